package hooks

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/packet"
	link "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func (h *host) write(path, s string, mode os.FileMode) {
	h.t.Helper()
	ok(h.t, os.MkdirAll(filepath.Dir(h.root+path), 0o755))
	ok(h.t, os.WriteFile(h.root+path, []byte(s), mode))
}

// fails runs the script, which must say each of want and tell libxl the same.
func (h *host) fails(command string, want ...string) {
	h.t.Helper()
	err := h.run(command, "type_if=vif")
	if err == nil {
		h.t.Fatalf("%s: no error, want %q", command, want)
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			h.t.Errorf("%s: %v, want %q", command, err, w)
		}
	}
	h.node(backend+"/hotplug-status", "error")
	h.node(backend+"/hotplug-error", err.Error())
}

func TestAttachmentOf(t *testing.T) {
	for name, want := range map[string]string{
		"": onBridge, "vif-kemari": onBridge, "/usr/libexec/kemari/vif-kemari": onBridge, "/opt/vif-route/vif-kemari": onBridge,
		"/usr/libexec/kemari/vif-kemari-openvswitch": onSwitch, "vif-kemari-route": routed,
	} {
		if got := attachmentOf(name); got != want {
			t.Errorf("%s: %q", name, got)
		}
	}
}

// TestVIFOpenvSwitch: what ovs-vsctl is asked for, by a script in its place.
func TestVIFOpenvSwitch(t *testing.T) {
	h := newHost(t)
	h.name = "/usr/libexec/kemari/vif-kemari-openvswitch"
	h.store.Set(backend+"/bridge", "ovs0")
	h.fails("online", "ovs0", "no ovs-vsctl", "openvswitch-switch")
	ok(t, h.run("offline", "type_if=vif")) // nothing in the way of a guest's end

	h.write("/usr/bin/ovs-vsctl", "#!/bin/sh\nfor a; do echo \"$a\"; done > "+h.root+"/asked\n", 0o755)
	asked := func() string {
		t.Helper()
		b, err := os.ReadFile(h.root + "/asked")
		ok(t, err)
		return strings.Join(strings.Split(strings.TrimSpace(string(b)), "\n"), " ")
	}
	h.store.Set(backend+"/mac", "00:16:3e:00:00:01")
	h.store.Set("/local/domain/7/vm", "/vm/7")
	h.store.Set("/vm/7/name", `the "first", & only`)
	h.store.Set("/vm/7/uuid", "u")
	const ids = ` -- set interface vif7.0 external-ids:xen-vm-name="the \"first\", \u0026 only"` +
		` -- set interface vif7.0 external-ids:xen-vm-uuid="u" -- set interface vif7.0 external-ids:attached-mac="00:16:3e:00:00:01"`
	for bridge, want := range map[string]string{
		"ovs0": "ovs0 vif7.0", "ovs0.12": "ovs0 vif7.0 tag=12",
		"ovs0:1:20": "ovs0 vif7.0 trunks=1,20", "ovs0.3:1": "ovs0 vif7.0 tag=3 trunks=1",
	} {
		h.store.Set(backend+"/bridge", bridge)
		ok(t, h.run("online", "type_if=vif"))
		if got, want := asked(), "--timeout=8 -- --if-exists del-port vif7.0 -- add-port "+want+ids; got != want {
			t.Errorf("%s:\n%s, want\n%s", bridge, got, want)
		}
		h.check("vif7.0", "", 0, true)
		h.node(backend+"/hotplug-status", "connected")
	}
	ok(t, h.run("offline", "type_if=vif"))
	if got := asked(); got != "--timeout=8 -- --if-exists del-port vif7.0" {
		t.Errorf("offline: %s", got)
	}
	h.check("vif7.0", "", 0, false)

	for _, bridge := range []string{"", "ovs0.", "ovs0.x", "ovs0:1:", ".1", "ovs0.1.2"} {
		h.store.Set(backend+"/bridge", bridge)
		h.fails("online", "<source bridge>")
	}
	h.store.Set(backend+"/bridge", "ovs9")
	h.write("/usr/bin/ovs-vsctl", "#!/bin/sh\necho no bridge named ovs9 >&2; exit 1\n", 0o755)
	h.fails("online", "put vif7.0 on the Open vSwitch ovs9", "no bridge named ovs9", "ovs-vsctl show")
	h.check("vif7.0", "", 0, false)
}

func (h *host) routes(dev string) (all []string) {
	h.t.Helper()
	l, err := link.LinkByName(dev)
	ok(h.t, err)
	routes, err := link.RouteList(l, link.FAMILY_V4)
	ok(h.t, err)
	for _, r := range routes {
		all = append(all, r.Dst.String()+" from "+r.Src.String())
	}
	slices.Sort(all)
	return all
}

// uplink makes an interface towards the world, with an address.
func (h *host) uplink(name, addr string) link.Link {
	h.t.Helper()
	attrs := link.NewLinkAttrs()
	attrs.Name = name
	ok(h.t, link.LinkAdd(&link.Veth{LinkAttrs: attrs, PeerName: "to-" + name}))
	for _, n := range []string{name, "to-" + name} {
		l, err := link.LinkByName(n)
		ok(h.t, err)
		ok(h.t, link.LinkSetUp(l))
	}
	l, err := link.LinkByName(name)
	ok(h.t, err)
	a, err := link.ParseAddr(addr)
	ok(h.t, err)
	ok(h.t, link.AddrAdd(l, a))
	return l
}

func TestVIFRoute(t *testing.T) {
	h := newHost(t)
	h.name = "vif-kemari-route"
	ok(t, os.Symlink("/proc", h.root+"/proc"))
	h.store.Set(backend+"/bridge", "xenbr0") // as libxl has it for all
	h.store.Set(backend+"/ip", "192.0.2.7 198.51.100.0/24")
	proxyARP := func() string {
		b, err := os.ReadFile("/proc/sys/net/ipv4/conf/vif7.0/proxy_arp")
		ok(t, err)
		return strings.TrimSpace(string(b))
	}
	up := func(from string, routes ...string) {
		t.Helper()
		ok(t, h.run("online", "type_if=vif"))
		h.node(backend+"/hotplug-status", "connected")
		for i, r := range routes {
			routes[i] = r + " from " + from
		}
		if got := h.routes("vif7.0"); !slices.Equal(got, routes) || proxyARP() != "1" {
			t.Errorf("routes %q, proxy_arp %s; want %q", got, proxyARP(), routes)
		}
	}
	down := func() {
		t.Helper()
		ok(t, h.run("offline", "type_if=vif"))
		h.check("vif7.0", "", 0, false)
		l, err := link.LinkByName("vif7.0")
		ok(t, err)
		addrs, err := link.AddrList(l, link.FAMILY_V4)
		ok(t, err)
		if got := h.routes("vif7.0"); len(got) > 0 || len(addrs) > 0 || proxyARP() != "0" {
			t.Errorf("left: routes %q, addresses %v, proxy_arp %s", got, addrs, proxyARP())
		}
	}

	up("<nil>", "192.0.2.7/32", "198.51.100.0/24") // a host without an address
	down()

	// Without eth0 it is the default route's.
	wan := h.uplink("wan0", "203.0.113.1/24")
	ok(t, link.RouteAdd(&link.Route{LinkIndex: wan.Attrs().Index, Gw: net.IPv4(203, 0, 113, 254)}))
	up("203.0.113.1", "192.0.2.7/32", "198.51.100.0/24")
	down()

	announced := func(on, addr string, f func()) {
		t.Helper()
		h.uplink(on, addr)
		ifi, err := net.InterfaceByName("to-" + on)
		ok(t, err)
		neighbour, err := packet.Listen(ifi, packet.Raw, unix.ETH_P_ARP, nil)
		ok(t, err)
		defer neighbour.Close()
		ok(t, os.WriteFile("/proc/sys/net/ipv4/conf/"+on+"/proxy_arp", []byte("1"), 0))
		f()
		b := make([]byte, 100)
		for {
			ok(t, neighbour.SetReadDeadline(time.Now().Add(5*time.Second)))
			n, _, err := neighbour.ReadFrom(b)
			ok(t, err)
			if n >= 42 && net.IP(b[28:32]).Equal(net.IPv4(192, 0, 2, 7)) && net.IP(b[38:42]).Equal(net.IPv4(192, 0, 2, 7)) {
				return
			}
		}
	}
	announced("eth0", "192.0.2.1/24", func() {
		up("192.0.2.1", "192.0.2.7/32", "198.51.100.0/24")
		up("192.0.2.1", "192.0.2.7/32", "198.51.100.0/24") // once more
	})
	down()
	// Where the guest's neighbours are on another link than eth0's.
	announced("lan0", "192.0.2.2/29", func() { up("192.0.2.1", "192.0.2.7/32", "198.51.100.0/24") })

	// Another guest with the same address does not get its traffic.
	h.store.Set("backend/vif/8/0/ip", "192.0.2.7")
	v := h.vif("online", "type_if=vif")
	for i, e := range v.Environ {
		if strings.HasPrefix(e, "XENBUS_PATH=") {
			v.Environ[i] = "XENBUS_PATH=backend/vif/8/0"
		} else if strings.HasPrefix(e, "vif=") {
			v.Environ[i] = "vif=vif7.0-emu" // any interface will do
		}
	}
	if err := v.Run(); err == nil || !strings.Contains(err.Error(), "192.0.2.7/32 is routed elsewhere") {
		t.Errorf("an address twice: %v", err)
	}
	down()

	h.store.Set(backend+"/ip", "192.0.2.7 nonsense")
	h.fails("online", "'nonsense'", "<ip address>")

	h.store.Set(backend+"/ip", "")
	ok(t, os.Remove(h.root+"/proc"))
	h.write("/etc/xen/scripts/vif-post.d/log.hook", "", 0o644)
	ok(t, h.run("online", "type_if=vif"))
	if len(h.execs) != 1 || h.execs[0][0] != vifRoute {
		t.Errorf("with a hook: %q, want %s", h.execs, vifRoute)
	}

	l, err := link.LinkByName("vif7.0")
	ok(t, err)
	ok(t, os.RemoveAll(h.root+"/etc"))
	ok(t, link.LinkDel(l))
	ok(t, h.run("offline", "type_if=vif")) // libxl is later than the kernel
}
