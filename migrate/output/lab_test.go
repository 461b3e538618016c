package output

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mdlayher/packet"
	link "github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"kemari/migrate/migratetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// space moves the test into a network namespace of its own, empty but for lo.
func space(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		migratetest.Need(t, "root", func() error { return errors.New("not root") })
	}
	runtime.LockOSThread()
	old, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netns.Set(old); err != nil {
			t.Error(err) // and the thread ends with its goroutine
			return
		}
		ns.Close()
		old.Close()
		runtime.UnlockOSThread()
	})
	// Or else every interface speaks by itself.
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0)
}

// lab is space where the kernel can hold output, and skips the test elsewhere.
func lab(t testing.TB) {
	t.Helper()
	space(t)
	migratetest.Need(t, "sch_plug", canHold)
}

var canHold = sync.OnceValue(func() error {
	l := veth("vif9.0", "guest9")
	if err := link.LinkAdd(l); err != nil {
		return err
	}
	defer link.LinkDel(l)
	p, err := Open(context.Background(), slog.New(slog.DiscardHandler), []string{"vif9.0"})
	if err != nil {
		return err
	}
	return p.Close()
})

func veth(a, b string) *link.Veth {
	attrs := link.NewLinkAttrs()
	attrs.Name = a
	attrs.MTU = 65000
	return &link.Veth{LinkAttrs: attrs, PeerName: b, PeerMTU: 65000}
}

// guest is one interface of a guest: frames sent into it come out of a veth, its
// vif, and go on by some attachment to another veth, which leads out.
type guest struct {
	t       testing.TB
	n       int
	vif     string
	at      attachment
	in, out *packet.Conn
	arrived *packet.Conn // at the vif: the near side of the plug
	sent    atomic.Int64
	came    int // how many have been seen to arrive
}

func newGuest(t testing.TB, n int) *guest { return newGuestOn(t, n, bridged) }

func newGuestOn(t testing.TB, n int, at attachment) *guest {
	t.Helper()
	g := &guest{t: t, n: n, at: at, vif: fmt.Sprintf("vif3.%d", n)}
	inside, wire, out := fmt.Sprint("guest", n), fmt.Sprint("wire", n), fmt.Sprint("out", n)
	must(t, link.LinkAdd(veth(g.vif, inside)))
	must(t, link.LinkAdd(veth(wire, out)))
	for _, name := range []string{g.vif, inside, wire, out} {
		must(t, link.LinkSetUp(byName(t, name)))
	}
	at.attach(t, n, byName(t, g.vif), byName(t, wire))
	// What leaves is seen as the attachment sends it: behind a veth, each processor
	// has a queue of its own and the order is lost.
	g.in, g.out, g.arrived = g.listen(inside, 0), g.listen(wire, unix.ETH_P_ALL), g.listen(g.vif, unix.ETH_P_ALL)
	raw, err := g.arrived.SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1)
	}))
	must(t, err)
	// A link that has just come up may swallow frames for a moment.
	for try := 0; g.next(20*time.Millisecond) < 0; try++ {
		if try == 500 {
			t.Fatal("no frame gets through")
		}
		g.push(1)
	}
	for g.next(100*time.Millisecond) >= 0 {
	}
	for g.read(g.arrived, 0) >= 0 {
	}
	g.sent.Store(0)
	return g
}

func byName(t testing.TB, name string) link.Link {
	t.Helper()
	l, err := link.LinkByName(name)
	must(t, err)
	return l
}

// settle waits until all that was sent has arrived at the vif.
func (g *guest) settle() {
	g.t.Helper()
	for want := int(g.sent.Load()); g.came < want; g.came++ {
		if n := g.read(g.arrived, 10*time.Second); n != g.came {
			g.t.Errorf("%s: frame %d arrived, want %d (of %d)", g.vif, n, g.came, want)
			return
		}
	}
}

func (g *guest) listen(name string, proto int) *packet.Conn {
	g.t.Helper()
	ifi, err := net.InterfaceByName(name)
	must(g.t, err)
	c, err := packet.Listen(ifi, packet.Raw, proto, nil)
	must(g.t, err)
	g.t.Cleanup(func() { c.Close() })
	raw, err := c.SyscallConn()
	must(g.t, err)
	must(g.t, raw.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 256<<20)
		// What is held counts against its sender, here as in no guest.
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 256<<20)
	}))
	return c
}

// send sends as many frames, numbered on, and waits until they have arrived: only
// then is it sure which epoch they belong to.
func (g *guest) send(n int) {
	g.t.Helper()
	g.push(n)
	g.settle()
}

// push is send without the wait.
func (g *guest) push(n int) {
	g.t.Helper()
	for range n {
		g.sendSize(60)
	}
}

func (g *guest) sendSize(size int) {
	g.t.Helper()
	for {
		_, err := g.in.WriteTo(g.at.frame(g.n, int(g.sent.Load()), size), &packet.Addr{HardwareAddr: net.HardwareAddr{255, 255, 255, 255, 255, 255}})
		if err == nil {
			break
		}
		if !errors.Is(err, unix.ENOBUFS) {
			g.t.Error(err)
			return
		}
	}
	g.sent.Add(1)
}

// next returns the number of the next frame that comes out, -1 if none does.
func (g *guest) next(wait time.Duration) int {
	g.t.Helper()
	return g.read(g.out, wait)
}

// read looks into a socket before it waits and after that, since a host that is
// short of time may have let the time pass without having looked.
func (g *guest) read(c *packet.Conn, wait time.Duration) int {
	g.t.Helper()
	raw, err := c.SyscallConn()
	must(g.t, err)
	must(g.t, c.SetReadDeadline(time.Now().Add(wait)))
	var buf [256]byte // the rest of a frame does not matter
	n := -1
	look := func(fd uintptr) bool {
		for {
			size, _, err := unix.Recvfrom(int(fd), buf[:], unix.MSG_DONTWAIT)
			if err == unix.EINTR {
				continue
			}
			if err == unix.EAGAIN {
				return false
			}
			if err != nil {
				g.t.Errorf("read: %v", err)
				return true
			}
			if i, ok := g.at.number(buf[:size]); ok {
				n = i
				return true
			}
		}
	}
	var done bool
	once := func(fd uintptr) { done = look(fd) }
	if must(g.t, raw.Control(once)); done || wait <= 0 {
		return n
	}
	if err := raw.Read(look); errors.Is(err, os.ErrDeadlineExceeded) {
		must(g.t, raw.Control(once))
	} else {
		must(g.t, err)
	}
	return n
}

// expect checks that exactly the frames from to before end come out, in order.
func (g *guest) expect(from, end int) {
	g.t.Helper()
	for want := from; want < end; want++ {
		if got := g.next(5 * time.Second); got != want {
			g.t.Fatalf("%s: frame %d came out, want %d (of %d to %d)", g.vif, got, want, from, end-1)
		}
	}
	if got := g.next(30 * time.Millisecond); got != -1 {
		g.t.Fatalf("%s: frame %d came out after %d to %d, want none", g.vif, got, from, end-1)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, vifs ...string) *Plug {
	t.Helper()
	p, err := Open(context.Background(), slog.New(slog.DiscardHandler), vifs)
	must(t, err)
	t.Cleanup(func() { must(t, p.Close()) })
	return p
}

// ours lists what of us is in the namespace.
func ours(t testing.TB) (found []string) {
	t.Helper()
	k, err := openKernel()
	must(t, err)
	defer k.Close()
	links, err := k.list()
	must(t, err)
	for _, l := range links {
		if l.Type() == "ifb" {
			found = append(found, l.Attrs().Name)
		}
	}
	qdiscs, err := k.qdiscs()
	must(t, err)
	for _, q := range qdiscs {
		if q.kind == "clsact" {
			found = append(found, "clsact")
		}
	}
	return found
}
