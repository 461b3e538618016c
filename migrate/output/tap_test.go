package output

import (
	"encoding/binary"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	link "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestTap needs no plug: a Plug of nothing but its tap.
func TestTap(t *testing.T) {
	space(t)
	g := newGuest(t, 0)
	ifi, err := net.InterfaceByName(g.vif)
	must(t, err)
	p := open(t)
	tp, err := openTap(g.vif, uint32(ifi.Index), &p.tapMu, p.held, slog.New(slog.DiscardHandler))
	must(t, err)
	p.taps = append(p.taps, tp)

	g.send(3)
	if held(p, 5*time.Millisecond) {
		t.Error("reported before Arm")
	}
	p.Arm()
	if held(p, 5*time.Millisecond) {
		t.Error("reported a frame from before Arm")
	}
	for range 50 {
		g.send(1)
		if !held(p, 5*time.Second) {
			t.Fatal("not reported")
		}
		g.send(50)
		p.Arm()
		p.Arm()
	}
	if held(p, 5*time.Millisecond) {
		t.Error("reported without a frame")
	}

	// What goes to the guest is not its output.
	out, err := net.InterfaceByName("out0")
	must(t, err)
	g.in.Close()
	g.in = g.listen(out.Name, 0)
	g.push(3)
	if held(p, 5*time.Millisecond) {
		t.Error("reported what the guest was sent")
	}

	l, err := link.LinkByName(g.vif)
	must(t, err)
	must(t, link.LinkSetDown(l))
	must(t, link.LinkSetUp(l))
	g.in.Close()
	g.in = g.listen("guest0", 0)
	p.Arm()
	g.push(1)
	if !held(p, 5*time.Second) {
		t.Error("blind after the interface was down")
	}
	if tp.gone() {
		t.Error("gone too early")
	}
	p.Arm() // so that the goroutine reads while all this happens
	must(t, link.LinkDel(l))
	if !tp.gone() {
		t.Error("not gone")
	}
}

func TestNames(t *testing.T) {
	seen := map[string]string{}
	for _, vif := range []string{"vif3.0", "vif3.1", "vif32751.11", "vif1234567.12345", "web", "vif-of-the-web0", "vif3.0-emu"} {
		n := ifbName(vif)
		if len(n) >= unix.IFNAMSIZ || !strings.HasPrefix(n, "kemari") || seen[n] != "" {
			t.Errorf("%s: %s", vif, n)
		}
		seen[n] = vif
		for _, own := range []bool{false, true} {
			want := label{vif: vif, index: 12, ownClsact: own}
			if l, ok := parseLabel(want.String()); !ok || l != want {
				t.Errorf("%v became %v, %v", want, l, ok)
			}
		}
	}
	if n := ifbName("vif3.0"); n != "kemari3.0" {
		t.Error(n)
	}
	for _, s := range []string{"", "uplink", "kemari holds vif3.0", "kemari holds vif3.0 index 12 clsact mine", "kemari holds vif3.0 index 12 clsact own x"} {
		if l, ok := parseLabel(s); ok {
			t.Errorf("%q taken for %v", s, l)
		}
	}
}

func FuzzParseQdisc(f *testing.F) {
	b := make([]byte, tcmsgLen)
	binary.NativeEndian.PutUint32(b[4:], 7)
	b = append(b, 9, 0, tcaKind, 0, 'p', 'r', 'i', 'o', 0, 0, 0, 0)
	b = append(b, 24, 0, tcaOptions, 0)
	b = append(b, 4, 0, 0, 0)
	b = append(b, make([]byte, 16)...)
	if q, err := parseQdisc(b); err != nil || q.ifindex != 7 || q.kind != "prio" {
		f.Fatalf("%+v, %v", q, err)
	} else if band, ok := q.fillBand(); band != 0 || !ok {
		f.Fatalf("band %d, %v", band, ok)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := parseQdisc(b)
		if err == nil {
			q.fillBand()
		}
	})
}
