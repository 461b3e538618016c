package migrate

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"kemari/migrate/wire"
)

// primaryLine is one connection to the standby, of one or several that a
// protection has one after the other.
type primaryLine struct {
	*link
	committed wire.Epoch      // the last one the standby had when the connection began
	acks      chan wire.Epoch // at most one is under way
	refused   chan string     // reasons; at most one is under way
	done      chan struct{}   // closed when the connection is not used any more
	err       error           // why not; valid then
}

// patience is how long silence is borne.
func (p *Primary) patience() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.handing:
		return max(p.cfg.Heartbeat.Timeout, handoverPatience)
	case p.stats.Epoch > 0:
		return p.cfg.Heartbeat.Timeout
	}
	return max(p.cfg.Heartbeat.Timeout, setupTimeout)
}

// keep keeps a connection to the standby until ctx ends or it is known that there
// will be none. The first one is not tried twice.
func (p *Primary) keep(ctx context.Context) {
	defer func() {
		close(p.kept)
		p.change(func() { p.asking = false }) // after kept, so that fate is never missed
	}()
	const first = 5 * time.Millisecond
	pause := first
	for n := 0; ; {
		began := time.Now()
		l, err := p.connect(ctx)
		if err == nil {
			n++
			p.change(func() {
				p.line, p.asking = l, false
				p.stats.Reconnects = int64(n - 1)
			})
			if n > 1 {
				p.log.Warn("connected to the standby again", "committed", uint64(l.committed))
			}
			l.err = p.serve(ctx, l)
			// Before done, so that await does not return it.
			p.change(func() { p.line, p.asking = nil, true })
			close(l.done)
			err = l.err
			if time.Since(began) > p.cfg.Heartbeat.Timeout {
				pause = first
			}
		}
		if ctx.Err() != nil {
			p.fate = context.Cause(ctx)
			return
		}
		if errors.Is(err, errLine) && n == 0 {
			err = fmt.Errorf("%w: %w", ErrStandbyLost, err)
		}
		if !errors.Is(err, errLine) || errors.Is(err, ErrStandbyLost) || errors.Is(err, ErrTakenOver) {
			p.fate = err
			p.cancel(err)
			return
		}
		p.change(func() { p.asking = false })
		p.log.Warn("no connection to the standby; trying again", "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, max(p.cfg.Heartbeat.Interval, first))
	}
}

// connect dials and shakes hands. Its error is errLine where another try may
// succeed. Once the standby has let us in it leaves asking set, for who acts on what
// comes of that.
func (p *Primary) connect(ctx context.Context) (*primaryLine, error) {
	deadline := time.Now().Add(p.patience())
	if p.Stats().Alone {
		deadline = time.Now().Add(setupTimeout)
	}
	dctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	conn, err := p.dial(dctx)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errLine, err)
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	// It lives. If it is taking over now, it says so once it knows how that has ended.
	p.change(func() { p.asking = true })
	deadline = time.Now().Add(AnswerTimeout)
	l := &primaryLine{
		link: newLink(conn, p.cfg.Generation, &p.life),
		acks: make(chan wire.Epoch, 1), refused: make(chan string, 1), done: make(chan struct{}),
	}
	if err := p.greet(l, deadline); err != nil {
		conn.Close()
		return nil, err
	}
	return l, nil
}

func (p *Primary) greet(l *primaryLine, deadline time.Time) error {
	committed := p.Stats().Epoch
	hello := wire.Hello{
		Lowest: wire.Version, Highest: wire.Version, UUID: p.cfg.UUID, MemoryKiB: p.cfg.MemoryKiB,
		Session: p.session, Committed: committed,
	}
	if err := l.conn.SetWriteDeadline(deadline); err != nil {
		return fmt.Errorf("%w: %w", errLine, err)
	}
	if err := l.send(wire.TypeHello, 0, hello.Append(nil)); err != nil {
		return err
	}
	f, err := l.handshake(deadline, wire.TypeWelcome)
	switch {
	case errors.Is(err, ErrTakenOver):
		return p.takenOver(l)
	case errors.Is(err, ErrEnded), errors.Is(err, wire.ErrVersion):
		return fmt.Errorf("%w: %w", ErrStandbyLost, err)
	case err != nil:
		return fmt.Errorf("%w: %w", errLine, err)
	}
	w, err := wire.ParseWelcome(f.Payload)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrStandbyLost, err)
	}
	if w.Committed < committed || w.Committed > wire.Epoch(p.sending.Load()) {
		return fmt.Errorf("%w: it has epoch %d, where %d is committed and %d was sent last", ErrStandbyLost, w.Committed, committed, p.sending.Load())
	}
	l.committed = w.Committed
	if err := l.conn.SetWriteDeadline(time.Time{}); err != nil {
		return fmt.Errorf("%w: %w", errLine, err)
	}
	return nil
}

// serve receives on a connection until that ends, and says why.
func (p *Primary) serve(ctx context.Context, l *primaryLine) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.conn.Close() })
	defer stop()
	wg.Go(func() { l.beat(ctx, p.cfg.Heartbeat.beat) }) // whoever reads sees what is wrong
	err := l.receive(func(f wire.Frame) error { return p.handle(l, f) })
	l.conn.Close()
	switch {
	case errors.Is(err, ErrTakenOver), errors.Is(err, ErrStandbyLost):
		return err
	case closedByPeer(err):
		return fmt.Errorf("%w: the standby closed it", errLine)
	}
	if errors.Is(err, errLine) {
		return err
	}
	return fmt.Errorf("%w: %w", errLine, err)
}

func (p *Primary) handle(l *primaryLine, f wire.Frame) error {
	switch f.Type {
	case wire.TypeHeartbeat:
		return nil
	case wire.TypeAck:
		select {
		case l.acks <- f.Epoch:
			return nil
		default:
			return fmt.Errorf("%w: acknowledgement of epoch %d comes twice", ErrStandbyLost, f.Epoch)
		}
	case wire.TypeCompared:
		return p.compared(f)
	case wire.TypeResync:
		reason := printable(f.Payload)
		p.log.Warn("the standby refuses what it was sent", "epoch", uint64(f.Epoch), "reason", reason)
		if f.Epoch == 0 { // it means the connection, and will close it
			return nil
		}
		select {
		case l.refused <- reason:
		default: // it has said so already
		}
		return nil
	case wire.TypeEnd:
		return fmt.Errorf("%w: it ended protection: %s", ErrStandbyLost, printable(f.Payload))
	case wire.TypeTakenOver:
		return p.takenOver(l)
	default:
		return fmt.Errorf("%w: %v from a standby", wire.ErrFormat, f.Type)
	}
}

// takenOver says in just these words that we know, so that the standby need not stay to
// tell us: not before it is remembered, should we die before our copy does.
func (p *Primary) takenOver(l *primaryLine) error {
	if p.cfg.TakenOver != nil {
		if err := p.cfg.TakenOver(); err != nil {
			p.log.Error("not remembered that the standby has taken over", "err", err)
			return ErrTakenOver
		}
	}
	l.conn.SetWriteDeadline(time.Now().Add(p.cfg.Heartbeat.Timeout))
	l.send(wire.TypeEnd, 0, []byte(ErrTakenOver.Error()))
	return ErrTakenOver
}

// watch decides what silence means. Before it means anything the standby is asked
// over another connection: it may be that only this one is dead, and it may be that
// the standby has been told to take over.
func (p *Primary) watch(ctx context.Context) {
	for {
		err := p.life.watch(ctx, p.cfg.Heartbeat.Interval, p.patience)
		if err == nil {
			return
		}
		err = fmt.Errorf("%w: %w for %v", ErrStandbyLost, err, p.life.silence().Round(time.Millisecond))
		var l *primaryLine
		// Without it at once, or whoever waits would take it for one that is back.
		p.change(func() {
			l, p.line = p.line, nil
			p.asking = p.asking || l != nil // until keep has seen its last word
		})
		p.hangUp(l)
		// Before the first commit, too: it may have acknowledged that epoch.
		if p.answered(ctx) {
			continue
		}
		if p.cfg.Automatic || p.cfg.Rejoin == 0 || p.Stats().Epoch == 0 {
			p.cancel(err)
			return
		}
		p.change(func() { p.alone = true })
		if !p.rejoined(ctx) {
			p.cancel(err)
			return
		}
	}
}

// hangUp brings out whoever is stuck in a write.
func (p *Primary) hangUp(l *primaryLine) {
	if l != nil {
		l.conn.Close()
	}
}

// answered returns whether a standby that was silent answers over another connection.
// It has a part of the time-out to let us in, and who let us in the time that a
// take-over may last. False, too, if it has answered that it will not go on.
func (p *Primary) answered(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, AnswerTimeout)
	defer cancel()
	soon := time.After(p.cfg.Heartbeat.Timeout / 4)
	for late := false; ; {
		p.mu.Lock()
		l, asking, changed := p.line, p.asking, p.changed
		p.mu.Unlock()
		if l != nil {
			return true
		}
		if late && !asking {
			return false
		}
		select {
		case <-ctx.Done():
			return false
		case <-p.kept:
			return false
		case <-soon:
			late = true
		case <-changed:
		}
	}
}

// reachable tells whether there is something to be learnt about the standby.
func (p *Primary) reachable() bool {
	select {
	case <-p.kept: // its fate
		return true
	default:
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.line != nil || p.asking
}

// rejoined waits for the standby to be back.
func (p *Primary) rejoined(ctx context.Context) bool {
	t := time.NewTimer(p.cfg.Rejoin)
	defer t.Stop()
	for {
		p.mu.Lock()
		l, changed := p.line, p.changed
		p.mu.Unlock()
		if l != nil {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-t.C:
			return false
		case <-changed:
		}
	}
}

// tell ends protection at the standby and waits until it has confirmed: only then
// may held output go, since before that it might still take over. One that cannot be
// reached is waited for as long as silence is borne, one that lives as long as a
// take-over may last that it is just making. It returns ErrTakenOver if that is the
// answer.
func (p *Primary) tell(ctx context.Context, reason string) error {
	began := time.Now()
	t := time.NewTimer(max(p.cfg.Heartbeat.Timeout, 5*time.Second))
	defer t.Stop()
	var told *primaryLine
	for {
		p.mu.Lock()
		l, changed := p.line, p.changed
		p.mu.Unlock()
		if l != nil {
			// Heartbeats and a write that is stuck are ended by the watch, and so is this.
			if l != told {
				l.send(wire.TypeEnd, 0, []byte(reason))
			}
			told, changed = l, l.done
		}
		select {
		case <-p.kept:
			return p.fate
		case <-changed:
		case <-ctx.Done():
			return nil
		case <-t.C:
			if left := AnswerTimeout - time.Since(began); left > 0 && p.reachable() {
				t.Reset(left)
				continue
			}
			p.log.Warn("the standby did not confirm the end of protection")
			return nil
		}
	}
}
