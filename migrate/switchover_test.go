package migrate_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kemari/migrate"
	"kemari/migrate/migratetest"
)

// switchover asks for one, and returns where its outcome will be.
func switchover(x *migratetest.Pair) chan error {
	done := make(chan error, 1)
	go func() { done <- x.Primary.Switchover(context.Background()) }()
	return done
}

// handedOver checks all that must hold of a switchover that was made: the guest runs
// there and nowhere else, and every frame it has sent here has left, once.
func handedOver(t *testing.T, x *migratetest.Pair) {
	t.Helper()
	ended(t, x, migrate.ErrSwitchedOver, nil)
	over := x.Shadow.Over()
	if over == nil || !x.Guest.Destroyed() || !x.Output.Closed() {
		t.Fatalf("runs there from %v, destroyed here %v, output closed %v", over, x.Guest.Destroyed(), x.Output.Closed())
	}
	out := x.Output.Released()
	for i, n := range out {
		if n != uint64(i)+1 {
			t.Fatalf("frame %d left in the place of %d", n, i+1)
		}
	}
	if uint64(len(out)) != over.Count {
		t.Errorf("%d frames have left, and what runs is the guest at %d", len(out), over.Count)
	}
	if f := x.Standby.Stats().Failover; f == nil || !strings.Contains(f.Reason, "handed the guest over") {
		t.Errorf("the standby says %+v", f)
	}
}

// goesOn checks that the guest runs here, protected.
func goesOn(t *testing.T, x *migratetest.Pair) {
	t.Helper()
	epoch := x.Primary.Stats().Epoch
	x.Work(20, 50*time.Millisecond)
	if st := x.Primary.Stats(); !st.Protected || st.Alone || st.Epoch < epoch+5 || x.Guest.Destroyed() || x.Shadow.Over() != nil {
		t.Errorf("destroyed here %v, runs there from %v: %+v", x.Guest.Destroyed(), x.Shadow.Over(), st)
	}
	if out := x.Output.Released(); !slices.IsSorted(out) || uint64(len(out))+20 < x.Guest.Count() {
		t.Errorf("%d frames of %d have left", len(out), x.Guest.Count())
	}
}

// Nothing leaves before it is committed, and all of it does before the standby runs.
func TestSwitchover(t *testing.T) {
	for _, automatic := range []bool{false, true} {
		for seed := range uint64(20) {
			synctest.Test(t, func(t *testing.T) {
				x := start(t, migratetest.Options{Automatic: automatic, Seed: seed, Rejoin: time.Minute})
				x.Net.Delay(time.Duration(seed%5) * time.Millisecond)
				x.Work(int(seed), 7*time.Millisecond)
				x.Points.At("guest: held", 1, func() {
					held := len(x.Output.Released())
					x.Points.At("shadow: check", 1, func() {
						if n := len(x.Output.Released()); n != held {
							t.Errorf("%d frames left before the epoch was committed", n-held)
						}
						x.Points.At("shadow: take over", 1, func() {
							if n := len(x.Output.Released()); n <= held {
								t.Errorf("taken over while %d frames are out", n)
							}
						})
					})
				})
				began := time.Now()
				done := switchover(x)
				if err := <-done; err != nil {
					t.Fatal(err)
				}
				if d := time.Since(began); d > time.Second {
					t.Errorf("after %v", d)
				}
				handedOver(t, x)
				if err := x.Primary.Switchover(t.Context()); err == nil {
					t.Error("and once more")
				}
			})
		}
	}
}

// brk are ways in which a connection breaks for a moment.
var brk = map[string]func(*migratetest.Network){
	"reset":             (*migratetest.Network).Reset,
	"closed by primary": func(n *migratetest.Network) { n.Kill(migratetest.Primary) },
	"closed by standby": func(n *migratetest.Network) { n.Kill(migratetest.Standby) },
	"frozen":            (*migratetest.Network).Freeze,
}

// The points of a switchover, in their order, and whose they are.
var handoverPoints = []string{
	"guest: asked to suspend", "guest: suspended", "output: seal", "guest: sealed", "guest: captured", "guest: held",
	"shadow: check", "shadow: apply", "shadow: take over", "guest: destroy",
}

// A connection that breaks at any step harms nothing: the guest is handed over.
func TestSwitchoverBreaks(t *testing.T) {
	for name, breaking := range brk {
		for _, label := range handoverPoints[:len(handoverPoints)-1] { // what is said last may be lost
			for _, automatic := range []bool{false, true} {
				if automatic && name == "frozen" {
					continue // the standby takes over on silence: see below
				}
				t.Run(fmt.Sprintf("%s, %s, automatic %v", name, label, automatic), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						x := start(t, migratetest.Options{Automatic: automatic, Rejoin: time.Minute})
						x.Points.At(label, 1, func() { breaking(x.Net) })
						if err := <-switchover(x); err != nil {
							t.Error(err)
						}
						handedOver(t, x)
					})
				})
			}
		}
	}
}

// A connection that goes dead while an automatic standby is asked: it takes over by
// itself, and the guest runs once.
func TestSwitchoverAutomaticSilence(t *testing.T) {
	for _, label := range handoverPoints {
		synctest.Test(t, func(t *testing.T) {
			x := start(t, migratetest.Options{Automatic: true})
			x.Points.At(label, 1, func() { x.Net.Mute(migratetest.Primary, true) })
			done := switchover(x)
			time.Sleep(3 * time.Second)
			x.Net.Mute(migratetest.Primary, false)
			<-done
			perr := <-x.PrimaryErr
			<-x.StandbyErr
			if x.Shadow.Over() == nil || !x.Guest.Destroyed() {
				t.Errorf("%s: runs there from %v, destroyed here %v: %v", label, x.Shadow.Over(), x.Guest.Destroyed(), perr)
			}
			exact(t, x)
		})
	}
}

// A standby that cannot take over says so: the guest goes on, and protection has ended
// since the copy is gone.
func TestSwitchoverFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{})
		x.Guest.Quiet()
		x.Work(1, time.Second) // what is spoilt is not sent again
		x.Shadow.Spoil(1)
		x.Points.At("shadow: take over", 1, func() { time.Sleep(20 * time.Second) }) // it may take its time
		if err := <-switchover(x); err == nil || !strings.Contains(err.Error(), "take over: ") {
			t.Errorf("said to who asked: %v", err)
		}
		if err := <-x.PrimaryErr; !errors.Is(err, migrate.ErrStandbyLost) {
			t.Errorf("primary: %v", err)
		}
		if err := <-x.StandbyErr; err == nil {
			t.Error("the standby has not failed")
		}
		alone(t, x)
	})
}

// A standby that gives its copy up before it is asked, or while it is.
func TestSwitchoverStandbyEnds(t *testing.T) {
	for _, label := range handoverPoints {
		t.Run(label, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := start(t, migratetest.Options{Rejoin: time.Minute})
				x.Points.At(label, 1, func() { x.Standby.End("it is needed elsewhere") })
				err := <-switchover(x)
				perr := <-x.PrimaryErr
				<-x.StandbyErr
				if x.Shadow.Over() != nil {
					if err != nil || !errors.Is(perr, migrate.ErrSwitchedOver) || !x.Guest.Destroyed() {
						t.Errorf("it runs there: %v, %v, destroyed %v", err, perr, x.Guest.Destroyed())
					}
					return
				}
				if err == nil || !errors.Is(perr, migrate.ErrStandbyLost) {
					t.Errorf("%v, %v", err, perr)
				}
				alone(t, x)
			})
		})
	}
}

// Being asked to end is heeded before the standby is asked, and has to wait after.
func TestSwitchoverEnd(t *testing.T) {
	for i, label := range handoverPoints {
		for _, takes := range []time.Duration{0, 30 * time.Second} {
			t.Run(fmt.Sprintf("%s, %v", label, takes), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					x := start(t, migratetest.Options{Rejoin: time.Minute})
					x.Points.At(label, 1, func() { x.Primary.End("enough"); time.Sleep(takes) })
					err := <-switchover(x)
					perr := <-x.PrimaryErr
					<-x.StandbyErr
					asked := slices.Index(handoverPoints, "shadow: take over")
					switch {
					case i >= asked && (err != nil || !errors.Is(perr, migrate.ErrSwitchedOver)):
						t.Errorf("%v, %v", err, perr)
					case i >= asked:
					case err == nil || perr != nil || x.Shadow.Over() != nil:
						t.Errorf("%v, %v, runs there from %v", err, perr, x.Shadow.Over())
					default:
						alone(t, x)
					}
				})
			})
		}
	}
}

// A standby that was asked and is silent from then on: the guest stands for as long as
// that may mean that it runs there, and then goes on here. What the standby finds on
// the old connection later it does not do.
func TestSwitchoverSilent(t *testing.T) {
	for name, o := range map[string]migratetest.Options{"rejoin": {Rejoin: time.Hour}, "no rejoin": {}} {
		for _, cut := range []time.Duration{12 * time.Second, time.Minute} {
			t.Run(fmt.Sprintf("%s, %v", name, cut), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					x := start(t, o)
					// The epoch is committed, and of what is said then nothing comes through.
					x.Points.At("shadow: apply", 1, func() {
						time.AfterFunc(3*time.Millisecond, func() { x.Net.Cut(true) })
					})
					x.Net.Delay(2 * time.Millisecond)
					time.AfterFunc(cut, func() { x.Net.Cut(false) })
					began := time.Now()
					if err := <-switchover(x); err == nil || time.Since(began) < 10*time.Second || time.Since(began) > 12*time.Second {
						t.Errorf("after %v: %v", time.Since(began), err)
					}
					time.Sleep(time.Until(began.Add(cut)))
					if name == "rejoin" {
						time.Sleep(5 * time.Second)
						goesOn(t, x)
						if err := <-switchover(x); err != nil {
							t.Errorf("the next time: %v", err)
						}
						handedOver(t, x)
						return
					}
					if err := <-x.PrimaryErr; !errors.Is(err, migrate.ErrStandbyLost) {
						t.Errorf("primary: %v", err)
					}
					alone(t, x)
					x.Stop()
					<-x.StandbyErr
					if x.Shadow.Over() != nil {
						t.Error("two copies run")
					}
				})
			})
		}
	}
}

// A standby that is silent before it is asked: nothing is begun, or the guest goes on
// at once and the standby is looked for.
func TestSwitchoverAlone(t *testing.T) {
	for _, label := range handoverPoints[:6] {
		t.Run(label, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := start(t, migratetest.Options{Rejoin: time.Hour})
				x.Points.At(label, 1, func() { x.Net.Cut(true) })
				began := time.Now()
				if err := <-switchover(x); !errors.Is(err, migrate.ErrStandbyLost) {
					t.Error(err)
				}
				if d := time.Since(began); d > 2*time.Second {
					t.Errorf("the guest stood for %v", d)
				}
				x.Work(3, time.Second)
				if st := x.Primary.Stats(); !st.Alone {
					t.Errorf("%+v", st)
				}
				if err := x.Primary.Switchover(t.Context()); err == nil || !strings.Contains(err.Error(), "silent") {
					t.Errorf("while alone: %v", err)
				}
				x.Net.Cut(false)
				time.Sleep(3 * time.Second)
				goesOn(t, x)
				if err := <-switchover(x); err != nil {
					t.Error(err)
				}
				if x.Shadow.Over() == nil || !x.Guest.Destroyed() {
					t.Error("not handed over")
				}
				ended(t, x, migrate.ErrSwitchedOver, nil)
			})
		})
	}
}

// Asked twice, while the first copy is made, and by somebody who does not wait.
func TestSwitchoverAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := migratetest.NewPair(migratetest.Options{})
		x.Points.At("shadow: apply", 1, func() {
			if err := x.Primary.Switchover(t.Context()); err == nil || !strings.Contains(err.Error(), "not complete") {
				t.Errorf("while copying: %v", err)
			}
		})
		x.Start(t)
		x.Work(20, 50*time.Millisecond)
		ctx, cancel := context.WithCancelCause(t.Context())
		why := errors.New("no patience")
		cancel(why)
		if err := x.Primary.Switchover(ctx); !errors.Is(err, why) {
			t.Error(err)
		}
		goesOn(t, x)
		ctx, cancel = context.WithCancelCause(t.Context())
		x.Points.At("shadow: take over", 1, func() {
			if err := x.Primary.Switchover(t.Context()); err == nil || !strings.Contains(err.Error(), "already") {
				t.Errorf("twice: %v", err)
			}
			cancel(why)
		})
		if err := x.Primary.Switchover(ctx); !errors.Is(err, why) || !strings.Contains(err.Error(), "goes on") {
			t.Error(err)
		}
		handedOver(t, x)
	})
}

// Somebody else is told that the standby has not taken over, and goes on with the guest:
// what was asked for before is not done any more.
func TestSwitchoverDenied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var cfg migrate.PrimaryConfig
		x := start(t, migratetest.Options{Primary: func(c *migrate.PrimaryConfig) { cfg = *c }})
		log := slog.New(slog.DiscardHandler)
		x.Points.At("shadow: apply", 1, func() {
			go func() {
				// It waits until the epoch is applied, and comes before the Handover.
				if err := migrate.Ask(t.Context(), cfg, x.Net.Dial, log); err != nil {
					t.Errorf("asked: %v", err)
				}
				x.Net.Refuse(true) // its process ends
			}()
			time.Sleep(time.Millisecond)
		})
		x.Net.Delay(5 * time.Millisecond)
		if err := <-switchover(x); err == nil {
			t.Error("done, though somebody was told that it would not be")
		}
		ended(t, x, migrate.ErrStandbyLost, migrate.ErrPrimaryLost)
		alone(t, x)
	})
}

// Either process is killed at any step. Whoever cleans up behind it does what the
// replicator's command does: asks the standby, or takes back what was not finished.
// Then one copy can run, and if it is ours nothing of it is lost.
func TestSwitchoverKilled(t *testing.T) {
	for _, label := range append([]string{"output: release"}, handoverPoints...) {
		for _, side := range []migratetest.Side{migratetest.Primary, migratetest.Standby} {
			t.Run(fmt.Sprintf("%s, %v", label, side), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { killed(t, label, side) })
			})
		}
	}
}

func killed(t *testing.T, label string, side migratetest.Side) {
	var cfg migrate.PrimaryConfig
	var marked, asked atomic.Bool
	dead, thaw := make(chan struct{}), make(chan struct{})
	x := start(t, migratetest.Options{
		Rejoin: time.Minute,
		Primary: func(c *migrate.PrimaryConfig) {
			cfg = *c
			c.TakenOver = func() error { marked.Store(true); return nil }
		},
		Standby: func(c *migrate.StandbyConfig) {
			c.HandedOver = func() error { asked.Store(true); return nil }
		},
		// A process that is no more dials no more.
		Dial: func(dial migrate.Dial) migrate.Dial {
			return func(ctx context.Context) (net.Conn, error) {
				if side == migratetest.Primary {
					select {
					case <-dead:
						<-ctx.Done()
						return nil, ctx.Err()
					default:
					}
				}
				return dial(ctx)
			}
		},
	})
	x.Net.Delay(time.Millisecond)
	x.Points.At(label, 1, func() {
		// What it had sent is under way.
		x.Net.Kill(side)
		if side == migratetest.Standby {
			x.Net.Refuse(true)
		}
		close(dead)
		if strings.HasPrefix(label, "shadow") == (side == migratetest.Standby) {
			<-thaw // it goes no further
		}
	})
	done := switchover(x)
	<-dead
	if side == migratetest.Standby {
		// The primary goes on, once what the standby's host has was taken back, for its
		// take-over was not finished.
		began := time.Now()
		if err := <-x.PrimaryErr; strings.HasPrefix(label, "shadow") && !errors.Is(err, migrate.ErrStandbyLost) {
			t.Errorf("primary: %v", err)
		}
		<-done
		if strings.HasPrefix(label, "shadow") {
			alone(t, x)
			// Where the acknowledgement had come before the death was seen, it waits for
			// what it has asked on a connection that nobody reads, too: it cannot know.
			if waited := time.Since(began) > 9*time.Second; !waited && asked.Load() {
				t.Error("did not wait for it to be taken back")
			}
			if (label == "shadow: take over") != asked.Load() {
				t.Errorf("who cleans up is told that the primary has asked: %v", asked.Load())
			}
		}
	} else {
		time.Sleep(50 * time.Millisecond) // systemd has to see it
		ours := !marked.Load()
		if ours {
			ours = !errors.Is(migrate.Ask(t.Context(), cfg, x.Net.Dial, slog.New(slog.DiscardHandler)), migrate.ErrTakenOver)
		}
		time.Sleep(time.Minute) // what is under way arrives
		if theirs := x.Shadow.Over() != nil; theirs == ours {
			t.Errorf("ours may run: %v, theirs runs: %v", ours, theirs)
		}
		if over := x.Shadow.Over(); over != nil {
			out := x.Output.Released()
			if n := len(out); n == 0 || out[n-1] > over.Count {
				t.Errorf("%d frames are out, and what runs is the guest at %d", n, over.Count)
			}
		}
	}
	close(thaw)
	x.Stop()
	if side == migratetest.Primary {
		<-x.PrimaryErr
	}
	<-x.StandbyErr
}
