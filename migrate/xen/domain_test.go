package xen

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"

	"kemari/migrate"
	"kemari/migrate/page"
	"kemari/migrate/xen/internal/sys"
)

// replica is what a standby would have.
type replica map[page.PFN][page.Size]byte

func (r replica) take(p *Pages) error {
	if len(p.Data) != len(p.PFNs)*page.Size {
		return fmt.Errorf("%d pages in %d bytes", len(p.PFNs), len(p.Data))
	}
	for i, pfn := range p.PFNs {
		r[pfn] = [page.Size]byte(p.Data[i*page.Size:])
	}
	return nil
}

// equal tells where the replica lacks what the guest has. What the guest has given
// back it may have still.
func (r replica) equal(x *fakeXen) error {
	for p, want := range x.contents() {
		if got, ok := r[p]; !ok || got != want {
			return fmt.Errorf("page %v differs (there: %v)", p, ok)
		}
	}
	return nil
}

func nothing() error { return nil }

func begin(t tb, f *fixture, r replica) {
	t.Helper()
	head, err := f.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := CheckHead(head); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Round(t.Context(), r.take); err != nil {
		t.Fatal(err)
	}
}

func TestCheckpoint(t *testing.T) {
	x := newFakeXen(1 << 20)
	for p := range page.PFN(300) {
		x.populate(p)
	}
	x.populate(1<<20 - 9) // as a PVH guest's special pages
	f := newFixture(t, x, 64)
	r := replica{}
	var c Capture
	if err := f.Checkpoint(t.Context(), nothing, &c); !errors.Is(err, ErrIncomplete) {
		t.Fatalf("before a Round: %v", err)
	}
	begin(t, f, r)
	if len(r) != 301 {
		t.Fatalf("the first Round had %d pages", len(r))
	}
	for i := range 20 {
		x.write(page.PFN(i)+2, byte(i))
		x.write(1<<20-9, byte(i))
		sealed := false
		err := f.Checkpoint(t.Context(), func() error {
			sealed = !x.runs()
			x.write(200, byte(i)) // as late as can be
			return nil
		}, &c)
		if err != nil || !sealed {
			t.Fatalf("checkpoint: %v, sealed while it stood: %v", err, sealed)
		}
		if !x.runs() {
			t.Fatal("left standing")
		}
		if len(c.PFNs) != 4 { // and the canary
			t.Fatalf("%d pages", len(c.PFNs))
		}
		if err := CheckState(c.State, false); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(r.take(&c.Pages), r.equal(x)); err != nil {
			t.Fatal(err)
		}
	}
	if s := f.Stats(); s.Checkpoints != 20 || s.Maps > 301/64+2 {
		t.Errorf("%+v", s)
	}
	x.write(5, 1)
	if n, err := f.Round(t.Context(), r.take); err != nil || n != 2 {
		t.Errorf("Round: %d, %v", n, err)
	}
	if err := f.Close(); err != nil || x.log || x.port != 0 || !x.runs() {
		t.Errorf("Close: %v, log-dirty %v, port %d, runs %v", err, x.log, x.port, x.runs())
	}
}

// TestExact lets the guest write, balloon and be meddled with at random. Whenever a
// checkpoint succeeds the replica has what the guest has.
func TestExact(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		const limit = 1 << 14
		x := newFakeXen(limit)
		for p := range page.PFN(rapid.IntRange(2, 400).Draw(rt, "pages")) {
			x.populate(p)
		}
		x.populate(limit - 9)
		for i := range page.PFN(rapid.IntRange(0, 3).Draw(rt, "own")) {
			x.own[limit-10-i] = &frame{ours: true} // where the first one's chunk is mapped
		}
		balloons := rapid.Bool().Draw(rt, "balloons")
		slots := limit / sys.SlotPages // enough for all, or not
		if rapid.Bool().Draw(rt, "few slots") {
			slots = rapid.IntRange(1, 10).Draw(rt, "slots")
		}
		x.unmark = rapid.Bool().Draw(rt, "unmark")
		f := newFixture(rt, x, slots)
		r := replica{}
		begin(rt, f, r)
		c := Capture{Sums: new(migrate.Sums)}
		spoiled, out := false, []page.PFN{}
		some := func() page.PFN {
			all := x.pfns()
			return all[rapid.IntRange(0, len(all)-1).Draw(rt, "page")]
		}
		act := func() {
			switch rapid.IntRange(0, 12).Draw(rt, "act") {
			case 0, 1, 2:
				if p := some(); balloons && p > fakeCanary {
					x.balloonOut(p)
					out = append(out, p)
				}
			case 3, 4:
				if len(out) > 0 {
					x.populate(out[len(out)-1])
					out = out[:len(out)-1]
				}
			case 5:
				if balloons {
					x.populate(page.PFN(rapid.IntRange(0, limit-1).Draw(rt, "pfn")))
				}
			case 6:
				if rapid.IntRange(0, 9).Draw(rt, "meddle") > 0 {
					return
				}
				switch spoiled = true; rapid.IntRange(0, 2).Draw(rt, "how") {
				case 0:
					x.foreignClean()
				case 1:
					x.DisableLogDirty()
				case 2:
					x.DisableLogDirty()
					x.EnableLogDirty()
				}
			default:
				x.write(some(), byte(rapid.IntRange(0, 255).Draw(rt, "byte")))
			}
		}
		for range rapid.IntRange(1, 12).Draw(rt, "epochs") {
			spoiled = false
			for range rapid.IntRange(0, 30).Draw(rt, "acts") {
				act()
			}
			// Sometimes a Round comes first, with the guest acting in the middle of it.
			if rapid.IntRange(0, 2).Draw(rt, "round") == 0 {
				x.inClean = func() { act(); act(); act() }
				x.inLook = act
				_, err := f.Round(t.Context(), func(p *Pages) error {
					act()
					return r.take(p)
				})
				x.inClean, x.inLook = nil, nil
				if err != nil && !(spoiled && errors.Is(err, ErrLogDirtyLost)) {
					rt.Fatal(err)
				}
				if err != nil {
					spoiled = false
					x.inLook = func() {
						if !spoiled {
							act()
						}
					}
					_, err := f.Round(t.Context(), r.take)
					if x.inLook = nil; err != nil {
						rt.Fatal(err)
					}
				}
			}
			err := f.Checkpoint(t.Context(), nothing, &c)
			if !x.runs() {
				rt.Fatal("left standing")
			}
			if errors.Is(err, ErrLogDirtyLost) && spoiled {
				if err := f.Checkpoint(t.Context(), nothing, &c); !errors.Is(err, ErrIncomplete) {
					rt.Fatalf("after losing the log: %v", err)
				}
				if _, err := f.Round(t.Context(), r.take); err != nil {
					rt.Fatal(err)
				}
				err = f.Checkpoint(t.Context(), nothing, &c)
			} else if spoiled {
				rt.Fatalf("log-dirty spoiled, and not noticed: %v", err)
			}
			if err != nil {
				rt.Fatal(err)
			}
			if err := errors.Join(r.take(&c.Pages), r.equal(x), summed(x, c.Sums)); err != nil {
				rt.Fatal(err)
			}
		}
	})
}

// TestSwapInRound swaps a page's memory just before a Round reads the bitmap, which
// then has its bit for the last time.
func TestSwapInRound(t *testing.T) {
	x := newFakeXen(1024)
	for p := range page.PFN(100) {
		x.populate(p)
	}
	f := newFixture(t, x, 64)
	r := replica{}
	x.write(50, 7)
	begin(t, f, r)
	// Between a Round's look at the number of pages and its reading of the bitmap.
	x.inClean = func() { x.balloonOut(50); x.populate(50) }
	if _, err := f.Round(t.Context(), r.take); err != nil {
		t.Fatal(err)
	}
	var c Capture
	if err := f.Checkpoint(t.Context(), nothing, &c); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.take(&c.Pages), r.equal(x)); err != nil {
		t.Error(err)
	}
}

// TestSwapAfterRestart: what was given back and mapped, and is freed when all is
// begun anew, must not make up for a page swapped later.
func TestSwapAfterRestart(t *testing.T) {
	x := newFakeXen(1024)
	for p := range page.PFN(200) {
		x.populate(p)
	}
	f := newFixture(t, x, 64)
	r := replica{}
	x.write(50, 7)
	begin(t, f, r)
	x.balloonOut(150) // still mapped, so still counted
	f.known = false   // as after any error
	if _, err := f.Round(t.Context(), r.take); err != nil {
		t.Fatal(err)
	}
	x.balloonOut(50)
	x.populate(50)
	var c Capture
	if err := f.Checkpoint(t.Context(), nothing, &c); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.take(&c.Pages), r.equal(x)); err != nil {
		t.Error(err)
	}
}

// TestSwapInLook: a guest that gets memory where it is looked at soon, and gives some
// back where it has been looked at, has as many pages found before all are.
func TestSwapInLook(t *testing.T) {
	x := newFakeXen(1 << 14)
	for p := range page.PFN(3 * sys.TypesBatch) {
		x.populate(p)
	}
	x.balloonOut(2500)
	x.populate(4000)
	x.write(4000, 7)
	f := newFixture(t, x, 1<<14/sys.SlotPages)
	r := replica{}
	looks := 0
	x.inLook = func() {
		if looks++; looks == 5 { // the canary; the last ones; two more; those with 2500 in them
			x.balloonOut(5)
			x.populate(2500)
		}
	}
	begin(t, f, r)
	if s := f.Stats(); looks < 16 || s.Vanished != 1 {
		t.Errorf("looked %d times; %+v", looks, s)
	}
	var c Capture
	if err := f.Checkpoint(t.Context(), nothing, &c); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.take(&c.Pages), r.equal(x)); err != nil {
		t.Error(err)
	}
}

// TestBalloon: what the guest gives back is freed, so that it may have other memory,
// and it costs as little as before once it is done.
func TestBalloon(t *testing.T) {
	const limit, pages = 1 << 14, 4096
	x := newFakeXen(limit)
	for p := range page.PFN(pages) {
		x.populate(p)
	}
	x.max = pages
	f := newFixture(t, x, limit/sys.SlotPages)
	r := replica{}
	begin(t, f, r)
	var c Capture
	checkpoint := func() {
		t.Helper()
		for p := range page.PFN(20) {
			x.write(2+p*99, 1)
		}
		if err := f.Checkpoint(t.Context(), nothing, &c); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(r.take(&c.Pages), r.equal(x)); err != nil {
			t.Fatal(err)
		}
	}
	for p := range page.PFN(1000) {
		x.balloonOut(2100 + p)
	}
	for range pages/sys.TypesBatch + 1 {
		checkpoint()
	}
	if x.total != pages-1000 || f.pop.pages != pages-1000 {
		t.Errorf("given back, of %d pages there are %d, known %d", pages, x.total, f.pop.pages)
	}
	if s := f.Stats(); s.Ballooned != 0 || s.Vanished != 1000 {
		t.Errorf("%+v", s)
	}
	for p := range page.PFN(1000) {
		x.populate(2100 + p)
	}
	checkpoint()
	before := f.Stats()
	if before.Ballooned != 1 || before.Appeared != 1000 {
		t.Errorf("%+v", before)
	}
	for range 5 {
		checkpoint()
	}
	if s := f.Stats(); s.Ballooned != 1 || s.Maps != before.Maps || x.total != pages {
		t.Errorf("%+v, then %+v", before, s)
	}
}

// TestErrors: whatever goes wrong, the guest runs afterwards and nothing is missed.
func TestErrors(t *testing.T) {
	boom := errors.New("boom")
	for name, c := range map[string]struct {
		spoil func(*fixture)
		seal  error
		want  error
		known bool // nothing has been missed
	}{
		"seal":             {seal: boom, want: boom},
		"hypercall":        {spoil: func(f *fixture) { f.x.fail = boom }, want: boom},
		"no memory to log": {spoil: func(f *fixture) { f.x.fail = syscall.ENOMEM }, want: ErrLogDirtyLost},
		"mapping": {spoil: func(f *fixture) {
			f.w.fail = boom
			f.mem.dropAll()
		}, want: boom},
		"somebody else suspended it": {spoil: func(f *fixture) { f.x.shutdown(sys.ShutdownSuspend) }, want: ErrBusy, known: true},
		"no answer":                  {spoil: func(f *fixture) { f.answer(func() {}); f.susp.limit = 300 * time.Millisecond }, want: ErrNoSuspend, known: true},
	} {
		t.Run(name, func(t *testing.T) {
			x := newFakeXen(1024)
			for p := range page.PFN(100) {
				x.populate(p)
			}
			f := newFixture(t, x, 8)
			r := replica{}
			begin(t, f, r)
			x.write(50, 9)
			if c.spoil != nil {
				c.spoil(f)
			}
			var cap Capture
			err := f.Checkpoint(t.Context(), func() error { return c.seal }, &cap)
			if !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			if c.want == ErrBusy {
				if x.runs() {
					t.Error("resumed what somebody else had suspended")
				}
				x.Resume(false)
			}
			if !x.runs() {
				t.Fatal("left standing")
			}
			f.w.fail, f.susp.limit = nil, 30*time.Second
			f.answer(nil)
			if !c.known {
				if err := f.Checkpoint(t.Context(), nothing, &cap); !errors.Is(err, ErrIncomplete) {
					t.Fatalf("then: %v", err)
				}
				if _, err := f.Round(t.Context(), r.take); err != nil {
					t.Fatal(err)
				}
			}
			if err := f.Checkpoint(t.Context(), nothing, &cap); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(r.take(&cap.Pages), r.equal(x)); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestForeignMark: a page of Xen's that is marked at every checkpoint is looked for
// once, and is no page of the guest's.
func TestForeignMark(t *testing.T) {
	x := newFakeXen(1 << 20)
	for p := range page.PFN(100) {
		x.populate(p)
	}
	x.populate(500_001)
	x.own[500_000] = &frame{ours: true}
	f := newFixture(t, x, 64)
	begin(t, f, replica{})
	var c Capture
	for range 5 {
		x.mu.Lock()
		x.mark(500_000)
		x.mu.Unlock()
		x.write(7, 1)
		if err := f.Checkpoint(t.Context(), nothing, &c); err != nil || len(c.PFNs) != 2 { // and the canary
			t.Fatal(len(c.PFNs), err)
		}
	}
	if s := f.Stats(); s.Searches != 1 || s.Ballooned != 0 {
		t.Errorf("%+v", s)
	}
}

// A guest that is left standing stands until it is let go on, however, or is ended;
// nothing is missed of what it does then.
func TestHold(t *testing.T) {
	for name, end := range map[string]func(*fixture, replica) error{
		"resumed": func(f *fixture, r replica) error {
			if err := f.Resume(); err != nil {
				return err
			}
			if err := f.Resume(); err == nil {
				return errors.New("resumed twice")
			}
			f.x.write(60, 3)
			var c Capture
			if err := f.Checkpoint(t.Context(), nothing, &c); err != nil {
				return err
			}
			return errors.Join(r.take(&c.Pages), r.equal(f.x))
		},
		"resumed by somebody else": func(f *fixture, r replica) error {
			f.x.Resume(false)
			if err := f.Resume(); !errors.Is(err, ErrBusy) {
				return fmt.Errorf("got %w", err)
			}
			return nil
		},
		"closed":     func(f *fixture, r replica) error { return f.Close() },
		"cleaned up": func(f *fixture, r replica) error { return cleanup(t.Context(), f.x, &f.susp) },
	} {
		t.Run(name, func(t *testing.T) {
			x := newFakeXen(1024)
			for p := range page.PFN(100) {
				x.populate(p)
			}
			f := newFixture(t, x, 16)
			r := replica{}
			begin(t, f, r)
			x.write(50, 9)
			c := Capture{Hold: true}
			boom := errors.New("boom")
			if err := f.Checkpoint(t.Context(), func() error { return boom }, &c); !errors.Is(err, boom) || !x.runs() {
				t.Fatalf("runs %v after %v", x.runs(), err)
			}
			if _, err := f.Round(t.Context(), r.take); err != nil {
				t.Fatal(err)
			}
			if err := f.Checkpoint(t.Context(), nothing, &c); err != nil || x.runs() || c.Resume > time.Millisecond {
				t.Fatalf("runs %v, resumed for %v, %v", x.runs(), c.Resume, err)
			}
			if err := errors.Join(r.take(&c.Pages), r.equal(x)); err != nil {
				t.Error(err)
			}
			if err := end(f, r); err != nil || !x.runs() {
				t.Errorf("runs %v, %v", x.runs(), err)
			}
		})
	}
}

// A guest that stands is ended by whoever manages it, and then there is nothing left to
// put back.
func TestHoldDestroy(t *testing.T) {
	x := newFakeXen(1024)
	for p := range page.PFN(100) {
		x.populate(p)
	}
	f := newFixture(t, x, 16)
	begin(t, f, replica{})
	f.destroy = func(context.Context) error {
		x.mu.Lock()
		defer x.mu.Unlock()
		if !x.info.Down {
			t.Error("it runs")
		}
		x.absent = true
		return nil
	}
	c := Capture{Hold: true}
	if err := f.Checkpoint(t.Context(), nothing, &c); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Destroy(t.Context()), f.Close()); err != nil || x.resumed != 0 {
		t.Errorf("resumed %d times, %v", x.resumed, err)
	}
}

// TestGrown: memory above all there was is noticed.
func TestGrown(t *testing.T) {
	x := newFakeXen(1024)
	for p := range page.PFN(100) {
		x.populate(p)
	}
	f := newFixture(t, x, 64)
	r := replica{}
	begin(t, f, r)
	x.limit = 4096
	x.populate(4000)
	var c Capture
	if err := f.Checkpoint(t.Context(), nothing, &c); !errors.Is(err, ErrLogDirtyLost) {
		t.Fatalf("%v", err)
	}
	if _, err := f.Round(t.Context(), r.take); err != nil {
		t.Fatal(err)
	}
	x.write(4000, 3)
	if err := f.Checkpoint(t.Context(), nothing, &c); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.take(&c.Pages), r.equal(x)); err != nil {
		t.Error(err)
	}
}

func TestGuestGone(t *testing.T) {
	for name, end := range map[string]func(*fixture){
		"destroyed": func(f *fixture) { f.x.absent = true },
		"dying":     func(f *fixture) { f.x.set(func(i *sys.Info) { i.Dying = true }) },
		"poweroff":  func(f *fixture) { f.x.shutdown(0) },
		"crash when asked": func(f *fixture) {
			f.answer(func() { f.x.shutdown(3) })
		},
	} {
		t.Run(name, func(t *testing.T) {
			x := newFakeXen(128)
			for p := range page.PFN(100) {
				x.populate(p)
			}
			f := newFixture(t, x, 8)
			begin(t, f, replica{})
			if f.Ended() {
				t.Error("a guest that runs has ended")
			}
			end(f)
			var c Capture
			if err := f.Checkpoint(t.Context(), nothing, &c); !errors.Is(err, migrate.ErrGuestGone) {
				t.Errorf("%v", err)
			}
			if !f.Ended() {
				t.Error("it is not said to have ended")
			}
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestCancel ends the context at any moment of a checkpoint.
func TestCancel(t *testing.T) {
	x := newFakeXen(1024)
	for p := range page.PFN(1000) {
		x.populate(p)
	}
	f := newFixture(t, x, 4)
	r := replica{}
	begin(t, f, r)
	f.answer(func() { time.Sleep(2 * time.Millisecond); x.shutdown(sys.ShutdownSuspend) })
	cause := errors.New("told to")
	var c Capture
	cancelled := 0
	for i := range 60 {
		for p := range page.PFN(500) {
			x.write(p, byte(i))
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		timer := time.AfterFunc(time.Duration(i)*100*time.Microsecond, func() { cancel(cause) })
		start := time.Now()
		err := f.Checkpoint(ctx, nothing, &c)
		timer.Stop()
		cancel(nil)
		if !x.runs() {
			t.Fatalf("left standing, with %v", err)
		}
		if d := time.Since(start); d > 5*time.Second {
			t.Fatalf("took %v", d)
		}
		switch {
		case err == nil:
			r.take(&c.Pages)
		case errors.Is(err, cause):
			cancelled++
			if _, err := f.Round(t.Context(), r.take); err != nil {
				t.Fatal(err)
			}
			if err := f.Checkpoint(t.Context(), nothing, &c); err != nil {
				t.Fatal(err)
			}
			r.take(&c.Pages)
		default:
			t.Fatal(err)
		}
		if err := r.equal(x); err != nil {
			t.Fatal(err)
		}
	}
	if cancelled == 0 {
		t.Error("nothing was cancelled")
	}
}

// TestPaused: a guest an operator pauses is waited for; asked to stop meanwhile, the
// request is taken back, or the mark stays.
func TestPaused(t *testing.T) {
	x := newFakeXen(128)
	for p := range page.PFN(100) {
		x.populate(p)
	}
	f := newFixture(t, x, 8)
	begin(t, f, replica{})
	f.susp.limit = 300 * time.Millisecond
	x.set(func(i *sys.Info) { i.Paused = true })
	f.answer(func() {
		time.Sleep(time.Second) // longer than the limit
		x.shutdown(sys.ShutdownSuspend)
	})
	var c Capture
	if err := f.Checkpoint(t.Context(), nothing, &c); err != nil {
		t.Errorf("a paused guest: %v", err)
	}
	f.answer(func() {}) // seen, and no more
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := f.Checkpoint(ctx, nothing, &c); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	if state, _, _ := f.Domain.mark.get(); state != markSuspending {
		t.Errorf("mark %q: nobody would resume it", state)
	}
}

// TestPausedInTheMiddle: a guest that an operator pauses while it suspends is left
// paused as often as he did it, and not suspended, once protection ends.
func TestPausedInTheMiddle(t *testing.T) {
	for name, c := range map[string]struct {
		pauses  int
		gone    bool // it ends where it should suspend
		cleanup bool // the process was killed
	}{
		"once":         {pauses: 1},
		"twice":        {pauses: 2},
		"then it ends": {pauses: 1, gone: true},
		"killed":       {pauses: 1, cleanup: true},
	} {
		t.Run(name, func(t *testing.T) {
			x := newFakeXen(128)
			for p := range page.PFN(100) {
				x.populate(p)
			}
			f := newFixture(t, x, 8)
			begin(t, f, replica{})
			seen := make(chan struct{})
			f.answer(func() {
				for range c.pauses {
					x.Pause()
				}
				close(seen)
				for x.paused() > 0 && t.Context().Err() == nil { // its processors do not run
					time.Sleep(time.Millisecond)
				}
				if c.gone {
					x.shutdown(0)
				} else {
					x.shutdown(sys.ShutdownSuspend)
				}
			})
			cause := errors.New("told to")
			ctx, cancel := context.WithCancelCause(t.Context())
			go func() { <-seen; cancel(cause) }()
			var cap Capture
			if err := f.Checkpoint(ctx, nothing, &cap); err == nil || err.Error() != cause.Error() {
				t.Errorf("%v", err)
			}
			// Nothing was done to it yet: another copy of it may run.
			if x.paused() != c.pauses {
				t.Errorf("paused %d times, %d by the operator", x.paused(), c.pauses)
			}
			if c.cleanup {
				if err := cleanup(t.Context(), x, &f.susp); err != nil {
					t.Error(err)
				}
			} else if err := f.Close(); err != nil {
				t.Error(err)
			}
			if c.gone {
				return
			}
			if !x.runs() || x.paused() != c.pauses || x.resumed != 1 || x.log || x.port != 0 {
				t.Errorf("runs %v, paused %d times, resumed %d times, log-dirty %v, port %d", x.runs(), x.paused(), x.resumed, x.log, x.port)
			}
			if m, err := openMark(f.mark); err != nil {
				t.Error(err)
			} else if state, _, _ := m.get(); state != markRunning {
				t.Errorf("mark %q", state)
			} else {
				m.Close()
			}
		})
	}
}

func TestCleanup(t *testing.T) {
	for name, c := range map[string]struct {
		mark  string
		stand bool
		ask   bool // the request is there, unseen
		want  bool // runs afterwards
	}{
		"nothing left":                        {mark: "r port 12 of 010203\n", want: true},
		"stands, ours":                        {mark: "s", stand: true, want: true},
		"stands, no mark":                     {mark: "", stand: true, want: true},
		"stands, somebody else's":             {mark: "r", stand: true, want: false},
		"request unseen":                      {mark: "s", ask: true, want: true},
		"marked, but the guest never saw one": {mark: "s", want: true},
	} {
		t.Run(name, func(t *testing.T) {
			x := newFakeXen(128)
			x.EnableLogDirty()
			x.Subscribe(12)
			f := newFixture(t, x, 8)
			f.susp.limit = time.Second
			f.answer(func() {})
			if c.ask {
				f.store.Set(f.susp.node(), "suspend")
			}
			if c.stand {
				x.shutdown(sys.ShutdownSuspend)
			}
			f.Domain.mark.f.WriteAt([]byte(c.mark), 0)
			for range 2 {
				if err := cleanup(t.Context(), x, &f.susp); err != nil {
					t.Error(err)
				}
			}
			if x.runs() != c.want || x.log || x.port != 0 {
				t.Errorf("runs %v, log-dirty %v, port %d", x.runs(), x.log, x.port)
			}
			if v := f.store.Get(f.susp.node()); v != "" {
				t.Errorf("the request is still there: %q", v)
			}
		})
	}
}

func TestBegin(t *testing.T) {
	x := newFakeXen(128)
	x.populate(1)
	x.noLog = syscall.EOPNOTSUPP
	f := newFixture(t, x, 8)
	if _, err := f.Begin(t.Context()); !errors.Is(err, ErrNoLogDirty) {
		t.Errorf("log-dirty refused: %v", err)
	}
	x.noLog, x.log = nil, true // left on
	if _, err := f.Begin(t.Context()); err != nil {
		t.Error(err)
	}
	if _, port, of := f.Domain.mark.get(); port != 12 || of != "01020300000000000000000000000000" {
		t.Errorf("mark: port %d of %q", port, of)
	}
	if err := f.check(t.Context()); err != nil {
		t.Error(err)
	}
	for want, set := range map[error]func(*sys.Info){
		ErrNoLogDirty: func(i *sys.Info) { i.HVM = false },
	} {
		x.set(set)
		if err := f.check(t.Context()); !errors.Is(err, want) {
			t.Errorf("got %v, want %v", err, want)
		}
	}
}

// TestNoAllocations: a capture allocates nothing once its buffers are there.
func TestNoAllocations(t *testing.T) {
	x := newFakeXen(4096)
	for p := range page.PFN(4000) {
		x.populate(p)
	}
	f := newFixture(t, x, 64)
	begin(t, f, replica{})
	var c Capture
	reserve(&c, 4096)
	info, _ := x.Info()
	dirtied := make([]page.PFN, 0, 100)
	for p := range page.PFN(100) {
		dirtied = append(dirtied, p*37)
	}
	one := func() {
		for _, p := range dirtied {
			x.write(p, 1)
		}
		c.PFNs, c.State = c.PFNs[:0], c.State[:0]
		x.info.Down, x.info.Reason = true, sys.ShutdownSuspend
		if _, err := f.capture(t.Context(), info, nothing, &c); err != nil {
			t.Fatal(err)
		}
	}
	one()
	// The fake's own state takes two.
	if n := testing.AllocsPerRun(50, one); n > 3 {
		t.Errorf("%v allocations for %d pages", n, len(c.PFNs))
	}
	x.Resume(false)
}
