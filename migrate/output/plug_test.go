package output

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/florianl/go-tc"
	"github.com/mdlayher/packet"
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

// TestCommitted reads both sides of the plugs of two interfaces: what has come out
// of each after a release is exactly what had arrived there before the seal.
func TestCommitted(t *testing.T) {
	for _, at := range attachments {
		t.Run(at.name, func(t *testing.T) {
			lab(t)
			guests := []*guest{newGuestOn(t, 0, at), newGuestOn(t, 1, at)}
			p := open(t, guests[0].vif, guests[1].vif)
			must(t, p.Seal())
			must(t, p.Release())
			talk := func() {
				for range rand.IntN(8) {
					guests[rand.IntN(2)].send(rand.IntN(10))
				}
				for _, g := range guests {
					g.settle()
				}
			}
			var out, end [2]int
			for range 2 * numBands {
				talk()
				must(t, p.Seal()) // the guest stands
				for i, g := range guests {
					end[i] = g.came
				}
				talk()
				for i, g := range guests {
					if n := g.next(0); n >= 0 {
						t.Fatalf("%s: frame %d came out before its release, after %d", g.vif, n, out[i])
					}
				}
				must(t, p.Release())
				for i, g := range guests {
					g.expect(out[i], end[i])
					out[i] = end[i]
				}
			}
			must(t, p.Close())
			for i, g := range guests {
				g.expect(out[i], g.came)
			}
			t.Logf("%d and %d frames in %d epochs", guests[0].came, guests[1].came, 2*numBands)
		})
	}
}

// TestSlowDrain: the frames of an epoch that are slow to leave hold up those of
// the next ones, whatever comes then.
func TestSlowDrain(t *testing.T) {
	for _, c := range []struct {
		name   string
		epochs int
		then   func(t *testing.T, g *guest, p *Plug, unblock func()) (out int)
	}{
		{"catches up by itself", 5, func(t *testing.T, g *guest, p *Plug, unblock func()) int {
			unblock()
			return 5 * 3
		}},
		{"full", numBands - 2, func(t *testing.T, g *guest, p *Plug, unblock func()) int {
			g.send(3)
			must(t, p.Seal())
			time.AfterFunc(50*time.Millisecond, unblock)
			began := time.Now()
			must(t, p.Release()) // there is no band for the next Seal before
			if d := time.Since(began); d < 40*time.Millisecond {
				t.Errorf("there was room after %v", d)
			}
			must(t, p.Seal())
			return (numBands-1)*3 + 1
		}},
		{"pass", 5, func(t *testing.T, g *guest, p *Plug, unblock func()) int {
			must(t, p.Pass())
			g.send(2)
			g.expect(0, 0)
			unblock()
			return 5*3 + 3
		}},
		{"close", 5, func(t *testing.T, g *guest, p *Plug, unblock func()) int {
			must(t, p.Seal())
			g.send(2)
			must(t, p.Close())
			return 5*3 + 3
		}},
		{"killed", 5, func(t *testing.T, g *guest, p *Plug, unblock func()) int {
			must(t, p.Seal())
			g.send(2)
			crash(p)
			must(t, Cleanup(t.Context(), []string{g.vif}))
			return 5*3 + 3
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			lab(t)
			g := newGuest(t, 0)
			p := open(t, g.vif)
			must(t, p.Seal())
			must(t, p.Release())
			// Its first epoch is released, but a request that does nothing in place of
			// the one that opens its band keeps it as a host does that has no time.
			d := p.devs[0]
			slow := d.ring.fill
			real := d.open[slow]
			d.open[slow] = d.shut[slow]
			k, err := openKernel()
			must(t, err)
			defer k.Close()
			for epoch := range c.epochs {
				g.send(3)
				must(t, p.Seal())
				must(t, p.Release())
				if epoch == 0 {
					d.open[slow] = real // it has been asked for
				}
			}
			g.send(1)
			g.expect(0, 0)
			out := c.then(t, g, p, func() {
				if err := k.request(real); err != nil {
					t.Error(err)
				}
			})
			g.expect(0, out)
			must(t, p.Close())
			g.expect(out, int(g.sent.Load()))
		})
	}
}

// TestTraffic: opening, checkpointing and closing under traffic lose nothing,
// duplicate nothing and keep the order.
func TestTraffic(t *testing.T) {
	for _, at := range attachments {
		t.Run(at.name, func(t *testing.T) {
			lab(t)
			testTraffic(t, newGuestOn(t, 0, at))
		})
	}
}

func testTraffic(t *testing.T, g *guest) {
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var standing sync.Mutex // held: the guest does not run
	wg.Go(func() {
		// Behind a veth each processor has a queue of its own; netback has one
		// thread for each queue of a guest.
		runtime.LockOSThread()
		var one unix.CPUSet
		one.Set(0)
		_ = unix.SchedSetaffinity(0, &one)
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
				standing.Lock()
				g.push(8)
				if n%32 == 0 {
					g.settle() // or else more could wait for the vif than the kernel keeps
				}
				standing.Unlock()
				time.Sleep(50 * time.Microsecond)
			}
		}
	})
	pause := func() (func(), error) {
		standing.Lock()
		g.settle()
		return standing.Unlock, nil
	}

	prev, count, epochs, late := -1, 0, 0, 0
	type span struct{ from, to int }
	var unplugged []span // what was sent between a last Seal and the plug's end
	seen := map[int]int{}
	look := func(wait time.Duration) bool {
		n := g.next(wait)
		if n < 0 {
			return false
		}
		seen[n]++
		count++
		if n != prev+1 {
			late++
			if !slices.ContainsFunc(unplugged, func(s span) bool { return s.from <= n && n <= s.to+1 }) {
				t.Errorf("frame %d follows %d, and no plug was being removed (%v)", n, prev, unplugged)
			}
		}
		prev = n
		return true
	}
	length := 25
	if testing.Short() {
		length = 8 // an emulated host takes four minutes for all
	}
	for round := range 4 {
		crashed, pauses := round%2 == 1, round < 2
		time.Sleep(20 * time.Millisecond)
		var opts []Option
		if pauses {
			opts = append(opts, WithPause(pause))
		}
		p, err := Open(t.Context(), slog.New(slog.DiscardHandler), []string{g.vif}, opts...)
		must(t, err)
		var last, sealed int
		for epoch := range length {
			time.Sleep(3 * time.Millisecond)
			last = int(g.sent.Load())
			must(t, p.Seal())
			next := int(g.sent.Load())
			time.Sleep(time.Millisecond)
			for look(0) {
			}
			if epoch > 0 && prev > sealed {
				t.Errorf("frame %d came out, and the one sealed last was at most %d", prev, sealed)
			}
			sealed = next
			must(t, p.Release())
			epochs++
		}
		if crashed {
			crash(p)
			must(t, Cleanup(context.Background(), []string{g.vif}, opts...))
		} else {
			must(t, p.Close())
			if n, err := p.Drops(); n != 0 || err != nil {
				t.Errorf("drops: %d, %v", n, err)
			}
		}
		if !pauses {
			unplugged = append(unplugged, span{last, int(g.sent.Load())})
		}
	}
	close(stop)
	wg.Wait()
	g.settle()
	for count < g.came && look(5*time.Second) {
	}
	for look(50 * time.Millisecond) { // there should be none
	}
	for n := range g.came {
		if seen[n] != 1 {
			t.Errorf("frame %d came out %d times", n, seen[n])
		}
	}
	t.Logf("%d frames, %d epochs, %d out of order where a plug was removed without a pause", g.came, epochs, late)
}

// crash ends a Plug as the death of its process does.
func crash(p *Plug) {
	p.mu.Lock()
	p.closed = true
	if p.due && p.retry.Stop() {
		p.later.Done()
	}
	for _, t := range p.taps {
		t.Close()
	}
	p.k.Close()
	p.mu.Unlock()
	p.later.Wait()
}

// TestCleanup: a process that was killed, in whatever state, leaves nothing that
// cannot be put back without loss, nor anything in the way of another.
func TestCleanup(t *testing.T) {
	for _, at := range attachments {
		t.Run(at.name, func(t *testing.T) {
			lab(t)
			g := newGuestOn(t, 0, at)
			steps := []func(p *Plug){
				func(p *Plug) { must(t, p.Seal()) },
				func(p *Plug) { must(t, p.Release()) },
				func(p *Plug) { must(t, p.Seal()) },
				func(p *Plug) { must(t, p.Release()) },
				func(p *Plug) { must(t, p.Seal()) },
				func(p *Plug) { must(t, p.Pass()) },
				func(p *Plug) { must(t, p.Seal()) },
			}
			for killed := range len(steps) + 1 {
				p := open(t, g.vif)
				from := int(g.sent.Load())
				g.send(3)
				for _, step := range steps[:killed] {
					step(p)
					g.send(3)
				}
				crash(p)
				must(t, Cleanup(t.Context(), []string{g.vif}))
				if found := ours(t); len(found) > 0 {
					t.Errorf("left behind: %q", found)
				}
				g.send(3)
				g.expect(from, int(g.sent.Load()))
			}
		})
	}
}

func TestCleanupLeftovers(t *testing.T) {
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

// What the kernel could not do it says, and nothing of that is left to be read later.
func TestRequestFails(t *testing.T) {
	space(t)
	k, err := openKernel()
	must(t, err)
	defer k.Close()
	d := &device{vif: "vif9.0", ifb: 0x7ffffff0}
	d.prepare()
	for range 3 {
		if err := k.request(d.open[0]); !isGone(err) {
			t.Errorf("of an interface that is not there: %v", err)
		}
		if _, err := k.qdiscs(); err != nil {
			t.Error(err)
		}
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

// TestRedirectStays: where the redirect cannot be removed the guest is not cut off,
// and a later Cleanup does the rest.
func TestRedirectStays(t *testing.T) {
	lab(t)
	g := newGuest(t, 0)
	p := open(t, g.vif)
	must(t, p.Seal())
	g.send(3)
	must(t, p.k.tc.Close())
	if err := p.Close(); err == nil || !strings.Contains(err.Error(), "remove the redirect") {
		t.Errorf("close: %v", err)
	}
	g.send(3)
	g.expect(0, 6)
	must(t, Cleanup(t.Context(), []string{g.vif}))
	if found := ours(t); len(found) > 0 {
		t.Errorf("left behind: %q", found)
	}
	g.send(3)
	g.expect(6, 9)
}

// TestLetOutAll: where epochs cannot be let out one after the other, they are let
// out all the same.
func TestLetOutAll(t *testing.T) {
	lab(t)
	g := newGuest(t, 0)
	p := open(t, g.vif)
	must(t, p.Seal())
	must(t, p.Release())
	g.send(3)
	must(t, p.Seal())
	g.send(3)
	d := p.devs[0]
	list := d.list
	d.list = tcRequest(unix.RTM_GETTCLASS, 0, 0) // of no interface
	if err := p.k.letOut(d, time.Now()); err == nil {
		t.Error("lengths were known")
	}
	d.list = list
	seen := map[int]int{}
	for range 6 {
		seen[g.next(5*time.Second)]++
	}
	for n := range 6 {
		if seen[n] != 1 {
			t.Errorf("frame %d came out %d times", n, seen[n])
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
	// Open vSwitch deletes what it takes for its own of every port, at any time.
	if err := k.tc.Qdisc().Delete(ingress); err == nil {
		t.Error("a clsact qdisc was deleted as ingress")
	}
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

// TestLimit: an epoch beyond the limit drops frames, says how many and logs it.
// Long before that it has asked for a checkpoint.
func TestLimit(t *testing.T) {
	lab(t)
	g := newGuest(t, 0)
	var log bytes.Buffer
	p, err := Open(t.Context(), slog.New(slog.NewTextHandler(&log, nil)), []string{g.vif})
	must(t, err)
	defer p.Close()
	p.Arm()
	must(t, p.Seal())
	const size = 60000
	g.sendSize(size)
	if !held(p, 5*time.Second) {
		t.Error("not asked for a checkpoint")
	}
	for range Limit/size - 1 {
		g.sendSize(size)
	}
	g.settle()
	if n, err := p.Drops(); n != 0 || err != nil {
		t.Errorf("drops below the limit: %d, %v", n, err)
	}
	end := int(g.sent.Load())
	for range 5 {
		g.sendSize(size)
	}
	g.settle()
	if n, err := p.Drops(); n != 5 || err != nil {
		t.Errorf("drops: %d, %v; want 5", n, err)
	}
	must(t, p.Release())
	must(t, p.Seal())
	g.sendSize(size) // the next epoch has room of its own
	must(t, p.Release())
	if !strings.Contains(log.String(), "level=WARN") || !strings.Contains(log.String(), "frames=5") {
		t.Errorf("logged: %s", log.String())
	}
	g.expect(0, end)
	must(t, p.Seal())
	must(t, p.Release())
	g.expect(end+5, end+6)
	must(t, p.Close())
	if n, err := p.Drops(); n != 5 || err != nil {
		t.Errorf("drops after Close: %d, %v; want 5", n, err)
	}
	if n := strings.Count(log.String(), "level=WARN"); n != 1 {
		t.Errorf("logged %d times: %s", n, log.String())
	}
}

// TestQuiet: what is sent to a guest, by whomever, and what of its own is let out
// late does not ask for a checkpoint.
func TestQuiet(t *testing.T) {
	for _, at := range attachments {
		t.Run(at.name, func(t *testing.T) {
			lab(t)
			g := newGuestOn(t, 0, at)
			p := open(t, g.vif)
			must(t, p.Seal())
			world := []*packet.Conn{g.listen("out0", 0), g.listen(g.vif, 0)}
			if at.name == "bridge" {
				world = append(world, g.listen("br0", 0)) // the host itself
			}
			heard := 0
			to := g.listen("guest0", unix.ETH_P_ALL)
			for i := range 10 {
				g.send(5)
				p.Arm()
				must(t, p.Release())
				must(t, p.Seal())
				for _, c := range world {
					for _, dst := range []string{
						"\xff\xff\xff\xff\xff\xff", // ARP for the guest
						"\x02\x00\x00\x00\x00\x01", // to the guest
						"\x33\x33\x00\x00\x00\x01", // IPv6 to all nodes
						"\x01\x00\x5e\x00\x00\x01", // an IGMP query
						"\x01\x80\xc2\x00\x00\x00", // a bridge's own
					} {
						b := broadcast(i, 60, protocols[i%4])
						copy(b, dst)
						b[11] = 9 // not the guest
						_, err := c.WriteTo(b, &packet.Addr{HardwareAddr: net.HardwareAddr(dst)})
						must(t, err)
					}
				}
				if held(p, 20*time.Millisecond) {
					t.Fatal("reported what was no output")
				}
			}
			must(t, to.SetReadDeadline(time.Now().Add(100*time.Millisecond)))
			for b := make([]byte, 100); ; {
				n, _, err := to.ReadFrom(b)
				if err != nil {
					break
				}
				if n >= 12 && b[11] == 9 {
					heard++
				}
			}
			if heard == 0 {
				t.Error("nothing reached the guest")
			}
			g.send(1)
			if !held(p, 5*time.Second) {
				t.Error("output not reported")
			}
		})
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
