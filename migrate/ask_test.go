package migrate_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kemari/migrate"
	"kemari/migrate/migratetest"
	"kemari/migrate/wire"
)

// slowLog lets everybody else go first whenever something is logged.
type slowLog struct{ slog.Handler }

func (slowLog) Enabled(context.Context, slog.Level) bool { return true }
func (l slowLog) WithAttrs([]slog.Attr) slog.Handler     { return l }
func (l slowLog) WithGroup(string) slog.Handler          { return l }
func (slowLog) Handle(context.Context, slog.Record) error {
	time.Sleep(time.Microsecond)
	return nil
}

// A standby that answers over another connection is not silent, though it takes longer
// than a part of the time-out and whatever is going on just then.
func TestAnswersLate(t *testing.T) {
	for name, o := range map[string]migratetest.Options{
		"rejoin":    {Rejoin: time.Minute},
		"no rejoin": {},
		"automatic": {Automatic: true, Standby: func(c *migrate.StandbyConfig) { c.Automatic = false }},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o.Log = slog.New(slowLog{slog.DiscardHandler})
				x := migratetest.NewPair(o)
				x.Start(t)
				x.Work(20, 50*time.Millisecond)
				for range 20 {
					x.Net.Freeze()
					x.Net.Delay(timeout / 5)
					for range 100 {
						x.Guest.Work()
						time.Sleep(10 * time.Millisecond)
						if x.Primary.Stats().Alone {
							x.Stop()
							t.Fatal("went on alone though it was answered")
						}
					}
					x.Net.Delay(0)
					x.Work(10, 50*time.Millisecond)
				}
				x.Primary.End("enough")
				ended(t, x, nil, nil)
			})
		})
	}
}

// The same of one that answers that it has taken over: not one frame leaves.
func TestAnswersTakenOverLate(t *testing.T) {
	for name, o := range map[string]migratetest.Options{
		"rejoin":    {Rejoin: time.Minute},
		"no rejoin": {},
		"automatic": {Automatic: true},
	} {
		t.Run(name, func(t *testing.T) {
			for _, takes := range []time.Duration{0, timeout, 5 * time.Second} {
				synctest.Test(t, func(t *testing.T) {
					o := o
					o.Log = slog.New(slowLog{slog.DiscardHandler})
					o.Primary = func(c *migrate.PrimaryConfig) {
						c.TakenOver = func() error { time.Sleep(timeout); return nil } // a slow disk
					}
					x := migratetest.NewPair(o)
					x.Start(t)
					x.Work(20, 50*time.Millisecond)
					x.Points.At("shadow: take over", 1, func() { time.Sleep(takes) })
					x.Net.Freeze()
					x.Net.Delay(timeout / 5)
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
			}
		})
	}
}

// That the standby has not taken over is so for good, whatever it had heard of its
// primary's death: it has no copy any more when it says so.
func TestAskBinds(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	for name, c := range map[string]struct {
		automatic bool
		dies      func(*migratetest.Pair)
	}{
		"it is heard no more": {true, func(x *migratetest.Pair) { x.Net.Freeze() }},
		"it is reset after a silence": {false, func(x *migratetest.Pair) {
			x.Net.Freeze()
			time.Sleep(10 * time.Second)
			x.Net.Reset()
			time.Sleep(time.Second)
		}},
		"it is closed": {true, func(x *migratetest.Pair) { x.Net.Kill(migratetest.Primary) }},
		"it lives":     {true, func(*migratetest.Pair) {}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var cfg migrate.PrimaryConfig
				var dead atomic.Bool
				x := migratetest.NewPair(migratetest.Options{
					Primary: func(p *migrate.PrimaryConfig) { cfg = *p },
					Standby: func(s *migrate.StandbyConfig) { s.Automatic = c.automatic },
					Dial: func(d migrate.Dial) migrate.Dial {
						return func(ctx context.Context) (net.Conn, error) {
							if dead.Load() {
								return nil, migrate.ErrStandbyLost
							}
							return d(ctx)
						}
					},
				})
				x.Start(t)
				x.Work(20, 50*time.Millisecond)
				dead.Store(true)
				c.dies(x)
				if err := migrate.Ask(t.Context(), cfg, x.Net.Dial, log); err != nil {
					t.Fatal(err)
				}
				if !x.Shadow.Closed() {
					t.Error("it still has a copy")
				}
				x.Standby.Failover("told to") // it may say no
				ended(t, x, migrate.ErrStandbyLost, migrate.ErrPrimaryLost)
				time.Sleep(10 * time.Minute)
				alone(t, x)
			})
		})
	}
}

// Of the first epoch the primary may have heard nothing yet when the standby, which
// has acknowledged it, takes over on silence.
func TestFirstAckUnheard(t *testing.T) {
	for name, rejoin := range map[string]time.Duration{"rejoin": time.Minute, "no rejoin": 0} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := migratetest.NewPair(migratetest.Options{Automatic: true, Rejoin: rejoin})
				x.Points.At("shadow: check", 1, x.Net.Freeze)
				x.Start(t)
				x.Work(400, 50*time.Millisecond)
				ended(t, x, migrate.ErrTakenOver, nil)
				if !x.Guest.Destroyed() {
					t.Error("two copies run")
				}
			})
		})
	}
}

// The same where the standby waits to be told: the first copy is gone on with. One that
// does not answer ends protection before there is any.
func TestFirstAckUnheardAnswered(t *testing.T) {
	for name, refuse := range map[string]bool{"answers": false, "does not answer": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := migratetest.NewPair(migratetest.Options{Rejoin: time.Minute})
				x.Points.At("shadow: check", 1, func() {
					x.Net.Freeze()
					x.Net.Mute(migratetest.Standby, refuse)
				})
				x.Start(t)
				x.Work(400, 50*time.Millisecond)
				if !refuse {
					if st := x.Primary.Stats(); !st.Protected || st.Reconnects != 1 {
						t.Errorf("%+v", st)
					}
					x.Primary.End("enough")
					ended(t, x, nil, nil)
					return
				}
				if err := <-x.PrimaryErr; !errors.Is(err, migrate.ErrStandbyLost) {
					t.Error(err)
				}
				alone(t, x)
				x.Stop()
				<-x.StandbyErr
			})
		})
	}
}

// A primary that is asked to end while the standby takes over says so before it can know
// of that. The standby does not take it for the answer, and stays until it is known.
func TestEndDuringTakeOver(t *testing.T) {
	for range 10 {
		synctest.Test(t, func(t *testing.T) {
			x := start(t, migratetest.Options{})
			x.Net.Delay(timeout / 5)
			x.Points.At("shadow: take over", 1, func() { time.Sleep(2 * time.Second) })
			if err := x.Standby.Failover("told to"); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			x.Primary.End("enough")
			time.Sleep(1100 * time.Millisecond)
			x.Net.Reset() // the standby's first word is lost
			ended(t, x, migrate.ErrTakenOver, nil)
			exact(t, x)
		})
	}
}

// Whatever a take-over that nobody confirms may take, the primary does not go on before
// the standby has given it up and said so.
func TestTakeOverHangs(t *testing.T) {
	for name, c := range map[string]struct {
		freeze bool
		end    string // asked of the primary meanwhile
	}{
		"heard all the time":          {},
		"silent at first":             {freeze: true},
		"the primary is asked to end": {end: "enough"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := start(t, migratetest.Options{})
				x.Shadow.Hang()
				began := time.Now()
				if c.freeze {
					x.Net.Freeze()
				}
				if err := x.Standby.Failover("told to"); err != nil {
					t.Fatal(err)
				}
				time.Sleep(100 * time.Millisecond)
				if c.end != "" {
					x.Primary.End(c.end)
				}
				if err := <-x.PrimaryErr; c.end == "" && !errors.Is(err, migrate.ErrStandbyLost) {
					t.Errorf("primary: %v", err)
				}
				if d := time.Since(began); !x.Shadow.Closed() || d > migrate.AnswerTimeout {
					t.Errorf("after %v the copy is gone: %v", d, x.Shadow.Closed())
				}
				<-x.StandbyErr
				alone(t, x)
			})
		})
	}
}

// Whoever speaks for the primary hears that the guest runs here, though there is
// something wrong with how it asks.
func TestToldAnyway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{})
		x.Net.Cut(true) // nobody tells the standby that it is known
		if err := x.Standby.Failover("told to"); err != nil {
			t.Fatal(err)
		}
		<-x.PrimaryErr
		x.Net.Cut(false)
		for _, h := range []wire.Hello{
			{Lowest: wire.Version + 1, Highest: wire.Version + 1, UUID: [16]byte{1}, MemoryKiB: 256, Session: 99},
			{Lowest: wire.Version, Highest: wire.Version, UUID: [16]byte{1}, MemoryKiB: 512, Session: 99},
		} {
			conn, err := x.Net.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			f := wire.Frame{Type: wire.TypeHello, Generation: 3, Payload: h.Append(nil)}
			b, err := f.Append(nil)
			if err != nil {
				t.Fatal(err)
			}
			conn.Write(b)
			if got, err := wire.NewReader(conn, 3).Read(); err != nil || got.Type != wire.TypeTakenOver {
				t.Errorf("answered by %v, %v", got.Type, err)
			}
			conn.Close()
		}
		x.Stop()
		<-x.StandbyErr
	})
}
