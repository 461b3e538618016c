package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"net"
	"sync"

	"kemari/migrate/control"
)

// tlsConn is a TLS connection that needs a system call per Write and not one per
// record of 16 KiB: what TLS writes in one Write goes out at once, and what has
// come in is read at once.
type tlsConn struct {
	*tls.Conn
	under *corked
	mu    sync.Mutex
}

// securer returns what makes sure of who is at the other end of a connection, of ours
// to the standby or of the primary's to us, by the means the channel has. It closes a
// connection that does not pass.
func securer(ch control.Channel, role control.Role) (func(context.Context, net.Conn) (net.Conn, error), error) {
	var handshake func(context.Context, net.Conn) (net.Conn, error)
	if ch.Transport == control.TransportTCP {
		handshake = func(ctx context.Context, c net.Conn) (net.Conn, error) {
			return &plainConn{c, bufio.NewReaderSize(c, 256<<10)}, ch.Greet(ctx, c, role)
		}
	} else {
		tc, err := ch.TLS()
		if err != nil {
			return nil, err
		}
		side := tls.Client
		if role == control.Standby {
			side = tls.Server
		}
		handshake = func(ctx context.Context, c net.Conn) (net.Conn, error) {
			under := &corked{Conn: c, r: bufio.NewReaderSize(c, 256<<10), w: bufio.NewWriterSize(c, 528<<10)}
			t := &tlsConn{Conn: side(under, tc), under: under}
			return t, t.HandshakeContext(ctx)
		}
	}
	return func(ctx context.Context, c net.Conn) (net.Conn, error) {
		s, err := handshake(ctx, c)
		if err != nil {
			c.Close()
			return nil, err
		}
		return s, nil
	}, nil
}

// plainConn is a connection in the clear, read as tlsConn is.
type plainConn struct {
	net.Conn
	r *bufio.Reader
}

func (c *plainConn) Read(b []byte) (int, error) { return c.r.Read(b) }

// Close closes at once if a write is stuck: that one holds what TLS needs to say
// goodbye, which would take until its time-out of five seconds.
func (t *tlsConn) Close() error {
	if !t.mu.TryLock() {
		return t.under.Conn.Close()
	}
	defer t.mu.Unlock()
	return t.Conn.Close()
}

func (t *tlsConn) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.under.cork(true)
	n, err := t.Conn.Write(b)
	if e := t.under.cork(false); err == nil {
		err = e
	}
	return n, err
}

// corked is the connection below TLS.
type corked struct {
	net.Conn
	r *bufio.Reader // TLS has one reader at a time

	mu    sync.Mutex // TLS writes alerts by itself
	w     *bufio.Writer
	holds bool
}

func (c *corked) Read(b []byte) (int, error) { return c.r.Read(b) }

func (c *corked) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	n, err := c.w.Write(b)
	if err == nil && !c.holds {
		err = c.w.Flush()
	}
	return n, err
}

func (c *corked) cork(hold bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.holds = hold
	if hold {
		return nil
	}
	return c.w.Flush()
}
