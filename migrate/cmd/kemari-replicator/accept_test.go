package main

import (
	"bytes"
	"log/slog"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"kemari/migrate/control"
)

// starved is a listener for which there are no descriptors left, at first.
type starved struct {
	net.Listener
	left int
}

func (s *starved) Accept() (net.Conn, error) {
	if s.left--; s.left >= 0 {
		return nil, syscall.EMFILE
	}
	return s.Listener.Accept()
}

// What keeps the primary from connecting is said, once.
func TestAcceptStarved(t *testing.T) {
	l := listenLocal(t)
	primary, standby := protection(t, l, control.TransportTLS)
	var out bytes.Buffer
	conns, stop, err := accepting(&starved{l, 5}, standby, slog.New(slog.NewTextHandler(&out, nil)))
	if err != nil {
		t.Fatal(err)
	}
	c, err := dial(t.Context(), primary)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	select {
	case c := <-conns:
		c.Close()
	case <-time.After(10 * time.Second):
		t.Error("not accepted")
	}
	stop()
	if n := strings.Count(out.String(), "too many open files"); n != 1 {
		t.Errorf("said %d times: %s", n, &out)
	}
}
