package main

import (
	"context"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"kemari/migrate/control"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// protection makes the settings of both sides of one, the standby's address being
// that of l.
func protection(t *testing.T, l net.Listener, transport control.Transport) (control.PrimaryConfig, control.StandbyConfig) {
	t.Helper()
	var sides [2]control.Channel
	for i, role := range []control.Role{control.Primary, control.Standby} {
		var err error
		if sides[i], err = control.NewChannel(transport, role, "g1", t.TempDir()); err != nil {
			t.Fatal(err)
		}
	}
	for i := range sides {
		var err error
		if sides[i].Peer, err = sides[1-i].Credential(); err != nil {
			t.Fatal(err)
		}
	}
	return control.PrimaryConfig{StandbyAddr: l.Addr().String(), Channel: sides[0]}, control.StandbyConfig{Channel: sides[1]}
}

func listenLocal(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// Connections that say nothing do not keep the primary from connecting, be they many
// and old or always new ones.
func TestStrangers(t *testing.T) {
	for _, transport := range []control.Transport{control.TransportTLS, control.TransportTCP} {
		t.Run(string(transport), func(t *testing.T) { testStrangers(t, transport) })
	}
}

func testStrangers(t *testing.T, transport control.Transport) {
	l := listenLocal(t)
	primary, standby := protection(t, l, transport)
	conns, stop, err := accepting(l, standby, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	connect := func() {
		t.Helper()
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		c, err := dial(ctx, primary)
		if err != nil {
			t.Fatalf("after %v: %v", time.Since(began), err)
		}
		defer c.Close()
		select {
		case theirs := <-conns:
			theirs.Close()
		case <-ctx.Done():
			t.Fatal("not accepted")
		}
	}
	for range 4 * maxStrangers {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	connect()

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for range 4 {
		wg.Go(func() {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
			for ctx.Err() == nil {
				if c, err := d.DialContext(ctx, "tcp", l.Addr().String()); err == nil {
					defer c.Close()
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
	time.Sleep(50 * time.Millisecond)
	for range 5 {
		connect()
	}
}

// Whoever shows the wrong credential is not let in.
func TestStrangersCredential(t *testing.T) {
	for _, transport := range []control.Transport{control.TransportTLS, control.TransportTCP} {
		t.Run(string(transport), func(t *testing.T) {
			l := listenLocal(t)
			_, standby := protection(t, l, transport)
			stranger, _ := protection(t, l, transport)
			var err error
			// It does know whom to expect, which is no secret with TLS.
			if transport == control.TransportTLS {
				if stranger.Channel.Peer, err = standby.Channel.Credential(); err != nil {
					t.Fatal(err)
				}
			}
			conns, stop, err := accepting(l, standby, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Fatal(err)
			}
			defer stop()
			if c, err := dial(t.Context(), stranger); err == nil {
				// TLS 1.3 tells the client with the first thing it reads.
				if _, err := c.Read(make([]byte, 1)); err == nil {
					t.Error("let in")
				}
				c.Close()
			}
			select {
			case <-conns:
				t.Error("handed on")
			default:
			}
		})
	}
}
