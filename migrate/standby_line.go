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

	"kemari/migrate/wire"
)

// standbyLine is one connection from the primary.
type standbyLine struct {
	*link
	gone chan struct{} // closed when nothing more comes in
}

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
				s.fail(err)
			} else {
				s.log.Error("the primary cannot connect again", "err", err)
			}
			return
		}
		slots <- struct{}{}
		wg.Go(func() { s.serve(ctx, conn, sync.OnceFunc(func() { <-slots })) })
	}
}

// serve handles one connection. It calls greeted once it is known whose it is.
func (s *Standby) serve(ctx context.Context, conn net.Conn, greeted func()) {
	defer greeted()
	defer conn.Close()
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	l := &standbyLine{link: newLink(conn, s.cfg.Generation, &s.life), gone: make(chan struct{})}
	// Our frames are small, and whoever sends one holds up the standby.
	l.patience = max(s.cfg.Heartbeat.Timeout, 2*time.Second)
	defer close(l.gone)
	f, err := l.handshake(time.Now().Add(setupTimeout), wire.TypeHello)
	greeted()
	if err == nil {
		err = s.greet(l, f)
	}
	if err != nil {
		s.log.Warn("a connection was refused", "err", err)
		l.send(wire.TypeEnd, 0, failure(err))
		if s.Stats().State == Greeting {
			s.fail(err)
		}
		return
	}
	wg.Go(func() {
		// The connection stays open for whoever reads: that the primary closes it is
		// worth to know.
		if err := l.beat(ctx, s.cfg.Heartbeat.Interval); err != nil && ctx.Err() == nil {
			s.log.Warn("the primary takes no sign of life", "err", err)
		}
	})
	err = l.receive(func(f wire.Frame) error {
		s.step.Lock()
		defer s.step.Unlock()
		if s.line != l {
			return fmt.Errorf("%w: another one has taken its place", errLine)
		}
		return s.handle(l, f)
	})
	if s.left(l, err) {
		// What was sent to us and not read when we close would make the kernel reset the
		// connection, and Run's last word could be lost over there.
		io.Copy(io.Discard, conn)
	}
}

// greet makes l the connection that counts, if it is the primary's and goes on
// where we are.
func (s *Standby) greet(l *standbyLine, f wire.Frame) error {
	h, err := wire.ParseHello(f.Payload)
	if err != nil {
		return err
	}
	version, err := h.Choose()
	if err != nil {
		return err
	}
	if h.UUID != s.cfg.UUID || h.MemoryKiB != s.cfg.MemoryKiB {
		return errors.New("the primary protects another guest than was announced")
	}
	s.step.Lock()
	defer s.step.Unlock()
	last := s.next - 1
	switch st := s.Stats().State; {
	case st >= TakingOver:
		// It lives after all. It must know that its copy is no longer the guest.
		s.replace(l)
		return l.send(wire.TypeTakenOver, 0, nil)
	case st == Greeting:
		if h.Committed != 0 {
			return fmt.Errorf("the primary goes on from epoch %d, of which nothing is here", h.Committed)
		}
		s.session = h.Session
		s.set(func(st *StandbyStats) { st.State = Copying })
	case h.Session != s.session:
		return errors.New("another replicator than the one that began protects the guest")
	case st == Copying:
		return errors.New("the first copy was cut off")
	case h.Committed != last && h.Committed+1 != last:
		return fmt.Errorf("the primary has epoch %d committed, which epoch %d here does not follow", h.Committed, last)
	default:
		s.set(func(st *StandbyStats) { st.Reconnects++ })
		s.log.Warn("the primary has connected again", "committed", uint64(last))
	}
	s.replace(l)
	s.restart()
	return l.send(wire.TypeWelcome, 0, wire.Welcome{Version: version, Committed: last}.Append(nil))
}

// replace makes l the connection that counts.
func (s *Standby) replace(l *standbyLine) {
	if s.line != nil {
		s.line.conn.Close()
	}
	s.line = l
	s.closed.Store(false)
}

// left notes that a connection has ended, and what that means. It returns whether
// Run still has something to say on it.
func (s *Standby) left(l *standbyLine, err error) bool {
	s.step.Lock()
	defer s.step.Unlock()
	if s.line != l {
		return false
	}
	if errors.Is(err, errStop) {
		return true
	}
	byPeer := closedByPeer(err)
	// A reset after a silence proves nothing: a host that lost its power gives it once it
	// has booted again, and then the guest runs nowhere but here.
	if errors.Is(err, syscall.ECONNRESET) && s.Stats().Silent {
		byPeer = false
	}
	if byPeer {
		err = fmt.Errorf("%w: the primary closed it", errLine)
	}
	switch st := s.Stats().State; {
	case st < Ready:
		s.fail(fmt.Errorf("%w: %w", ErrPrimaryLost, err))
		return true
	case st > Ready || s.dropped:
	default:
		if !errors.Is(err, errLine) {
			// The primary cannot know what was wrong with what it sent.
			l.send(wire.TypeResync, 0, failure(err))
		}
		s.log.Warn("no connection to the primary; waiting for another", "err", err)
	}
	s.line = nil
	s.closed.Store(byPeer)
	return false
}
