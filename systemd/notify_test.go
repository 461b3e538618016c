package systemd

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestNotify(t *testing.T) {
	dir, err := os.MkdirTemp("", "k")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "n")
	if err := Ready(); err != nil {
		t.Errorf("nobody wants to know: %v", err)
	}
	if err := Watchdog(context.Background(), nil); err != nil {
		t.Errorf("no watchdog: %v", err)
	}
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "60000")
	read := func() string {
		b := make([]byte, 64)
		n, err := c.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	if err := Ready(); err != nil || read() != "READY=1" {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	calls := 0
	go func() {
		done <- Watchdog(ctx, func() error {
			calls++
			if calls == 1 {
				return errors.New("not well")
			}
			return nil
		})
	}()
	for range 3 {
		if s := read(); s != "WATCHDOG=1" {
			t.Errorf("%q", s)
		}
	}
	cancel()
	if err := <-done; err != nil || calls < 4 {
		t.Errorf("%v after %d calls", err, calls)
	}
}
