package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"kemari/migrate/core"
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
	// HandedOver remembers, for who cleans up should we be killed, that the primary has
	// asked us to take over and will go on by itself if it does not hear that we have.
	// May be nil.
	HandedOver func() error
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
// What it does is decided by the machine of migrate/core, which Run's goroutine steps:
// everybody else posts what has happened. Each connection has a goroutine that reads,
// and waits until what it has read is dealt with, and one that writes. A worker does
// what touches the copy, in the order in which the machine wants it.
type Standby struct {
	cfg    StandbyConfig
	accept Accept
	shadow Shadow
	log    *slog.Logger
	born   time.Time

	failover chan string   // reasons to take over that did not come from the primary
	end      chan string   // reasons to drop the shadow, likewise
	posts    chan post     // what has happened
	jobs     chan func()   // for the worker
	over     chan struct{} // closed when the machine is done

	// Of Run's goroutine.
	machine *core.Standby
	round   core.Round
	lines   map[core.Round]*standbyLine
	heard   time.Time // the last sign of life
	cause   error     // of what is being stepped
	why     error     // why the copy is dropped
	started Failover

	// Of the worker.
	head      []byte // what the guest is, once that has come
	headed    bool   // it has come in what is being received
	got       wire.EpochEnd
	broken    bool // the copy is good for nothing
	dec       *page.Decoder
	staged    staging
	state     []byte // of the epoch being received
	committed []byte // state of the last committed epoch
	check     comparison

	mu    sync.Mutex
	stats StandbyStats
}

// post is something that has happened.
type post struct {
	core.Event
	line  *standbyLine
	frame wire.Frame    // of a line that waits until it is dealt with
	end   wire.EpochEnd // of an epoch that is whole
	err   error         // why
}

// NewStandby prepares to receive a protection over connections from the primary,
// one after the other. Run owns s until it returns.
func NewStandby(cfg StandbyConfig, accept Accept, s Shadow, log *slog.Logger) *Standby {
	if cfg.Rejoin == 0 {
		cfg.Rejoin = setupTimeout
	}
	return &Standby{
		cfg: cfg, accept: accept, shadow: s, log: log, born: time.Now(),
		dec:      page.NewDecoder(cfg.Limit, s.Base),
		failover: make(chan string, 1),
		end:      make(chan string, 1),
		posts:    make(chan post, 64),
		jobs:     make(chan func(), maxJobs),
		over:     make(chan struct{}),
		lines:    make(map[core.Round]*standbyLine),
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

func (s *Standby) now() core.Time { return core.Time(time.Since(s.born)) }

// Run receives epochs until protection ends or this side takes over. It returns
// nil once the guest runs here and the old primary needs no more telling, or once
// the primary has ended protection; else why the shadow was dropped. When ctx ends
// that is as if End had been called.
func (s *Standby) Run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { s.End("the standby was stopped") })
	defer stop()
	hb := s.cfg.Heartbeat
	cfg := core.Config{
		Generation: core.Generation(s.cfg.Generation), Interval: hb.Interval, Timeout: hb.Timeout,
		Setup: max(hb.Timeout, setupTimeout), GiveUp: s.cfg.Rejoin, Stale: handoverStale,
	}
	if s.cfg.Automatic {
		cfg.Arbitration = core.Automatic
	}
	s.machine, s.heard = core.NewStandby(cfg, s.now()), time.Now()
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	defer close(s.jobs)
	wg.Go(func() {
		for job := range s.jobs {
			job()
		}
	})
	wg.Go(func() { s.listen(work) })

	timer := time.NewTimer(0)
	defer timer.Stop()
	for s.machine.State() != core.StandbyOver {
		end, quit := s.end, ctx.Done()
		if s.machine.State() < core.TakingOver {
			quit = nil
		} else if end = nil; s.machine.State() != core.Active {
			quit = nil
		}
		timer.Reset(time.Duration(s.machine.Deadline()) - time.Since(s.born))
		select {
		case p := <-s.posts:
			s.happened(work, p)
		case reason := <-end:
			s.step(work, post{Event: core.Event{Kind: core.Stop}, err: errors.New(reason)})
		case <-quit:
			s.step(work, post{Event: core.Event{Kind: core.Stop}})
		case reason := <-s.failover:
			s.step(work, post{Event: core.Event{Kind: core.FailOver}, err: errors.New(reason)})
		case <-timer.C:
			s.step(work, post{})
		}
	}
	close(s.over)
	for _, l := range s.lines { // the last words
		l.hangUp()
		<-l.quiet
	}
	if errors.Is(s.why, ErrEnded) {
		return nil
	}
	return s.why
}

// post tells Run's goroutine. It reports false once nobody listens any more.
func (s *Standby) post(p post) bool {
	select {
	case s.posts <- p:
		return true
	case <-s.over:
		return false
	}
}

// step has the machine decide, and does what it says.
func (s *Standby) step(ctx context.Context, p post) {
	was := s.machine.State()
	s.cause = p.err
	acts := s.machine.Step(s.now(), p.Event)
	if is := s.machine.State(); is != was {
		s.became(was, is)
	}
	for _, a := range acts {
		s.act(ctx, a, p)
	}
	if p.Kind == core.Received || p.Kind == core.Done {
		s.heard = time.Now()
	}
}

// became notes another state of the machine.
func (s *Standby) became(was, is core.StandbyState) {
	silence := time.Since(s.heard).Round(time.Millisecond)
	switch is {
	case core.Silent:
		s.log.Error("the primary is silent, and nobody may decide that it is dead: waiting to be told", "silence", silence)
	case core.Ready:
		if was == core.Silent && s.machine.Connected() {
			s.log.Info("the primary is back")
		}
	case core.TakingOver:
		reason := "the primary handed the guest over"
		switch s.machine.Reason() {
		case core.Silence:
			reason = fmt.Sprintf("no sign of life from the primary for %v", silence)
		case core.Asked:
			reason = s.cause.Error()
		}
		s.started = Failover{Reason: reason, At: time.Now(), Detect: time.Since(s.heard)}
	case core.Active:
		s.tookOver()
	case core.Dropping:
		s.why = s.ends(was, silence)
	}
	s.set(func(st *StandbyStats) {
		st.Silent = is == core.Silent
		switch is {
		case core.Receiving:
			st.State = Copying
		case core.TakingOver:
			st.State = TakingOver
		}
	})
}

// ends says why the copy is dropped.
func (s *Standby) ends(was core.StandbyState, silence time.Duration) error {
	switch s.machine.Reason() {
	case core.PeerEnded:
		return fmt.Errorf("%w: %w", ErrEnded, s.cause)
	case core.NotTaken:
		return fmt.Errorf("take over: %w", s.cause)
	case core.PrimaryLost:
		switch {
		case s.cause != nil:
			return fmt.Errorf("%w: %w", ErrPrimaryLost, s.cause)
		case was == core.Ready:
			return fmt.Errorf("%w: its replicator closed the connection; the guest runs on there, unprotected", ErrPrimaryLost)
		}
		return fmt.Errorf("%w: %w for %v, before the first copy was complete", ErrPrimaryLost, errSilent, silence)
	}
	return s.cause
}

// act does one action of the machine, or has the worker do it.
func (s *Standby) act(ctx context.Context, a core.Action, p post) {
	switch a.Kind {
	case core.Send:
		if l := s.lines[a.Round]; l != nil {
			s.say(l, a.Message, p)
		}
	case core.Close:
		if l := s.lines[a.Round]; l != nil {
			s.leave(l)
		}
	case core.Stage:
		p.line.busy = true // it waits for the worker
		s.jobs <- func() { s.stage(p.line, p.frame, a.Direct) }
	case core.Compare:
		p.line.busy = true
		s.jobs <- func() { s.compared(p.line, p.frame) }
	case core.Unstage:
		s.jobs <- s.restart
	case core.Commit:
		s.commit(wire.Epoch(a.Epoch), p.end)
		s.jobs <- func() { s.committed, s.state, s.got = s.state, s.committed[:0], wire.EpochEnd{} }
	case core.Apply:
		s.jobs <- func() {
			if err := s.apply(); err != nil {
				s.post(post{Event: core.Event{Kind: core.Failure}, err: fmt.Errorf("apply epoch %d: %w", a.Epoch, err)})
			}
			s.post(post{Event: core.Event{Kind: core.Done}})
		}
	case core.TakeOver:
		s.jobs <- func() { s.takeOver(ctx, a.Reason == core.HandedOver) }
	case core.DropCopy:
		s.jobs <- func() {
			if err := s.shadow.Close(); err != nil {
				s.log.Error("the shadow could not be removed", "err", err)
			}
			s.post(post{Event: core.Event{Kind: core.CopyDropped}})
		}
	}
}

// say puts a message of the machine's into a frame.
func (s *Standby) say(l *standbyLine, m core.Message, p post) {
	reason := func() string {
		if p.err != nil {
			return p.err.Error()
		}
		return fmt.Sprintf("%s: %v", describe(p.frame), m.Reason)
	}
	f := wire.Frame{Epoch: wire.Epoch(m.Epoch)}
	switch m.Type {
	case core.Welcome:
		copying := m.Epoch == 0
		s.jobs <- func() {
			s.restart()
			s.headed = !copying // or else the first copy begins anew, into what there is of it
		}
		f = wire.Frame{Type: wire.TypeWelcome, Payload: wire.Welcome{Version: l.version, Committed: wire.Epoch(m.Epoch)}.Append(nil)}
	case core.Ack:
		// Of the worker, which has the epoch to apply next, and loses no time to others
		// before it. If it cannot be sent, the next connection begins with saying so.
		s.jobs <- func() { l.answer(wire.Frame{Type: wire.TypeAck, Epoch: f.Epoch}) }
		return
	case core.Heartbeat:
		f.Type = wire.TypeHeartbeat
	case core.Over:
		f.Type = wire.TypeTakenOver
	case core.Resync:
		f.Type, f.Payload = wire.TypeResync, bounded(reason())
		s.log.Warn("epoch refused", "epoch", uint64(m.Epoch), "err", reason())
		s.set(func(st *StandbyStats) { st.Refused++ })
	case core.Refuse: // the primary cannot know what was wrong with what it sent
		f.Type, f.Payload = wire.TypeResync, bounded(reason())
		s.log.Warn("no connection to the primary; waiting for another", "err", reason())
	case core.Ended:
		f.Type = wire.TypeEnd
		if f.Payload = bounded(s.why.Error()); s.started.At.IsZero() {
			f.Payload = bounded(strings.TrimPrefix(s.why.Error(), ErrEnded.Error()+": "))
		}
	}
	l.say(f)
}

func (s *Standby) set(f func(*StandbyStats)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.stats)
}

// errBroken: the copy itself is broken, and no epoch can mend it.
var errBroken = errors.New("the copy is lost")

// receive takes a frame of an epoch. An error refuses the epoch.
func (s *Standby) receive(f wire.Frame, copying bool) error {
	if f.Type == wire.TypeHead {
		if s.headed || f.Epoch != 1 {
			return errors.New("a head in the middle")
		}
		s.headed = true
		s.got.Add(f)
		if s.head == nil {
			s.head = append([]byte{}, f.Payload...)
			return s.shadow.Head(f.Payload)
		}
		if !bytes.Equal(s.head, f.Payload) {
			return errors.New("another head than that of the copy that was begun")
		}
		return nil
	}
	if !s.headed {
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

// stage deals with a frame of an epoch, which is in its reader's buffer.
func (s *Standby) stage(l *standbyLine, f wire.Frame, direct bool) {
	err := s.receive(f, direct)
	switch {
	case err == nil && f.Type == wire.TypeEpochEnd:
		m := core.Message{Type: core.EpochEnd, Generation: core.Generation(s.cfg.Generation), Round: l.round, Epoch: core.Epoch(f.Epoch)}
		s.post(post{Event: core.Event{Kind: core.Received, Message: m}, line: l, end: s.got})
	case err == nil:
	case errors.Is(err, errBroken) || errors.Is(err, ErrShadowLost):
		s.post(post{Event: core.Event{Kind: core.Failure}, err: fmt.Errorf("epoch %d: %w", f.Epoch, err)})
	case direct:
		// The first epoch cannot be sent anew: its pages are in the copy already.
		s.post(post{Event: core.Event{Kind: core.Failure}, line: l, err: fmt.Errorf("epoch %d: %w", f.Epoch, err)})
	default:
		s.post(post{Event: core.Event{Kind: core.Bad, Round: l.round}, line: l, err: err})
	}
	s.post(post{Event: core.Event{Kind: core.Done}})
	l.handled <- struct{}{}
}

// compared deals with a part of a check.
func (s *Standby) compared(l *standbyLine, f wire.Frame) {
	switch err := s.compare(l, f); {
	case errors.Is(err, wire.ErrFormat):
		s.post(l.unfit(err))
	case err != nil && !errors.Is(err, errLine):
		s.post(post{Event: core.Event{Kind: core.Failure}, err: err})
	}
	s.post(post{Event: core.Event{Kind: core.Done}})
	l.handled <- struct{}{}
}

// restart drops what has come of an epoch.
func (s *Standby) restart() {
	s.got, s.state = wire.EpochEnd{}, s.state[:0]
	s.staged.reset()
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

// commit counts an epoch, before the acknowledgement leaves, so that a take-over right
// behind it knows.
func (s *Standby) commit(epoch wire.Epoch, got wire.EpochEnd) {
	s.set(func(st *StandbyStats) {
		if st.State == Copying {
			s.log.Info("ready to take over", "bytes", got.Bytes)
		}
		st.State, st.Epoch, st.LastBytes, st.LastPages = Ready, epoch, int64(got.Bytes), int64(got.Pages)
		st.Bytes += int64(got.Bytes)
	})
}

// takeOver lets the shadow run.
func (s *Standby) takeOver(ctx context.Context, asked bool) {
	err := errBroken
	if !s.broken {
		err = nil
		if asked && s.cfg.HandedOver != nil {
			err = s.cfg.HandedOver()
		}
		if err == nil {
			ctx, cancel := context.WithTimeoutCause(ctx, takeOverTimeout, fmt.Errorf("not done within %v", takeOverTimeout))
			err = s.shadow.TakeOver(ctx, s.committed)
			cancel()
		}
	}
	if err != nil {
		s.post(post{Event: core.Event{Kind: core.TakeOverFailed, Unsure: errors.Is(err, ErrMayRun)}, err: err})
		return
	}
	s.post(post{Event: core.Event{Kind: core.TookOver}})
}

// tookOver notes that the guest runs here.
func (s *Standby) tookOver() {
	f := s.started
	f.Takeover = time.Since(f.At)
	s.set(func(st *StandbyStats) { st.State, st.Failover = Active, &f })
	s.log.Info("taken over", "epoch", uint64(s.machine.Committed()), "reason", f.Reason, "detect", f.Detect, "takeover", f.Takeover)
}

// bounded is what is said of a reason to the other side, and failure of an error.
func bounded(reason string) []byte { return []byte(reason[:min(len(reason), maxReason)]) }
func failure(err error) []byte     { return bounded(err.Error()) }
