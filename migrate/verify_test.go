package migrate_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kemari/migrate"
	"kemari/migrate/migratetest"
	"kemari/migrate/page"
	"kemari/migrate/wire"
)

// verify asks, and has the guest work meanwhile.
func verify(t *testing.T, x *migratetest.Pair) (*migrate.Verified, error) {
	t.Helper()
	type result struct {
		v   *migrate.Verified
		err error
	}
	done := make(chan result, 1)
	go func() {
		v, err := x.Primary.Verify(t.Context())
		done <- result{v, err}
	}()
	for {
		select {
		case r := <-done:
			return r.v, r.err
		case <-time.After(20 * time.Millisecond):
			x.Guest.Work()
		}
	}
}

// still checks that protection has not suffered, and ends it by a take-over, for
// which the fake shadow checks that memory is exact.
func still(t *testing.T, x *migratetest.Pair, takeOver bool) {
	t.Helper()
	before := x.Primary.Stats().Epoch
	x.Work(20, 50*time.Millisecond)
	if st := x.Primary.Stats(); !st.Protected || st.Epoch <= before {
		t.Errorf("after it: %+v", st)
	}
	if !takeOver {
		x.Primary.End("enough")
		ended(t, x, nil, nil)
		return
	}
	if err := x.Standby.Failover("asked for"); err != nil {
		t.Fatal(err)
	}
	ended(t, x, migrate.ErrTakenOver, nil)
	exact(t, x)
}

func TestVerify(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{Pages: 200})
		for range 3 {
			before := x.Primary.Stats()
			v, err := verify(t, x)
			if err != nil {
				t.Fatal(err)
			}
			if v.Epoch <= before.Epoch || v.Pages != 200 || v.Differ+v.Missing+v.Shared+v.Moved+v.Unread > 0 || len(v.Differing) > 0 {
				t.Errorf("%+v", v)
			}
			if v.Pause < migratetest.SumsTake || v.Pause > migratetest.SumsTake+50*time.Millisecond {
				t.Errorf("it says that the guest stood for %v", v.Pause)
			}
			x.Work(20, 50*time.Millisecond)
			after := x.Primary.Stats()
			if after.Last.Pause() >= migratetest.SumsTake || after.Last.Sums > 0 {
				t.Errorf("checkpoints go on taking %v", after.Last.Pause())
			}
			// For the long pause alone it would be a second until the next checkpoint.
			if n := after.Epoch - v.Epoch; n < 10 {
				t.Errorf("%d epochs in the second after it", n)
			}
		}
		still(t, x, true)
	})
}

// TestVerifyFinds: whatever pages of the copy are spoiled, those and no others are
// found.
func TestVerifyFinds(t *testing.T) {
	for _, n := range []int{1, 2, 7, 64, 65, 200} {
		synctest.Test(t, func(t *testing.T) {
			x := start(t, migratetest.Options{Pages: 200})
			x.Guest.Quiet()
			time.Sleep(time.Second) // nothing is dirty any more, or a spoiled page might be mended
			spoiled := rand.New(rand.NewPCG(uint64(n), 1)).Perm(200)[:n]
			var want []page.PFN
			for _, i := range spoiled {
				x.Shadow.SpoilPage(x.Guest.PFN(i))
				want = append(want, x.Guest.PFN(i))
			}
			slices.Sort(want)
			v, err := x.Primary.Verify(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if v.Differ != n || v.Missing != 0 || !slices.Equal(v.Differing, want[:min(n, 64)]) {
				t.Errorf("%+v, want %v", v, want)
			}
			x.Primary.End("enough")
			ended(t, x, nil, nil)
		})
	}
}

// Shared pages are told apart among however many differ.
func TestVerifySharedAmongMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const pages = 1500
		x := start(t, migratetest.Options{Pages: pages})
		x.Guest.Quiet()
		time.Sleep(time.Second)
		for i := range pages {
			x.Shadow.SpoilPage(x.Guest.PFN(i))
		}
		x.Guest.Share(map[int]string{3: "a ring", pages - 1: "another"}, func(func(int)) {})
		v, err := x.Primary.Verify(t.Context())
		if err != nil || v.Differ != pages-2 || v.Shared != 2 {
			t.Errorf("%+v, %v", v, err)
		}
		still(t, x, false)
	})
}

// Pages that the copy has nothing of are told apart.
func TestVerifyMissing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{Pages: 100})
		x.Guest.Quiet()
		time.Sleep(time.Second)
		want := []page.PFN{x.Guest.PFN(3), x.Guest.PFN(99)}
		x.Shadow.Lose(want[0])
		x.Shadow.SpoilPage(want[1])
		v, err := x.Primary.Verify(t.Context())
		if err != nil || v.Differ != 2 || v.Missing != 1 || !slices.Equal(v.Differing, want) {
			t.Errorf("%+v, %v", v, err)
		}
		still(t, x, false)
	})
}

// A copy that cannot be read ends protection, at the first page: each may take long.
func TestVerifyUnreadable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{Pages: 100})
		x.Guest.Quiet()
		time.Sleep(time.Second)
		broken := errors.New("it does not take what it is fed")
		x.Shadow.Unread(broken)
		before := x.Points.Hits()["shadow: base"]
		if v, err := x.Primary.Verify(t.Context()); err == nil {
			t.Errorf("%+v", v)
		}
		if n := x.Points.Hits()["shadow: base"] - before; n != 1 {
			t.Errorf("%d pages read", n)
		}
		ended(t, x, migrate.ErrStandbyLost, broken)
		alone(t, x)
	})
}

// TestVerifyShared: what others write to behind the guest's back is told of by name,
// and what they write while it stands is compared as it was captured.
func TestVerifyShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{Pages: 100})
		x.Guest.Quiet()
		time.Sleep(time.Second)
		x.Guest.Share(map[int]string{3: "a ring", 99: "another"}, func(write func(int)) { write(3); write(99) })
		v, err := x.Primary.Verify(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		want := []migrate.SharedPage{{PFN: x.Guest.PFN(3), By: "a ring"}, {PFN: x.Guest.PFN(99), By: "another"}}
		if v.Differ != 0 || v.Shared != 2 || !slices.Equal(v.SharedPages, want) || v.Moved != 0 {
			t.Errorf("%+v", v)
		}
		// The same pages without their names are a difference.
		x.Guest.Share(nil, nil)
		if v, err = x.Primary.Verify(t.Context()); err != nil || v.Differ != 2 || v.Shared != 0 {
			t.Errorf("%+v, %v", v, err)
		}
		// A page that was captured, and written to by others before it is summed up.
		x.Guest.Share(nil, func(write func(int)) { write(50) })
		time.Sleep(777 * time.Microsecond) // when no checkpoint begins
		x.Points.At("guest: asked to suspend", 1, func() { x.Guest.Touch(50) })
		if v, err = x.Primary.Verify(t.Context()); err != nil || v.Differ != 2 || v.Moved != 1 {
			t.Errorf("%+v, %v", v, err)
		}
		x.Primary.End("enough")
		ended(t, x, nil, nil)
	})
}

func TestVerifyRefused(t *testing.T) {
	refused := func(t *testing.T, x *migratetest.Pair, want string) {
		t.Helper()
		if v, err := x.Primary.Verify(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v, %v; want %q", v, err, want)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		x := migratetest.NewPair(migratetest.Options{})
		x.Points.At("shadow: apply", 1, func() { time.Sleep(5 * time.Second) })
		x.Start(t)
		time.Sleep(time.Second)
		refused(t, x, "the first copy is not complete yet")
		time.Sleep(10 * time.Second)
		// Two at once.
		x.Points.At("guest: summed", 1, func() { refused(t, x, "verified already") })
		if v, err := verify(t, x); err != nil || v.Differ > 0 {
			t.Errorf("%+v, %v", v, err)
		}
		// The guest's memory cannot be read: nothing but the check fails.
		x.Guest.Unsummed(errors.New("mapping fails"))
		refused(t, x, "read the guest's memory: mapping fails")
		x.Guest.Unsummed(nil)
		if v, err := verify(t, x); err != nil || v.Differ > 0 {
			t.Errorf("after one that failed: %+v, %v", v, err)
		}
		// Nobody waits any more.
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := x.Primary.Verify(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("interrupted: %v", err)
		}
		if v, err := verify(t, x); err != nil || v.Differ > 0 {
			t.Errorf("after one that was interrupted: %+v, %v", v, err)
		}
		still(t, x, true)
		refused(t, x, "protection has ended")
	})
	synctest.Test(t, func(t *testing.T) {
		x := start(t, migratetest.Options{Rejoin: time.Minute})
		x.Net.Cut(true)
		time.Sleep(2 * time.Second)
		refused(t, x, "the standby is silent")
		x.Net.Cut(false)
		x.Work(40, 50*time.Millisecond)
		if v, err := verify(t, x); err != nil || v.Differ > 0 {
			t.Errorf("with the standby back: %+v, %v", v, err)
		}
		x.Primary.End("enough")
		x.Stop()
	})
}

// TestVerifyAcross: what breaks in the middle of a check, or ends, fails it with a
// sentence.
func TestVerifyAcross(t *testing.T) {
	for name, tt := range map[string]struct {
		at   string
		do   func(*migratetest.Pair)
		want string // "" is success: the epoch is sent again, and the check with it
		over bool
	}{
		"reset before the epoch": {at: "guest: summed", do: func(x *migratetest.Pair) { x.Net.Reset() }},
		"reset at the commit":    {at: "output: release", do: func(x *migratetest.Pair) { x.Net.Reset() }, want: "connection"},
		"cut off at the commit": {at: "output: release", do: func(x *migratetest.Pair) {
			x.Net.Mute(migratetest.Standby, true)
			time.AfterFunc(timeout/2, func() { x.Net.Reset(); x.Net.Mute(migratetest.Standby, false) })
		}, want: "connection"},
		"damaged":                 {at: "output: release", do: func(x *migratetest.Pair) { x.Net.Corrupt(migratetest.Primary, 100) }, want: "connection"},
		"what changed is unknown": {at: "guest: suspended", do: func(x *migratetest.Pair) { go x.Guest.Confuse(migratetest.After) }},
		"ended":                   {at: "guest: summed", do: func(x *migratetest.Pair) { x.Primary.End("enough") }, want: "protection has ended", over: true},
		"guest ends": {at: "guest: asked to suspend", do: func(x *migratetest.Pair) {
			x.Guest.Fail(migrate.ErrGuestGone)
		}, want: "protection has ended", over: true},
		"standby ends": {at: "output: release", do: func(x *migratetest.Pair) { x.Standby.End("enough") }, want: "", over: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := start(t, migratetest.Options{Pages: 200})
				hit := false
				once := func() {
					hit = true
					tt.do(x)
				}
				if tt.at == "output: release" {
					// That of the epoch with the sums, and not of the one before.
					x.Points.At("guest: summed", 1, func() { x.Points.At(tt.at, 1, once) })
				} else {
					x.Points.At(tt.at, 1, once)
				}
				v, err := verify(t, x)
				if !hit {
					t.Fatal("nothing has happened")
				}
				switch {
				case tt.over:
					if err == nil && (tt.want != "" || v.Differ > 0) || err != nil && !strings.Contains(err.Error(), tt.want) {
						t.Errorf("%+v, %v", v, err)
					}
					<-x.PrimaryErr
					<-x.StandbyErr
					return
				case tt.want == "":
					if err != nil || v.Differ > 0 {
						t.Errorf("%+v, %v", v, err)
					}
				case err == nil || !strings.Contains(err.Error(), tt.want):
					t.Errorf("%+v, %v", v, err)
				}
				time.Sleep(time.Second)
				if v, err := verify(t, x); err != nil || v.Differ > 0 {
					t.Errorf("once more: %+v, %v", v, err)
				}
				still(t, x, true)
			})
		})
	}
}

// TestVerifyLied: an answer that cannot be one is no answer.
func TestVerifyLied(t *testing.T) {
	for name, tt := range map[string]struct {
		lie  func(wire.Compared) []byte
		want string
	}{
		"of other pages": {func(c wire.Compared) []byte { c.Pages--; return c.Append(nil) }, "compared 63 pages, where 64 were to be"},
		"of none":        {func(wire.Compared) []byte { return wire.Compared{}.Append(nil) }, "compared 0 pages"},
		"a page not asked for": {func(c wire.Compared) []byte {
			c.Differ, c.PFNs = 1, []uint64{1 << 40}
			return c.Append(nil)
		}, "which it was not asked for"},
		"too many named": {func(c wire.Compared) []byte {
			c.PFNs = make([]uint64, wire.MaxDiffering+1)
			return c.Append(nil)
		}, "compared of"},
		"nothing": {func(wire.Compared) []byte { return nil }, "compared of 0 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				x := start(t, migratetest.Options{Dial: func(d migrate.Dial) migrate.Dial { return lying(d, tt.lie) }})
				if v, err := verify(t, x); err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%+v, %v; want %q", v, err, tt.want)
				}
				time.Sleep(time.Second)
				still(t, x, true)
			})
		})
	}
}

// lying has what a standby answers replaced.
func lying(dial migrate.Dial, lie func(wire.Compared) []byte) migrate.Dial {
	return func(ctx context.Context) (net.Conn, error) {
		c, err := dial(ctx)
		if err != nil {
			return nil, err
		}
		return &liar{Conn: c, r: wire.NewReader(c, 3), lie: lie}, nil
	}
}

type liar struct {
	net.Conn
	r   *wire.Reader
	lie func(wire.Compared) []byte
	out []byte
}

func (l *liar) Read(b []byte) (int, error) {
	if len(l.out) == 0 {
		f, err := l.r.Read()
		if err != nil {
			return 0, err
		}
		if f.Type == wire.TypeCompared {
			c, err := wire.ParseCompared(f.Payload)
			if err != nil {
				return 0, err
			}
			f.Payload = l.lie(c)
		}
		if l.out, err = f.Append(nil); err != nil {
			return 0, err
		}
	}
	n := copy(b, l.out)
	l.out = l.out[n:]
	return n, nil
}
