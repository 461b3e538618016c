package daemon

import (
	"context"
	"errors"
	"io"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// Dir is where libvirt's daemons listen.
const Dir = "/run/libvirt"

// DialTimeout bounds the way to one socket.
const DialTimeout = 10 * time.Second

// Sockets returns where the daemon of a connection's URI may listen in dir, the best
// choice first: the driver's own daemon, then the one for all drivers.
func Sockets(dir, uri string, ro bool) []string {
	suffix := "-sock"
	if ro {
		suffix = "-sock-ro"
	}
	names := []string{"libvirt" + suffix}
	if u, err := url.Parse(uri); err == nil && u.Scheme != "" {
		scheme, _, _ := strings.Cut(u.Scheme, "+")
		names = append([]string{"virt" + scheme + "d" + suffix}, names...)
	}
	for i, n := range names {
		names[i] = filepath.Join(dir, n)
	}
	return names
}

// Enter connects to the first of the sockets where somebody listens, since one may be a
// left-over of a daemon that does not run any more, and has hello say the first words.
// hello must change nothing, and keeps the connection that it was given.
//
// A daemon that systemd starts when it is needed ends when it was idle for two minutes.
// Who comes just then finds the connection accepted and closed, or refused. So if it has
// ended before a byte of an answer came, it is tried once more.
func Enter(ctx context.Context, sockets []string, hello func(net.Conn) error) (net.Conn, error) {
	conn, again, err := enter(ctx, sockets, hello)
	if err == nil || !again {
		return conn, err
	}
	select {
	case <-ctx.Done():
		return nil, err
	case <-time.After(pause):
	}
	conn, _, err = enter(ctx, sockets, hello)
	return conn, err
}

// pause is what systemd gets to listen again.
const pause = 100 * time.Millisecond

func enter(ctx context.Context, sockets []string, hello func(net.Conn) error) (_ net.Conn, again bool, _ error) {
	dialer := net.Dialer{Timeout: DialTimeout}
	var errs []error
	for _, path := range sockets {
		c, err := dialer.DialContext(ctx, "unix", path)
		if err != nil {
			again = again || errors.Is(err, syscall.ECONNREFUSED)
			errs = append(errs, err)
			continue
		}
		first := &firstWords{Conn: c}
		if err := hello(first); err != nil {
			c.Close()
			return nil, first.ended.Load() && !first.heard.Load(), err
		}
		return c, false, nil
	}
	return nil, again, &DialError{errors.Join(errs...)}
}

// DialError is returned where nobody listens.
type DialError struct{ error }

func (e *DialError) Unwrap() error { return e.error }

// firstWords notes whether the other side has said anything, and whether it has ended
// the connection.
type firstWords struct {
	net.Conn
	heard, ended atomic.Bool
}

func (c *firstWords) note(err error) {
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		c.ended.Store(true)
	}
}

func (c *firstWords) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 && !c.heard.Load() {
		c.heard.Store(true)
	}
	if err != nil {
		c.note(err)
	}
	return n, err
}

func (c *firstWords) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if err != nil {
		c.note(err)
	}
	return n, err
}
