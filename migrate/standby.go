package migrate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"kemari/migrate/page"
	"kemari/migrate/wire"
)

// StandbyConfig is what a Standby needs to know.
type StandbyConfig struct {
	UUID       [16]byte
	MemoryKiB  uint64
	Limit      page.PFN // every page of the guest is below it
	Generation wire.Generation
	Heartbeat  Heartbeat
	// Automatic lets the standby take over on silence alone. Without an arbiter that
	// risks two running copies, so somebody has to have asked for it.
	Automatic bool
	// Rejoin is how long a primary that has closed its connection may take to come
	// back before the shadow is dropped; 0 is ten seconds.
	Rejoin time.Duration
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
	LastPages int64
	LastBytes int64
	CopyBytes int64 // of the guest's memory, received with the first epoch so far
	Bytes     int64
	Reconnects,
	Refused int64 // connections that replaced one that broke; epochs refused
	Failover *Failover
}

// Failover is a take-over in its parts.
type Failover struct {
	Reason   string
	At       time.Time     // loss declared
	Detect   time.Duration // last sign of life to loss declared
	Takeover time.Duration // loss declared to the guest running here
}

// maxState bounds the guest's state, in bytes.
const maxState = 16 << 20

// slack is what an epoch may have of pages beside the guest's memory: of video
// memory, of firmware, of Xen's own.
const slack = 64 << 20 / page.Size

// Standby receives one protection on the standby host.
//
// One goroutine accepts connections and each of these has one that handles its
// frames; only the last connection counts. What Run decides comes to it by the
// channels failover, end and fatal, and by the watch for silence.
type Standby struct {
	cfg    StandbyConfig
	accept Accept
	shadow Shadow
	log    *slog.Logger
	life   life
	closed atomic.Bool // the primary has closed the last connection, and there is no other

	// step orders what touches the shadow and what follows: frames being handled,
	// connections coming and going, and taking over.
	step      lock
	line      *standbyLine // the one that counts, or nil
	session   wire.Session // of the first Hello
	head      bool         // has come
	next      wire.Epoch   // being received
	got       wire.EpochEnd
	refused   bool // what comes of the epoch is ignored until it begins anew
	broken    bool // the copy is good for nothing
	dropped   bool // nothing counts any more
	dec       *page.Decoder
	staged    staging
	state     []byte // of the epoch being received
	committed []byte // state of the last committed epoch

	failover chan string   // reasons to take over that did not come from the primary
	end      chan string   // reasons to drop the shadow, likewise
	fatal    chan error    // why protection cannot go on
	told     chan struct{} // closed when an old primary knows that we took over
	toldOnce sync.Once

	mu    sync.Mutex
	stats StandbyStats
}

// NewStandby prepares to receive a protection over connections from the primary,
// one after the other. Run owns s until it returns.
func NewStandby(cfg StandbyConfig, accept Accept, s Shadow, log *slog.Logger) *Standby {
	if cfg.Rejoin == 0 {
		cfg.Rejoin = setupTimeout
	}
	return &Standby{
		cfg: cfg, accept: accept, shadow: s, log: log, next: 1,
		life: life{born: time.Now()}, step: newLock(),
		dec:      page.NewDecoder(cfg.Limit, s.Base),
		failover: make(chan string, 1),
		end:      make(chan string, 1),
		fatal:    make(chan error, 1),
		told:     make(chan struct{}),
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
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	s.life.sign()
	wg.Go(func() { s.listen(work) })
	silent := make(chan error)
	wg.Go(func() { s.watch(work, silent) })

	for {
		var why error
		select {
		case why = <-s.fatal:
		case reason := <-s.end:
			s.drop(reason)
			return fmt.Errorf("%s", reason)
		case reason := <-s.failover:
			why = errTakeOver{reason}
		case err := <-silent:
			if why = s.silence(err); why == nil {
				continue // we may not take over, and wait for who may decide
			}
		}
		var over errTakeOver
		if errors.As(why, &over) {
			if err := s.takeOver(work, over.reason); err != nil {
				return err
			}
			s.linger(ctx)
			return nil
		}
		s.drop(why.Error())
		if errors.Is(why, ErrEnded) {
			return nil
		}
		return why
	}
}

// watch says when the primary has been silent for too long, time and again.
func (s *Standby) watch(ctx context.Context, silent chan<- error) {
	for {
		err := s.life.watch(ctx, s.cfg.Heartbeat.Interval, s.patience)
		if err == nil {
			return
		}
		select {
		case silent <- err:
		case <-ctx.Done():
			return
		}
	}
}

func (s *Standby) patience() time.Duration {
	switch {
	case s.Stats().State < Ready:
		return max(s.cfg.Heartbeat.Timeout, setupTimeout)
	case s.closed.Load():
		return max(s.cfg.Heartbeat.Timeout, s.cfg.Rejoin)
	}
	return s.cfg.Heartbeat.Timeout
}

// silence decides what silence means. Nil means to go on waiting.
func (s *Standby) silence(err error) error {
	d := s.life.silence().Round(time.Millisecond)
	st := s.Stats()
	switch {
	case st.State < Ready:
		return fmt.Errorf("%w: %w for %v, before the first copy was complete", ErrPrimaryLost, err, d)
	case s.closed.Load():
		// A host that lost its power closes nothing. The kernel of one whose replicator
		// was killed does, and its guest runs on.
		return fmt.Errorf("%w: its replicator closed the connection; the guest runs on there, unprotected", ErrPrimaryLost)
	case s.cfg.Automatic:
		return errTakeOver{fmt.Sprintf("no sign of life from the primary for %v", d)}
	}
	if !st.Silent {
		s.log.Error("the primary is silent, and nobody may decide that it is dead: waiting to be told", "silence", d)
		s.set(func(st *StandbyStats) { st.Silent = true })
	}
	return nil
}

func (s *Standby) set(f func(*StandbyStats)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.stats)
}

// fail has Run end protection with err, and returns what ends receiving.
func (s *Standby) fail(err error) error {
	select {
	case s.fatal <- err:
	default: // something has come first
	}
	return errStop
}

// handle takes one frame from the primary, step being held. It returns an error
// where the connection cannot be used any further, and errStop where nothing can.
func (s *Standby) handle(l *standbyLine, f wire.Frame) error {
	st := s.Stats()
	if s.dropped {
		return nil
	}
	if st.State >= TakingOver {
		if f.Type == wire.TypeEnd {
			s.toldOnce.Do(func() { close(s.told) })
			return nil
		}
		// It lives after all. It must know that its copy is no longer the guest. If that
		// cannot be said, what it says may still be read.
		l.send(wire.TypeTakenOver, 0, nil)
		return nil
	}
	if st.Silent {
		s.log.Info("the primary is back")
		s.set(func(st *StandbyStats) { st.Silent = false })
	}
	switch f.Type {
	case wire.TypeHeartbeat:
		return nil
	case wire.TypeEnd:
		return s.fail(fmt.Errorf("%w: %s", ErrEnded, printable(f.Payload)))
	case wire.TypeRestart:
		if f.Epoch == s.next && st.State == Ready {
			s.restart()
			return nil
		}
	case wire.TypeHead, wire.TypePages, wire.TypeState, wire.TypeEpochEnd:
		if s.refused {
			return nil
		}
		if err := s.receive(f, st.State == Copying); err != nil {
			return s.refuse(l, err)
		}
		if f.Type == wire.TypeEpochEnd {
			return s.commit(l)
		}
		return nil
	}
	return fmt.Errorf("%w: %v of epoch %d from a primary", wire.ErrFormat, f.Type, f.Epoch)
}

// restart drops what has come of an epoch.
func (s *Standby) restart() {
	s.refused, s.got, s.state = false, wire.EpochEnd{}, s.state[:0]
	s.staged.reset()
}

// errBroken: the copy itself is broken, and no epoch can mend it.
var errBroken = errors.New("the copy is lost")

// receive takes a frame of an epoch. An error refuses the epoch.
func (s *Standby) receive(f wire.Frame, copying bool) error {
	if f.Epoch != s.next {
		return fmt.Errorf("%v of epoch %d, while epoch %d is due", f.Type, f.Epoch, s.next)
	}
	if f.Type == wire.TypeHead {
		if s.head || f.Epoch != 1 {
			return errors.New("a head in the middle")
		}
		s.head = true
		s.got.Add(f)
		return s.shadow.Head(f.Payload)
	}
	if !s.head {
		return fmt.Errorf("%v before the head", f.Type)
	}
	switch f.Type {
	case wire.TypePages:
		if len(s.state) > 0 {
			return errors.New("pages after the state")
		}
		s.got.Add(f)
		return s.pages(f.Payload, copying)
	case wire.TypeState:
		if len(s.state)+len(f.Payload) > maxState {
			return fmt.Errorf("a state of more than %d bytes", maxState)
		}
		s.got.Add(f)
		s.state = append(s.state, f.Payload...)
		return nil
	}
	return s.whole(f, copying)
}

// pages decodes and stages pages; those of the first copy go in as they come.
func (s *Standby) pages(records []byte, copying bool) error {
	most := int(s.cfg.MemoryKiB/(page.Size>>10)) + slack
	err := s.dec.Decode(records, func(pfn page.PFN, data []byte) error {
		s.got.Pages++
		if copying && s.staged.pages == slabPages {
			if err := s.apply(); err != nil {
				return err
			}
		}
		if s.staged.pages == most+most/4 {
			if s.staged.compact(); s.staged.pages > most {
				return fmt.Errorf("more than %d pages in an epoch", most)
			}
		}
		s.staged.add(pfn, data)
		return nil
	})
	if copying {
		s.set(func(st *StandbyStats) { st.CopyBytes = int64(s.got.Pages) * page.Size })
	}
	return err
}

func (s *Standby) apply() error {
	if err := s.staged.drain(s.shadow.Apply); err != nil {
		s.broken = true
		return fmt.Errorf("%w: %w", errBroken, err)
	}
	return nil
}

// whole says whether the epoch is, and one that the copy could run from.
func (s *Standby) whole(f wire.Frame, copying bool) error {
	want, err := wire.ParseEpochEnd(f.Payload)
	if err != nil {
		return err
	}
	if want != s.got {
		return fmt.Errorf("the epoch is not whole: %d pages and %d bytes with sum %#x have come of %d, %d, %#x",
			s.got.Pages, s.got.Bytes, s.got.CRC, want.Pages, want.Bytes, want.CRC)
	}
	if err := s.shadow.Check(s.state); err != nil {
		return err
	}
	if copying {
		return s.apply()
	}
	return nil
}

// refuse asks for the epoch to be sent anew. The first one cannot be: its pages
// are in the copy already.
func (s *Standby) refuse(l *standbyLine, why error) error {
	if s.Stats().State < Ready || errors.Is(why, errBroken) || errors.Is(why, ErrShadowLost) {
		return s.fail(fmt.Errorf("epoch %d: %w", s.next, why))
	}
	s.log.Warn("epoch refused", "epoch", uint64(s.next), "err", why)
	s.set(func(st *StandbyStats) { st.Refused++ })
	s.restart()
	s.refused = true
	return l.send(wire.TypeResync, s.next, failure(why))
}

// failure is what is said of an error to the other side.
func failure(err error) []byte {
	b := []byte(err.Error())
	return b[:min(len(b), maxReason)]
}

// commit acknowledges the epoch, which is whole, and brings it into the shadow.
func (s *Standby) commit(l *standbyLine) error {
	epoch, got := s.next, s.got
	s.committed, s.state = s.state, s.committed[:0]
	// Before the acknowledgement leaves, so that a take-over right behind it knows.
	s.set(func(st *StandbyStats) {
		if st.State == Copying {
			s.log.Info("ready to take over", "bytes", got.Bytes)
		}
		st.State, st.Epoch, st.LastBytes, st.LastPages = Ready, epoch, int64(got.Bytes), int64(got.Pages)
		st.Bytes += int64(got.Bytes)
	})
	s.next, s.got = epoch+1, wire.EpochEnd{}
	// If it cannot be sent, the next connection begins with saying so.
	sent := l.send(wire.TypeAck, epoch, nil)
	if err := s.apply(); err != nil {
		return s.fail(fmt.Errorf("apply epoch %d: %w", epoch, err))
	}
	return sent
}

// takeOver lets the shadow run. From here on no frame of the primary's counts.
func (s *Standby) takeOver(ctx context.Context, reason string) error {
	silence := s.life.silence()
	s.step.Lock()
	defer s.step.Unlock()
	f := &Failover{Reason: reason, At: time.Now(), Detect: silence}
	s.set(func(st *StandbyStats) { st.State = TakingOver })
	// What is under way of the next epoch does not count.
	s.restart()
	err := errBroken
	if !s.broken {
		err = s.shadow.TakeOver(ctx, s.committed)
	}
	if err != nil {
		// A primary that lives has heard nothing yet, and goes on.
		s.dropped = true
		s.shadow.Close()
		err = fmt.Errorf("take over: %w", err)
		if l := s.line; l != nil {
			l.send(wire.TypeEnd, 0, failure(err))
		}
		return err
	}
	if l := s.line; l != nil {
		// Best effort, and not waited for: a primary that lives ends its copy, and its
		// output was held, since nothing has been acknowledged meanwhile.
		go l.send(wire.TypeTakenOver, 0, nil)
	}
	f.Takeover = time.Since(f.At)
	s.set(func(st *StandbyStats) { st.State, st.Failover, st.Silent = Active, f, false })
	s.log.Info("taken over", "epoch", uint64(s.next-1), "reason", reason, "detect", f.Detect, "takeover", f.Takeover)
	return nil
}

// lingerFor bounds how long an old primary can come back and be told.
const lingerFor = time.Hour

// linger stays on the line for a primary that was not dead but frozen or cut off:
// it is told that its copy is no longer the guest, over this connection or another
// one. It ends when the primary has said that it knows.
func (s *Standby) linger(ctx context.Context) {
	t := time.NewTimer(lingerFor)
	defer t.Stop()
	select {
	case <-s.told:
	case <-ctx.Done():
	case <-t.C:
	}
}

// farewell bounds how long a primary may take to hear that it has ended.
const farewell = time.Second

// drop ends protection from this side: no shadow, and the primary is told.
func (s *Standby) drop(reason string) {
	s.step.Lock()
	s.dropped = true
	if err := s.shadow.Close(); err != nil {
		s.log.Error("the shadow could not be removed", "err", err)
	}
	l := s.line
	s.step.Unlock()
	// After Close: the primary lets its output go on this frame.
	if l == nil || l.send(wire.TypeEnd, 0, []byte(reason)) != nil {
		return
	}
	t := time.NewTimer(farewell)
	defer t.Stop()
	select {
	case <-l.gone:
	case <-t.C:
	}
}
