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

// StandbyConfig is what a Standby needs to know.
type StandbyConfig struct {
	UUID       [16]byte
	MemoryKiB  uint64
	Generation wire.Generation
	Heartbeat  Heartbeat
	// Automatic lets the standby take over on silence alone. Without an arbiter that
	// risks two running copies, so somebody has to have asked for it.
	Automatic bool
}

// StandbyState is where a Standby stands.
//
//	Greeting ─► Copying ─► Ready ─► TakingOver ─► Active
//
// Each but Active may end in the shadow being dropped.
type StandbyState uint8

const (
	Greeting   StandbyState = iota // nothing received yet
	Copying                        // the first epoch is coming in
	Ready                          // at least one epoch is committed
	TakingOver                     // the shadow is being let run
	Active                         // it runs
)

// StandbyStats is what a Standby has done so far.
type StandbyStats struct {
	State     StandbyState
	Silent    bool       // Ready, nothing heard, and not allowed to take over by itself
	Epoch     wire.Epoch // last committed
	LastBytes int64
	CopyBytes int64 // of the first epoch, so far
	Bytes     int64
	Failover  *Failover
}

// Failover is a take-over in its parts.
type Failover struct {
	Reason   string
	At       time.Time     // loss declared
	Detect   time.Duration // last sign of life to loss declared
	Takeover time.Duration // loss declared to the guest running here
}

// Standby receives one protection on the standby host.
type Standby struct {
	cfg    StandbyConfig
	shadow Shadow
	log    *slog.Logger
	link   *link

	// step orders what touches the shadow: frames being handled, and taking over.
	step sync.Mutex
	next wire.Epoch // being received
	got  wire.EpochEnd

	failover chan string // reasons to take over that did not come from the link
	end      chan string // reasons to drop the shadow, likewise

	mu    sync.Mutex
	stats StandbyStats
}

// NewStandby prepares to receive a protection over conn, an authenticated
// connection from the primary. Run owns conn and shadow until it returns.
func NewStandby(cfg StandbyConfig, conn net.Conn, s Shadow, log *slog.Logger) *Standby {
	return &Standby{
		cfg: cfg, shadow: s, log: log, next: 1,
		link:     newLink(conn, cfg.Generation),
		failover: make(chan string, 1),
		end:      make(chan string, 1),
	}
}

// Stats may be called at any time.
func (s *Standby) Stats() StandbyStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stats
}

// Failover asks Run to take over now, whether or not the primary lives: whoever
// calls it answers for that. It does not block; Stats tells what became of it.
func (s *Standby) Failover(reason string) error {
	if st := s.Stats().State; st != Ready {
		return errors.New("there is no committed epoch to take over from")
	}
	select {
	case s.failover <- reason:
	default: // asked already
	}
	return nil
}

// End asks Run to drop the shadow and end protection. It does not block.
func (s *Standby) End(reason string) {
	select {
	case s.end <- reason:
	default:
	}
}

// errTakeOver ends receiving because we take over. Its text is the reason.
type errTakeOver struct{ reason string }

func (e errTakeOver) Error() string { return e.reason }

// Run receives epochs until protection ends or this side takes over. It returns
// nil once the guest runs here and the old primary needs no more telling, or once
// the primary has ended protection; else why the shadow was dropped. When ctx ends
// that is as if End had been called.
func (s *Standby) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { s.End("the standby was stopped") })
	defer stop()
	work, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	defer func() {
		cancel(nil)
		s.link.conn.Close()
		wg.Wait()
	}()

	r := s.link.reader()
	if err := s.greet(r); err != nil {
		s.drop(err.Error())
		return err
	}
	receiving := make(chan error, 1)
	wg.Go(func() { receiving <- s.link.receive(r, s.handle) })
	wg.Go(func() { s.link.beat(work, s.cfg.Heartbeat.Interval) }) // the reader sees what is wrong
	silent := make(chan error, 1)
	watch := func() {
		wg.Go(func() {
			if err := s.link.watch(work, s.cfg.Heartbeat.Interval, s.patience); err != nil {
				silent <- err
			}
		})
	}
	watch()

	for {
		var why error
		select {
		case err := <-receiving:
			why = s.lost(err)
		case reason := <-s.end:
			s.drop(reason)
			return fmt.Errorf("%s", reason)
		case reason := <-s.failover:
			why = errTakeOver{reason}
		case err := <-silent:
			why = s.silence(err)
			if why == nil { // we may not take over, and wait for who may decide
				watch()
				continue
			}
		}
		var over errTakeOver
		if errors.As(why, &over) {
			if err := s.takeOver(work, over.reason); err != nil {
				return err
			}
			s.linger(ctx, receiving)
			return nil
		}
		s.drop(why.Error())
		if errors.Is(why, ErrEnded) {
			return nil
		}
		return why
	}
}

func (s *Standby) greet(r *wire.Reader) error {
	f, err := s.link.handshake(r, wire.TypeHello)
	if err != nil {
		return err
	}
	h, err := wire.ParseHello(f.Payload)
	if err != nil {
		return err
	}
	if h.UUID != s.cfg.UUID || h.MemoryKiB != s.cfg.MemoryKiB {
		return errors.New("the primary protects another guest than was announced")
	}
	v, err := h.Choose()
	if err != nil {
		return err
	}
	s.set(func(st *StandbyStats) { st.State = Copying })
	return s.link.send(wire.TypeWelcome, 0, wire.Welcome{Version: v}.Append(nil))
}

func (s *Standby) patience() time.Duration {
	if s.Stats().State == Ready {
		return s.cfg.Heartbeat.Timeout
	}
	return max(s.cfg.Heartbeat.Timeout, setupTimeout)
}

// silence decides what silence means. Nil means to go on waiting.
func (s *Standby) silence(err error) error {
	d := s.link.silence().Round(time.Millisecond)
	if s.Stats().State != Ready {
		return fmt.Errorf("%w: %w for %v, before the first copy was complete", ErrPrimaryLost, err, d)
	}
	if s.cfg.Automatic {
		return errTakeOver{fmt.Sprintf("no sign of life from the primary for %v", d)}
	}
	if !s.Stats().Silent {
		s.log.Error("the primary is silent, and nobody may decide that it is dead: waiting to be told", "silence", d)
		s.set(func(st *StandbyStats) { st.Silent = true })
	}
	return nil
}

func (s *Standby) lost(err error) error {
	switch {
	case errors.Is(err, ErrEnded):
		return err
	case errors.Is(err, io.EOF):
		return fmt.Errorf("%w: its replicator closed the connection; the guest runs on there, unprotected", ErrPrimaryLost)
	default:
		return fmt.Errorf("%w: %w", ErrPrimaryLost, err)
	}
}

func (s *Standby) set(f func(*StandbyStats)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.stats)
}

// handle takes one frame from the primary. Whatever it refuses ends protection.
func (s *Standby) handle(f wire.Frame) error {
	s.step.Lock()
	defer s.step.Unlock()
	st := s.Stats()
	if st.State >= TakingOver {
		// It lives after all. It must know that its copy is no longer the guest.
		return s.link.send(wire.TypeTakenOver, 0, nil)
	}
	if st.Silent {
		s.log.Info("the primary is back")
		s.set(func(st *StandbyStats) { st.Silent = false })
	}
	switch f.Type {
	case wire.TypeHeartbeat:
		return nil
	case wire.TypePages:
		if f.Epoch != s.next {
			return fmt.Errorf("data of epoch %d while epoch %d is due", f.Epoch, s.next)
		}
		if err := s.shadow.Stage(f.Payload); err != nil {
			return fmt.Errorf("epoch %d: %w", f.Epoch, err)
		}
		s.got.Add(f)
		if st.State == Copying {
			s.set(func(st *StandbyStats) { st.CopyBytes += int64(len(f.Payload)) })
		}
		return nil
	case wire.TypeEpochEnd:
		return s.commit(f)
	case wire.TypeEnd:
		return fmt.Errorf("%w: %s", ErrEnded, printable(f.Payload))
	default:
		return fmt.Errorf("%w: %v from a primary", wire.ErrFormat, f.Type)
	}
}

// commit acknowledges the epoch if it is whole, then brings it into the shadow.
func (s *Standby) commit(f wire.Frame) error {
	want, err := wire.ParseEpochEnd(f.Payload)
	if err != nil {
		return err
	}
	if f.Epoch != s.next || want != s.got {
		return fmt.Errorf("epoch %d is not whole: %d bytes with sum %#x, want epoch %d, %d bytes with sum %#x",
			f.Epoch, s.got.Bytes, s.got.CRC, s.next, want.Bytes, want.CRC)
	}
	if err := s.shadow.Seal(); err != nil {
		return fmt.Errorf("epoch %d: %w", f.Epoch, err)
	}
	// Before the acknowledgement leaves, so that a take-over right behind it knows.
	s.set(func(st *StandbyStats) {
		if st.State == Copying {
			s.log.Info("ready to take over", "bytes", want.Bytes)
		}
		st.State, st.Epoch, st.LastBytes = Ready, f.Epoch, int64(want.Bytes)
		st.Bytes += int64(want.Bytes)
	})
	s.next, s.got = f.Epoch+1, wire.EpochEnd{}
	if err := s.link.send(wire.TypeAck, f.Epoch, nil); err != nil {
		// Not known to have committed: whoever watches decides what that means.
		s.log.Warn("acknowledgement not sent", "epoch", f.Epoch, "err", err)
	}
	if err := s.shadow.Apply(); err != nil {
		return fmt.Errorf("apply epoch %d: %w", f.Epoch, err)
	}
	return nil
}

// takeOver lets the shadow run. From here on no frame of the primary's counts.
func (s *Standby) takeOver(ctx context.Context, reason string) error {
	silence := s.link.silence()
	s.step.Lock()
	defer s.step.Unlock()
	f := &Failover{Reason: reason, At: time.Now(), Detect: silence}
	s.set(func(st *StandbyStats) { st.State = TakingOver })
	// Best effort, and not waited for: a primary that lives ends its copy.
	go s.link.send(wire.TypeTakenOver, 0, nil)

	if err := s.shadow.TakeOver(ctx); err != nil {
		s.shadow.Close()
		return fmt.Errorf("take over: %w", err)
	}
	f.Takeover = time.Since(f.At)
	s.set(func(st *StandbyStats) { st.State, st.Failover, st.Silent = Active, f, false })
	s.log.Info("taken over", "epoch", s.next-1, "reason", reason, "detect", f.Detect, "takeover", f.Takeover)
	return nil
}

// lingerFor bounds how long an old primary can come back and be told.
const lingerFor = time.Hour

// linger stays on the line for a primary that was not dead but frozen or cut off:
// it is told that its copy is no longer the guest. It ends with the connection.
func (s *Standby) linger(ctx context.Context, receiving <-chan error) {
	t := time.NewTimer(lingerFor)
	defer t.Stop()
	select {
	case <-receiving:
	case <-ctx.Done():
	case <-t.C:
	}
}

// drop ends protection from this side: no shadow, and the primary is told.
func (s *Standby) drop(reason string) {
	s.step.Lock()
	defer s.step.Unlock()
	if err := s.shadow.Close(); err != nil {
		s.log.Error("the shadow could not be removed", "err", err)
	}
	// After Close: the primary lets its output go on this frame.
	s.link.conn.SetWriteDeadline(time.Now().Add(2 * time.Second))
	s.link.send(wire.TypeEnd, 0, []byte(reason))
}
