package migrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"kemari/migrate/core"
	"kemari/migrate/wire"
)

// standbyLine is one connection from the primary.
type standbyLine struct {
	*link
	handled chan struct{}   // what was read is dealt with
	words   chan wire.Frame // to be sent
	closing chan struct{}   // closed when what is in words is the last
	quiet   chan struct{}   // closed when nothing is sent any more
	hangUp  func()          // closes it once all has been said; idempotent
	round   core.Round      // of Run's goroutine until the Hello is dealt with; 0: not yet
	version uint8
	// Of Run's goroutine.
	busy bool // the worker has what was read
	left bool // it is closed as soon as all has been said
}

// maxJobs is how much the worker can have before it. Nobody waits for room: each line
// has a frame there at most, and there are maxWaiting before a new line is turned away.
const maxJobs, maxWaiting = 64, 32

// maxGreeting bounds the connections that have not said yet who they are.
const maxGreeting = 4

// listen accepts connections until ctx ends, and returns when all have ended.
func (s *Standby) listen(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, maxGreeting)
	for {
		conn, err := s.accept(ctx)
		if ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return
		}
		if err != nil {
			if s.Stats().State == Greeting {
				s.post(post{Event: core.Event{Kind: core.Failure}, err: err})
			} else {
				s.log.Error("the primary cannot connect again", "err", err)
			}
			return
		}
		slots <- struct{}{}
		wg.Go(func() { s.serve(ctx, conn, sync.OnceFunc(func() { <-slots })) })
	}
}

// serve reads what comes on one connection. It calls greeted once it is known whose
// it is.
func (s *Standby) serve(ctx context.Context, conn net.Conn, greeted func()) {
	defer greeted()
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	l := &standbyLine{
		link:    newLink(conn, s.cfg.Generation, &life{born: s.born}),
		handled: make(chan struct{}, 1), words: make(chan wire.Frame, 16),
		closing: make(chan struct{}), quiet: make(chan struct{}),
	}
	l.hangUp = sync.OnceFunc(func() { close(l.closing) })
	// Our frames are small, and whoever sends one holds up the standby.
	l.patience = max(s.cfg.Heartbeat.Timeout, 2*time.Second)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer l.hangUp()
	wg.Go(func() {
		if err := l.speak(); err != nil && !closedByPeer(err) && !errors.Is(err, net.ErrClosed) {
			s.log.Warn("the primary takes no sign of life", "err", err)
		}
	})

	f, err := l.handshake(time.Now().Add(setupTimeout), wire.TypeHello)
	greeted()
	if err != nil {
		s.log.Warn("a connection was refused", "err", err)
		if s.Stats().State == Greeting {
			l.say(wire.Frame{Type: wire.TypeEnd, Payload: failure(err)})
			s.post(post{Event: core.Event{Kind: core.Failure}, err: err})
		}
		return
	}
	for err == nil {
		if !s.post(post{Event: core.Event{Kind: core.Received}, line: l, frame: f}) {
			return
		}
		select {
		case <-l.handled:
		case <-s.over:
			return
		}
		f, err = l.r.Read()
	}
	if errors.Is(err, wire.ErrFormat) || errors.Is(err, wire.ErrGeneration) {
		s.post(l.unfit(err))
		// What is left to be said could be lost over there if we did not read.
		io.Copy(io.Discard, conn)
	}
	s.post(post{Event: core.Event{Kind: core.Gone}, line: l, err: err})
}

// unfit is what cannot be understood, or does not belong here: the connection cannot be
// used any further.
func (l *standbyLine) unfit(err error) post {
	return post{Event: core.Event{Kind: core.Received, Message: core.Message{Generation: core.Generation(l.gen), Round: l.round}}, line: l, err: err}
}

// say sends f, in its order, and does not wait for it. It is of Run's goroutine once
// the machine knows the line.
func (l *standbyLine) say(f wire.Frame) {
	select {
	case l.words <- f:
	case <-l.quiet:
	default:
		if f.Type != wire.TypeTakenOver && f.Type != wire.TypeHeartbeat { // which will be said again
			l.conn.Close() // it takes nothing any more
		}
	}
}

// describe names a frame.
func describe(f wire.Frame) string { return fmt.Sprintf("%v of epoch %d", f.Type, f.Epoch) }

// speak sends what there is to be said until the line hangs up, or breaks.
func (l *standbyLine) speak() error {
	defer close(l.quiet)
	for {
		var f wire.Frame
		select {
		case f = <-l.words:
		case <-l.closing:
			select {
			case f = <-l.words:
			default:
				l.conn.Close()
				return nil
			}
		}
		if err := l.answer(f); err != nil {
			return err
		}
	}
}

// answer sends f.
func (l *standbyLine) answer(f wire.Frame) error {
	err := l.send(f.Type, f.Epoch, f.Payload)
	if err != nil && !closedByPeer(err) { // else there may still be something to read
		l.conn.Close()
	}
	return err
}

// happened makes of what was posted what the machine understands.
func (s *Standby) happened(ctx context.Context, p post) {
	l := p.line
	switch {
	case l == nil:
		s.step(ctx, p)
	case p.frame.Type != 0:
		switch {
		case l.round != 0:
			s.received(ctx, p)
		case !l.left:
			s.greet(ctx, l, p)
		}
		if !l.busy {
			l.handled <- struct{}{}
		}
		l.busy = false
	case l.round == 0 || p.Kind == core.Failure && l.left:
	case p.Kind == core.Gone:
		p.Round, p.Clean = l.round, s.closedByPrimary(p.err)
		if !l.left && s.machine.State() < core.TakingOver {
			s.log.Warn("no connection to the primary; waiting for another", "err", p.err)
		}
		p.err = nil
		s.step(ctx, p)
		delete(s.lines, l.round)
	case p.Kind == core.Received && p.Message.Type == 0: // unfit
		if !l.left && s.Stats().State < Ready {
			p = post{Event: core.Event{Kind: core.Failure}, err: fmt.Errorf("%w: %w", ErrPrimaryLost, p.err)} // it would do so again
		}
		s.step(ctx, p)
		if is := s.machine.State(); is == core.TakingOver || is == core.Active {
			s.leave(l) // it is not read any more, and so the answer to Over would not be
		}
	default: // of the worker
		if p.Message.Type == core.EpochEnd { // which it has compared with what came
			p.Tally.Frames = s.machine.Seq()
			p.Message.Tally = p.Tally
		}
		s.step(ctx, p)
	}
}

// leave closes a line once all has been said. Nothing that still comes on it counts.
func (s *Standby) leave(l *standbyLine) {
	l.left = true
	l.hangUp()
}

// closedByPrimary tells whether a connection was closed by the primary's host.
func (s *Standby) closedByPrimary(err error) bool {
	// A reset after a silence proves nothing: a host that lost its power gives it once it
	// has booted again, and then the guest runs nowhere but here.
	return closedByPeer(err) && !(errors.Is(err, syscall.ECONNRESET) && s.machine.State() == core.Silent)
}

// greet has the machine decide about a new connection, if it is the primary's. Once it
// is decided that the guest runs here, or that the copy is no more, whoever asks is told.
func (s *Standby) greet(ctx context.Context, l *standbyLine, p post) {
	h, err := s.known(l, p.frame)
	switch {
	case s.machine.State() >= core.TakingOver:
	case err != nil:
		s.log.Warn("a connection was refused", "err", err)
		l.say(wire.Frame{Type: wire.TypeEnd, Payload: failure(err)})
		s.leave(l)
		if s.Stats().State == Greeting {
			s.step(ctx, post{Event: core.Event{Kind: core.Failure}, err: err})
		}
		return
	case len(s.jobs) > maxWaiting:
		// Without a word, which our primary would take for the end.
		s.log.Warn("a connection was turned away: too many have come while the copy is being worked on")
		s.leave(l)
		return
	}
	s.round++
	l.round = s.round
	s.lines[l.round] = l
	met := s.Stats().State != Greeting
	p.Message = core.Message{
		Type: core.Hello, Generation: core.Generation(s.cfg.Generation), Round: l.round, Session: core.Session(h.Session),
		Epoch: core.Epoch(h.Committed), Known: core.Epoch(h.Committed), Next: core.Epoch(h.Committed) + 1,
	}
	// Should it be that it cannot go on with us.
	p.err = errors.New("another replicator than the one that began has the guest")
	if last := wire.Epoch(s.machine.Committed()); h.Committed != last && h.Committed+1 != last {
		p.err = fmt.Errorf("the primary has epoch %d committed, which epoch %d here does not follow", h.Committed, last)
	}
	s.step(ctx, p)
	if s.machine.State() < core.TakingOver && met {
		s.set(func(st *StandbyStats) { st.Reconnects++ })
		s.log.Warn("the primary has connected again", "committed", uint64(s.machine.Committed()))
	}
}

// known says whose connection it is.
func (s *Standby) known(l *standbyLine, f wire.Frame) (wire.Hello, error) {
	h, err := wire.ParseHello(f.Payload)
	if err != nil {
		return h, err
	}
	if l.version, err = h.Choose(); err == nil && (h.UUID != s.cfg.UUID || h.MemoryKiB != s.cfg.MemoryKiB) {
		err = errors.New("the primary protects another guest than was announced")
	}
	return h, err
}

// received has the machine decide about a frame.
func (s *Standby) received(ctx context.Context, p post) {
	f := p.frame
	m := core.Message{Generation: core.Generation(s.cfg.Generation), Round: p.line.round, Epoch: core.Epoch(f.Epoch)}
	p.err = nil
	switch f.Type {
	case wire.TypeHeartbeat:
		m.Type = core.Heartbeat
	case wire.TypeHead, wire.TypePages, wire.TypeState, wire.TypeEpochEnd: // as the end is checked like a part
		m.Type, m.Seq = core.Data, s.machine.Seq()
	case wire.TypeRestart:
		m.Type = core.Restart
	case wire.TypeSums:
		m.Type = core.Sums
	case wire.TypeHandover:
		m.Type = core.Handover
	case wire.TypeEnd:
		m.Type, p.err = core.End, errors.New(printable(f.Payload))
		// One that was on its way before it could know says something else.
		if string(f.Payload) == ErrTakenOver.Error() {
			m.Type = core.Heard
		}
	}
	p.Message = m
	if !p.line.left && s.Stats().State < Ready && (m.Type == 0 || m.Type == core.Data && f.Epoch != 1 || m.Type == core.Restart || m.Type == core.Sums || m.Type == core.Handover) {
		// It would do so again.
		p = post{Event: core.Event{Kind: core.Failure}, err: fmt.Errorf("%w: %s from a primary", ErrPrimaryLost, describe(f))}
	}
	s.step(ctx, p)
}
