package migrate

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"kemari/migrate/wire"
)

var errSilent = errors.New("no sign of life")

// errLine: this connection has ended, another one may go on.
var errLine = errors.New("the connection broke")

// lock is a sync.Mutex for what may block for long, on a peer or on libvirt: it is
// made by newLock, and who waits for it is seen to wait by testing/synctest.
type lock chan struct{}

func newLock() lock    { return make(lock, 1) }
func (l lock) Lock()   { l <- struct{}{} }
func (l lock) Unlock() { <-l }

// life is what one side knows of the other being alive, over all connections.
type life struct {
	born time.Time
	seen atomic.Int64 // when the last frame came in whole, ns since born
	busy atomic.Int32 // frames being handled: the peer cannot be heard
}

func (l *life) now() int64                   { return int64(time.Since(l.born)) }
func (l *life) since(at int64) time.Duration { return time.Duration(l.now() - at) }
func (l *life) sign()                        { l.seen.Store(l.now()) }

// silence is how long ago the last frame came in.
func (l *life) silence() time.Duration { return l.since(l.seen.Load()) }

// watch returns errSilent once nothing has come in for as long as timeout says,
// and nil when ctx ends. If we did not get to run ourselves, the silence proves
// nothing: it begins anew then, when what has queued up meanwhile can be read.
func (l *life) watch(ctx context.Context, interval time.Duration, timeout func() time.Duration) error {
	last := time.Now()
	floor := last // silence before it proves nothing, since we did not listen
	for {
		// Each look costs a slow host a millisecond, so there are no more than it takes.
		wait := min(max(timeout()-l.silence(), interval/4), interval)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		now := time.Now()
		late := now.Sub(last) > wait+interval/2
		last = now
		if late {
			floor = now
		}
		if !late && l.busy.Load() == 0 && min(l.silence(), now.Sub(floor)) >= timeout() {
			return errSilent
		}
	}
}

// link is one data connection with its heartbeat, the same on both sides.
type link struct {
	conn net.Conn
	gen  wire.Generation
	life *life
	r    *wire.Reader
	// patience is how long the peer may take over a write, each one anew; zero is for
	// ever. A write that has run out of it is the last: TLS cannot go on after it.
	patience time.Duration
	wrote    atomic.Int64 // when the last frame went out, as life.seen

	mu  lock // orders writers
	buf []byte
}

func newLink(conn net.Conn, gen wire.Generation, life *life) *link {
	return &link{conn: conn, gen: gen, life: life, mu: newLock(), r: wire.NewReader(bufio.NewReaderSize(conn, 64<<10), gen)}
}

// send writes one small frame. It blocks as long as the peer's window is full;
// closing the connection ends it.
func (l *link) send(t wire.Type, e wire.Epoch, payload []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	f := wire.Frame{Type: t, Generation: l.gen, Epoch: e, Payload: payload}
	b, err := f.Append(l.buf[:0])
	if err != nil {
		return err
	}
	l.buf = b
	return l.writeLocked(b)
}

// write writes encoded frames.
func (l *link) write(b []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.writeLocked(b)
}

func (l *link) writeLocked(b []byte) error {
	if l.patience > 0 {
		if err := l.conn.SetWriteDeadline(time.Now().Add(l.patience)); err != nil {
			return fmt.Errorf("%w: %w", errLine, err)
		}
	}
	if _, err := l.conn.Write(b); err != nil {
		return fmt.Errorf("%w: send: %w", errLine, err)
	}
	l.wrote.Store(l.life.now())
	return nil
}

// receive hands every frame to handle, in order, until it returns an error or the
// connection ends. Nobody else may read.
func (l *link) receive(handle func(wire.Frame) error) error {
	for {
		f, err := l.r.Read()
		if err != nil {
			return err
		}
		l.life.busy.Add(1)
		l.life.sign()
		err = handle(f)
		l.life.sign()
		l.life.busy.Add(-1)
		if err != nil {
			return err
		}
	}
}

// closedByPeer: it was not broken here, nor by what came in, but closed over
// there, by whoever it was.
func closedByPeer(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// beat says what next tells whenever nothing has been said for as long as it tells,
// until ctx ends, or the connection does, which is the error.
func (l *link) beat(ctx context.Context, next func() (wire.Type, time.Duration)) error {
	for {
		say, every := next()
		wait := every - l.life.since(l.wrote.Load())
		if wait <= 0 {
			if err := l.send(say, 0, nil); err != nil {
				return err
			}
			wait = every
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// beat is how a side shows life while it is protected.
func (h Heartbeat) beat() (wire.Type, time.Duration) { return wire.TypeHeartbeat, h.Interval }

// handshake reads one frame by the deadline.
func (l *link) handshake(deadline time.Time, want wire.Type) (wire.Frame, error) {
	if err := l.conn.SetReadDeadline(deadline); err != nil {
		return wire.Frame{}, err
	}
	f, err := l.r.Read()
	if err != nil {
		return wire.Frame{}, fmt.Errorf("wait for %v: %w", want, err)
	}
	switch f.Type {
	case want:
		l.life.sign()
		return f, l.conn.SetReadDeadline(time.Time{})
	case wire.TypeEnd:
		return f, fmt.Errorf("%w: %s", ErrEnded, printable(f.Payload))
	case wire.TypeTakenOver:
		return f, ErrTakenOver
	}
	return f, fmt.Errorf("%w: got %v, want %v", wire.ErrFormat, f.Type, want)
}

// maxReason bounds a reason in words, ours and theirs.
const maxReason = 500

// printable is a reason given by the peer, bounded and fit for a log.
func printable(b []byte) string {
	if len(b) > maxReason {
		b = b[:maxReason]
	}
	out := make([]rune, 0, len(b))
	for _, r := range string(b) {
		if r < ' ' || r == 0x7f {
			r = ' '
		}
		out = append(out, r)
	}
	return string(out)
}
