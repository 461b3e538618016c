package migrate

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"kemari/migrate/wire"
)

var errSilent = errors.New("no sign of life")

// link is the data connection with its heartbeat, the same on both sides.
type link struct {
	conn net.Conn
	gen  wire.Generation
	born time.Time

	mu  sync.Mutex // orders writers
	buf []byte

	seen atomic.Int64 // when the last frame came in whole, ns since born
	busy atomic.Bool  // a frame is being handled: the peer cannot be heard, and is not to blame
}

func newLink(conn net.Conn, gen wire.Generation) *link {
	return &link{conn: conn, gen: gen, born: time.Now()}
}

// send writes one frame. It blocks as long as the peer's window is full; closing
// the connection ends it.
func (l *link) send(t wire.Type, e wire.Epoch, payload []byte) error {
	return l.sendFrame(&wire.Frame{Type: t, Generation: l.gen, Epoch: e, Payload: payload})
}

func (l *link) sendFrame(f *wire.Frame) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	b, err := f.Append(l.buf[:0])
	if err != nil {
		return err
	}
	l.buf = b
	if _, err := l.conn.Write(b); err != nil {
		return fmt.Errorf("send %v: %w", f.Type, err)
	}
	return nil
}

// receive hands every frame to handle, in order, until it returns an error or the
// connection ends. Nobody else may read.
func (l *link) receive(r *wire.Reader, handle func(wire.Frame) error) error {
	for {
		f, err := r.Read()
		if err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
				return io.EOF
			}
			return err
		}
		l.busy.Store(true)
		l.seen.Store(int64(time.Since(l.born)))
		err = handle(f)
		l.seen.Store(int64(time.Since(l.born)))
		l.busy.Store(false)
		if err != nil {
			return err
		}
	}
}

func (l *link) reader() *wire.Reader {
	return wire.NewReader(bufio.NewReaderSize(l.conn, 64<<10), l.gen)
}

// beat shows life until ctx ends.
func (l *link) beat(ctx context.Context, interval time.Duration) error {
	t := time.NewTicker(interval)
	defer t.Stop()
	for {
		if err := l.send(wire.TypeHeartbeat, 0, nil); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// watch returns errSilent once nothing has come in for as long as timeout says,
// and nil when ctx ends. If we did not get to run ourselves, the silence proves
// nothing: then it looks again after what has queued up meanwhile could be read.
func (l *link) watch(ctx context.Context, interval time.Duration, timeout func() time.Duration) error {
	step := interval / 2
	t := time.NewTicker(step)
	defer t.Stop()
	for last := time.Now(); ; {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		now := time.Now()
		late := now.Sub(last) > step+interval
		last = now
		if !late && !l.busy.Load() && l.silence() > timeout() {
			return errSilent
		}
	}
}

// silence is how long ago the last frame came in.
func (l *link) silence() time.Duration {
	return time.Since(l.born) - time.Duration(l.seen.Load())
}

// handshake reads one frame within the set-up time-out.
func (l *link) handshake(r *wire.Reader, want wire.Type) (wire.Frame, error) {
	if err := l.conn.SetReadDeadline(time.Now().Add(setupTimeout)); err != nil {
		return wire.Frame{}, err
	}
	f, err := r.Read()
	if err != nil {
		return wire.Frame{}, fmt.Errorf("wait for %v: %w", want, err)
	}
	if f.Type == wire.TypeEnd {
		return wire.Frame{}, fmt.Errorf("%w: %s", ErrEnded, printable(f.Payload))
	}
	if f.Type != want {
		return wire.Frame{}, fmt.Errorf("%w: got %v, want %v", wire.ErrFormat, f.Type, want)
	}
	l.seen.Store(int64(time.Since(l.born)))
	return f, l.conn.SetReadDeadline(time.Time{})
}

// printable is a reason given by the peer, bounded and fit for a log.
func printable(b []byte) string {
	const most = 500
	if len(b) > most {
		b = b[:most]
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
