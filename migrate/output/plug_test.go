package output

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/florianl/go-tc"
	link "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestNoInterfaces: a guest without a network is protected all the same.
func TestNoInterfaces(t *testing.T) {
	space(t)
	p := open(t)
	for range 3 {
		p.Arm()
		must(t, p.Seal())
		if err := p.Seal(); !errors.Is(err, ErrOutstanding) {
			t.Errorf("second seal: %v", err)
		}
		must(t, p.Release())
		if err := p.Release(); !errors.Is(err, ErrNotSealed) {
			t.Errorf("second release: %v", err)
		}
	}
	select {
	case <-p.Held():
		t.Error("held something")
	default:
	}
	if n, err := p.Drops(); n != 0 || err != nil {
		t.Errorf("drops: %d, %v", n, err)
	}
	for range 2 {
		must(t, p.Close())
	}
	p.Arm()
	if err := p.Seal(); !errors.Is(err, ErrClosed) {
		t.Errorf("seal after close: %v", err)
	}
	must(t, Cleanup(t.Context(), nil))
}

// TestEpochs: what comes out is exactly the epochs released, in order, of every
// protocol.
func TestEpochs(t *testing.T) {
	lab(t)
	g := newGuest(t, 0)
	p := open(t, g.vif)

	g.send(10)
	g.expect(0, 10) // passing
	must(t, p.Seal())
	g.send(10)
	g.expect(0, 0)
	must(t, p.Release()) // of the epoch that passed
	g.expect(0, 0)
	released := 10

	for epoch := range 20 {
		sealed := int(g.sent.Load())
		must(t, p.Seal())
		if err := p.Seal(); !errors.Is(err, ErrOutstanding) {
			t.Fatalf("second seal: %v", err)
		}
		g.send(rand.IntN(100))
		if epoch%4 == 0 {
			g.expect(0, 0)
		}
		must(t, p.Release())
		g.expect(released, sealed)
		released = sealed
		if err := p.Release(); !errors.Is(err, ErrNotSealed) {
			t.Fatalf("second release: %v", err)
		}
	}
	must(t, p.Seal())
	g.send(5)
	must(t, p.Close()) // with one epoch sealed, and the next begun
	g.expect(released, int(g.sent.Load()))
	if found := ours(t); len(found) > 0 {
		t.Errorf("left behind: %q", found)
	}
	released = int(g.sent.Load())
	g.send(5)
	g.expect(released, int(g.sent.Load()))
	if n, err := p.Drops(); n != 0 || err != nil {
		t.Errorf("drops: %d, %v", n, err)
	}
}

// TestPass: what is held comes out, in order, and then everything, until epochs
// begin anew. Repeated so often that each band is passed through.
func TestPass(t *testing.T) {
	lab(t)
	g := newGuest(t, 0)
	p := open(t, g.vif)
	must(t, p.Pass()) // before the first Seal
	for i := range 2 * numBands {
		released := int(g.sent.Load())
		g.send(3)
		g.expect(released, released+3)
		must(t, p.Seal())
		must(t, p.Release())
		g.send(3)
		must(t, p.Seal())
		g.send(3)
		out := released + 3
		if i%3 == 0 {
			must(t, p.Release())
			g.expect(out, out+3)
			out += 3
		} else {
			g.expect(0, 0)
		}
		for range 2 {
			must(t, p.Pass())
		}
		g.send(3)
		g.expect(out, released+12)
		if err := p.Release(); !errors.Is(err, ErrNotSealed) {
			t.Fatalf("release after pass: %v", err)
		}
	}
}

// TestTraffic: opening, checkpointing and closing under traffic lose nothing,
// duplicate nothing and keep the order.
func TestTraffic(t *testing.T) {
	lab(t)
	g := newGuest(t, 0)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		// Behind a veth each processor has a queue of its own; netback has one
		// thread for each queue of a guest.
		runtime.LockOSThread()
		var one unix.CPUSet
		one.Set(0)
		_ = unix.SchedSetaffinity(0, &one)
		for {
			select {
			case <-stop:
				return
			default:
				g.send(8)
				time.Sleep(50 * time.Microsecond)
			}
		}
	})
	type span struct{ from, to int }
	var closing []span // what was sent between a last Seal and the plug's end
	for round := range 3 {
		time.Sleep(20 * time.Millisecond)
		p := open(t, g.vif)
		var last int
		for range 30 {
			time.Sleep(3 * time.Millisecond)
			last = int(g.sent.Load())
			must(t, p.Seal())
			time.Sleep(time.Millisecond)
			must(t, p.Release())
		}
		if round == 1 {
			crash(p)
			must(t, Cleanup(context.Background(), []string{g.vif}))
		} else {
			must(t, p.Close())
		}
		closing = append(closing, span{last, int(g.sent.Load())})
		if n, err := p.Drops(); round != 1 && (n != 0 || err != nil) {
			t.Errorf("drops: %d, %v", n, err)
		}
	}
	close(stop)
	wg.Wait()

	seen, late := make([]int, g.sent.Load()), 0
	prev := -1
	for count := 0; ; count++ {
		wait := 5 * time.Second
		if count >= len(seen) {
			wait = 50 * time.Millisecond // there should be none
		}
		n := g.next(wait)
		if n < 0 {
			break
		}
		seen[n]++
		if n != prev+1 {
			late++
			if !slices.ContainsFunc(closing, func(s span) bool { return s.from <= n && n <= s.to+1 }) {
				t.Errorf("frame %d follows %d, and no plug was being removed (%v)", n, prev, closing)
			}
		}
		prev = n
	}
	for n, times := range seen {
		if times != 1 {
			t.Errorf("frame %d came out %d times", n, times)
		}
	}
	t.Logf("%d frames, %d out of order at the plugs' ends", len(seen), late)
}

// crash ends a Plug as the death of its process does.
func crash(p *Plug) {
	p.closed = true
	for _, t := range p.taps {
		t.Close()
	}
	p.k.Close()
}

func TestCleanup(t *testing.T) {
	lab(t)
	g := newGuest(t, 0)
	must(t, Cleanup(t.Context(), []string{g.vif})) // nothing there

	p := open(t, g.vif)
	must(t, p.Seal())
	g.send(10)
	must(t, p.Release())
	must(t, p.Seal())
	g.send(10)
	crash(p)
	if _, err := Open(t.Context(), slog.New(slog.DiscardHandler), []string{g.vif}); err == nil {
		t.Error("opened a plug over a plug")
	}
	g.expect(0, 0) // which has left the other alone
	for range 2 {
		must(t, Cleanup(t.Context(), []string{g.vif}))
		if found := ours(t); len(found) > 0 {
			t.Errorf("left behind: %q", found)
		}
	}
	g.expect(0, int(g.sent.Load()))

	// An ifb that never got further.
	attrs := link.NewLinkAttrs()
	attrs.Name = ifbName(g.vif)
	must(t, link.LinkAdd(&link.Ifb{LinkAttrs: attrs}))
	attrs.Name = "ifb7" // and one of somebody else
	must(t, link.LinkAdd(&link.Ifb{LinkAttrs: attrs}))
	must(t, Cleanup(t.Context(), []string{g.vif}))
	if found := ours(t); !slices.Equal(found, []string{"ifb7"}) {
		t.Errorf("left: %q, want ifb7", found)
	}
}

// TestGone: a guest that ends under the plug is told apart, and its plug can
// still be removed, by Close and by a Cleanup of anybody.
func TestGone(t *testing.T) {
	lab(t)
	a, b := newGuest(t, 0), newGuest(t, 1)
	for _, crashed := range []bool{false, true} {
		p := open(t, a.vif, b.vif)
		must(t, p.Seal())
		a.send(3)
		b.send(3)
		l, err := link.LinkByName(b.vif)
		must(t, err)
		must(t, link.LinkDel(l))
		from := int(a.sent.Load()) - 3
		for range 3 {
			if err := p.Release(); !errors.Is(err, ErrGone) {
				t.Errorf("release: %v", err)
			}
			if err := p.Seal(); !errors.Is(err, ErrGone) {
				t.Errorf("seal: %v", err)
			}
		}
		a.expect(from, int(a.sent.Load())) // the other goes on
		if crashed {
			crash(p)
			must(t, Cleanup(t.Context(), nil)) // its ifb is anybody's
			if found := ours(t); !slices.Equal(found, []string{ifbName(a.vif), "clsact"}) {
				t.Errorf("left: %q", found)
			}
			must(t, Cleanup(t.Context(), []string{a.vif}))
		}
		must(t, p.Close())
		if found := ours(t); len(found) > 0 {
			t.Errorf("left behind: %q", found)
		}
		for _, name := range []string{"br1", "wire1"} {
			l, err := link.LinkByName(name)
			must(t, err)
			must(t, link.LinkDel(l))
		}
		if !crashed {
			b = newGuest(t, 1)
		}
	}
}

// TestTwoInterfaces: their epochs are closed and let out together.
func TestTwoInterfaces(t *testing.T) {
	lab(t)
	a, b := newGuest(t, 0), newGuest(t, 1)
	p := open(t, a.vif, b.vif)
	must(t, p.Seal())
	must(t, p.Release())
	a.send(3)
	b.send(4)
	must(t, p.Seal())
	a.send(5)
	must(t, p.Release())
	a.expect(0, 3)
	b.expect(0, 4)
	must(t, p.Close())
	a.expect(3, 8)
	b.expect(0, 0)
}

// TestOpenUndone: if one interface cannot be plugged, none stays so.
func TestOpenUndone(t *testing.T) {
	lab(t)
	g := newGuest(t, 0)
	_, err := Open(t.Context(), slog.New(slog.DiscardHandler), []string{g.vif, "vif3.7"})
	if !errors.Is(err, ErrGone) {
		t.Errorf("open: %v", err)
	}
	if found := ours(t); len(found) > 0 {
		t.Errorf("left behind: %q", found)
	}
	g.send(3)
	g.expect(0, 3)
}

// TestIngressInUse: what others have at the ingress is shared, or refused with
// the remedy, and never removed.
func TestIngressInUse(t *testing.T) {
	lab(t)
	g := newGuest(t, 0)
	k, err := openKernel()
	must(t, err)
	defer k.Close()
	l, err := link.LinkByName(g.vif)
	must(t, err)
	d := &device{vif: g.vif, vifIndex: uint32(l.Attrs().Index)}

	ingress := d.clsact()
	ingress.Kind = "ingress"
	must(t, k.tc.Qdisc().Add(ingress))
	_, err = Open(t.Context(), slog.New(slog.DiscardHandler), []string{g.vif})
	if err == nil || !strings.Contains(err.Error(), "tc qdisc del dev vif3.0 ingress") {
		t.Errorf("beside an ingress qdisc: %v", err)
	}
	must(t, k.tc.Qdisc().Delete(ingress))

	must(t, k.tc.Qdisc().Add(d.clsact()))
	p := open(t, g.vif)
	must(t, p.Seal())
	g.send(2)
	g.expect(0, 0)
	must(t, p.Close())
	g.expect(0, 2)
	if found := ours(t); !slices.Equal(found, []string{"clsact"}) {
		t.Errorf("left: %q, want the clsact that was there", found)
	}

	f := d.filter()
	f.Handle, f.Info = 1, f.Info+1<<16
	class := uint32(1)
	f.Matchall = &tc.Matchall{ClassID: &class}
	must(t, k.tc.Filter().Add(f))
	_, err = Open(t.Context(), slog.New(slog.DiscardHandler), []string{g.vif})
	if err == nil || !strings.Contains(err.Error(), "tc filter del") {
		t.Errorf("beside a filter: %v", err)
	}
	if some, err := k.filters(d.vifIndex, tc.HandleMinIngress); !some || err != nil {
		t.Errorf("filter still there: %v, %v", some, err)
	}
}

// TestLimit: an epoch beyond the limit drops frames, and says how many.
func TestLimit(t *testing.T) {
	lab(t)
	g := newGuest(t, 0)
	p := open(t, g.vif)
	must(t, p.Seal())
	const size = 60000
	for range Limit / size {
		g.sendSize(size)
	}
	if n, err := p.Drops(); n != 0 || err != nil {
		t.Errorf("drops below the limit: %d, %v", n, err)
	}
	held := int(g.sent.Load())
	for range 5 {
		g.sendSize(size)
	}
	if n, err := p.Drops(); n != 5 || err != nil {
		t.Errorf("drops: %d, %v; want 5", n, err)
	}
	must(t, p.Release())
	must(t, p.Seal())
	g.sendSize(size) // the next epoch has room of its own
	must(t, p.Release())
	g.expect(0, held)
	must(t, p.Close())
	if n, err := p.Drops(); n != 5 || err != nil {
		t.Errorf("drops after Close: %d, %v; want 5", n, err)
	}
}

func TestHeld(t *testing.T) {
	lab(t)
	a, b := newGuest(t, 0), newGuest(t, 1)
	p := open(t, a.vif, b.vif)
	must(t, p.Seal())
	for range 20 {
		p.Arm()
		if held(p, 5*time.Millisecond) {
			t.Fatal("reported without a frame")
		}
		[]*guest{a, b}[rand.IntN(2)].send(1)
		if !held(p, 5*time.Second) {
			t.Fatal("not reported")
		}
		a.send(20)
		b.send(20)
		more := 0
		for held(p, 5*time.Millisecond) {
			more++
		}
		if more > 1 {
			t.Fatal("reported more than once per interface")
		}
	}
}

func held(p *Plug, wait time.Duration) bool {
	select {
	case <-p.Held():
		return true
	case <-time.After(wait):
		return false
	}
}

func BenchmarkSealRelease(b *testing.B) {
	lab(b)
	g := newGuest(b, 0)
	p := open(b, g.vif)
	var arm, seal, release time.Duration
	b.ReportAllocs()
	for b.Loop() {
		t0 := time.Now()
		p.Arm()
		t1 := time.Now()
		must(b, p.Seal())
		t2 := time.Now()
		must(b, p.Release())
		arm, seal, release = arm+t1.Sub(t0), seal+t2.Sub(t1), release+time.Since(t2)
	}
	n := float64(b.N) * 1e3
	b.ReportMetric(float64(arm)/n, "arm-µs")
	b.ReportMetric(float64(seal)/n, "seal-µs")
	b.ReportMetric(float64(release)/n, "release-µs")
}
