package migrate_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kemari/migrate"
	"kemari/migrate/migratetest"
	"kemari/migrate/page"
	"kemari/migrate/wire"
)

// What a primary says that is played by a test: of generation 3, a guest of 4 MiB, and
// session 7.

func frame(typ wire.Type, e wire.Epoch, payload []byte) *wire.Frame {
	return &wire.Frame{Type: typ, Epoch: e, Payload: payload, Generation: 3}
}

func helloAt(committed wire.Epoch) *wire.Frame {
	h := wire.Hello{Lowest: wire.Version, Highest: wire.Version, UUID: [16]byte{1}, MemoryKiB: 4096, Session: 7, Committed: committed}
	return frame(wire.TypeHello, 0, h.Append(nil))
}

func headFrame() *wire.Frame { return frame(wire.TypeHead, 1, []byte(migratetest.Head)) }

func records(pfns ...page.PFN) (b []byte) {
	enc := page.NewEncoder(0)
	for _, pfn := range pfns {
		b = enc.Append(b, pfn, make([]byte, page.Size))
	}
	return b
}

func pages(e wire.Epoch, pfns ...page.PFN) *wire.Frame {
	return frame(wire.TypePages, e, records(pfns...))
}

func state(e wire.Epoch) *wire.Frame {
	return frame(wire.TypeState, e, migratetest.State{}.Append(nil))
}

// epoch makes a whole one, of these frames.
func epoch(e wire.Epoch, pages uint64, frames ...*wire.Frame) []*wire.Frame {
	end := wire.EpochEnd{Pages: pages}
	for _, f := range frames {
		if _, err := f.Append(nil); err != nil {
			panic(err)
		}
		end.Add(*f)
	}
	return append(frames, frame(wire.TypeEpochEnd, e, end.Append(nil)))
}

// firstEpoch is what a primary says until it is protected.
func firstEpoch() []*wire.Frame {
	return append([]*wire.Frame{helloAt(0)}, epoch(1, 2, headFrame(), pages(1, 0, 1), state(1))...)
}

// lone is a standby whose primary is played by the test.
type lone struct {
	t       *testing.T
	net     *migratetest.Network
	points  *migratetest.Points
	shadow  *migratetest.Shadow
	standby *migrate.Standby
	stop    context.CancelFunc
	err     chan error
}

func startLone(t *testing.T) *lone {
	x := &lone{t: t, net: migratetest.NewNetwork(), points: new(migratetest.Points), shadow: migratetest.NewShadow(), err: make(chan error, 1)}
	x.shadow.Points = x.points
	x.standby = migrate.NewStandby(migrate.StandbyConfig{UUID: [16]byte{1}, MemoryKiB: 4096, Limit: migratetest.Limit, Generation: 3,
		Heartbeat: migrate.Heartbeat{Interval: interval, Timeout: timeout}}, x.net.Accept, x.shadow, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	x.stop = cancel
	go func() { x.err <- x.standby.Run(ctx) }()
	return x
}

// dial makes a connection and says these frames, at once.
func (x *lone) dial(frames ...*wire.Frame) net.Conn {
	x.t.Helper()
	conn, err := x.net.Dial(x.t.Context())
	if err != nil {
		x.t.Fatal(err)
	}
	x.say(conn, frames...)
	return conn
}

func (x *lone) say(conn net.Conn, frames ...*wire.Frame) {
	x.t.Helper()
	var b []byte
	for _, f := range frames {
		var err error
		if b, err = f.Append(b); err != nil {
			x.t.Fatal(err)
		}
	}
	if _, err := conn.Write(b); err != nil {
		x.t.Error(err)
	}
}

// runnable says an epoch 2 from which the copy can run.
func (x *lone) runnable(conn net.Conn) {
	x.t.Helper()
	is := migratetest.State{Sum: x.shadow.Sum()}
	x.say(conn, epoch(2, 1, pages(2, 0), frame(wire.TypeState, 2, is.Append(nil)))...)
}

// answer is the first frame of that type that comes.
func (x *lone) answer(r *wire.Reader, want wire.Type) wire.Frame {
	x.t.Helper()
	for {
		f, err := r.Read()
		if err != nil {
			x.t.Fatalf("wait for %v: %v", want, err)
		}
		if f.Type == want {
			return f
		}
	}
}

// A standby that is told to take over, or asked to, shows life for as long as that takes.
// Nobody takes it for lost, be it that it cannot be asked over another connection.
func TestTakeOverSlow(t *testing.T) {
	for name, c := range map[string]struct {
		o    migratetest.Options
		asks bool // the primary does
	}{
		"told to, rejoin":            {migratetest.Options{Rejoin: time.Minute}, false},
		"told to, no rejoin":         {migratetest.Options{}, false},
		"told to, automatic":         {migratetest.Options{Automatic: true}, false},
		"asked by the primary":       {migratetest.Options{Rejoin: time.Minute}, true},
		"asked, without automatic":   {migratetest.Options{}, true},
		"asked, may do so by itself": {migratetest.Options{Automatic: true}, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := start(t, c.o)
				x.Net.Refuse(true)
				x.Points.At("shadow: take over", 1, func() { time.Sleep(25 * time.Second) })
				want := migrate.ErrTakenOver
				if done := make(chan error, 1); c.asks {
					want = migrate.ErrSwitchedOver
					go func() { done <- x.Primary.Switchover(t.Context()) }()
				} else if err := x.Standby.Failover("told to"); err != nil {
					t.Fatal(err)
				}
				for range 240 {
					go x.Guest.Work() // it may stand
					time.Sleep(100 * time.Millisecond)
					if st := x.Primary.Stats(); st.Alone || st.Reconnects > 0 {
						t.Fatalf("while the standby takes over: %+v", st)
					}
				}
				ended(t, x, want, nil)
				if !x.Guest.Destroyed() {
					t.Error("two copies run")
				}
				exact(t, x)
			})
		})
	}
}

// The same of a copy that takes long to be dropped: both sides end as they were asked to.
func TestEndSlow(t *testing.T) {
	for name, c := range map[string]struct {
		end     func(*migratetest.Pair)
		primary error
	}{
		"at the primary": {func(x *migratetest.Pair) { x.Primary.End("enough") }, nil},
		"at the standby": {func(x *migratetest.Pair) { x.Standby.End("it is needed elsewhere") }, migrate.ErrStandbyLost},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := start(t, migratetest.Options{Automatic: true})
				x.Net.Refuse(true)
				x.Points.At("shadow: close", 1, func() { time.Sleep(20 * time.Second) })
				began := time.Now()
				c.end(x)
				err := <-x.PrimaryErr
				if !errors.Is(err, c.primary) || err != nil && !strings.Contains(err.Error(), "it is needed elsewhere") {
					t.Errorf("primary: %v", err)
				}
				if d := time.Since(began); d < 20*time.Second || !x.Shadow.Closed() {
					t.Errorf("the primary goes on after %v, and the copy is gone: %v", d, x.Shadow.Closed())
				}
				<-x.StandbyErr
				alone(t, x)
			})
		})
	}
}

// To a standby that waits to be told, a connection that its primary closes says that
// there is nothing to be told: the guest runs on there.
func TestClosedAfterSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := startLone(t)
		conn := x.dial(firstEpoch()...)
		go io.Copy(io.Discard, conn)
		time.Sleep(time.Minute)
		if st := x.standby.Stats(); !st.Silent || x.shadow.Closed() {
			t.Fatalf("after a silence: %+v", st)
		}
		conn.Close()
		time.Sleep(9 * time.Second)
		if st := x.standby.Stats(); st.Silent || x.shadow.Closed() {
			t.Errorf("before the primary has had its time to come back: %+v", st)
		}
		time.Sleep(2 * time.Second)
		if err := <-x.err; !errors.Is(err, migrate.ErrPrimaryLost) || !x.shadow.Closed() || x.shadow.Over() != nil {
			t.Errorf("%v, and the copy is gone: %v", err, x.shadow.Closed())
		}
		x.stop()
	})
}

// While the copy is worked on, any number of connections hold up neither what is decided
// nor more than some memory, and afterwards it goes on.
func TestManyConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := startLone(t)
		x.points.At("shadow: apply", 2, func() { time.Sleep(time.Minute) }) // of epoch 2
		conn := x.dial(append(firstEpoch(), epoch(2, 1, pages(2, 1), state(2))...)...)
		x.answer(wire.NewReader(conn, 3), wire.TypeAck)
		time.Sleep(time.Second)
		before := runtime.NumGoroutine()
		var welcomed atomic.Int32
		for range 500 {
			c := x.dial(helloAt(2), pages(3, 0))
			go func() {
				for r := wire.NewReader(c, 3); ; {
					f, err := r.Read()
					switch {
					case err != nil:
						c.Close()
						return
					case f.Type == wire.TypeEnd:
						t.Errorf("told that it has ended: %s", f.Payload)
					case f.Type == wire.TypeWelcome:
						welcomed.Add(1)
					}
				}
			}()
			time.Sleep(10 * time.Millisecond)
		}
		synctest.Wait()
		if n := welcomed.Load(); n < 10 || n > 50 {
			t.Errorf("%d were welcomed", n)
		}
		if n := runtime.NumGoroutine() - before; n > 50 {
			t.Errorf("%d goroutines more", n)
		}
		if st := x.standby.Stats(); st.State != migrate.Ready || st.Epoch != 2 {
			t.Errorf("%+v", st)
		}
		time.Sleep(time.Minute)
		c := x.dial(append([]*wire.Frame{helloAt(2)}, epoch(3, 1, pages(3, 1), state(3))...)...)
		r := wire.NewReader(c, 3)
		if f := x.answer(r, wire.TypeWelcome); len(f.Payload) == 0 {
			t.Error("an empty welcome")
		}
		if f := x.answer(r, wire.TypeAck); f.Epoch != 3 {
			t.Errorf("epoch %d acknowledged", f.Epoch)
		}
		x.stop()
		<-x.err
		c.Close()
		conn.Close()
	})
}

// A primary that takes nothing of what it asks for is not answered for ever.
func TestTakesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := startLone(t)
		conn := x.dial(firstEpoch()...)
		time.Sleep(time.Second)
		before := runtime.NumGoroutine()
		for i := 0; ; i++ {
			if i == 100_000 {
				t.Error("it still listens")
				break
			}
			var b []byte
			for _, f := range []*wire.Frame{pages(9, 0), frame(wire.TypeRestart, 2, nil)} {
				b, _ = f.Append(b)
			}
			if _, err := conn.Write(b); err != nil {
				break
			}
			synctest.Wait()
		}
		if n := runtime.NumGoroutine(); n > before {
			t.Errorf("%d goroutines more", n-before)
		}
		// Another connection works.
		c := x.dial(append([]*wire.Frame{helloAt(1)}, epoch(2, 1, pages(2, 1), state(2))...)...)
		x.answer(wire.NewReader(c, 3), wire.TypeAck)
		x.stop()
		<-x.err
		c.Close()
	})
}

// What was on its way on a connection that another one has replaced does not count, be
// it that it cannot be understood, and the first copy goes on.
func TestReplacedMidCopy(t *testing.T) {
	for name, replaced := range map[string][][]*wire.Frame{ // and what each of these says
		"not understood":   {{helloAt(0), headFrame(), {Type: wire.TypePages, Epoch: 1, Generation: 2}}},
		"out of place":     {{helloAt(0), headFrame(), frame(wire.TypeAck, 1, nil)}},
		"of another epoch": {{helloAt(0), headFrame(), pages(2, 0)}},
		"the end":          {{helloAt(0), headFrame(), frame(wire.TypeEnd, 0, []byte("enough"))}},
		"given to the worker": {
			{helloAt(0), headFrame()},
			{helloAt(0), pages(1, 0)}, // before the head
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := startLone(t)
				x.points.At("shadow: head", 1, func() { time.Sleep(5 * time.Second) })
				for _, frames := range replaced {
					old := x.dial(frames...)
					defer old.Close()
					time.Sleep(time.Second)
				}
				conn := x.dial(firstEpoch()...)
				x.answer(wire.NewReader(conn, 3), wire.TypeAck)
				if st := x.standby.Stats(); st.State != migrate.Ready || int(st.Reconnects) != len(replaced) {
					t.Errorf("%+v", st)
				}
				x.stop()
				<-x.err
				conn.Close()
			})
		})
	}
}

// A primary that cannot be understood on the connection on which it would say that it has
// heard of the take-over, says so on another one, and is not waited for any longer.
func TestToldOverAnother(t *testing.T) {
	for _, before := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			x := startLone(t)
			x.points.At("shadow: take over", 1, func() { time.Sleep(time.Second) })
			conn := x.dial(firstEpoch()...)
			go io.Copy(io.Discard, conn)
			time.Sleep(100 * time.Millisecond)
			x.runnable(conn)
			time.Sleep(100 * time.Millisecond)
			if err := x.standby.Failover("told to"); err != nil {
				t.Fatal(err)
			}
			if !before {
				time.Sleep(2 * time.Second)
			}
			x.say(conn, &wire.Frame{Type: wire.TypeHeartbeat, Generation: 2})
			time.Sleep(2 * time.Second)
			if _, err := conn.Write([]byte{0}); err == nil {
				t.Error("the connection is still open")
			}
			c := x.dial(helloAt(2))
			x.answer(wire.NewReader(c, 3), wire.TypeTakenOver)
			x.say(c, frame(wire.TypeEnd, 0, []byte(migrate.ErrTakenOver.Error())))
			began := time.Now()
			if err := <-x.err; err != nil || time.Since(began) > time.Second {
				t.Errorf("%v, after %v", err, time.Since(began))
			}
			if x.shadow.Over() == nil {
				t.Error("it does not run")
			}
			conn.Close()
			c.Close()
			x.stop()
		})
	}
}

// What is found on a connection on which nothing had come for long may have been asked
// for long ago, be it that the copy was worked on meanwhile.
func TestHandoverStale(t *testing.T) {
	for works, taken := range map[time.Duration]bool{4 * time.Second: true, 8 * time.Second: false} {
		synctest.Test(t, func(t *testing.T) {
			x := startLone(t)
			x.points.At("shadow: apply", 2, func() { time.Sleep(works) }) // of epoch 2
			conn := x.dial(firstEpoch()...)
			go io.Copy(io.Discard, conn)
			time.Sleep(100 * time.Millisecond)
			x.runnable(conn)
			time.Sleep(works + 400*time.Millisecond)
			x.say(conn, frame(wire.TypeHandover, 2, nil))
			time.Sleep(time.Second)
			if over := x.shadow.Over() != nil; over != taken {
				t.Errorf("asked %v after something had come, it takes over: %v", works, over)
			}
			x.stop()
			<-x.err
			conn.Close()
		})
	}
}
