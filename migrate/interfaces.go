package migrate

import (
	"context"
	"errors"
	"net"
	"time"

	"kemari/migrate/page"
)

// Pages is a batch of guest pages: Data[i*page.Size:(i+1)*page.Size] is the
// content of PFNs[i].
type Pages struct {
	PFNs []page.PFN
	Data []byte
}

// Page returns the content of PFNs[i].
func (p *Pages) Page(i int) []byte { return p.Data[i*page.Size : (i+1)*page.Size : (i+1)*page.Size] }

// Append adds a page. It allocates only to grow.
func (p *Pages) Append(pfn page.PFN, data []byte) {
	p.PFNs = append(p.PFNs, pfn)
	p.Data = append(p.Data, data...)
}

// Reset empties p and keeps its memory.
func (p *Pages) Reset() { p.PFNs, p.Data = p.PFNs[:0], p.Data[:0] }

// Capture is what one checkpoint took, each page once, in buffers that the next
// one uses again.
type Capture struct {
	Pages
	// State is the rest of the guest: for Xen the TSC_INFO, HVM_CONTEXT and
	// HVM_PARAMS records of the libxc stream, and for an HVM guest its END and the device
	// model's state. The engine does not look into it.
	State []byte

	// Sums is set by who wants to know, beside that, what all of the guest's memory is.
	Sums *Sums
	// Hold is set by who wants the guest to stand from then on.
	Hold bool

	Suspend time.Duration // request to standing still
	Copy    time.Duration // standing still, the capture
	Resume  time.Duration // the call that resumes
	// SumsTook is what of Copy went into Sums.
	SumsTook time.Duration
}

// Guest is a running guest that can be checkpointed. Its methods are called by
// one goroutine, but for Destroy and Close, which may be called once no other is
// under way.
//
// Begin, Round and Checkpoint end with ctx's cause soon after ctx has ended. They
// return ErrGuestGone if the guest has ended. After any error the guest runs, and
// only Destroy and Close may follow; after one of send's, Again, too.
type Guest interface {
	// Begin has Xen note from now on which pages the guest changes, and returns what
	// the guest is: the head of the libxc stream, opaque to the engine.
	Begin(ctx context.Context) (head []byte, err error)

	// Round hands the pages that changed since the last Round or Checkpoint to send,
	// in batches valid until send returns, while the guest runs; the first one hands
	// over every page the guest has. What changes meanwhile is for the next Round or
	// Checkpoint. It blocks until all is handed over, ends with an error of send as it
	// is, and says how many pages it were.
	Round(ctx context.Context, send func(*Pages) error) (pages int, err error)

	// Checkpoint suspends the guest, calls seal while the guest stands, takes the
	// pages that changed since the last Round or Checkpoint and the guest's state into
	// c, whose memory it uses again, and resumes the guest. It ends with an error of
	// seal as it is. If c.Sums is set it fills that, too, last of all before it resumes
	// the guest; what goes wrong with it is Sums.Err, and no error of the checkpoint's.
	//
	// If c.Hold is set and all went well the guest is left standing, for Resume, Destroy
	// or Close.
	//
	// ErrPagesUnknown is the one error after which it goes on: the next Round hands
	// over every page again.
	Checkpoint(ctx context.Context, seal func() error, c *Capture) error

	// Resume lets a guest go on that Checkpoint has left standing. The next Round or
	// Checkpoint is as after any other.
	Resume() error

	// Again has the next Round hand over every page again, whatever Round and Checkpoint
	// have done so far: also after a send that ended a Round.
	Again() error

	// Ended says that the guest has ended; false, too, where that cannot be told. It does
	// not block.
	Ended() bool

	// Destroy ends the guest, because another copy of it runs. It retries until it
	// has succeeded or ctx ends. Idempotent.
	Destroy(ctx context.Context) error

	// Close leaves the guest running, though it was left standing, and unobserved.
	// Idempotent.
	Close() error
}

// Checkpoint is what taking one cost.
type Checkpoint struct {
	Suspend, Copy, Resume time.Duration // see Capture
	Sums                  time.Duration // of Copy, see Capture.SumsTook
	Pages                 int64
}

// Pause is how long the guest may have stood still: an upper bound, since it
// still runs for most of Suspend.
func (c Checkpoint) Pause() time.Duration { return c.Suspend + c.Copy + c.Resume }

// Output holds what the guest sends. Its methods are called by one goroutine, but
// for Held.
type Output interface {
	// Seal is called while the guest stands: what is held belongs to the epoch being
	// checkpointed, what comes next to the one after. The first call, and the first
	// after Pass, begins holding. It must not block.
	Seal() error
	// Release lets out what the last Seal sealed. It must not block.
	Release() error
	// Pass lets out what is held, and all that comes, until the next Seal. Idempotent.
	Pass() error
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
	// Head is called once, before all else but Close, with what Guest.Begin returned
	// over there. It refuses a guest that cannot be copied here.
	Head(b []byte) error

	// Base copies what the copy has of a page to dst, as of the last Apply. It may
	// block. ErrNoPage means that there is nothing of it yet, any other error that the
	// page cannot be told. The primary then sends it whole.
	Base(pfn page.PFN, dst []byte) error

	// Check says whether state could let the copy run. It is called before an epoch
	// is acknowledged, for what is acknowledged must be able to run, and must not
	// block. It returns ErrShadowLost if there is no copy any more.
	Check(state []byte) error

	// Apply brings pages into the copy, later ones over earlier ones. It may block.
	// After an error the copy is good for nothing.
	Apply(p *Pages) error

	// TakeOver lets the copy run from a state that Check has let pass and whose pages
	// have been applied. It blocks until libvirt has resumed it, and ends some seconds
	// after ctx at the latest. After an error the copy does not run, nor will it once
	// Close has been called; but after ErrMayRun it may do either.
	TakeOver(ctx context.Context, state []byte) error

	// Close destroys the copy, unless it has taken over. Idempotent.
	Close() error
}

// Dial makes an authenticated connection to the standby. It returns soon after
// ctx has ended. An error that is ErrStandbyLost ends the tries: the standby's
// process is known to be gone.
type Dial func(ctx context.Context) (net.Conn, error)

// Accept waits for the next authenticated connection from the primary, until ctx
// ends.
type Accept func(ctx context.Context) (net.Conn, error)

// What callers decide on, most of it why protection ended.
var (
	// ErrStandbyLost: the standby was silent, could not be reached again or gave up.
	// The guest runs on, unprotected.
	ErrStandbyLost = errors.New("the standby is lost")
	// ErrPrimaryLost: the primary closed its connection and did not come back, or was
	// silent before there was anything to take over from, or while nobody allowed to
	// take over.
	ErrPrimaryLost = errors.New("the primary is lost")
	// ErrShadowLost: the standby's copy was ended by somebody else, and no epoch can
	// mend it.
	ErrShadowLost = errors.New("the copy is gone")
	// ErrNoPage: the standby's copy has nothing of a page.
	ErrNoPage = errors.New("there is nothing of the page yet")
	// ErrMayRun: the copy was to be let run, that has failed, and it could not be made
	// sure of that it does not run nevertheless.
	ErrMayRun = errors.New("it is not known whether the copy runs")
	// ErrRefused: the standby refused an epoch time and again, however it was sent.
	// The guest runs on, unprotected.
	ErrRefused = errors.New("the standby refuses what it is sent")
	// ErrGuestGone: the guest ended by itself: shut down, crashed or destroyed.
	ErrGuestGone = errors.New("the guest has ended")
	// ErrPagesUnknown: somebody else has read or ended the log of changed pages, as
	// `virsh save` does. What changed is not known any more.
	ErrPagesUnknown = errors.New("which pages changed is not known any more")
	// ErrSwitchedOver: the standby runs the guest as it was asked to, and all that ours
	// has ever sent has left; ours has been destroyed.
	ErrSwitchedOver = errors.New("the guest was handed over to the standby")
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

// takeOverTimeout bounds a take-over, and AnswerTimeout how long a primary waits for a
// standby that lives to say how it has ended: it has to make sure of that it has failed.
// The slowest that was seen to succeed, in an emulated host, took 11 seconds.
const (
	takeOverTimeout = 30 * time.Second
	AnswerTimeout   = takeOverTimeout + 10*time.Second
)
