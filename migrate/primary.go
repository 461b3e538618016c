package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"kemari/migrate/wire"
)

// Trigger is what asks for a checkpoint, apart from the longest interval.
type Trigger string

const (
	TriggerOutput   Trigger = "output"   // the first frame held in the epoch: Kemari's rule
	TriggerInterval Trigger = "interval" // nothing else
)

// PrimaryConfig is what a Primary needs to know.
type PrimaryConfig struct {
	UUID       [16]byte
	MemoryKiB  uint64
	Generation wire.Generation
	Trigger    Trigger
	Min, Max   time.Duration // shortest and longest time from checkpoint to checkpoint
	Heartbeat  Heartbeat
}

// PrimaryStats is what a Primary has done so far.
type PrimaryStats struct {
	Protected bool       // at least one epoch is committed
	Epoch     wire.Epoch // last committed
	Last      Checkpoint // of the last committed epoch
	LastBytes int64
	CopyBytes int64 // of the first epoch, so far
	Bytes     int64 // all
	Lag       time.Duration
	PauseMax  time.Duration
	PauseSum  time.Duration
	Drops     uint64
}

// Primary runs one protection of a guest on the host it runs on.
type Primary struct {
	cfg    PrimaryConfig
	guest  Guest
	output Output
	log    *slog.Logger
	link   *link

	acks   chan wire.Epoch
	ended  chan struct{} // the standby confirmed our End
	ask    chan struct{} // closed by End
	asked  sync.Once
	reason string

	mu    sync.Mutex
	stats PrimaryStats
}

// NewPrimary prepares a protection over conn, an authenticated connection to the
// standby. Run owns all three until it returns.
func NewPrimary(cfg PrimaryConfig, conn net.Conn, g Guest, o Output, log *slog.Logger) *Primary {
	return &Primary{
		cfg: cfg, guest: g, output: o, log: log,
		link:  newLink(conn, cfg.Generation),
		acks:  make(chan wire.Epoch, 1),
		ended: make(chan struct{}),
		ask:   make(chan struct{}),
	}
}

// Stats may be called at any time.
func (p *Primary) Stats() PrimaryStats {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stats
}

// End asks Run to end protection in good order. It does not block.
func (p *Primary) End(reason string) {
	p.asked.Do(func() {
		p.reason = reason
		close(p.ask)
	})
}

var errAsked = errors.New("asked to end")

// Run protects the guest until that ends, and says why: nil if End asked for it,
// else one of this package's errors. Whatever the reason, on return the guest's
// output flows freely and the guest runs, unless it has ended or the standby runs
// it. When ctx ends that is as if End had been called.
func (p *Primary) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { p.End("the replicator was stopped") })
	defer stop()

	work, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	err := p.start(work, cancel, &wg)
	if err == nil {
		err = p.protect(work)
	}
	if c := context.Cause(work); c != nil && !errors.Is(err, errAsked) && !errors.Is(err, ErrGuestGone) {
		err = c // what ended the connection says more than what stumbled over it
	}
	err = p.finish(work, err)
	cancel(nil)
	p.link.conn.Close()
	wg.Wait()
	return err
}

// start shakes hands and starts the goroutines that keep the connection.
func (p *Primary) start(ctx context.Context, cancel context.CancelCauseFunc, wg *sync.WaitGroup) error {
	r := p.link.reader()
	hello := wire.Hello{Lowest: wire.Version, Highest: wire.Version, UUID: p.cfg.UUID, MemoryKiB: p.cfg.MemoryKiB, Session: 1}
	if err := p.link.send(wire.TypeHello, 0, hello.Append(nil)); err != nil {
		return fmt.Errorf("%w: %w", ErrStandbyLost, err)
	}
	if _, err := p.link.handshake(r, wire.TypeWelcome); err != nil {
		return fmt.Errorf("%w: %w", ErrStandbyLost, err)
	}
	// Each of these ends the work when it ends; closing the connection ends them.
	wg.Go(func() { cancel(p.lost(p.link.receive(r, p.handle))) })
	wg.Go(func() {
		if err := p.link.beat(ctx, p.cfg.Heartbeat.Interval); err != nil {
			// The reader knows better why; it is given a moment to say so.
			time.Sleep(p.cfg.Heartbeat.Interval)
			cancel(p.lost(err))
		}
	})
	wg.Go(func() {
		if err := p.link.watch(ctx, p.cfg.Heartbeat.Interval, p.patience); err != nil {
			cancel(fmt.Errorf("%w: %w for %v", ErrStandbyLost, err, p.link.silence().Round(time.Millisecond)))
			p.link.conn.Close() // whoever is stuck in a write comes out
		}
	})
	return nil
}

func (p *Primary) patience() time.Duration {
	if p.Stats().Protected {
		return p.cfg.Heartbeat.Timeout
	}
	return max(p.cfg.Heartbeat.Timeout, setupTimeout)
}

func (p *Primary) lost(err error) error {
	switch {
	case errors.Is(err, ErrTakenOver), errors.Is(err, ErrStandbyLost):
		return err
	case errors.Is(err, io.EOF):
		return fmt.Errorf("%w: it closed the connection", ErrStandbyLost)
	default:
		return fmt.Errorf("%w: %w", ErrStandbyLost, err)
	}
}

func (p *Primary) handle(f wire.Frame) error {
	switch f.Type {
	case wire.TypeHeartbeat:
		return nil
	case wire.TypeAck:
		select {
		case p.acks <- f.Epoch:
			return nil
		default:
			return fmt.Errorf("%w: acknowledged epoch %d twice", wire.ErrFormat, f.Epoch)
		}
	case wire.TypeEnd:
		select {
		case <-p.ended: // twice; harmless
		default:
			close(p.ended)
		}
		return fmt.Errorf("%w: it ended protection: %s", ErrStandbyLost, printable(f.Payload))
	case wire.TypeTakenOver:
		return ErrTakenOver
	default:
		return fmt.Errorf("%w: %v from a standby", wire.ErrFormat, f.Type)
	}
}

// protect runs epoch after epoch until something ends it.
func (p *Primary) protect(ctx context.Context) error {
	var began time.Time // the last checkpoint
	for epoch := wire.Epoch(1); ; epoch++ {
		if epoch > 1 {
			if err := p.wait(ctx, began); err != nil {
				return err
			}
		}
		began = time.Now()
		if err := p.epoch(ctx, epoch); err != nil {
			return err
		}
	}
}

// wait blocks until the next checkpoint is due.
func (p *Primary) wait(ctx context.Context, began time.Time) error {
	longest := time.NewTimer(time.Until(began.Add(p.cfg.Max)))
	defer longest.Stop()
	held := p.output.Held()
	if p.cfg.Trigger == TriggerInterval {
		held = nil
	}
	var shortest <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-p.ask:
			return errAsked
		case <-longest.C:
			return nil
		case <-shortest:
			return nil
		case <-held:
			rest := time.Until(began.Add(p.cfg.Min))
			if rest <= 0 {
				return nil
			}
			shortest, held = time.After(rest), nil
		}
	}
}

// epoch takes, sends and commits one.
func (p *Primary) epoch(ctx context.Context, epoch wire.Epoch) error {
	var end wire.EpochEnd
	work, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Being asked to end cuts a checkpoint short: the first may take minutes, and
	// any takes for ever while the guest is paused.
	go func() {
		select {
		case <-p.ask:
			cancel(errAsked)
		case <-work.Done():
		}
	}()
	seal := func() error {
		// In this order a frame in between asks for a checkpoint too many; in the
		// other it would be held until the longest interval is over.
		p.output.Arm()
		return p.output.Seal()
	}

	cp, err := p.guest.Checkpoint(work, seal, func(b []byte) error {
		for len(b) > 0 {
			n := min(len(b), wire.MaxPayload)
			f := wire.Frame{Type: wire.TypePages, Generation: p.cfg.Generation, Epoch: epoch, Payload: b[:n]}
			if err := p.link.sendFrame(&f); err != nil {
				return p.lost(err)
			}
			end.Add(f)
			b = b[n:]
			if epoch == 1 {
				p.mu.Lock()
				p.stats.CopyBytes = int64(end.Bytes)
				p.mu.Unlock()
			}
		}
		return nil
	})
	if err != nil {
		if c := context.Cause(work); c != nil && !errors.Is(err, ErrGuestGone) {
			err = c
		}
		return fmt.Errorf("epoch %d: %w", epoch, err)
	}
	resumed := time.Now()
	if err := p.link.send(wire.TypeEpochEnd, epoch, end.Append(nil)); err != nil {
		return p.lost(err)
	}
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case e := <-p.acks:
		if e != epoch {
			return fmt.Errorf("%w: it acknowledged epoch %d, not %d", ErrStandbyLost, e, epoch)
		}
	}
	lag := time.Since(resumed)
	if err := p.output.Release(); err != nil {
		return fmt.Errorf("release epoch %d: %w", epoch, err)
	}
	p.committed(epoch, cp, int64(end.Bytes), lag)
	return nil
}

func (p *Primary) committed(epoch wire.Epoch, cp Checkpoint, bytes int64, lag time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &p.stats
	s.Epoch, s.Last, s.LastBytes, s.Lag = epoch, cp, bytes, lag
	s.Bytes += bytes
	s.PauseSum += cp.Pause()
	s.PauseMax = max(s.PauseMax, cp.Pause())
	if !s.Protected {
		s.Protected = true
		p.log.Info("protected", "bytes", bytes, "pause", cp.Pause(), "lag", lag)
	}
}

// finish takes protection down, in the order that why demands, and translates it.
func (p *Primary) finish(ctx context.Context, why error) error {
	var errs []error
	switch {
	case errors.Is(why, ErrTakenOver):
		// Not one held frame may leave: the standby speaks for the guest now.
		p.log.Error("the standby has taken over; ending this copy")
		errs = append(errs, p.guest.Destroy(context.WithoutCancel(ctx)), p.guest.Close(), p.output.Close())
		return errors.Join(append([]error{why}, errs...)...)
	case errors.Is(why, errAsked):
		p.tell(ctx, p.reason)
		why = nil
	case errors.Is(why, ErrGuestGone):
		p.tell(ctx, ErrGuestGone.Error())
	case errors.Is(why, ErrStandbyLost):
		// It is silent or gone: the guest goes on alone.
	default: // ours: the helper, the plug
		p.tell(ctx, why.Error())
	}
	if d, err := p.output.Drops(); err == nil && d > 0 {
		p.log.Error("the plug was too small and dropped frames", "frames", d)
	}
	errs = append(errs, p.output.Close(), p.guest.Close())
	if err := errors.Join(errs...); err != nil {
		p.log.Error("protection ended, but not everything could be put back", "err", err)
		if why == nil {
			return err
		}
	}
	return why
}

// tell ends protection at the standby and waits until it has confirmed: only then
// may held output go, since before that it might still take over. A standby that
// does not answer is waited for as long as silence is borne.
func (p *Primary) tell(ctx context.Context, reason string) {
	if err := p.link.send(wire.TypeEnd, 0, []byte(reason)); err != nil {
		return
	}
	t := time.NewTimer(max(p.cfg.Heartbeat.Timeout, 5*time.Second))
	defer t.Stop()
	select {
	case <-p.ended:
	case <-ctx.Done():
	case <-t.C:
		p.log.Warn("the standby did not confirm the end of protection")
	}
}
