package driver

import (
	"context"
	"log/slog"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"kemari/driver/drivertest"
	"kemari/driver/rpc"
)

// usage is what the process holds.
type usage struct {
	fds, goroutines int
	heap            uint64
}

func measure(t *testing.T) usage {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return usage{len(fds), runtime.NumGoroutine(), m.HeapAlloc}
}

// TestNoLeak opens and closes connections in a row, of well-behaved clients and
// of others, and wants nothing of them to be left. Eight rows go on side by side,
// so that a busy machine does not make it a test of patience.
func TestNoLeak(t *testing.T) {
	l := drivertest.StartLibvirtd(t)
	h := newHost(t, "xen1", l.Socket)
	h.d.log = slog.New(slog.DiscardHandler) // the test's own would grow
	one := func(i int) {
		nc, err := net.Dial("unix", h.rw)
		if err != nil {
			t.Error(i, err)
			return
		}
		nc.SetDeadline(time.Now().Add(time.Minute))
		c := rpc.NewClient(nc)
		defer c.Close()
		switch i % 5 {
		case 4: // hangs up before it has said anything
			return
		case 3: // asks for pings, and goes in the middle of a call
			remote(c, rpc.ProcConnectSupportsFeature, rpc.Int(rpc.FeatureProgramKeepalive).Append(nil))
			remote(c, rpc.ProcConnectOpen, open(nil, 0))
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			c.Call(ctx, rpc.ProgramRemote, 1, 7, nil)
			return
		}
		if _, err := remote(c, rpc.ProcConnectOpen, open(nil, 0)); err != nil {
			t.Error(i, err)
		}
		if _, err := remote(c, rpc.ProcConnectClose, nil); err != nil {
			t.Error(i, err)
		}
	}
	settled := func() {
		eventually(t, "the sessions end", func() bool {
			h.d.mu.Lock()
			defer h.d.mu.Unlock()
			return h.d.clients == 0
		})
	}
	const connections, rows = 10000, 8
	many := func(n int) {
		var wg sync.WaitGroup
		for row := range rows {
			wg.Go(func() {
				for i := row; i < n && !t.Failed(); i += rows {
					one(i)
				}
			})
		}
		wg.Wait()
	}
	many(500)
	settled()
	before := measure(t)
	start := time.Now()
	many(connections)
	took := time.Since(start)
	settled()
	after := measure(t)
	t.Logf("%d connections in %v; before %+v, after %+v", connections, took, before, after)
	// A goroutine may come and go; 10,000 of anything would show.
	if after.fds > before.fds+5 || after.goroutines > before.goroutines+5 || after.heap > before.heap+1<<20 {
		t.Errorf("before %+v, after %+v", before, after)
	}
}

// TestUpstreamRestart restarts libvirtd under clients that are busy, and idle.
func TestUpstreamRestart(t *testing.T) {
	l := drivertest.StartLibvirtd(t)
	h := newHost(t, "xen1", l.Socket)
	busy, idle := client(t, h.rw), client(t, h.rw)
	for _, c := range []*rpc.Client{busy, idle} {
		if _, err := remote(c, rpc.ProcConnectOpen, open(nil, 0)); err != nil {
			t.Fatal(err)
		}
	}
	failed := make(chan error, 1)
	go func() {
		for {
			if _, err := remote(busy, 7, nil); err != nil {
				failed <- err
				return
			}
		}
	}()
	time.Sleep(50 * time.Millisecond)
	l.Stop()
	if err := <-failed; !strings.Contains(err.Error(), "libvirtd has closed the connection") && !strings.Contains(err.Error(), "RPC connection is closed") {
		t.Errorf("busy: %v", err)
	}
	if _, err := remote(idle, 7, nil); err == nil {
		t.Error("idle: the connection goes on")
	}
	c := client(t, h.rw)
	_, err := remote(c, rpc.ProcConnectOpen, open(nil, 0))
	wantError(t, err, rpc.CodeNoConnect, "libvirtd cannot be reached", "systemctl status libvirtd")
	if out, err := virsh(t, h.rw, "list"); err == nil || !strings.Contains(out, "libvirtd cannot be reached") {
		t.Errorf("%v\n%s", err, out)
	}
	l.Start()
	// The connection that was refused works as well as a new one.
	if _, err := remote(c, rpc.ProcConnectOpen, open(nil, 0)); err != nil {
		t.Error(err)
	}
	if out, err := virsh(t, h.rw, "list"); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
