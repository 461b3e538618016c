package main

import (
	"context"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"kemari/driver/drivertest"
	"kemari/migrate/control"
)

// TestKilled kills virtkemarid with a guest protected. What protects it are processes of
// their own, which notice nothing; the next virtkemarid knows all that the first did.
func TestKilled(t *testing.T) {
	l := drivertest.StartLibvirtd(t)
	d := startDaemon(t, l.Socket)
	const uuid = "6695eb01-f6a4-8304-79aa-97f2502e193f" // of the guest of test:///default
	paths := control.PathsFor(d.root, control.Primary, uuid)
	if err := control.WriteConfig(paths, control.PrimaryConfig{Domain: "test", UUID: uuid, Generation: 5, StandbyURI: "kemari+ssh://xen2/system"}); err != nil {
		t.Fatal(err)
	}
	socket, err := control.Listen(paths.Socket, 0)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	st := control.Status{
		Role: control.Primary, Domain: "test", UUID: uuid, Phase: control.Protected, Peer: "kemari+ssh://xen2/system",
		Generation: 5, Epoch: 41, CopyTotal: 1 << 20, CopyBytes: 1 << 20,
	}
	var ops []control.Op // that change anything
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		control.ServeRequests(ctx, socket, func(_ context.Context, r control.Request) (control.Status, error) {
			mu.Lock()
			defer mu.Unlock()
			if r.Op != control.OpStatus {
				ops = append(ops, r.Op)
			}
			if r.Op == control.OpAbort {
				st.Phase = control.Ended
			}
			return st, nil
		})
	}()
	defer func() { cancel(); <-done }()

	virsh := func(args ...string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		b, err := exec.CommandContext(ctx, "virsh", append([]string{"-c", kemari + "?socket=" + d.rw}, args...)...).CombinedOutput()
		if err != nil {
			t.Logf("virsh %s: %v", strings.Join(args, " "), err)
		}
		return string(b)
	}
	all := func(epoch string) {
		t.Helper()
		for _, c := range []struct {
			args []string
			want []string
		}{
			{[]string{"domjobinfo", "test", "--rawstats"}, []string{"kemari.phase: protected", "kemari.epoch: " + epoch, "kemari.peer: kemari+ssh://xen2/system"}},
			{[]string{"domstats", "test"}, []string{"kemari.phase=protected"}},
			{[]string{"domstate", "test"}, []string{"running"}},
			{[]string{"save", "test", "/nowhere/x"}, []string{"while Kemari protects it", "domjobabort test"}},
		} {
			out := virsh(c.args...)
			for _, w := range c.want {
				if !strings.Contains(out, w) {
					t.Errorf("%v: want %q in\n%s", c.args, w, out)
				}
			}
		}
	}
	all("41")
	c, _, err := connect(d.rw, kemari) // a client that is there when it happens
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	d.kill()
	mu.Lock()
	st.Epoch++ // the guest goes on
	if st.Phase != control.Protected || len(ops) != 0 {
		t.Errorf("it was asked for %v, and is %s", ops, st.Phase)
	}
	mu.Unlock()
	d.start()
	all("42")
	if out := virsh("domjobabort", "test"); strings.Contains(out, "error") {
		t.Error(out)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(ops) != 1 || ops[0] != control.OpAbort {
		t.Errorf("it was asked for %v", ops)
	}
}
