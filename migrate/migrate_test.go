package migrate_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"kemari/migrate"
	"kemari/migrate/migratetest"
	"kemari/migrate/page"
	"kemari/migrate/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const interval, timeout = migratetest.Interval, migratetest.Timeout

// start runs a pair for a second, in which it becomes protected.
func start(t *testing.T, o migratetest.Options) *migratetest.Pair {
	t.Helper()
	if testing.Verbose() {
		o.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	x := migratetest.NewPair(o)
	x.Start(t)
	x.Work(20, 50*time.Millisecond)
	if st := x.Primary.Stats(); !st.Protected || st.Epoch < 3 {
		t.Fatalf("after a second: %+v", st)
	}
	return x
}

// ended waits for both sides and checks what they say.
func ended(t *testing.T, x *migratetest.Pair, primary, standby error) {
	t.Helper()
	for _, side := range []struct {
		name string
		got  chan error
		want error
	}{{"primary", x.PrimaryErr, primary}, {"standby", x.StandbyErr, standby}} {
		select {
		case err := <-side.got:
			if !errors.Is(err, side.want) {
				t.Errorf("%s: %v, want %v", side.name, err, side.want)
			}
		case <-time.After(time.Minute):
			t.Errorf("%s does not end", side.name)
		}
	}
}

// alone checks that the guest goes on at the primary, unhindered, and nowhere else.
func alone(t *testing.T, x *migratetest.Pair) {
	t.Helper()
	if x.Guest.Destroyed() || !x.Guest.Closed() || !x.Output.Closed() || x.Shadow.Over() != nil {
		t.Errorf("guest destroyed %v and let go %v, output let go %v, shadow runs from %v",
			x.Guest.Destroyed(), x.Guest.Closed(), x.Output.Closed(), x.Shadow.Over())
	}
	if out := x.Output.Released(); uint64(len(out)) != x.Guest.Count() || !slices.IsSorted(out) {
		t.Errorf("%d frames of %d have left, in order: %v", len(out), x.Guest.Count(), slices.IsSorted(out))
	}
}

// exact checks what must hold of a take-over: what runs is one committed epoch, its
// memory whole (that the fake shadow checks), and none older than what anyone
// outside has been told.
func exact(t *testing.T, x *migratetest.Pair) {
	t.Helper()
	over := x.Shadow.Over()
	if over == nil {
		t.Fatal("the standby has not taken over")
	}
	out := x.Output.Released()
	if n := len(out); n > 0 && out[n-1] > over.Count {
		t.Errorf("frame %d has left, and what runs is the guest at %d", out[n-1], over.Count)
	}
	if !slices.IsSorted(out) {
		t.Error("frames out of order")
	}
}

func TestProtectAndEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{Automatic: true})
		before := x.Primary.Stats()
		time.Sleep(time.Second)
		st := x.Primary.Stats()
		// A guest that says nothing is checkpointed at the longest interval only; the
		// fake says something whenever it is asked to suspend, before it is.
		if n := st.Epoch - before.Epoch; n > 6 {
			t.Errorf("%d epochs in a second without output", n)
		}
		if st.Epoch != x.Standby.Stats().Epoch {
			t.Errorf("epoch %d, standby has %d", st.Epoch, x.Standby.Stats().Epoch)
		}
		if st.CopyBytes != 64*page.Size || x.Standby.Stats().CopyBytes < st.CopyBytes {
			t.Errorf("copied %d, %d", st.CopyBytes, x.Standby.Stats().CopyBytes)
		}
		x.Primary.End("enough")
		ended(t, x, nil, nil)
		alone(t, x)
		if !x.Shadow.Closed() {
			t.Error("the shadow is still there")
		}
	})
}

// A host that lost its power and booted again resets the connection. To a standby that
// waits to be told this says nothing: its copy is the only one.
func TestResetAfterSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{Rejoin: 10 * time.Second})
		x.Net.Cut(true)
		<-x.PrimaryErr // the primary's host is no more, as far as the standby can tell
		time.Sleep(time.Minute)
		x.Net.Reset()
		time.Sleep(time.Minute)
		if st := x.Standby.Stats(); st.State != migrate.Ready || !st.Silent || x.Shadow.Closed() {
			t.Fatalf("the standby gave its copy up: %+v", st)
		}
		if err := x.Standby.Failover("asked for"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if x.Shadow.Over() == nil {
			t.Error("the standby has not taken over")
		}
		x.Stop()
		<-x.StandbyErr
	})
}

// TestTakeOverFails: a primary that lives hears of a take-over once it has succeeded,
// and of one that has failed that protection has ended.
func TestTakeOverFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{})
		x.Shadow.Spoil(1)
		if err := x.Standby.Failover("asked for"); err != nil {
			t.Fatal(err)
		}
		if err := <-x.StandbyErr; err == nil || !strings.Contains(err.Error(), "take over") {
			t.Errorf("standby: %v", err)
		}
		if err := <-x.PrimaryErr; !errors.Is(err, migrate.ErrStandbyLost) {
			t.Errorf("primary: %v", err)
		}
		alone(t, x)
	})
}

// Of a copy that may run though the take-over failed nothing is said, least of all
// that protection has ended.
func TestTakeOverMayRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{})
		x.Shadow.Balk(migrate.ErrMayRun)
		if err := x.Standby.Failover("asked for"); err != nil {
			t.Fatal(err)
		}
		if err := <-x.StandbyErr; !errors.Is(err, migrate.ErrMayRun) {
			t.Errorf("standby: %v", err)
		}
		x.Work(2, 20*time.Millisecond)
		select {
		case err := <-x.PrimaryErr:
			t.Errorf("the primary was told: %v", err)
		default:
		}
		x.Net.Refuse(true)
		x.Stop()
		<-x.PrimaryErr
	})
}

// TestSlowFirstCopy: while a copy takes long the standby goes on showing life.
func TestSlowFirstCopy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := migratetest.NewPair(migratetest.Options{Automatic: true})
		x.Points.At("shadow: apply", 1, func() { time.Sleep(40 * time.Second) })
		x.Start(t)
		time.Sleep(30 * time.Second)
		if st := x.Primary.Stats(); st.Protected || st.Reconnects > 0 {
			t.Errorf("while it is copied: %+v", st)
		}
		time.Sleep(15 * time.Second)
		if st := x.Primary.Stats(); !st.Protected || st.Reconnects > 0 {
			t.Errorf("after the copy: %+v", st)
		}
		x.Primary.End("enough")
		ended(t, x, nil, nil)
	})
}

func TestStandbyEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{Automatic: true})
		x.Standby.End("it is needed elsewhere")
		err := <-x.PrimaryErr
		if !errors.Is(err, migrate.ErrStandbyLost) || !strings.Contains(err.Error(), "it is needed elsewhere") {
			t.Errorf("primary: %v", err)
		}
		<-x.StandbyErr
		alone(t, x)
	})
}

func TestOutputTriggers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{Automatic: true})
		before := x.Primary.Stats().Epoch
		x.Work(20, 30*time.Millisecond)
		if got := x.Primary.Stats().Epoch - before; got < 15 {
			t.Errorf("%d epochs for 20 outputs", got)
		}
		x.Primary.End("enough")
		ended(t, x, nil, nil)
	})
}

// The policy is changed under a running protection; each change is felt within
// what the one before would have had to wait.
func TestSetPolicy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{Policy: migrate.Policy{Trigger: migrate.TriggerInterval, Max: 100 * time.Millisecond}})
		epochs := func(p migrate.Policy) wire.Epoch {
			if err := x.Primary.SetPolicy(p); err != nil {
				t.Fatal(err)
			}
			before := x.Primary.Stats().Epoch
			x.Work(500, 10*time.Millisecond)
			return x.Primary.Stats().Epoch - before
		}
		// Five seconds each; a checkpoint of the fake's takes 5 ms.
		for _, c := range []struct {
			p          migrate.Policy
			most, many wire.Epoch
		}{
			{migrate.Policy{Trigger: migrate.TriggerInterval, Max: time.Second}, 6, 4},
			{migrate.Policy{Trigger: migrate.TriggerInterval, Max: 50 * time.Millisecond}, 101, 95},
			{migrate.Policy{Trigger: migrate.TriggerOutput, Min: 100 * time.Millisecond, Max: time.Minute}, 51, 45},
			{migrate.Policy{Trigger: migrate.TriggerOutput, Max: time.Minute, Share: 0.1}, 101, 80},
			{migrate.Policy{Trigger: migrate.TriggerOutput, Max: 30 * time.Millisecond, Share: 0.01}, 11, 9},
		} {
			if n := epochs(c.p); n > c.most || n < c.many {
				t.Errorf("%+v: %d epochs, want %d to %d", c.p, n, c.many, c.most)
			}
		}
		if err := x.Primary.SetPolicy(migrate.Policy{Trigger: "whim", Max: 1}); err == nil {
			t.Error("a policy of no sense was taken")
		}
		x.Primary.End("enough")
		ended(t, x, nil, nil)
	})
}

// However long its pauses are, the guest has its share of the time.
func TestShare(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{})
		x.Guest.Suspend, x.Guest.Copy = 60*time.Millisecond, 20*time.Millisecond
		x.Work(10, 50*time.Millisecond)
		before, began := x.Primary.Stats().PauseSum, time.Now()
		for range 200 { // not Work, which waits for a guest that stands
			go x.Guest.Work()
			time.Sleep(50 * time.Millisecond)
		}
		share := float64(x.Primary.Stats().PauseSum-before) / float64(time.Since(began))
		if share > 0.31 || share < 0.2 {
			t.Errorf("paused for %.2f of its time", share)
		}
		x.Primary.End("enough")
		ended(t, x, nil, nil)
	})
}

// The standby hears nothing any more, at all kinds of moments. The primary lives,
// so that it is told that its copy is no longer the guest: not one frame of what it
// holds may leave.
func TestSilentPrimary(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			x := start(t, migratetest.Options{Automatic: true, Seed: seed})
			x.Net.Delay(time.Duration(seed%4) * time.Millisecond)
			x.Work(int(seed), 7*time.Millisecond)
			takeOver(t, x)
			if d := x.Standby.Stats().Failover.Detect; d < timeout || d > timeout+2*interval {
				t.Errorf("detected after %v", d)
			}
		})
	}
}

// takeOver makes the standby take over and checks all that must hold then.
func takeOver(t *testing.T, x *migratetest.Pair) {
	t.Helper()
	x.Net.Mute(migratetest.Primary, true)
	time.Sleep(timeout + 3*interval)
	if st := x.Standby.Stats(); st.State != migrate.Active {
		t.Fatalf("standby: %+v", st)
	}
	x.Net.Mute(migratetest.Primary, false)
	ended(t, x, migrate.ErrTakenOver, nil)
	if !x.Guest.Destroyed() {
		t.Error("two copies run")
	}
	exact(t, x)
}

// The standby is told to take over while the primary lives, and the connection dies at
// that moment. The primary does not let one frame go that the other copy, which it
// can still ask, does not know of.
func TestToldAndSilent(t *testing.T) {
	for name, o := range map[string]migratetest.Options{
		"rejoin":    {Rejoin: time.Minute},
		"no rejoin": {},
		"automatic": {Automatic: true},
	} {
		for _, takes := range []time.Duration{0, timeout, 5 * time.Second} {
			t.Run(fmt.Sprintf("%s, %v", name, takes), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					x := start(t, o)
					x.Points.At("shadow: take over", 1, func() { time.Sleep(takes) })
					x.Net.Freeze()
					if err := x.Standby.Failover("told to"); err != nil {
						t.Fatal(err)
					}
					x.Work(200, 50*time.Millisecond)
					ended(t, x, migrate.ErrTakenOver, nil)
					if !x.Guest.Destroyed() {
						t.Error("two copies run")
					}
					exact(t, x)
				})
			})
		}
	}
}

// A take-over that fails while the primary asks is none: there must be one copy.
func TestToldAndSilentFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{Rejoin: time.Minute})
		x.Shadow.Spoil(1)
		x.Points.At("shadow: take over", 1, func() { time.Sleep(3 * time.Second) })
		x.Net.Freeze()
		if err := x.Standby.Failover("told to"); err != nil {
			t.Fatal(err)
		}
		<-x.StandbyErr
		x.Net.Refuse(true)
		if err := <-x.PrimaryErr; !errors.Is(err, migrate.ErrStandbyLost) {
			t.Errorf("primary: %v", err)
		}
		alone(t, x)
	})
}

// Whoever cleans up after a primary that was killed learns whether the guest is still
// its own, while a take-over is under way, too.
func TestAsk(t *testing.T) {
	for name, c := range map[string]struct {
		failover, fails, mayRun, refuse bool
		want                            error // nil: not known to have taken over
		unknown                         bool  // whether it has
	}{
		"not taken over":  {},
		"taken over":      {failover: true, want: migrate.ErrTakenOver},
		"take-over fails": {failover: true, fails: true},
		"it may run":      {failover: true, mayRun: true, unknown: true},
		"process gone":    {refuse: true, unknown: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var cfg migrate.PrimaryConfig
				x := migratetest.NewPair(migratetest.Options{Primary: func(c *migrate.PrimaryConfig) { cfg = *c }})
				var killed atomic.Bool
				log := slog.New(slog.DiscardHandler)
				x.Primary = migrate.NewPrimary(cfg, func(ctx context.Context) (net.Conn, error) {
					if killed.Load() {
						return nil, migrate.ErrStandbyLost
					}
					return x.Net.Dial(ctx)
				}, x.Guest, x.Output, log)
				x.Start(t)
				x.Work(20, 50*time.Millisecond)
				killed.Store(true)
				x.Net.Kill(migratetest.Primary)
				<-x.PrimaryErr
				x.Net.Refuse(c.refuse)
				if c.fails {
					x.Shadow.Spoil(1)
				}
				if c.mayRun {
					x.Shadow.Balk(migrate.ErrMayRun)
				}
				if c.failover {
					x.Points.At("shadow: take over", 1, func() { time.Sleep(4 * time.Second) })
					if err := x.Standby.Failover("told to"); err != nil {
						t.Fatal(err)
					}
					time.Sleep(time.Second)
				}
				remembered := false
				cfg.TakenOver = func() error { remembered = true; return nil }
				ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
				defer cancel()
				err := migrate.Ask(ctx, cfg, x.Net.Dial, log)
				if c.want != nil && !errors.Is(err, c.want) || (c.unknown || c.want != nil) != (err != nil) || errors.Is(err, migrate.ErrTakenOver) != remembered {
					t.Errorf("%v, remembered %v", err, remembered)
				}
				if err == nil && !x.Shadow.Closed() {
					t.Error("it still has a copy, though it said that it has not taken over")
				}
				// It need not be told any more, or has nothing left.
				select {
				case <-x.StandbyErr:
				case <-time.After(15 * time.Second):
					t.Error("the standby does not end")
				}
			})
		})
	}
}

// A connection that says nothing any more is replaced: the standby lives.
func TestFrozenConnection(t *testing.T) {
	for name, o := range map[string]migratetest.Options{"rejoin": {Rejoin: time.Minute}, "no rejoin": {}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := start(t, o)
				for n := range int64(5) {
					x.Net.Freeze()
					x.Work(40, 50*time.Millisecond)
					if st := x.Primary.Stats(); !st.Protected || st.Reconnects != n+1 {
						t.Fatalf("%+v", st)
					}
				}
				takeOverTold(t, x)
			})
		})
	}
}

// takeOverTold is takeOver where the standby has to be told.
func takeOverTold(t *testing.T, x *migratetest.Pair) {
	t.Helper()
	if err := x.Standby.Failover("told to"); err != nil {
		t.Fatal(err)
	}
	ended(t, x, migrate.ErrTakenOver, nil)
	exact(t, x)
}

func TestSilenceWithoutPermission(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{})
		x.Net.Cut(true)
		time.Sleep(5 * time.Second)
		if st := x.Standby.Stats(); st.State != migrate.Ready || !st.Silent {
			t.Fatalf("standby: %+v", st)
		}
		if err := x.Standby.Failover("told to"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if st := x.Standby.Stats(); st.State != migrate.Active {
			t.Fatalf("standby: %+v", st)
		}
		<-x.PrimaryErr
		x.Stop()
		<-x.StandbyErr
	})
}

// A connection that breaks, in whatever way, ends nothing: the next one goes on
// where it stopped.
func TestReconnect(t *testing.T) {
	breaks := map[string]func(*migratetest.Network){
		"reset":             (*migratetest.Network).Reset,
		"closed by primary": func(n *migratetest.Network) { n.Kill(migratetest.Primary) },
		"closed by standby": func(n *migratetest.Network) { n.Kill(migratetest.Standby) },
		"short cut":         func(n *migratetest.Network) { n.Cut(true); time.Sleep(timeout / 2); n.Cut(false) },
		"cut and reset":     func(n *migratetest.Network) { n.Cut(true); n.Reset(); time.Sleep(timeout / 2); n.Cut(false) },
		"corrupt to":        func(n *migratetest.Network) { n.Corrupt(migratetest.Primary, 5000) },
		"corrupt fro":       func(n *migratetest.Network) { n.Corrupt(migratetest.Standby, 3) },
	}
	for name, breaking := range breaks {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := start(t, migratetest.Options{Automatic: true, Pages: 512})
				x.Net.Delay(time.Millisecond)
				first := x.Net.Written()
				for i := range 30 {
					if !strings.HasPrefix(name, "corrupt") || i%3 == 0 {
						breaking(x.Net)
					}
					x.Work(3, time.Duration(30+i)*time.Millisecond)
				}
				x.Work(20, 20*time.Millisecond)
				st, sb := x.Primary.Stats(), x.Standby.Stats()
				if !st.Protected || sb.State != migrate.Ready || st.Epoch < 20 {
					t.Fatalf("primary %+v, standby %+v", st, sb)
				}
				// Not each time where it takes some more bytes to notice; and the standby also
				// counts those whose Welcome does not arrive whole.
				if name != "short cut" && (st.Reconnects < 8 || sb.Reconnects < st.Reconnects) {
					t.Errorf("%d and %d reconnects", st.Reconnects, sb.Reconnects)
				}
				// Not another copy of all memory for each of them.
				if n := x.Net.Written() - first; n > 10*512*page.Size {
					t.Errorf("%d bytes were sent", n)
				}
				takeOver(t, x)
			})
		})
	}
}

// After a longer break on a standby that lives the guest has gone on alone; then
// only what changed is sent, and what is committed after that is whole.
func TestRejoin(t *testing.T) {
	for name, broken := range map[string]func(*migratetest.Network){
		"silence":   func(n *migratetest.Network) { n.Cut(true); time.Sleep(30 * time.Second); n.Cut(false) },
		"cut, lost": func(n *migratetest.Network) { n.Cut(true); time.Sleep(5 * time.Second); n.Reset(); n.Cut(false) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := start(t, migratetest.Options{Rejoin: time.Minute, Pages: 2048})
				x.Net.Delay(time.Millisecond)
				for range 5 {
					x.Points.At("guest: resumed", 2, func() {}) // at different moments of an epoch
					x.Guest.Work()
					time.Sleep(5 * time.Millisecond)
					sent, count := x.Net.Written(), x.Guest.Count()
					done := make(chan struct{})
					go func() { broken(x.Net); close(done) }()
					time.Sleep(timeout + 2*interval)
					st := x.Primary.Stats()
					if st.Protected || !st.Alone {
						t.Fatalf("while the standby is silent: %+v", st)
					}
					x.Work(10, 10*time.Millisecond)
					if out := x.Output.Released(); out[len(out)-1] < count+10 {
						t.Errorf("the guest alone is not heard: %d of %d", out[len(out)-1], x.Guest.Count())
					}
					<-done
					x.Work(20, 50*time.Millisecond)
					if st := x.Primary.Stats(); !st.Protected || st.Alone {
						t.Fatalf("after it is back: %+v", st)
					}
					if n := x.Net.Written() - sent; n > 700*page.Size {
						t.Errorf("%d bytes were sent, of %d", n, 2048*page.Size)
					}
				}
				x.Net.Cut(true)
				time.Sleep(timeout / 2)
				if err := x.Standby.Failover("told to"); err != nil {
					t.Fatal(err)
				}
				time.Sleep(timeout / 5)
				exact(t, x)
				// It comes back, and learns that its copy is not the guest any more.
				x.Net.Cut(false)
				ended(t, x, migrate.ErrTakenOver, nil)
				if !x.Guest.Destroyed() {
					t.Error("two copies run")
				}
			})
		})
	}
}

func TestRejoinTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{Rejoin: 10 * time.Second})
		x.Net.Cut(true)
		if err := <-x.PrimaryErr; !errors.Is(err, migrate.ErrStandbyLost) {
			t.Errorf("primary: %v", err)
		}
		alone(t, x)
		x.Net.Cut(false) // now the standby learns that the connection is closed
		if err := <-x.StandbyErr; !errors.Is(err, migrate.ErrPrimaryLost) {
			t.Errorf("standby: %v", err)
		}
	})
}

// A closed connection is no power cut: the guest runs on at the primary.
func TestReplicatorKilled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{Automatic: true})
		x.Net.Refuse(true) // it does not come back
		x.Net.Kill(migratetest.Primary)
		began := time.Now()
		if err := <-x.StandbyErr; !errors.Is(err, migrate.ErrPrimaryLost) {
			t.Errorf("standby: %v", err)
		}
		if d := time.Since(began); d < 9*time.Second || d > 12*time.Second {
			t.Errorf("dropped after %v", d)
		}
		if x.Shadow.Over() != nil || !x.Shadow.Closed() {
			t.Error("the shadow took over, or stays")
		}
		<-x.PrimaryErr
	})
}

// A standby whose process is known to be gone is not waited for.
func TestStandbyKilled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{})
		x.Net.Refuse(true)
		x.Net.Kill(migratetest.Standby)
		if err := <-x.PrimaryErr; !errors.Is(err, migrate.ErrStandbyLost) {
			t.Errorf("primary: %v", err)
		}
		alone(t, x)
		x.Stop()
		<-x.StandbyErr
	})
}

// A copy that is not what the primary believes is found out, and mended where it
// can be: sent whole what is named, and refused for good what is not.
func TestOutOfStep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{Automatic: true, Cache: 64})
		for i := range 20 {
			// All of it, so that no page that is not named stays wrong.
			for n := range 64 {
				x.Shadow.Spoil(n)
			}
			x.Guest.Changes(300)
			x.Work(5, 40*time.Millisecond)
			if st := x.Primary.Stats(); !st.Protected || st.Resyncs < int64(i) {
				t.Fatalf("%d: %+v", i, st)
			}
			x.Guest.Changes(8)
		}
		st, sb := x.Primary.Stats(), x.Standby.Stats()
		if st.Resyncs == 0 || st.Resyncs != sb.Refused || st.Reconnects != 0 {
			t.Errorf("primary %+v, standby %+v", st, sb)
		}
		takeOver(t, x)
	})
}

// checker is a shadow that refuses states.
type checker struct {
	migrate.Shadow
	refuse func() bool
}

func (c checker) Check(state []byte) error {
	if c.refuse() {
		return errors.New("a state of no sense")
	}
	return c.Shadow.Check(state)
}

func TestRefusedForGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := migratetest.NewPair(migratetest.Options{Automatic: true})
		var on atomic.Bool
		sc := migrate.StandbyConfig{UUID: [16]byte{1}, MemoryKiB: 256, Limit: migratetest.Limit, Generation: 3,
			Heartbeat: migrate.Heartbeat{Interval: interval, Timeout: timeout}, Automatic: true}
		x.Standby = migrate.NewStandby(sc, x.Net.Accept, checker{x.Shadow, on.Load}, slog.New(slog.DiscardHandler))
		x.Start(t)
		x.Work(20, 50*time.Millisecond)
		on.Store(true)
		ended(t, x, migrate.ErrRefused, nil)
		alone(t, x)
		if st := x.Standby.Stats(); st.Refused != 3 {
			t.Errorf("refused %d times", st.Refused)
		}
	})
}

func TestShadowBreaks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{Automatic: true})
		x.Shadow.Fail(errors.New("restore has died"))
		err := <-x.PrimaryErr
		if !errors.Is(err, migrate.ErrStandbyLost) || !strings.Contains(err.Error(), "restore has died") {
			t.Errorf("primary: %v", err)
		}
		if err := <-x.StandbyErr; err == nil || x.Shadow.Over() != nil {
			t.Errorf("standby: %v", err)
		}
		alone(t, x)
	})
}

// stumbler is a guest whose checkpoint ends with more than what it was ended by.
type stumbler struct {
	migrate.Guest
	on  *atomic.Bool
	err error
}

func (g stumbler) Checkpoint(ctx context.Context, seal func() error, c *migrate.Capture) error {
	if !g.on.Load() {
		return g.Guest.Checkpoint(ctx, seal, c)
	}
	<-ctx.Done()
	return errors.Join(context.Cause(ctx), g.err)
}

// What goes wrong with the guest while protection ends is not hidden by why it ends.
func TestStumble(t *testing.T) {
	stuck := errors.New("the guest stands and cannot be resumed")
	for name, c := range map[string]struct {
		end  func(*migratetest.Pair)
		want error // too
	}{
		"asked":            {func(x *migratetest.Pair) { x.Primary.End("enough") }, nil},
		"standby ends":     {func(x *migratetest.Pair) { x.Standby.End("enough") }, migrate.ErrStandbyLost},
		"standby silent":   {func(x *migratetest.Pair) { x.Net.Cut(true) }, migrate.ErrStandbyLost},
		"standby killed":   {func(x *migratetest.Pair) { x.Net.Refuse(true); x.Net.Kill(migratetest.Standby) }, migrate.ErrStandbyLost},
		"standby has it":   {func(x *migratetest.Pair) { x.Standby.Failover("told to") }, migrate.ErrTakenOver},
		"asked, no reason": {func(x *migratetest.Pair) { x.Stop() }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var on atomic.Bool
				x := start(t, migratetest.Options{Guest: func(g migrate.Guest) migrate.Guest { return stumbler{g, &on, stuck} }})
				on.Store(true)
				x.Work(1, time.Second)
				c.end(x)
				err := <-x.PrimaryErr
				if !errors.Is(err, stuck) || c.want != nil && !errors.Is(err, c.want) {
					t.Errorf("%v, want %v and %v", err, c.want, stuck)
				}
				if said := fmt.Sprint(err); strings.Count(said, "\n") > 1 || strings.Contains(said, "asked to end") {
					t.Errorf("said to the operator: %v", err)
				}
				x.Stop()
				x.Net.Refuse(false)
				<-x.StandbyErr
			})
		})
	}
}

func TestGuestGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{Automatic: true})
		x.Guest.Fail(migrate.ErrGuestGone)
		ended(t, x, migrate.ErrGuestGone, nil)
		if x.Shadow.Over() != nil || !x.Shadow.Closed() {
			t.Error("the shadow of a guest that has ended must end")
		}
	})
}

// A guest's interfaces go with it; one that goes alone ends protection by itself.
func TestInterfaceGone(t *testing.T) {
	lost := errors.New("vif: interface is gone")
	for name, c := range map[string]struct {
		guest bool
		want  error
	}{
		"with the guest": {true, migrate.ErrGuestGone},
		"alone":          {false, lost},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := start(t, migratetest.Options{Automatic: true})
				x.Points.At("output: release", 1, func() {
					x.Output.Break(lost)
					if c.guest {
						x.Guest.Fail(migrate.ErrGuestGone)
					}
				})
				x.Work(1, time.Second)
				err := <-x.PrimaryErr
				if !errors.Is(err, c.want) || c.guest && err.Error() != c.want.Error() {
					t.Errorf("%v, want %v", err, c.want)
				}
				if err := <-x.StandbyErr; err != nil || x.Shadow.Over() != nil || !x.Shadow.Closed() {
					t.Errorf("standby: %v", err)
				}
			})
		})
	}
}

// Being asked to end is heeded wherever the protection stands.
func TestAbortAnywhere(t *testing.T) {
	for label := range labels(t) {
		for _, side := range []string{"primary", "standby"} {
			t.Run(label+", "+side, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					x := migratetest.NewPair(migratetest.Options{Automatic: true})
					end := func() { x.Primary.End("enough") }
					if side == "standby" {
						end = func() { x.Standby.End("enough") }
					}
					x.Points.At(label, 1, end)
					x.Start(t)
					x.Work(40, 20*time.Millisecond)
					perr, serr := <-x.PrimaryErr, <-x.StandbyErr
					if side == "primary" && (perr != nil || serr != nil) || side == "standby" && !errors.Is(perr, migrate.ErrStandbyLost) {
						t.Errorf("primary: %v, standby: %v", perr, serr)
					}
					alone(t, x)
					if !x.Shadow.Closed() {
						t.Error("the shadow stays")
					}
				})
			})
		}
	}
}

// labels are the points that a protection comes to, and how often at least.
func labels(t *testing.T) (hits map[string]int) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{Automatic: true})
		hits = x.Points.Hits()
		x.Primary.End("enough")
		ended(t, x, nil, nil)
	})
	if len(hits) < 10 {
		t.Fatalf("points: %v", hits)
	}
	return hits
}

// A host loses its power at each of the labelled points: the first time it is come
// to, at which there may be nothing to take over from, and later.
func TestCrashPoints(t *testing.T) {
	for label, hits := range labels(t) {
		for _, nth := range []int{1, 2, 3, 9} {
			if nth > hits {
				continue
			}
			for _, side := range []string{"primary", "standby"} {
				if strings.HasPrefix(label, "shadow") != (side == "standby") {
					continue // a point is of one side
				}
				t.Run(fmt.Sprintf("%s, %s, %d", side, label, nth), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { crash(t, side, label, nth) })
				})
			}
		}
	}
}

func crash(t *testing.T, side, label string, nth int) {
	x := migratetest.NewPair(migratetest.Options{Automatic: true, Seed: uint64(nth)})
	off, thaw := make(chan struct{}), make(chan struct{})
	x.Points.At(label, nth, func() {
		x.Net.Cut(true)
		close(off)
		<-thaw // whoever came here goes no further
	})
	x.Start(t)
	work := make(chan struct{})
	go func() {
		defer close(work)
		x.Work(60, 20*time.Millisecond)
	}()
	<-off
	if side == "standby" {
		// The guest goes on, and is heard again.
		if err := <-x.PrimaryErr; !errors.Is(err, migrate.ErrStandbyLost) {
			t.Errorf("primary: %v", err)
		}
		<-work
		alone(t, x)
		close(thaw)
		x.Stop()
		<-x.StandbyErr
		return
	}
	// Of a host without power nothing leaves any more.
	told := x.Output.Released()
	time.Sleep(timeout + 3*interval)
	over := x.Shadow.Over()
	switch st := x.Standby.Stats(); {
	case st.Epoch == 0 && over != nil:
		t.Error("taken over from nothing")
	case st.Epoch > 0 && over == nil:
		t.Errorf("not taken over: %+v", st)
	case st.Epoch == 0:
		time.Sleep(10 * time.Second) // before it gives up
		if !x.Shadow.Closed() {
			t.Error("the shadow stays")
		}
	default:
		if n := len(told); n > 0 && told[n-1] > over.Count {
			t.Errorf("frame %d had left, and what runs is the guest at %d", told[n-1], over.Count)
		}
	}
	close(thaw)
	<-work
	x.Stop()
	<-x.PrimaryErr
	<-x.StandbyErr
}

// A connection that breaks while all memory is sent, the first time or later, has it
// sent anew, at whatever moment it breaks.
func TestCopyBreaks(t *testing.T) {
	breaks := map[string]func(*migratetest.Network){
		"reset":             (*migratetest.Network).Reset,
		"closed by primary": func(n *migratetest.Network) { n.Kill(migratetest.Primary) },
		"closed by standby": func(n *migratetest.Network) { n.Kill(migratetest.Standby) },
	}
	for name, breaking := range breaks {
		for label := range labels(t) {
			if strings.HasPrefix(label, "output: release") {
				continue // it comes after the copy
			}
			for _, later := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, %s, later %v", name, label, later), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						x := migratetest.NewPair(migratetest.Options{Automatic: true, Pages: 2000})
						if later {
							x.Start(t)
							x.Work(20, 50*time.Millisecond)
							x.Guest.Confuse(migratetest.After)
						}
						if !later || label != "guest: begin" && label != "shadow: head" {
							x.Points.At(label, 1, func() { breaking(x.Net) })
						}
						if !later {
							x.Start(t)
						}
						x.Work(40, 50*time.Millisecond)
						if st := x.Primary.Stats(); !st.Protected || st.Epoch < 5 || st.CopyBytes != 2000*page.Size {
							t.Fatalf("%+v", st)
						}
						takeOver(t, x)
					})
				})
			}
		}
	}
}

// A guest that is not protected yet is heard while its first copy is made anew, though
// it was about to be.
func TestCopyBreaksLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := migratetest.NewPair(migratetest.Options{Automatic: true})
		x.Points.At("guest: resumed", 1, func() {
			x.Net.Reset()
			x.Points.At("guest: round", 1, func() { time.Sleep(10 * time.Second) })
		})
		x.Start(t)
		x.Work(50, 50*time.Millisecond)
		if out := x.Output.Released(); uint64(len(out)) != x.Guest.Count() {
			t.Errorf("%d frames of %d have left", len(out), x.Guest.Count())
		}
		x.Work(200, 50*time.Millisecond)
		if st := x.Primary.Stats(); !st.Protected {
			t.Fatalf("%+v", st)
		}
		takeOver(t, x)
	})
}

// Only the acknowledgement of the first copy is lost: it is not sent again.
func TestCopyAcknowledgementLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := migratetest.NewPair(migratetest.Options{Automatic: true, Pages: 2000})
		x.Points.At("shadow: check", 1, func() {
			x.Net.Mute(migratetest.Standby, true)
			go func() {
				time.Sleep(timeout / 5)
				x.Net.Reset()
				x.Net.Mute(migratetest.Standby, false)
			}()
		})
		x.Start(t)
		x.Work(40, 50*time.Millisecond)
		if st, n := x.Primary.Stats(), x.Net.Written(); !st.Protected || st.Reconnects != 1 || n > 3000*page.Size {
			t.Fatalf("%d bytes written, %+v", n, st)
		}
		takeOver(t, x)
	})
}

// A copy that begins anew is of the guest that it was begun with.
func TestCopyAnotherHead(t *testing.T) {
	for head, good := range map[string]bool{migratetest.Head: true, "another": false} {
		synctest.Test(t, func(t *testing.T) {
			n, s := migratetest.NewNetwork(), migratetest.NewShadow()
			sb := migrate.NewStandby(migrate.StandbyConfig{UUID: [16]byte{1}, MemoryKiB: 4096, Limit: migratetest.Limit, Generation: 3,
				Heartbeat: migrate.Heartbeat{Interval: interval, Timeout: timeout}}, n.Accept, s, slog.New(slog.DiscardHandler))
			done := make(chan error, 1)
			go func() { done <- sb.Run(t.Context()) }()
			hello := wire.Hello{Lowest: wire.Version, Highest: wire.Version, UUID: [16]byte{1}, MemoryKiB: 4096, Session: 7}.Append(nil)
			for _, h := range []string{migratetest.Head, head} {
				conn, err := n.Dial(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				for _, f := range []wire.Frame{{Type: wire.TypeHello, Payload: hello}, {Type: wire.TypeHead, Epoch: 1, Payload: []byte(h)}} {
					f.Generation = 3
					raw, err := f.Append(nil)
					if err != nil {
						t.Fatal(err)
					}
					conn.Write(raw)
				}
				synctest.Wait()
				conn.Close()
			}
			began := time.Now()
			err := <-done
			if waited := time.Since(began) > time.Second; err == nil || waited != good {
				t.Errorf("head %q: waited for another connection %v: %v", head, waited, err)
			}
		})
	}
}

// It is not tried for ever.
func TestCopyBreaksForGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := migratetest.NewPair(migratetest.Options{Automatic: true})
		var again func()
		again = func() {
			x.Net.Reset()
			x.Points.At("guest: round", 1, again)
		}
		x.Points.At("guest: round", 1, again)
		x.Start(t)
		ended(t, x, migrate.ErrStandbyLost, nil)
		alone(t, x)
		if n := x.Points.Hits()["guest: round"]; n != 4 || !x.Shadow.Closed() {
			t.Errorf("tried %d times, shadow closed: %v", n, x.Shadow.Closed())
		}
	})
}

// Who dies in the middle of the first copy is not waited for for long.
func TestCopyKilled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := migratetest.NewPair(migratetest.Options{Automatic: true})
		x.Points.At("guest: round", 1, func() {
			x.Net.Refuse(true)
			x.Net.Kill(migratetest.Primary)
		})
		x.Start(t)
		began := time.Now()
		ended(t, x, migrate.ErrStandbyLost, migrate.ErrPrimaryLost)
		if d := time.Since(began); d > 12*time.Second || x.Shadow.Over() != nil || !x.Shadow.Closed() {
			t.Errorf("after %v: shadow over %v, closed %v", d, x.Shadow.Over(), x.Shadow.Closed())
		}
		alone(t, x)
	})
}

// Somebody else reads the log of changed pages: all is sent again, and protection
// goes on.
func TestPagesUnknown(t *testing.T) {
	for _, c := range []migratetest.Confusion{migratetest.Before, migratetest.After} {
		synctest.Test(t, func(t *testing.T) {
			x := start(t, migratetest.Options{Automatic: true, Pages: 2000})
			for range 3 {
				x.Guest.Confuse(c)
				sent, epoch := x.Net.Written(), x.Primary.Stats().Epoch
				x.Work(10, 50*time.Millisecond)
				if n := x.Net.Written() - sent; n < 2000*page.Size/8 || x.Primary.Stats().Epoch < epoch+3 {
					t.Errorf("%d bytes and %d epochs later", n, x.Primary.Stats().Epoch-epoch)
				}
			}
			takeOver(t, x)
		})
	}
}

// Whatever happens to connections, pages and settings, in whatever order, and
// however it ends: one copy of the guest runs, and it is one that knows all that
// anyone outside has been told.
func TestRandomFaults(t *testing.T) {
	n := 120
	if testing.Short() {
		n = 30
	}
	both := 0
	for seed := range uint64(n) {
		synctest.Test(t, func(t *testing.T) {
			if randomFaults(t, seed) {
				both++
			}
		})
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	// Several faults in a row can amount to silence on both sides, and nobody
	// arbitrates. That must stay rare here, or the test shows nothing.
	if both > n/30 {
		t.Errorf("%d times of %d both sides found the other one silent", both, n)
	}
}

func randomFaults(t *testing.T, seed uint64) (bothSilent bool) {
	r := rand.New(rand.NewPCG(seed, 7))
	ms := func(n int) time.Duration { return time.Duration(r.IntN(n)) * time.Millisecond }
	o := migratetest.Options{Automatic: r.IntN(2) == 0, Seed: seed, Pages: 32 + r.IntN(200), Cache: r.IntN(100), Rejoin: time.Hour}
	x := start(t, o)
	x.Net.Delay(ms(15))
	for range 5 + r.IntN(20) {
		switch r.IntN(10) {
		case 0:
			x.Net.Reset()
		case 1:
			x.Net.Kill(migratetest.Side(r.IntN(2)))
		case 2:
			x.Net.Cut(true)
			time.Sleep(ms(int(timeout/time.Millisecond) / 2))
			x.Net.Cut(false)
		case 3:
			x.Net.Corrupt(migratetest.Side(r.IntN(2)), r.IntN(20000))
		case 4:
			x.Net.Delay(ms(30))
		case 5:
			x.Guest.Confuse(migratetest.Confusion(r.IntN(3)))
		case 6:
			p := migrate.Policy{Trigger: migrate.TriggerOutput, Min: ms(30), Share: r.Float64()}
			p.Max = p.Min + 1 + ms(300)
			if r.IntN(2) == 0 {
				p.Trigger = migrate.TriggerInterval
			}
			if err := x.Primary.SetPolicy(p); err != nil {
				t.Error(err)
			}
		case 7:
			if o.Automatic {
				break // nobody arbitrates
			}
			x.Net.Cut(true)
			time.Sleep(timeout + ms(5000))
			x.Net.Cut(false)
		case 8:
			x.Guest.Changes(1 + r.IntN(100))
		default:
			x.Work(r.IntN(20), ms(50))
		}
		x.Work(r.IntN(5), ms(100))
	}
	if r.IntN(3) == 0 { // what else happens, happens meanwhile
		go x.Primary.Switchover(t.Context())
		time.Sleep(ms(40))
	}
	switch r.IntN(5) {
	case 4:
		if x.Primary.Switchover(t.Context()) != nil {
			x.Primary.End("enough")
		}
	case 0:
		x.Primary.End("enough")
	case 1:
		x.Standby.End("enough")
	case 2:
		x.Guest.Fail(migrate.ErrGuestGone)
	case 3:
		if o.Automatic {
			x.Net.Mute(migratetest.Primary, true)
			time.Sleep(timeout + 3*interval)
			x.Net.Mute(migratetest.Primary, false)
		} else if x.Standby.Failover("told to") != nil {
			x.Primary.End("enough")
		}
	}
	perr, serr := <-x.PrimaryErr, error(nil)
	select {
	case serr = <-x.StandbyErr:
	case <-time.After(time.Minute):
		x.Stop()
		serr = <-x.StandbyErr
	}
	if testing.Verbose() {
		t.Logf("seed %d: primary %v (%+v), standby %v", seed, perr, x.Primary.Stats(), serr)
	}
	switch over := x.Shadow.Over(); {
	case over != nil && o.Automatic && strings.Contains(fmt.Sprint(perr), "no sign of life"):
		return true
	case over != nil:
		if !x.Guest.Destroyed() {
			t.Errorf("two copies run: primary %v, standby %v", perr, serr)
		}
		// What a guest alone said before the standby was told to take over is lost, and
		// whoever told it answers for that.
		if o.Automatic {
			exact(t, x)
		}
	case errors.Is(perr, migrate.ErrGuestGone):
	default:
		alone(t, x)
	}
	if x.Shadow.Over() == nil && !x.Shadow.Closed() {
		t.Error("the shadow stays")
	}
	return false
}

// hostile plays a primary that does not keep to the protocol.
func TestHostilePrimary(t *testing.T) {
	hello := helloAt(0)
	with := func(f func(*wire.Hello)) *wire.Frame {
		h := wire.Hello{Lowest: wire.Version, Highest: wire.Version, UUID: [16]byte{1}, MemoryKiB: 4096, Session: 7}
		f(&h)
		return frame(wire.TypeHello, 0, h.Append(nil))
	}
	sums := func(e wire.Epoch, total, before, first uint64, n int) *wire.Frame {
		return frame(wire.TypeSums, e, wire.Sums{Total: total, Before: before, First: first, Sums: make([]uint64, n)}.Append(nil))
	}
	head, first := headFrame(), firstEpoch()
	then := func(f ...*wire.Frame) []*wire.Frame { return append(slices.Clone(first), f...) }

	for name, c := range map[string]struct {
		frames  []*wire.Frame
		epoch   wire.Epoch // committed in the end
		resyncs int
		open    bool // the connection is
	}{
		"whole":                   {then(epoch(2, 1, pages(2, 1), state(2))...), 2, 0, true},
		"no hello":                {[]*wire.Frame{pages(1, 0)}, 0, 0, false},
		"another guest":           {[]*wire.Frame{with(func(h *wire.Hello) { h.UUID[3] = 1 })}, 0, 0, false},
		"another size":            {[]*wire.Frame{with(func(h *wire.Hello) { h.MemoryKiB++ })}, 0, 0, false},
		"another version":         {[]*wire.Frame{with(func(h *wire.Hello) { h.Lowest, h.Highest = wire.Version+1, wire.Version+1 })}, 0, 0, false},
		"from the middle":         {[]*wire.Frame{with(func(h *wire.Hello) { h.Committed = 4 })}, 0, 0, false},
		"another generation":      {[]*wire.Frame{{Type: wire.TypeHello, Generation: 4, Payload: hello.Payload}}, 0, 0, false},
		"hello twice":             {[]*wire.Frame{hello, hello}, 0, 0, false},
		"no head":                 {[]*wire.Frame{hello, pages(1, 0)}, 0, 0, false},
		"head twice":              {[]*wire.Frame{hello, head, head}, 0, 0, false},
		"first, skipped":          {[]*wire.Frame{hello, head, pages(2, 0)}, 0, 0, false},
		"first, wrong sum":        {[]*wire.Frame{hello, head, state(1), frame(wire.TypeEpochEnd, 1, wire.EpochEnd{Bytes: 8}.Append(nil))}, 0, 0, false},
		"first, outside":          {[]*wire.Frame{hello, head, pages(1, migratetest.Limit)}, 0, 0, false},
		"first, without state":    {append([]*wire.Frame{hello}, epoch(1, 1, head, pages(1, 0))...), 0, 0, false},
		"first, says ack":         {[]*wire.Frame{hello, frame(wire.TypeAck, 1, nil)}, 0, 0, false},
		"first, restarts":         {[]*wire.Frame{hello, head, frame(wire.TypeRestart, 1, nil)}, 0, 0, false},
		"says ack":                {then(frame(wire.TypeAck, 2, nil)), 1, 1, false},
		"hello in the middle":     {then(hello), 1, 1, false},
		"stale generation":        {then(&wire.Frame{Type: wire.TypePages, Epoch: 2, Generation: 2}), 1, 1, false},
		"skipped epoch":           {then(pages(3, 0)), 1, 1, true},
		"replayed epoch":          {then(first[1:]...), 1, 1, true},
		"replayed epoch, later":   {then(append(epoch(2, 1, pages(2, 1), state(2)), epoch(2, 1, pages(2, 1), state(2))...)...), 2, 1, true},
		"reordered":               {then(epoch(2, 1, state(2), pages(2, 1))...), 1, 1, true},
		"lying count":             {then(epoch(2, 3, pages(2, 0, 1), state(2))...), 1, 1, true},
		"lost frame":              {then(epoch(2, 2, pages(2, 0), pages(2, 1), state(2))[1:]...), 1, 1, true},
		"outside the guest":       {then(epoch(2, 1, pages(2, migratetest.Limit), state(2))...), 1, 1, true},
		"half a record":           {then(epoch(2, 1, frame(wire.TypePages, 2, records(0)[:7]), state(2))...), 1, 1, true},
		"no state":                {then(epoch(2, 1, pages(2, 0))...), 1, 1, true},
		"half a state":            {then(epoch(2, 0, frame(wire.TypeState, 2, []byte("fake")))...), 1, 1, true},
		"head later":              {then(frame(wire.TypeHead, 2, head.Payload)), 1, 1, true},
		"end without sum":         {then(pages(2, 0), state(2), frame(wire.TypeEpochEnd, 2, nil)), 1, 1, true},
		"refused, then no more":   {then(append([]*wire.Frame{pages(9, 0)}, epoch(2, 1, pages(2, 1), state(2))...)...), 1, 1, true},
		"refused, then restarted": {then(append([]*wire.Frame{pages(9, 0), frame(wire.TypeRestart, 2, nil)}, epoch(2, 1, pages(2, 1), state(2))...)...), 2, 1, true},
		"sums, all":               {then(sums(1, 2, 0, 0, 1), sums(1, 2, 1, 1, 1)), 1, 0, true},
		"sums, begun anew":        {then(sums(1, 9, 0, 0, 1), sums(1, 9, 0, 0, 1), sums(1, 9, 1, 1, 1)), 1, 0, true},
		"sums, then an epoch":     {then(append([]*wire.Frame{sums(1, 9, 0, 0, 1)}, epoch(2, 1, pages(2, 1), state(2))...)...), 2, 0, true},
		"sums, too early":         {[]*wire.Frame{hello, head, sums(1, 1, 0, 0, 1)}, 0, 0, false},
		"sums, too many":          {then(sums(1, 1<<30, 0, 0, 1)), 1, 1, false},
		"sums, outside":           {then(sums(1, 2, 0, uint64(migratetest.Limit)-1, 2)), 1, 1, false},
		"sums, far outside":       {then(sums(1, 2, 0, 1<<47, 2)), 1, 1, false},
		"sums, next epoch":        {then(sums(2, 1, 0, 0, 1)), 1, 1, false},
		"sums, last epoch":        {then(sums(0, 1, 0, 0, 1)), 1, 1, false},
		"sums, amid an epoch":     {then(pages(2, 0), sums(1, 1, 0, 0, 1)), 1, 1, false},
		"sums, without a start":   {then(sums(1, 9, 1, 0, 1)), 1, 1, false},
		"sums, some left out":     {then(sums(1, 9, 0, 0, 1), sums(1, 9, 2, 1, 1)), 1, 1, false},
		"sums, twice":             {then(sums(1, 9, 0, 0, 2), sums(1, 9, 2, 1, 1)), 1, 1, false},
		"sums, of more":           {then(sums(1, 9, 0, 0, 2), sums(1, 10, 2, 2, 1)), 1, 1, false},
		"sums, after the end":     {then(sums(1, 2, 0, 0, 2), sums(1, 2, 1, 2, 1)), 1, 1, false},
		"sums, none":              {then(frame(wire.TypeSums, 1, make([]byte, 24))), 1, 1, false},
		"sums, of another epoch":  {then(append(append([]*wire.Frame{sums(1, 9, 0, 0, 1)}, epoch(2, 1, pages(2, 1), state(2))...), sums(2, 9, 1, 1, 1))...), 2, 1, false},
		"says compared":           {then(frame(wire.TypeCompared, 1, wire.Compared{Pages: 1}.Append(nil))), 1, 1, false},
		"restarts another":        {then(frame(wire.TypeRestart, 3, nil)), 1, 1, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n, s := migratetest.NewNetwork(), migratetest.NewShadow()
				sb := migrate.NewStandby(migrate.StandbyConfig{UUID: [16]byte{1}, MemoryKiB: 4096, Limit: migratetest.Limit, Generation: 3,
					Heartbeat: migrate.Heartbeat{Interval: interval, Timeout: timeout}}, n.Accept, s, slog.New(slog.DiscardHandler))
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error, 1)
				go func() { done <- sb.Run(ctx) }()
				conn, err := n.Dial(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				var resyncs, closed atomic.Int32
				go func() {
					for r := wire.NewReader(conn, 3); ; {
						f, err := r.Read()
						if err != nil {
							closed.Store(1)
							return
						}
						if f.Type == wire.TypeResync {
							resyncs.Add(1)
						}
					}
				}()
				for _, f := range c.frames {
					raw, err := f.Append(nil)
					if err != nil {
						t.Fatal(err)
					}
					conn.Write(raw)
					time.Sleep(time.Millisecond)
				}
				synctest.Wait()
				e, again, open := sb.Stats().Epoch, int(resyncs.Load()), closed.Load() == 0
				if e != c.epoch || again != c.resyncs || open != c.open && c.epoch > 0 {
					t.Errorf("epoch %d committed, %d resyncs, open %v; want %d, %d, %v", e, again, open, c.epoch, c.resyncs, c.open)
				}
				if c.epoch == 0 {
					time.Sleep(2 * time.Second)
					if err := <-done; err == nil {
						t.Error("accepted")
					}
				}
				cancel()
				if c.epoch > 0 {
					<-done
				}
				if s.Over() != nil || !s.Closed() {
					t.Errorf("shadow over=%v closed=%v", s.Over(), s.Closed())
				}
				conn.Close()
			})
		})
	}
}

// A second connection of somebody who speaks for another guest, or another language, is
// refused, and harms nothing. Who speaks for the same guest is its primary's successor:
// see TestAskBinds.
func TestIntruder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{Automatic: true})
		for _, h := range []wire.Hello{
			{Lowest: wire.Version, Highest: wire.Version, UUID: [16]byte{2}, MemoryKiB: 256, Session: 99},
			{Lowest: wire.Version, Highest: wire.Version, UUID: [16]byte{1}, MemoryKiB: 128, Session: 99, Committed: x.Primary.Stats().Epoch},
			{Lowest: wire.Version + 1, Highest: wire.Version + 1, UUID: [16]byte{1}, MemoryKiB: 256, Session: 99},
		} {
			var conn net.Conn
			conn, err := x.Net.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			f := wire.Frame{Type: wire.TypeHello, Generation: 3, Payload: h.Append(nil)}
			b, _ := f.Append(nil)
			conn.Write(b)
			got, err := wire.NewReader(conn, 3).Read()
			if err != nil || got.Type != wire.TypeEnd {
				t.Errorf("answered by %v, %v", got.Type, err)
			}
			conn.Close()
		}
		x.Work(5, 20*time.Millisecond)
		if st := x.Primary.Stats(); !st.Protected || st.Reconnects != 0 {
			t.Errorf("%+v", st)
		}
		x.Primary.End("enough")
		ended(t, x, nil, nil)
	})
}

// Twenty thousand epochs leave no more behind than two thousand: neither
// goroutines nor memory.
func TestManyEpochs(t *testing.T) {
	const early, late = 2000, 20000
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{Automatic: true, Pages: 32, Policy: migrate.Policy{
			Trigger: migrate.TriggerInterval, Max: 10 * time.Millisecond, Share: 1}})
		measure := func(epoch wire.Epoch) (goroutines int, heap uint64) {
			for x.Primary.Stats().Epoch < epoch {
				time.Sleep(time.Second)
				x.Output.Trim()
			}
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return runtime.NumGoroutine(), m.HeapAlloc
		}
		g1, h1 := measure(early)
		x.Net.Reset() // and of connections neither
		g2, h2 := measure(late)
		if g2 > g1 || h2 > h1+1<<20 {
			t.Errorf("after %d epochs %d goroutines and %d KiB, after %d %d and %d", early, g1, h1>>10, late, g2, h2>>10)
		}
		t.Logf("%d to %d goroutines, %d to %d KiB", g1, g2, h1>>10, h2>>10)
		takeOver(t, x)
	})
}
