package migrate

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"kemari/migrate/page"
	"kemari/migrate/wire"
)

// PrimaryConfig is what a Primary needs to know.
type PrimaryConfig struct {
	UUID       [16]byte
	MemoryKiB  uint64
	Generation wire.Generation
	Policy     Policy
	Heartbeat  Heartbeat
	// Automatic: the standby takes over on silence alone. Silence then ends
	// protection, since the copy over there is the guest by then.
	Automatic bool
	// Rejoin is how long, after a silence and unless Automatic, the guest goes on alone
	// while a standby that lives is looked for. 0 ends protection at once.
	Rejoin time.Duration
	// CachePages bounds what is kept of what the standby has, in pages.
	CachePages int
	// TakenOver remembers, for who cleans up should we be killed, that the guest is the
	// standby's. The standby learns that we know only after it. May be nil.
	TakenOver func() error
}

// PrimaryStats is what a Primary has done so far.
type PrimaryStats struct {
	Protected  bool       // the last epoch committed is not older than the output that is out
	Alone      bool       // the standby is silent, the guest goes on without it
	Switching  bool       // the guest stands, or is about to, to be handed over
	Epoch      wire.Epoch // last committed
	Last       Checkpoint // of the last committed epoch
	LastBytes  int64
	CopyBytes  int64 // of the guest's memory, copied with the first epoch so far
	Bytes      int64 // all
	Lag        time.Duration
	PauseMax   time.Duration
	PauseSum   time.Duration
	Drops      uint64
	Reconnects int64 // connections that replaced one that broke
	Resyncs    int64 // epochs that the standby refused and was sent again
}

// Bounds of the first copy: rounds while the guest runs end when few pages are
// left, when they do not become fewer, or when there were many.
const (
	fewPages  = 1024
	maxRounds = 8
)

// Bounds of what is tried for one epoch.
const (
	maxRefusals = 3
	maxLines    = 16
	maxCopies   = 4 // of all memory, which takes its time
)

// Primary runs one protection of a guest on the host it runs on.
//
// Run's goroutine takes, encodes and sends the epochs. A second one keeps the
// connection: it makes a new one when one breaks. A third one watches for
// silence. What they tell each other is under mu; whoever waits for it to change
// waits for changed.
type Primary struct {
	cfg     PrimaryConfig
	dial    Dial
	guest   Guest
	output  Output
	log     *slog.Logger
	life    life
	session wire.Session

	// Of Run's goroutine.
	enc      *page.Encoder
	capture  Capture
	frames   []byte       // of an epochWriter
	last     *primaryLine // on which the last epoch was committed
	sealed   bool         // the output of the epoch under way is held, and waits for its commit
	passing  bool         // output passes: nothing is held
	fresh    bool         // the epoch under way was taken after the output had last passed
	held     bool         // the guest stands since the last checkpoint, to be handed over
	reason   string       // of End
	cancel   context.CancelCauseFunc
	canceled context.Context

	sending atomic.Uint64 // last epoch of which something was sent

	mu     sync.Mutex
	stats  PrimaryStats
	policy Policy
	line   *primaryLine // nil while there is none
	asking bool         // what the standby says, or said last, is still to be acted on
	alone  bool         // told to go on alone
	check  *check       // somebody waits for it, see Verify; nil: nobody
	asked  bool         // to end
	// See Switchover. While handing, the standby may be taking over.
	handover *handover
	handing  bool
	changed  chan struct{}

	kept chan struct{} // closed when the connection is not kept any more
	fate error         // why not; valid then
}

// NewPrimary prepares a protection. Run dials, again whenever a connection breaks,
// and owns g and o until it returns.
func NewPrimary(cfg PrimaryConfig, dial Dial, g Guest, o Output, log *slog.Logger) *Primary {
	p := &Primary{
		cfg: cfg, dial: dial, guest: g, output: o, log: log, policy: cfg.Policy,
		life:    life{born: time.Now()},
		session: wire.Session(rand.Uint64() | 1),
		enc:     page.NewEncoder(cfg.CachePages),
		frames:  make([]byte, 0, 2*maxFrame),
		passing: true,
		changed: make(chan struct{}), kept: make(chan struct{}),
	}
	p.canceled, p.cancel = context.WithCancelCause(context.Background())
	return p
}

// Stats may be called at any time.
func (p *Primary) Stats() PrimaryStats {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.stats
	s.Switching = p.handover != nil && p.handover.begun
	return s
}

// SetPolicy changes when checkpoints are due, from now on. It may be called at any
// time.
func (p *Primary) SetPolicy(policy Policy) error {
	if err := policy.Validate(); err != nil {
		return err
	}
	p.change(func() { p.policy = policy })
	return nil
}

// change changes what mu guards and wakes whoever waits for that.
func (p *Primary) change(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f()
	close(p.changed)
	p.changed = make(chan struct{})
}

// End asks Run to end protection in good order. It does not block. If the standby is
// just being asked to take over, what becomes of that comes first.
func (p *Primary) End(reason string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.asked {
		return
	}
	p.asked, p.reason = true, reason
	if !p.handing {
		p.cancel(errAsked)
	}
}

var errAsked = errors.New("asked to end")

// Run protects the guest until that ends, and says why: nil if End asked for it,
// else one of this package's errors; ErrSwitchedOver is what Switchover asked for.
// Whatever the reason, on return the guest's
// output flows freely and the guest runs, unless it has ended or the standby runs
// it. Where something went wrong with that in the meantime it is said, too, and then
// not even an End asked for returns nil. When ctx ends that is as if End had been called.
func (p *Primary) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { p.End("the replicator was stopped") })
	defer stop()

	p.life.sign()
	// The work ends before the connection does: there is something to say last.
	connected, disconnect := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	wg.Go(func() { p.keep(connected) })
	wg.Go(func() { p.watch(connected) })

	err := p.cfg.Policy.Validate()
	if err == nil {
		err = p.protect(p.canceled)
	}
	// With a guest its interfaces go, and whoever meets that first does not know why.
	if err != nil && !errors.Is(err, ErrGuestGone) && p.canceled.Err() == nil && p.guest.Ended() {
		p.log.Info("the guest has ended", "met", err)
		err = ErrGuestGone
	}
	var rest error
	if c := context.Cause(p.canceled); c != nil && !errors.Is(err, ErrGuestGone) {
		rest, err = beside(err, c), c // what ended the work comes first
	}
	if err = p.finish(connected, err); rest != nil {
		err = errors.Join(err, rest)
	}
	p.cancel(err)
	disconnect()
	wg.Wait()
	if errors.Is(err, ErrSwitchedOver) {
		p.settle(nil)
	} else {
		p.settle(fmt.Errorf("protection has ended meanwhile: %w", cmp.Or(err, errAsked)))
	}
	return err
}

// protect runs epoch after epoch until something ends it.
func (p *Primary) protect(ctx context.Context) error {
	if _, err := p.await(ctx); err != nil {
		return err
	}
	p.sending.Store(1)
	head, err := p.guest.Begin(ctx)
	if err != nil {
		return err
	}
	began, err := p.copy(ctx, 1, head)
	if err != nil {
		return fmt.Errorf("first copy: %w", err)
	}
	for epoch := wire.Epoch(2); ; epoch++ {
		if err := p.wait(ctx, began); err != nil {
			return err
		}
		if _, err := p.await(ctx); err != nil {
			return err
		}
		began = time.Now()
		handover := p.pick()
		check, err := p.checked(ctx, handover != nil)
		if errors.Is(err, ErrPagesUnknown) {
			p.log.Warn("all pages are sent again", "epoch", uint64(epoch), "reason", err)
			if began, err = p.copy(ctx, epoch, nil); err == nil {
				continue
			}
		}
		if err == nil {
			err = p.commit(ctx, epoch)
		}
		if err == nil && p.held {
			err = p.handOver(ctx, epoch)
		}
		if err != nil {
			return fmt.Errorf("epoch %d: %w", epoch, err)
		}
		if check != nil {
			p.compare(epoch, check)
		}
	}
}

// copy sends all of the guest's memory, most of it while the guest runs, as one
// epoch: the first one, which has a head, or a later one where it is not known what
// changed. Its pages are not kept here, so that it cannot be gone on with over another
// connection: it begins anew over each one. What the standby refuses ends protection.
func (p *Primary) copy(ctx context.Context, epoch wire.Epoch, head []byte) (began time.Time, err error) {
	p.sending.Store(uint64(epoch))
	w := epochWriter{p: p, epoch: epoch, whole: true}
	for try := 1; ; try++ {
		l, err := p.await(ctx)
		switch {
		case err != nil:
			return began, err
		case l == p.last: // what it began with is old
		case l.committed == epoch && w.line != nil: // its acknowledgement was lost
			p.last = l
			return began, p.committed(epoch, &w, time.Since(began))
		case l.committed != epoch-1:
			return began, fmt.Errorf("%w: it says it has epoch %d", ErrStandbyLost, l.committed)
		}
		if w.line != nil {
			if err := p.again(epoch); err != nil {
				return began, err
			}
		}
		w.line, w.end, w.frames = l, wire.EpochEnd{}, p.frames[:0]
		began, err = p.copyOn(ctx, &w, head)
		switch {
		case errors.Is(err, errRefused):
			return began, fmt.Errorf("%w: %s", ErrRefused, <-l.refused)
		case !errors.Is(err, errLine):
			return began, err
		}
		// If there is more to say than that, it is known where connections are kept.
		p.hangUp(l)
		<-l.done
		switch {
		case !errors.Is(l.err, errLine):
			return began, l.err
		case try == maxCopies:
			return began, fmt.Errorf("%w: %d times while all of the guest's memory was sent: %w", ErrStandbyLost, try, l.err)
		}
	}
}

// again prepares for a copy to begin anew. Before the first one is whole the standby
// has nothing to take over from, and nothing needs to be held.
func (p *Primary) again(epoch wire.Epoch) error {
	p.log.Warn("all of the guest's memory is sent anew, over another connection", "epoch", uint64(epoch))
	// What is dropped over there is not sent again if the guest has no such page by then.
	p.enc.Reset()
	if err := p.guest.Again(); err != nil {
		return err
	}
	if epoch > 1 {
		return nil
	}
	if err := p.output.Pass(); err != nil {
		return fmt.Errorf("let the guest's output go: %w", err)
	}
	p.passing, p.sealed, p.fresh = true, false, false
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stats.CopyBytes = 0
	return nil
}

func (p *Primary) copyOn(ctx context.Context, w *epochWriter, head []byte) (began time.Time, err error) {
	if head != nil {
		if err := w.bytes(wire.TypeHead, head); err != nil {
			return began, err
		}
		// Making the copy's domain takes the standby longer than reading the first pages us.
		if err := w.flush(); err != nil {
			return began, err
		}
	}
	for n, last := 1, 0; ; n++ {
		pages, err := p.guest.Round(ctx, func(b *Pages) error {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			if n == 1 && w.epoch == 1 {
				p.mu.Lock()
				p.stats.CopyBytes += int64(len(b.Data))
				p.mu.Unlock()
			}
			return w.pages(b)
		})
		if err != nil {
			return began, err
		}
		if pages <= fewPages || n >= maxRounds || n > 2 && pages >= last {
			break
		}
		last = pages
	}
	began = time.Now()
	if err := p.checkpoint(ctx); err != nil {
		return began, err
	}
	resumed := time.Now()
	if err := w.finish(&p.capture); err != nil {
		return began, err
	}
	late := time.NewTimer(p.ackTimeout())
	defer late.Stop()
	select {
	case <-ctx.Done():
		return began, context.Cause(ctx)
	case <-late.C:
		return began, p.unacknowledged(w.epoch)
	case <-w.line.done:
		return began, w.line.err
	case reason := <-w.line.refused:
		return began, fmt.Errorf("%w: %s", ErrRefused, reason)
	case e := <-w.line.acks:
		if e != w.epoch {
			return began, fmt.Errorf("%w: it acknowledged epoch %d, not %d", ErrStandbyLost, e, w.epoch)
		}
	}
	p.last = w.line
	return began, p.committed(w.epoch, w, time.Since(resumed))
}

// wait blocks until the next checkpoint is due.
func (p *Primary) wait(ctx context.Context, began time.Time) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var asked bool // output has asked for a checkpoint
	for {
		p.mu.Lock()
		policy, l, handover, changed := p.policy, p.line, p.handover, p.changed
		pause := p.stats.Last.Pause() - p.stats.Last.Sums // that was for once
		p.mu.Unlock()
		if l == nil || p.passing || handover != nil {
			return nil // what is to be done about that is not decided here
		}
		soonest, latest := policy.after(pause)
		due, held := latest, p.output.Held()
		if policy.Trigger == TriggerInterval {
			held = nil
		} else if asked {
			due, held = soonest, nil
		}
		timer.Reset(time.Until(began.Add(due)))
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-l.done:
			return nil
		case <-timer.C:
			return nil
		case <-held:
			asked = true
		case <-changed:
		}
	}
}

// await returns the connection to go on with, waiting for one if there is none.
// Meanwhile it lets the guest go on alone when that has been decided.
func (p *Primary) await(ctx context.Context) (*primaryLine, error) {
	for {
		p.mu.Lock()
		l, alone, changed := p.line, p.alone, p.changed
		if l != nil {
			p.alone = false
		}
		p.mu.Unlock()
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		if l != nil {
			return l, nil
		}
		if alone && p.held { // before the standby was asked to take over
			if err := p.goOn(fmt.Errorf("%w: it is silent", ErrStandbyLost)); err != nil {
				return nil, err
			}
		}
		if alone && !p.passing {
			if err := p.output.Pass(); err != nil {
				return nil, fmt.Errorf("let the guest's output go: %w", err)
			}
			p.passing, p.sealed, p.fresh = true, false, false
			p.mu.Lock()
			p.stats.Protected, p.stats.Alone = false, true
			p.mu.Unlock()
			p.log.Error("the standby is silent; the guest goes on, unprotected, until it is back", "rejoin", p.cfg.Rejoin)
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-changed:
		}
	}
}

// checkpoint takes one into p.capture.
func (p *Primary) checkpoint(ctx context.Context) error {
	return p.guest.Checkpoint(ctx, p.seal, &p.capture)
}

// beside is what err says apart from cause: what else there was to stumble over when
// cause ended the work. What has become of the connection then follows from cause. If
// somebody asks to end while a guest is suspended that then cannot be resumed, err is
// errAsked and that: what is beside errAsked is that the guest stands.
func beside(err, cause error) error {
	switch {
	case err == cause:
		return nil
	case !errors.Is(err, cause):
		if errors.Is(err, errLine) || errors.Is(err, ErrStandbyLost) {
			return nil
		}
		return err
	}
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return beside(errors.Unwrap(err), cause)
	}
	var rest []error
	for _, e := range joined.Unwrap() {
		rest = append(rest, beside(e, cause))
	}
	return errors.Join(rest...)
}

func (p *Primary) seal() error {
	// In this order a frame in between asks for a checkpoint too many; in the other
	// it would be held until the longest interval is over.
	p.output.Arm()
	if p.sealed { // by a checkpoint that did not succeed: what came since is for the next one
		return nil
	}
	if err := p.output.Seal(); err != nil {
		return fmt.Errorf("seal: %w", err)
	}
	p.sealed, p.passing, p.fresh = true, false, true
	return nil
}

// commit sends the captured epoch until the standby has it: over as many
// connections, and as often, as it takes within bounds. The capture stays until
// then, so that what got lost or was refused can be sent again.
func (p *Primary) commit(ctx context.Context, epoch wire.Epoch) error {
	p.sending.Store(uint64(epoch))
	resumed := time.Now()
	var w epochWriter
	for refusals, lines, restart := 0, 0, false; ; {
		l, err := p.await(ctx)
		if err != nil {
			return err
		}
		if l != w.line {
			// What a connection began with is old once an epoch was committed on it.
			switch {
			case l == p.last:
			case l.committed == epoch && w.line != nil: // its acknowledgement was lost
				p.last = l
				return p.committed(epoch, &w, time.Since(resumed))
			case l.committed != epoch-1:
				return fmt.Errorf("%w: it says it has epoch %d", ErrStandbyLost, l.committed)
			}
			if lines++; lines > maxLines {
				return fmt.Errorf("%w: the connection broke %d times during one epoch", ErrStandbyLost, maxLines)
			}
			restart = false
		}
		if w.line != nil { // an earlier try: what the standby has made of it is not known
			for _, pfn := range p.capture.PFNs {
				p.enc.Forget(pfn)
			}
		}
		w = epochWriter{p: p, line: l, epoch: epoch, frames: p.frames[:0]}
		if restart {
			if err := l.send(wire.TypeRestart, epoch, nil); err != nil {
				<-l.done
				continue
			}
		}
		switch err := w.finish(&p.capture); {
		case errors.Is(err, errRefused): // below
		case err != nil:
			l.conn.Close() // whatever it was, this one is not used any further
			<-l.done
			continue
		}
		late := time.NewTimer(p.ackTimeout())
		defer late.Stop()
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-late.C:
			return p.unacknowledged(epoch)
		case e := <-l.acks:
			if e != epoch {
				return fmt.Errorf("%w: it acknowledged epoch %d, not %d", ErrStandbyLost, e, epoch)
			}
			p.last = l
			return p.committed(epoch, &w, time.Since(resumed))
		case <-l.done:
		case reason := <-l.refused:
			if refusals++; refusals >= maxRefusals {
				return fmt.Errorf("%w, %d times in a row: %s", ErrRefused, refusals, reason)
			}
			p.mu.Lock()
			p.stats.Resyncs++
			p.mu.Unlock()
			// If it has something else than we believe of one page, why not of others.
			p.enc.Reset()
			restart = true
		}
	}
}

// ackTimeout bounds how long a standby that shows life may keep an epoch, and so the
// guest's output, to itself.
func (p *Primary) ackTimeout() time.Duration { return max(time.Minute, 10*p.cfg.Heartbeat.Timeout) }

func (p *Primary) unacknowledged(e wire.Epoch) error {
	return fmt.Errorf("%w: it lives, but has not acknowledged epoch %d within %v", ErrStandbyLost, e, p.ackTimeout())
}

// committed lets the epoch's output go and counts.
func (p *Primary) committed(epoch wire.Epoch, w *epochWriter, lag time.Duration) error {
	if p.sealed {
		if err := p.output.Release(); err != nil {
			return fmt.Errorf("release: %w", err)
		}
		p.sealed = false
	}
	c := &p.capture
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &p.stats
	s.Epoch, s.LastBytes, s.Lag = epoch, int64(w.end.Bytes), lag
	s.Last = Checkpoint{Suspend: c.Suspend, Copy: c.Copy, Resume: c.Resume, Sums: c.SumsTook, Pages: int64(len(c.PFNs))}
	s.Bytes += int64(w.end.Bytes)
	s.PauseSum += s.Last.Pause()
	s.PauseMax = max(s.PauseMax, s.Last.Pause())
	if !s.Protected && p.fresh {
		s.Protected, s.Alone = true, false
		p.log.Info("protected", "epoch", uint64(epoch), "bytes", w.end.Bytes, "pause", s.Last.Pause(), "lag", lag)
	}
	return nil
}

// finish takes protection down, in the order that why demands, and translates it.
func (p *Primary) finish(connected context.Context, why error) error {
	reason := why.Error()
	switch {
	case errors.Is(why, errAsked):
		p.mu.Lock()
		reason = p.reason
		p.mu.Unlock()
		why = nil
	case errors.Is(why, ErrGuestGone):
		reason = ErrGuestGone.Error()
	}
	// One that is silent, and cannot be reached, is not told: the guest goes on alone
	// at once.
	if !errors.Is(why, ErrTakenOver) && (!errors.Is(why, errSilent) || p.reachable()) {
		if err := p.tell(connected, reason); errors.Is(err, ErrTakenOver) {
			why = err // it came first
		}
	}
	if errors.Is(why, ErrTakenOver) && p.handing {
		// Nor is there any: what the guest had sent is out, or about to leave. Close sees
		// it leave before the interface goes with the guest.
		p.log.Info("the standby runs the guest; ending this copy")
		if err := errors.Join(p.output.Close(), p.guest.Destroy(context.WithoutCancel(connected)), p.guest.Close()); err != nil {
			p.log.Error("the guest was handed over, but not everything could be put back", "err", err)
		}
		return ErrSwitchedOver
	}
	if errors.Is(why, ErrTakenOver) {
		// Not one held frame may leave: the standby speaks for the guest now.
		p.log.Error("the standby has taken over; ending this copy")
		errs := []error{why, p.guest.Destroy(context.WithoutCancel(connected)), p.guest.Close(), p.output.Close()}
		return errors.Join(errs...)
	}
	if d, err := p.output.Drops(); err == nil && d > 0 {
		p.log.Error("the plug was too small and dropped frames", "frames", d)
	}
	if err := errors.Join(p.output.Close(), p.guest.Close()); err != nil {
		p.log.Error("protection ended, but not everything could be put back", "err", err)
		if why == nil {
			return err
		}
	}
	return why
}
