package hooks

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/mdlayher/netlink"
	link "github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"kemari/migrate/migratetest"
	"kemari/migrate/xen/xenstore"
	"kemari/migrate/xen/xenstore/xenstoretest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// host is a network namespace with bridges and vifs, a xenstore, and a root
// folder whose /sys is the namespace's.
type host struct {
	t     *testing.T
	name  string // of the program
	root  string
	store *xenstoretest.Server
	execs [][]string
}

const backend = "backend/vif/7/0"

func newHost(t *testing.T) *host {
	t.Helper()
	migratetest.Need(t, "root", func() error {
		if os.Getuid() != 0 {
			return errors.New("not root")
		}
		return nil
	})
	runtime.LockOSThread()
	old, err := netns.Get()
	ok(t, err)
	ns, err := netns.New()
	ok(t, err)
	t.Cleanup(func() {
		ok(t, netns.Set(old))
		ns.Close()
		old.Close()
		runtime.UnlockOSThread()
	})
	h := &host{t: t, root: t.TempDir()}
	h.store, err = xenstoretest.Listen(filepath.Join(h.root, "socket"))
	ok(t, err)
	t.Cleanup(h.store.Close)
	ok(t, os.MkdirAll(h.root+"/sys/class/net", 0o755))

	for _, br := range []string{"xenbr0", "xenbr1"} {
		attrs := link.NewLinkAttrs()
		attrs.Name, attrs.MTU = br, 1400
		ok(t, link.LinkAdd(&link.Bridge{LinkAttrs: attrs}))
		ok(t, os.MkdirAll(h.root+"/sys/class/net/"+br+"/bridge", 0o755))
	}
	for _, vif := range []string{"vif7.0", "vif7.0-emu"} {
		attrs := link.NewLinkAttrs()
		attrs.Name = vif
		ok(t, link.LinkAdd(&link.Veth{LinkAttrs: attrs, PeerName: "g" + vif[3:]}))
	}
	h.store.Set(backend+"/bridge", "xenbr1")
	return h
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// run runs the script as libxl does for interface 0 of domain 7.
func (h *host) run(args ...string) error {
	h.t.Helper()
	return h.vif(args...).Run()
}

func (h *host) vif(args ...string) VIF {
	return VIF{
		Name: h.name,
		Args: args,
		Environ: []string{"script=/etc/xen/scripts/vif-kemari", "XENBUS_TYPE=vif", "XENBUS_PATH=" + backend,
			"XENBUS_BASE_PATH=backend", "netdev=", "INTERFACE=vif7.0-emu", "vif=vif7.0"},
		Root: h.root,
		Dial: func() (*xenstore.Client, error) { return xenstore.DialSocket(h.root + "/socket") },
		Exec: func(path string, argv, environ []string) error {
			if len(environ) == 0 || path != h.root+argv[0] {
				h.t.Errorf("exec %s with environment %q", path, environ)
			}
			h.execs = append(h.execs, argv)
			return nil
		},
	}
}

// TestRehearse: a rehearsal needs what a run needs, and changes nothing.
func TestRehearse(t *testing.T) {
	h := newHost(t)
	ok(t, h.vif().Rehearse())
	h.check("vif7.0", "", 1500, false)
	if s := h.store.Get(backend + "/hotplug-status"); s != "" {
		t.Errorf("hotplug-status %q", s)
	}
	h.store.Close()
	if err := h.vif().Rehearse(); err == nil {
		t.Error("no error without a xenstore")
	}
}

// check compares an interface with what is wanted of it.
func (h *host) check(dev, bridge string, mtu int, up bool) {
	h.t.Helper()
	l, err := link.LinkByName(dev)
	ok(h.t, err)
	a, master := l.Attrs(), ""
	if a.MasterIndex != 0 {
		m, err := link.LinkByIndex(a.MasterIndex)
		ok(h.t, err)
		master = m.Attrs().Name
	}
	if master != bridge || mtu != 0 && a.MTU != mtu || up != (a.Flags&net.FlagUp != 0) {
		h.t.Errorf("%s: bridge %q, mtu %d, %v; want bridge %q, mtu %d, up %v", dev, master, a.MTU, a.Flags, bridge, mtu, up)
	}
	if up && a.HardwareAddr.String() != "fe:ff:ff:ff:ff:ff" {
		h.t.Errorf("%s: address %v", dev, a.HardwareAddr)
	}
	addrs, err := link.AddrList(l, link.FAMILY_V4)
	ok(h.t, err)
	if up && len(addrs) > 0 {
		h.t.Errorf("%s: addresses %v", dev, addrs)
	}
}

// node checks a node of xenstore.
func (h *host) node(path, want string) {
	h.t.Helper()
	if v := h.store.Get(path); v != want {
		h.t.Errorf("%s is %q, want %q", path, v, want)
	}
}

func TestVIFOnlineOffline(t *testing.T) {
	h := newHost(t)
	l, err := link.LinkByName("vif7.0")
	ok(t, err)
	ok(t, link.LinkSetUp(l)) // somebody was quicker
	ok(t, link.AddrAdd(l, &link.Addr{IPNet: &net.IPNet{IP: net.IPv4(192, 0, 2, 1), Mask: net.CIDRMask(24, 32)}}))

	ok(t, h.run("online", "type_if=vif"))
	h.check("vif7.0", "xenbr1", 1400, true)
	h.node(backend+"/hotplug-status", "connected")
	h.node(backend+"/hotplug-error", "")
	h.node("/local/domain/7/device/vif/0/mtu", "1400")

	// The kernel's view of it, which the real /sys would show.
	dir := h.root + "/sys/class/net/vif7.0"
	ok(t, os.MkdirAll(dir, 0o755))
	ok(t, os.Symlink("../xenbr1", dir+"/master"))
	ok(t, os.MkdirAll(h.root+"/sys/class/net/xenbr1/brif/vif7.0", 0o755))
	ok(t, h.run("online", "type_if=vif")) // already a port
	h.check("vif7.0", "xenbr1", 1400, true)
	ok(t, h.run("offline", "type_if=vif"))
	h.check("vif7.0", "", 0, false)
	ok(t, link.LinkDel(l))
	ok(t, h.run("offline", "type_if=vif")) // libxl is later than the kernel
}

// TestVIFType: each kind of interface has commands of its own.
func TestVIFType(t *testing.T) {
	h := newHost(t)
	for _, args := range [][]string{{"add", "type_if=vif"}, {"remove"}, {"online", "type_if=tap"}, {"offline", "type_if=tap"}} {
		ok(t, h.run(args...))
		h.node(backend+"/hotplug-status", "")
	}
	h.store.Set("/local/domain/0/"+backend+"/bridge", "xenbr0")
	h.store.Set("/local/domain/0/"+backend+"/mtu", "1300")
	ok(t, h.run("add", "type_if=tap"))
	h.check("vif7.0-emu", "xenbr0", 1300, true)
	h.node("/local/domain/0/"+backend+"/hotplug-status", "")
	h.node("/local/domain/7/device/vif/0/mtu", "")
	ok(t, h.run("remove", "type_if=tap"))

	for _, args := range [][]string{{}, {"type_if=vif"}, {"up", "type_if=vif"}, {"online", "type_if=tun"}} {
		if err := h.run(args...); err == nil {
			t.Errorf("%q accepted", args)
		}
	}
}

func TestVIFName(t *testing.T) {
	h := newHost(t)
	h.store.Set(backend+"/vifname", "web0")
	h.store.Set(backend+"/mtu", "1200")
	ok(t, h.run("online", "type_if=vif"))
	h.check("web0", "xenbr1", 1200, true)
	h.node("/local/domain/7/device/vif/0/mtu", "1200")

	attrs := link.NewLinkAttrs()
	attrs.Name = "vif7.0"
	ok(t, link.LinkAdd(&link.Veth{LinkAttrs: attrs, PeerName: "other"}))
	err := h.run("online", "type_if=vif")
	if err == nil || !strings.Contains(err.Error(), "web0 exists") {
		t.Errorf("a name that is taken: %v", err)
	}
	h.node(backend+"/hotplug-status", "error")
	h.node(backend+"/hotplug-error", err.Error())
}

func TestVIFBridge(t *testing.T) {
	h := newHost(t)
	h.store.Set(backend+"/bridge", "xenbr7")
	err := h.run("online", "type_if=vif")
	if err == nil || !strings.Contains(err.Error(), "bridge xenbr7") {
		t.Errorf("no such bridge: %v", err)
	}
	h.node(backend+"/hotplug-status", "error")
	h.node(backend+"/hotplug-error", err.Error())
	ok(t, h.run("offline", "type_if=vif")) // which needs none

	attrs := link.NewLinkAttrs()
	attrs.Name = "eth7"
	ok(t, link.LinkAdd(&link.Bridge{LinkAttrs: attrs}))
	ok(t, os.MkdirAll(h.root+"/sys/class/net/eth7/bridge", 0o755))
	ok(t, h.run("online", "type_if=vif")) // the old names
	h.check("vif7.0", "eth7", 0, true)

	h2 := newHost(t)
	h2.store.Set(backend+"/bridge", "")
	ok(t, h2.run("online", "type_if=vif")) // the first there is
	h2.check("vif7.0", "xenbr0", 1400, true)
}

// TestVIFTurnsIntoBridgeScript: what only vif-bridge can do is left to it.
func TestVIFTurnsIntoBridgeScript(t *testing.T) {
	h := newHost(t)
	write := func(path, s string) {
		ok(t, os.MkdirAll(filepath.Dir(h.root+path), 0o755))
		ok(t, os.WriteFile(h.root+path, []byte(s), 0o644))
	}
	runs := func(want int) {
		t.Helper()
		h.execs = nil
		ok(t, h.run("online", "type_if=vif"))
		if len(h.execs) != want || want == 1 && strings.Join(h.execs[0], " ") != vifBridge+" online type_if=vif" {
			t.Errorf("execs: %q, want %d", h.execs, want)
		}
		l, err := link.LinkByName("vif7.0")
		ok(t, err)
		ok(t, link.LinkSetNoMaster(l))
	}
	write("/usr/sbin/iptables", "")
	runs(0) // bridged frames do not pass iptables
	h.store.Set(backend+"/ip", "192.0.2.7")
	runs(1)
	h.store.Set(backend+"/ip", "")
	write("/proc/sys/net/bridge/bridge-nf-call-iptables", "0\n")
	runs(0)
	write("/proc/sys/net/bridge/bridge-nf-call-iptables", "1\n")
	runs(0) // no rules
	write("/proc/net/ip_tables_names", "nat\nfilter\n")
	runs(1)
	ok(t, os.Remove(h.root+"/proc/net/ip_tables_names"))
	write("/etc/xen/scripts/vif-post.d/log.hook", "")
	runs(1)
}

// nested encodes attributes.
func nested(typ uint16, attrs ...netlink.Attribute) netlink.Attribute {
	b, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		panic(err)
	}
	return netlink.Attribute{Type: typ, Data: b}
}

func text(typ uint16, s string) netlink.Attribute {
	return netlink.Attribute{Type: typ, Data: append([]byte(s), 0)}
}

func number(typ uint16, n uint32) netlink.Attribute {
	return netlink.Attribute{Type: typ, Data: binary.BigEndian.AppendUint32(nil, n)}
}

func nftMessage(family byte, attrs ...netlink.Attribute) []byte {
	return append([]byte{family, 0, 0, 0}, nested(0, attrs...).Data...)
}

func TestNftForwardChain(t *testing.T) {
	chain := func(family byte, hook, policy uint32) []byte {
		return nftMessage(family, text(unix.NFTA_CHAIN_TABLE, "filter"), text(unix.NFTA_CHAIN_NAME, "FORWARD"),
			nested(unix.NFTA_CHAIN_HOOK, number(nftaHookNum, hook), number(2, 0)), number(unix.NFTA_CHAIN_POLICY, policy))
	}
	for _, c := range []struct {
		b           []byte
		accepts, ok bool
	}{
		{chain(unix.NFPROTO_IPV4, nfInetForward, 1), true, true},
		{chain(unix.NFPROTO_INET, nfInetForward, 0), false, true},
		{chain(unix.NFPROTO_IPV6, 1, 0), false, false},
		{chain(unix.NFPROTO_BRIDGE, nfInetForward, 0), false, false},
		{nftMessage(unix.NFPROTO_IPV4, text(unix.NFTA_CHAIN_NAME, "mine")), true, false},
	} {
		_, accepts, ok, err := nftForwardChain(c.b)
		if accepts != c.accepts || ok != c.ok || err != nil {
			t.Errorf("%x: accepts %v, forward %v, %v", c.b, accepts, ok, err)
		}
	}
}

func TestNftRule(t *testing.T) {
	expr := func(name string, data ...netlink.Attribute) netlink.Attribute {
		return nested(1, text(unix.NFTA_EXPR_NAME, name), nested(unix.NFTA_EXPR_DATA, data...))
	}
	verdict := func(code int32) netlink.Attribute {
		return expr("immediate", number(1, 0),
			nested(unix.NFTA_IMMEDIATE_DATA, nested(nftaVerdict, number(nftaVerdictNum, uint32(code)))))
	}
	physdev, counter := expr("match", text(1, "physdev")), expr("counter")
	for i, c := range []struct {
		exprs    []netlink.Attribute
		harmless bool
	}{
		{nil, true},
		{[]netlink.Attribute{physdev, counter, verdict(nfAccept)}, true}, // as vif-bridge makes them
		{[]netlink.Attribute{physdev, counter}, true},
		{[]netlink.Attribute{counter, verdict(0)}, false},               // drop
		{[]netlink.Attribute{counter, verdict(-3)}, false},              // jump
		{[]netlink.Attribute{expr("target", text(1, "REJECT"))}, false}, // of xtables
		{[]netlink.Attribute{expr("reject"), verdict(nfAccept)}, false}, // whatever follows
		{[]netlink.Attribute{expr("lookup"), verdict(nfAccept)}, false}, // could be a map of verdicts
		{[]netlink.Attribute{verdict(nfAccept), expr("queue")}, false},  // to a program
		{[]netlink.Attribute{expr("meta"), expr("cmp"), counter}, true}, // conditions
		{[]netlink.Attribute{expr("meta"), expr("cmp"), verdict(0)}, false},
	} {
		b := nftMessage(unix.NFPROTO_IPV4, text(unix.NFTA_RULE_TABLE, "filter"), text(unix.NFTA_RULE_CHAIN, "FORWARD"),
			nested(unix.NFTA_RULE_EXPRESSIONS, c.exprs...))
		chain, harmless, err := nftRule(b)
		if harmless != c.harmless || err != nil || chain != (nftChain{unix.NFPROTO_IPV4, "filter", "FORWARD"}) {
			t.Errorf("case %d: %+v, harmless %v, %v", i, chain, harmless, err)
		}
		for n := range b {
			nftRule(b[:n])
			nftForwardChain(b[:n])
		}
	}
}

// TestNftForwardOpen asks the kernel of this machine.
func TestNftForwardOpen(t *testing.T) {
	newHost(t)
	migratetest.Need(t, "nf_tables", func() error {
		_, err := nftForwardOpen()
		return err
	})
	if open, err := nftForwardOpen(); !open || err != nil {
		t.Errorf("in an empty namespace: %v, %v", open, err)
	}
	for i, policy := range []uint32{nfAccept, 0} {
		addForwardChain(t, "t"+strconv.Itoa(i), policy)
		if open, err := nftForwardOpen(); open != (policy == nfAccept) || err != nil {
			t.Errorf("with policy %d: %v, %v", policy, open, err)
		}
	}
}

// addForwardChain adds a table with one base chain, as nft does.
func addForwardChain(t *testing.T, table string, policy uint32) {
	t.Helper()
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	ok(t, err)
	defer c.Close()
	message := func(typ uint16, flags netlink.HeaderFlags, data []byte) netlink.Message {
		return netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(typ), Flags: netlink.Request | flags}, Data: data}
	}
	batch := []byte{0, 0, 0, unix.NFNL_SUBSYS_NFTABLES}
	_, err = c.SendMessages([]netlink.Message{
		message(unix.NFNL_MSG_BATCH_BEGIN, 0, batch),
		message(nftSubsystem|unix.NFT_MSG_NEWTABLE, netlink.Create, nftMessage(unix.NFPROTO_IPV4, text(1, table))),
		message(nftSubsystem|unix.NFT_MSG_NEWCHAIN, netlink.Create|netlink.Acknowledge, nftMessage(unix.NFPROTO_IPV4,
			text(unix.NFTA_CHAIN_TABLE, table), text(unix.NFTA_CHAIN_NAME, "FORWARD"),
			nested(unix.NFTA_CHAIN_HOOK|unix.NLA_F_NESTED, number(nftaHookNum, nfInetForward), number(2, 0)),
			number(unix.NFTA_CHAIN_POLICY, policy), text(unix.NFTA_CHAIN_TYPE, "filter"))),
		message(unix.NFNL_MSG_BATCH_END, 0, batch),
	})
	ok(t, err)
	_, err = c.Receive()
	ok(t, err)
}
