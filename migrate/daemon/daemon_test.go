package daemon

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestSockets(t *testing.T) {
	for _, c := range []struct {
		uri  string
		ro   bool
		want []string
	}{
		{"xen:///system", false, []string{"/d/virtxend-sock", "/d/libvirt-sock"}},
		{"xen:///system", true, []string{"/d/virtxend-sock-ro", "/d/libvirt-sock-ro"}},
		{"qemu+unix:///system", false, []string{"/d/virtqemud-sock", "/d/libvirt-sock"}},
		{"", false, []string{"/d/libvirt-sock"}},
		{"://", false, []string{"/d/libvirt-sock"}},
	} {
		if got := Sockets("/d", c.uri, c.ro); !slices.Equal(got, c.want) {
			t.Errorf("%q, %v: %q", c.uri, c.ro, got)
		}
	}
}

// serve has the n-th connection to a new socket, from 0 on, served by f, and returns the
// socket and how many there were.
func serve(t *testing.T, f func(n int, c net.Conn)) (string, *atomic.Int32) {
	t.Helper()
	dir, err := os.MkdirTemp("", "k")
	if err != nil {
		t.Fatal(err)
	}
	path, count := filepath.Join(dir, "sock"), new(atomic.Int32)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f(int(count.Add(1))-1, c)
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done; os.RemoveAll(dir) })
	return path, count
}

// hello asks with a byte and wants two.
func hello(c net.Conn) error {
	c.SetDeadline(time.Now().Add(300 * time.Millisecond))
	if _, err := c.Write([]byte("?")); err != nil {
		return err
	}
	var b [2]byte
	_, err := io.ReadFull(c, b[:])
	return err
}

func TestEnter(t *testing.T) {
	answers := func(c net.Conn) { c.Read(make([]byte, 1)); c.Write([]byte("ok")) }
	closes := func(net.Conn) {} // before or after it was written to
	resets := func(c net.Conn) { c.Read(make([]byte, 1)) }
	stops := func(c net.Conn) { c.Read(make([]byte, 1)); c.Write([]byte("o")) }
	silent := func(c net.Conn) { c.Read(make([]byte, 1)); c.Read(make([]byte, 1)) }
	for name, c := range map[string]struct {
		conns []func(net.Conn) // the last one stands for those after it
		tries int32
		err   error // nil: it is in
	}{
		"at once":             {[]func(net.Conn){answers}, 1, nil},
		"ends as one comes":   {[]func(net.Conn){closes, answers}, 2, nil},
		"ends with the call":  {[]func(net.Conn){resets, answers}, 2, nil},
		"ends for good":       {[]func(net.Conn){closes}, 2, io.EOF},
		"has begun to answer": {[]func(net.Conn){stops, answers}, 1, io.ErrUnexpectedEOF},
		"is silent":           {[]func(net.Conn){silent, answers}, 1, os.ErrDeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			path, count := serve(t, func(n int, conn net.Conn) { c.conns[min(n, len(c.conns)-1)](conn) })
			conn, err := Enter(t.Context(), []string{filepath.Join(filepath.Dir(path), "none"), path}, hello)
			if conn != nil {
				conn.Close()
			}
			var nobody *DialError
			if (err == nil) != (conn != nil) || (err == nil) != (c.err == nil) || errors.As(err, &nobody) {
				t.Fatalf("%v, %v", conn, err)
			}
			// Writing to one that has ended already fails in another way.
			if c.err != nil && c.err != io.EOF && !errors.Is(err, c.err) {
				t.Errorf("%v, want %v", err, c.err)
			}
			if n := count.Load(); n != c.tries {
				t.Errorf("tried %d times, want %d", n, c.tries)
			}
		})
	}
}

// TestEnterRefused: the socket of a daemon that has ended is there, and refuses, until
// it is listened on again.
func TestEnterRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	began := time.Now()
	_, err = Enter(t.Context(), []string{path}, hello)
	var nobody *DialError
	if !errors.As(err, &nobody) || time.Since(began) < pause {
		t.Errorf("%v after %v", err, time.Since(began))
	}
	accepted := make(chan struct{})
	time.AfterFunc(pause/4, func() {
		defer close(accepted)
		os.Remove(path)
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Error(err)
			return
		}
		defer l.Close()
		l.(*net.UnixListener).SetDeadline(time.Now().Add(5 * time.Second))
		if c, err := l.Accept(); err == nil {
			c.Read(make([]byte, 1)) // else the caller writes to one that has ended
			c.Write([]byte("ok"))
			c.Close()
		}
	})
	conn, err := Enter(t.Context(), []string{path}, hello)
	if err != nil {
		t.Error(err)
	} else {
		conn.Close()
	}
	<-accepted
	// Where there is no socket nobody is waited for, nor for one who does not wait.
	if _, err := Enter(t.Context(), []string{path + "none"}, hello); !errors.As(err, &nobody) || !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Enter(ctx, []string{path}, hello); err == nil {
		t.Error("entered without waiting")
	}
}
