package output

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
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
	migratetest.Need(t, "sch_plug", func() error {
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
}

func veth(a, b string) *link.Veth {
	attrs := link.NewLinkAttrs()
	attrs.Name = a
	attrs.MTU = 65000
	return &link.Veth{LinkAttrs: attrs, PeerName: b, PeerMTU: 65000}
}

// guest is one interface of a guest: frames sent into it come out of a veth,
// its vif, which is a port of a bridge with another veth that leads out.
type guest struct {
	t       testing.TB
	vif     string
	in, out *packet.Conn
	sent    atomic.Int64
	buf     []byte
}

func newGuest(t testing.TB, n int) *guest {
	t.Helper()
	g := &guest{t: t, vif: fmt.Sprintf("vif3.%d", n), buf: make([]byte, 1<<16)}
	inside, wire, out, br := fmt.Sprint("guest", n), fmt.Sprint("wire", n), fmt.Sprint("out", n), fmt.Sprint("br", n)
	attrs := link.NewLinkAttrs()
	attrs.Name = br
	no := false
	must(t, link.LinkAdd(&link.Bridge{LinkAttrs: attrs, MulticastSnooping: &no}))
	must(t, link.LinkAdd(veth(g.vif, inside)))
	must(t, link.LinkAdd(veth(wire, out)))
	for _, name := range []string{br, g.vif, inside, wire, out} {
		l, err := link.LinkByName(name)
		must(t, err)
		if name == g.vif || name == wire {
			b, err := link.LinkByName(br)
			must(t, err)
			must(t, link.LinkSetMaster(l, b))
		}
		must(t, link.LinkSetUp(l))
	}
	// What leaves is seen as the bridge sends it: behind a veth, each processor
	// has a queue of its own and the order is lost.
	g.in, g.out = g.listen(inside, 0), g.listen(wire, unix.ETH_P_ALL)
	// A link that has just come up may swallow frames for a moment.
	for try := 0; g.next(20*time.Millisecond) < 0; try++ {
		if try == 500 {
			t.Fatal("no frame gets through")
		}
		g.send(1)
	}
	for g.next(100*time.Millisecond) >= 0 {
	}
	g.sent.Store(0)
	return g
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

// Protocols a frame may be of; the numbering continues through all of them.
var protocols = []uint16{0x88b5, unix.ETH_P_ARP, unix.ETH_P_IPV6, unix.ETH_P_IP, unix.ETH_P_8021Q}

// frame makes the frame of a number.
func frame(n, size int) []byte {
	b := make([]byte, max(size, 60))
	for i := range 6 {
		b[i] = 0xff // all are to get it
	}
	copy(b[6:], []byte{2, 0, 0, 0, 0, 1})
	binary.BigEndian.PutUint16(b[12:], protocols[n%len(protocols)])
	binary.BigEndian.PutUint16(b[16:], 0x88b5) // within a VLAN
	binary.BigEndian.PutUint32(b[20:], uint32(n))
	return b
}

// send sends as many frames, numbered on.
func (g *guest) send(n int) {
	g.t.Helper()
	for range n {
		g.sendSize(60)
	}
}

func (g *guest) sendSize(size int) {
	g.t.Helper()
	for {
		_, err := g.in.WriteTo(frame(int(g.sent.Load()), size), &packet.Addr{HardwareAddr: net.HardwareAddr{255, 255, 255, 255, 255, 255}})
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
	must(g.t, g.out.SetReadDeadline(time.Now().Add(wait)))
	n, _, err := g.out.ReadFrom(g.buf)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return -1
	}
	must(g.t, err)
	b := g.buf[:n]
	// The kernel takes the VLAN tag out of the frame.
	if n < 24 {
		g.t.Fatalf("frame of %d bytes: %x", n, b)
	}
	if p := binary.BigEndian.Uint16(b[12:]); p == 0x88b5 && binary.BigEndian.Uint16(b[16:]) != 0x88b5 {
		return int(binary.BigEndian.Uint32(b[16:]))
	}
	return int(binary.BigEndian.Uint32(b[20:]))
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
