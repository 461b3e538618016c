package migrate

import (
	"context"
	"errors"
	"time"
)

// Guest is a running guest that can be checkpointed. Its methods are called by
// one goroutine.
type Guest interface {
	// Checkpoint takes one: it suspends the guest, calls seal while the guest
	// stands, captures what changed since the last one (at the first: everything,
	// most of it while the guest still runs), and resumes it. What it captured goes
	// to send, in order and in pieces of any size; all but the first checkpoint's
	// live part is sent after the guest has been resumed. A piece is valid until
	// send returns.
	//
	// It blocks until all is sent. An error from seal or send, or ctx ending, ends
	// it with that error; the guest then runs, and no further Checkpoint may be
	// asked for. It returns ErrGuestGone if the guest ended.
	Checkpoint(ctx context.Context, seal func() error, send func([]byte) error) (Checkpoint, error)

	// Destroy ends the guest, because another copy of it runs. It retries until it
	// has succeeded or ctx ends. Idempotent.
	Destroy(ctx context.Context) error

	// Close leaves the guest running and unobserved. Idempotent.
	Close() error
}

// Checkpoint is what taking one cost.
type Checkpoint struct {
	Suspend time.Duration // request to standing still
	Copy    time.Duration // standing still, the capture
	Resume  time.Duration // the call that resumes
	Pages   int64
}

// Pause is how long the guest may have stood still: an upper bound, since it
// still runs for most of Suspend.
func (c Checkpoint) Pause() time.Duration { return c.Suspend + c.Copy + c.Resume }

// Output holds what the guest sends. Its methods are called by one goroutine, but
// for Held.
type Output interface {
	// Seal is called while the guest stands: what is held belongs to the epoch being
	// checkpointed, what comes next to the one after. The first call begins holding.
	// It must not block.
	Seal() error
	// Release lets out what the last Seal sealed. It must not block.
	Release() error
	// Arm makes Held report the next frame that is held.
	Arm()
	Held() <-chan struct{}
	// Drops counts frames lost for want of room, since the beginning.
	Drops() (uint64, error)
	// Close lets everything out and stops holding; what a guest that has been
	// destroyed meanwhile sent is lost. Idempotent.
	Close() error
}

// Shadow is the standby's copy of the guest. Its methods are called by one
// goroutine at a time.
type Shadow interface {
	// Stage takes the next bytes of the epoch being received, and may refuse them.
	// It may block while the copy is being fed with the first epoch.
	Stage(p []byte) error
	// Seal checks that what is staged is a whole epoch. After nil, and only then,
	// the epoch may be acknowledged: TakeOver resumes this epoch or a later one.
	Seal() error
	// Apply brings the sealed epoch into the copy. It may block.
	Apply() error
	// TakeOver drops what is staged and not sealed, and lets the copy run from the
	// last sealed epoch. It blocks until libvirt has resumed it.
	TakeOver(ctx context.Context) error
	// Close destroys the copy, unless it has taken over. Idempotent.
	Close() error
}

// Why protection ended.
var (
	// ErrStandbyLost: the standby was silent, closed its connection or gave up.
	// The guest runs on, unprotected.
	ErrStandbyLost = errors.New("the standby is lost")
	// ErrPrimaryLost: the primary closed its connection, or was silent before there
	// was anything to take over from, or while nobody allowed to take over.
	ErrPrimaryLost = errors.New("the primary is lost")
	// ErrGuestGone: the guest ended by itself: shut down, crashed or destroyed.
	ErrGuestGone = errors.New("the guest has ended")
	// ErrTakenOver: the standby runs the guest; ours has been destroyed.
	ErrTakenOver = errors.New("the standby has taken over")
	// ErrEnded: the other side ended protection and said why.
	ErrEnded = errors.New("protection was ended by the other side")
)

// Heartbeat is how often life is shown, and how long silence is borne.
type Heartbeat struct {
	Interval, Timeout time.Duration
}

// setupTimeout bounds the silence while there is nothing to take over from: slow
// is better than not at all then.
const setupTimeout = 10 * time.Second
