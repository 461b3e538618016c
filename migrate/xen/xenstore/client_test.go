package xenstore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"kemari/migrate/xen/xenstore/xenstoretest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newPair(t *testing.T) (*Client, *xenstoretest.Server) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "socket")
	srv, err := xenstoretest.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(srv.Close)
	c, err := DialSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c, srv
}

func TestNodes(t *testing.T) {
	c, _ := newPair(t)
	ctx := t.Context()

	if _, err := c.Read(ctx, "/a/b"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("read of a missing node: %v", err)
	}
	if err := c.Write(ctx, "/a/b", "one"); err != nil {
		t.Fatal(err)
	}
	if err := c.Mkdir(ctx, "/a/c"); err != nil {
		t.Fatal(err)
	}
	if v, err := c.Read(ctx, "/a/b"); v != "one" || err != nil {
		t.Errorf("read: %q, %v", v, err)
	}
	if v, err := c.Read(ctx, "/a/c"); v != "" || err != nil {
		t.Errorf("read of an empty node: %q, %v", v, err)
	}
	if l, err := c.List(ctx, "/a"); !slices.Equal(l, []string{"b", "c"}) || err != nil {
		t.Errorf("list: %q, %v", l, err)
	}
	if l, err := c.List(ctx, "/a/c"); len(l) != 0 || err != nil {
		t.Errorf("list of an empty node: %q, %v", l, err)
	}
	for range 2 { // the second finds nothing
		if err := c.Rm(ctx, "/a/b"); err != nil {
			t.Errorf("remove: %v", err)
		}
	}
	if err := c.Write(ctx, "/a/big", strings.Repeat("x", maxPayload)); !errors.Is(err, errTooLong) {
		t.Errorf("too long a value: %v", err)
	}
	for _, p := range []string{"", "/a\x00b", "/" + strings.Repeat("a", maxPath)} {
		if _, err := c.Read(ctx, p); err == nil {
			t.Errorf("path of %d bytes accepted", len(p))
		}
	}
}

func TestTransact(t *testing.T) {
	c, srv := newPair(t)
	ctx := t.Context()
	srv.Set("/n", "1")

	tries := 0
	err := c.Transact(ctx, func(tx *Tx) error {
		tries++
		v, err := tx.Read(ctx, "/n")
		if err != nil {
			return err
		}
		if tries == 1 {
			srv.Set("/n", "5") // somebody interferes
		}
		return tx.Write(ctx, "/n", v+"0")
	})
	if err != nil {
		t.Fatal(err)
	}
	if v := srv.Get("/n"); tries != 2 || v != "50" {
		t.Errorf("%d tries, value %q; want 2 and 50", tries, v)
	}

	failed := errors.New("no")
	err = c.Transact(ctx, func(tx *Tx) error {
		if err := tx.Write(ctx, "/n", "7"); err != nil {
			return err
		}
		return failed
	})
	if v := srv.Get("/n"); !errors.Is(err, failed) || v != "50" {
		t.Errorf("after a failed transaction: %v, value %q", err, v)
	}
}

func TestWatch(t *testing.T) {
	c, srv := newPair(t)
	ctx := t.Context()
	w, err := c.Watch(ctx, "/a")
	if err != nil {
		t.Fatal(err)
	}
	expect(t, w, true) // the first event comes by itself
	srv.Set("/b", "1")
	srv.Set("/a/x", "1")
	expect(t, w, true)
	if err := c.Write(ctx, "/a/y", "2"); err != nil {
		t.Fatal(err)
	}
	expect(t, w, true)

	for range 2 {
		if err := w.Close(ctx); err != nil {
			t.Error(err)
		}
	}
	if _, open := <-w.C(); open {
		t.Error("channel still open after Close")
	}
	srv.Set("/a/x", "3") // nobody's any more
	if _, err := c.Read(ctx, "/a/x"); err != nil {
		t.Error(err)
	}

	w, err = c.Watch(ctx, "/a")
	if err != nil {
		t.Fatal(err)
	}
	expect(t, w, true)
	srv.Close() // the daemon goes away
	expect(t, w, false)
	if _, err := c.Read(ctx, "/a"); err == nil {
		t.Error("read on a lost connection succeeded")
	}
	if _, err := c.Watch(ctx, "/a"); err == nil {
		t.Error("watch on a lost connection succeeded")
	}
}

func expect(t *testing.T, w *Watch, want bool) {
	t.Helper()
	select {
	case _, open := <-w.C():
		if open != want {
			t.Fatalf("channel open: %v, want %v", open, want)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("no event")
	}
}

// TestContext: a daemon that does not answer holds nobody beyond his context,
// and its late answer disturbs nobody.
func TestContext(t *testing.T) {
	near, far := net.Pipe()
	c := New(near)
	defer c.Close()

	served := make(chan error, 1)
	go func() {
		first, err := readMessage(far)
		if err != nil {
			served <- err
			return
		}
		second, err := readMessage(far)
		if err != nil {
			served <- err
			return
		}
		first.payload, second.payload = []byte("late"), []byte("right")
		// One nobody ever asked for comes in between.
		stray := message{op: opRead, id: 4711}
		_, err = far.Write(second.append(stray.append(first.append(nil))))
		served <- err
	}()

	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := c.Read(ctx, "/a"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("read: %v", err)
	}
	if v, err := c.Read(t.Context(), "/b"); v != "right" || err != nil {
		t.Errorf("read: %q, %v", v, err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func TestCloseReleases(t *testing.T) {
	near, far := net.Pipe()
	c := New(near)
	go io.Copy(io.Discard, far)
	errc := make(chan error)
	go func() {
		_, err := c.Read(context.Background(), "/a")
		errc <- err
	}()
	time.Sleep(5 * time.Millisecond)
	c.Close()
	if err := <-errc; !errors.Is(err, ErrClosed) {
		t.Errorf("read: %v", err)
	}
	far.Close()
}

func TestErrors(t *testing.T) {
	if err := parseError([]byte("EACCES\x00")); err != unix.EACCES {
		t.Errorf("%v", err)
	}
	if err := parseError([]byte("EODD\x00")); err == nil || !strings.Contains(err.Error(), "EODD") {
		t.Errorf("%v", err)
	}
	for _, p := range []string{"", "\x00", "0\x00", "-1\x00", "1\x002\x00", "4294967296\x00"} {
		if _, err := txID([]byte(p)); err == nil {
			t.Errorf("transaction id %q accepted", p)
		}
	}
}

// TestTruncations: every prefix of a message is an error, only the empty one
// the end of the stream.
func TestTruncations(t *testing.T) {
	whole := message{op: opRead, id: 1, payload: []byte("/a\x00")}.append(nil)
	for n := range whole {
		_, err := readMessage(bytes.NewReader(whole[:n]))
		if (n == 0) != (err == io.EOF) || err == nil {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

func FuzzReadMessage(f *testing.F) {
	f.Add(message{op: opWatchEvent, payload: []byte("/a\x00k1\x00")}.append(nil))
	f.Add(binary.NativeEndian.AppendUint32(make([]byte, 12), maxPayload+1))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := readMessage(bytes.NewReader(b))
		if (err == nil) != (m.payload != nil) {
			t.Fatalf("error %v with payload %v", err, m.payload)
		}
		if err != nil {
			return
		}
		if again := m.append(nil); !bytes.Equal(again, b[:len(again)]) {
			t.Fatalf("%x became %x", b, again)
		}
		c := &Client{waiting: map[uint32]chan message{}, watches: map[string]*Watch{}}
		c.dispatch(m)
		splitStrings(m.payload)
		parseError(m.payload)
	})
}
