package main

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kemari/migrate"
	"kemari/migrate/control"
	"kemari/migrate/migratetest"
)

// What cleans up after a killed primary asks the standby, with what the settings say.
func TestCleanupAsks(t *testing.T) {
	t.Run("not taken over", func(t *testing.T) { cleanupAsks(t, false) })
	t.Run("taken over", func(t *testing.T) { cleanupAsks(t, true) })
}

func cleanupAsks(t *testing.T, over bool) {
	l := listenLocal(t)
	primary, standby := protection(t, l, control.TransportTLS)
	hb := migrate.Heartbeat{Interval: 100 * time.Millisecond, Timeout: 2 * time.Second}
	primary.Heartbeat = control.Heartbeat{Interval: hb.Interval, Timeout: hb.Timeout}
	primary.MemoryKiB, primary.Generation = 256, 3
	id := [16]byte{7}
	conns, stop, err := accepting(l, standby, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	log := slog.New(slog.DiscardHandler)
	e := &env{log: log}
	paths := control.Paths{Dir: t.TempDir()}

	sb := migrate.NewStandby(migrate.StandbyConfig{UUID: id, MemoryKiB: 256, Limit: migratetest.Limit, Generation: 3, Heartbeat: hb},
		func(ctx context.Context) (net.Conn, error) {
			select {
			case c := <-conns:
				return c, nil
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}, migratetest.NewShadow(), log)
	standbyErr := make(chan error, 1)
	go func() { standbyErr <- sb.Run(t.Context()) }()
	var killed atomic.Bool
	var last net.Conn
	p := migrate.NewPrimary(migrate.PrimaryConfig{UUID: id, MemoryKiB: 256, Generation: 3, Heartbeat: hb,
		Policy: migrate.Policy{Trigger: migrate.TriggerInterval, Max: 50 * time.Millisecond},
	}, func(ctx context.Context) (net.Conn, error) {
		if killed.Load() {
			return nil, migrate.ErrStandbyLost
		}
		c, err := dial(ctx, primary)
		last = c
		return c, err
	}, migratetest.NewGuest(64, 1), migratetest.NewOutput(), log)
	primaryErr := make(chan error, 1)
	go func() { primaryErr <- p.Run(t.Context()) }()
	for end := time.Now().Add(20 * time.Second); sb.Stats().State != migrate.Ready; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%+v, %+v", p.Stats(), sb.Stats())
		}
	}
	killed.Store(true)
	last.Close()
	<-primaryErr
	if over {
		if err := sb.Failover("told to"); err != nil {
			t.Fatal(err)
		}
	}
	if got := e.takenOver(t.Context(), primary, id, paths); got != over {
		t.Errorf("taken over: %v, want %v", got, over)
	}
	// Of a later protection of this guest, on this host, it says nothing.
	if mark := takenOverMark(paths); hasMark(mark, 3) != over || hasMark(mark, 4) || hasMark(mark, 0) {
		t.Error("not remembered, or of any protection")
	}
	if err := <-standbyErr; (err == nil) != over {
		t.Error(err)
	}
	// Without a standby the guest goes on, and soon.
	stop()
	began := time.Now()
	if e.takenOver(t.Context(), primary, id, paths) || time.Since(began) > 2*reachTimeout {
		t.Errorf("asked nobody for %v", time.Since(began))
	}
}

// TestInterfacesOf: each interface of the guest is found once, by the name it has,
// and nobody else's.
func TestInterfacesOf(t *testing.T) {
	e := &env{sys: t.TempDir()}
	add := func(names ...string) {
		for _, n := range names {
			if err := os.MkdirAll(filepath.Join(e.sys, n), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	add("class/net/vif3.0", "class/net/web0", "class/net/vif31.0", "class/net/eth0",
		"bus/xen-backend/devices/vif-3-0/net/vif3.0", "bus/xen-backend/devices/vif-3-1/net/web0",
		"bus/xen-backend/devices/vif-31-0/net/vif31.0", "bus/xen-backend/devices/vbd-3-51712",
		"bus/xen-backend/devices/vif-3-2") // which is not made yet
	got, err := e.interfacesOf(3)
	if want := []string{"vif3.0", "web0"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
	if got, err := e.interfacesOf(4); len(got) > 0 || err != nil {
		t.Errorf("of a guest without any: %q, %v", got, err)
	}
}

// TestAwaitGone: a guest that is destroyed counts as gone when its interfaces are.
func TestAwaitGone(t *testing.T) {
	e := &env{sys: t.TempDir()}
	vif := filepath.Join(e.sys, "class/net/vif3.0")
	if err := os.MkdirAll(vif, 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := e.awaitGone(ctx, 3); err == nil || !strings.Contains(err.Error(), "vif3.0") {
		t.Errorf("with an interface left: %v", err)
	}
	time.AfterFunc(20*time.Millisecond, func() { os.Remove(vif) })
	if err := e.awaitGone(t.Context(), 3); err != nil {
		t.Error(err)
	}
}

// A hand-over that was asked for is a good end, and says where the guest is.
func TestSwitchover(t *testing.T) {
	me := &side{status: control.Status{Phase: control.Copying, Peer: "kemari+ssh://xen2/system"}}
	if err := me.switchover(t.Context(), nil); err == nil {
		t.Error("before there is anything to hand over")
	}
	x := migratetest.NewPair(migratetest.Options{})
	x.Start(t)
	for x.Primary.Stats().Epoch < 3 {
		x.Work(1, time.Millisecond)
	}
	seen := make(chan control.Phase, 1)
	x.Points.At("shadow: take over", 1, func() {
		st := me.get()
		primaryStats(&st, x.Primary.Stats())
		seen <- st.Phase
	})
	if err := me.switchover(t.Context(), x.Primary); err != nil {
		t.Fatal(err)
	}
	if p := <-seen; p != control.Switching {
		t.Errorf("meanwhile it is %v", p)
	}
	st := me.get()
	primaryStats(&st, x.Primary.Stats())
	if st.Phase != control.Ended || st.SwitchedOver != st.Peer || st.Error != "" {
		t.Errorf("%+v", st)
	}
	if err := me.switchover(t.Context(), x.Primary); err == nil || !strings.Contains(err.Error(), "ended") {
		t.Errorf("again: %v", err)
	}
	<-x.PrimaryErr
	<-x.StandbyErr
}
