package migratetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"kemari/migrate"
)

// Network connects a primary's Dial with a standby's Accept by connections that
// behave as TCP's do: what is written is taken into a buffer and comes out in
// order or not at all. Its methods are safe for concurrent use.
type Network struct {
	mu      sync.Mutex
	cond    *sync.Cond
	waiting []*Conn // dialed and not accepted
	conns   []*Conn // all that are open, both ends
	cut     [2]bool // what a side writes
	refuse  bool
	delay   time.Duration
	corrupt map[Side]int
	// Dials counts connections made, Written bytes that the primary wrote.
	dials, written int
}

// Side is an end of a connection.
type Side int

const (
	Primary Side = iota
	Standby
)

// windowSize is what a connection takes before it makes the writer wait.
const windowSize = 1 << 20

// NewNetwork returns a network without fault.
func NewNetwork() *Network {
	n := &Network{corrupt: make(map[Side]int)}
	n.cond = sync.NewCond(&n.mu)
	return n
}

// Conn is one end of a connection.
type Conn struct {
	net    *Network
	side   Side
	peer   *Conn
	in     []chunk // on its way to this end
	size   int     // of in
	eof    bool    // the peer has closed
	frozen bool
	err    error // of all that is asked of this end
	rd, wd deadline
}

type chunk struct {
	b  []byte
	at time.Time // not before
}

type deadline struct {
	at    time.Time
	timer *time.Timer
}

func (d *deadline) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

// Dial implements migrate.Dial.
func (n *Network) Dial(ctx context.Context) (net.Conn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	defer context.AfterFunc(ctx, n.wake)()
	for n.cut != [2]bool{} && ctx.Err() == nil {
		n.cond.Wait()
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if n.refuse {
		return nil, fmt.Errorf("%w: %w", migrate.ErrStandbyLost, syscall.ECONNREFUSED)
	}
	a, b := &Conn{net: n, side: Primary}, &Conn{net: n, side: Standby}
	a.peer, b.peer = b, a
	n.conns = append(n.conns, a, b)
	n.waiting = append(n.waiting, b)
	n.dials++
	n.cond.Broadcast()
	return a, nil
}

// Accept implements migrate.Accept.
func (n *Network) Accept(ctx context.Context) (net.Conn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	defer context.AfterFunc(ctx, n.wake)()
	for len(n.waiting) == 0 && ctx.Err() == nil {
		n.cond.Wait()
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	c := n.waiting[0]
	n.waiting = n.waiting[1:]
	return c, nil
}

func (n *Network) wake() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cond.Broadcast()
}

func (n *Network) change(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f()
	n.cond.Broadcast()
}

// Cut holds up all that is under way, and dials, or lets it go again. Nobody is
// told.
func (n *Network) Cut(cut bool) { n.change(func() { n.cut = [2]bool{cut, cut} }) }

// Mute is Cut of what one side writes.
func (n *Network) Mute(side Side, mute bool) { n.change(func() { n.cut[side] = mute }) }

// Refuse makes dials fail at once, as a host does on which nobody listens.
func (n *Network) Refuse(refuse bool) { n.change(func() { n.refuse = refuse }) }

// Delay makes what is written from now on take that long.
func (n *Network) Delay(d time.Duration) { n.change(func() { n.delay = d }) }

// Freeze holds up for good what is under way on the connections that there are, as a
// firewall does that has forgotten them. New ones work.
func (n *Network) Freeze() {
	n.change(func() {
		for _, c := range n.conns {
			c.frozen = true
		}
	})
}

// Error breaks all connections, at both ends, with err.
func (n *Network) Error(err error) {
	n.change(func() {
		for _, c := range n.conns {
			c.err = err
		}
		n.conns, n.waiting = nil, nil
	})
}

// Reset is Error with what a reset connection says.
func (n *Network) Reset() { n.Error(syscall.ECONNRESET) }

// Kill closes the connections of one side as the kernel does for a process that was
// killed.
func (n *Network) Kill(side Side) {
	n.mu.Lock()
	conns := append([]*Conn(nil), n.conns...)
	n.mu.Unlock()
	for _, c := range conns {
		if c.side == side {
			c.Close()
		}
	}
}

// Corrupt flips a bit of the byte that is the n-th one written by side from now on.
func (n *Network) Corrupt(side Side, nth int) { n.change(func() { n.corrupt[side] = nth + 1 }) }

// Dials is how many connections have been made.
func (n *Network) Dials() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.dials
}

// Written is how many bytes the primary has written.
func (n *Network) Written() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.written
}

func (c *Conn) Read(b []byte) (int, error) {
	n := c.net
	n.mu.Lock()
	defer n.mu.Unlock()
	for {
		now := time.Now()
		switch {
		case c.err != nil:
			return 0, c.err
		case c.rd.passed():
			return 0, os.ErrDeadlineExceeded
		case n.cut[1-c.side] || c.frozen:
		case len(c.in) > 0 && !now.Before(c.in[0].at):
			m := copy(b, c.in[0].b)
			if c.in[0].b = c.in[0].b[m:]; len(c.in[0].b) == 0 {
				c.in = c.in[1:]
			}
			c.size -= m
			n.cond.Broadcast()
			return m, nil
		case len(c.in) > 0:
			time.AfterFunc(c.in[0].at.Sub(now), n.wake)
		case c.eof:
			return 0, io.EOF
		}
		n.cond.Wait()
	}
}

func (c *Conn) Write(b []byte) (int, error) {
	n := c.net
	n.mu.Lock()
	defer n.mu.Unlock()
	for {
		switch {
		case c.err != nil:
			return 0, c.err
		case c.wd.passed():
			return 0, os.ErrDeadlineExceeded
		case c.eof:
			return 0, syscall.EPIPE
		case c.peer.size < windowSize:
			d := append([]byte(nil), b...)
			if at := n.corrupt[c.side]; at > 0 {
				if at <= len(d) {
					d[at-1] ^= 0x10
					at = 0
				}
				n.corrupt[c.side] = max(0, at-len(d))
			}
			if c.side == Primary {
				n.written += len(d)
			}
			c.peer.in = append(c.peer.in, chunk{d, time.Now().Add(n.delay)})
			c.peer.size += len(d)
			n.cond.Broadcast()
			return len(b), nil
		}
		n.cond.Wait()
	}
}

// Close lets what was written arrive, as TCP does.
func (c *Conn) Close() error {
	n := c.net
	n.mu.Lock()
	defer n.mu.Unlock()
	if c.err != nil {
		return nil
	}
	c.err = net.ErrClosed
	c.peer.eof = true
	for _, d := range []*deadline{&c.rd, &c.wd} {
		if d.timer != nil {
			d.timer.Stop()
		}
	}
	for i, o := range n.conns {
		if o == c {
			n.conns = append(n.conns[:i], n.conns[i+1:]...)
			break
		}
	}
	n.cond.Broadcast()
	return nil
}

func (c *Conn) set(d *deadline, at time.Time) error {
	n := c.net
	n.mu.Lock()
	defer n.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
	}
	*d = deadline{at: at}
	if !at.IsZero() && c.err == nil {
		d.timer = time.AfterFunc(time.Until(at), n.wake)
	}
	n.cond.Broadcast()
	return nil
}

func (c *Conn) SetReadDeadline(t time.Time) error  { return c.set(&c.rd, t) }
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.set(&c.wd, t) }
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}
func (c *Conn) LocalAddr() net.Addr  { return addr{} }
func (c *Conn) RemoteAddr() net.Addr { return addr{} }

type addr struct{}

func (addr) Network() string { return "test" }
func (addr) String() string  { return "test" }
