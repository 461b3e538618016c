package output

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"testing"

	"github.com/mdlayher/netlink"
	link "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kemari/migrate/migratetest"
)

// attachment is a way from a guest's interface to the world. What it does comes
// after the plug, so that each must work alike.
type attachment struct {
	name   string
	attach func(t testing.TB, n int, vif, wire link.Link)
	// frame makes a frame of a number that a guest can send, and number reads it
	// from one that goes out; it says no of a frame that is not the guest's.
	frame  func(guest, n, size int) []byte
	number func(b []byte) (n int, ok bool)
}

var (
	bridged = attachment{"bridge", attachBridge, anyFrame, anyNumber}
	routed  = attachment{"routed", attachRouted, udpFrame, udpNumber}
	ovs     = attachment{"openvswitch", attachOVS, untaggedFrame, anyNumber}
)

var attachments = []attachment{bridged, routed, ovs}

// attachBridge does what vif-bridge does.
func attachBridge(t testing.TB, n int, vif, wire link.Link) {
	t.Helper()
	attrs := link.NewLinkAttrs()
	attrs.Name = fmt.Sprint("br", n)
	no := false
	br := &link.Bridge{LinkAttrs: attrs, MulticastSnooping: &no}
	must(t, link.LinkAdd(br))
	must(t, link.LinkSetUp(br))
	must(t, link.LinkSetMaster(vif, br))
	must(t, link.LinkSetMaster(wire, br))
}

// Protocols a frame may be of; the numbering continues through all of them.
var protocols = []uint16{0x88b5, unix.ETH_P_ARP, unix.ETH_P_IPV6, unix.ETH_P_IP, unix.ETH_P_8021Q}

// anyFrame makes a frame for all, of one protocol after the other.
func anyFrame(_, n, size int) []byte { return broadcast(n, size, protocols[n%len(protocols)]) }

func broadcast(n, size int, protocol uint16) []byte {
	b := make([]byte, max(size, 60))
	for i := range 6 {
		b[i] = 0xff
	}
	copy(b[6:], []byte{2, 0, 0, 0, 0, 1})
	binary.BigEndian.PutUint16(b[12:], protocol)
	binary.BigEndian.PutUint16(b[16:], 0x88b5) // within a VLAN
	binary.BigEndian.PutUint32(b[20:], uint32(n))
	return b
}

func anyNumber(b []byte) (n int, ok bool) {
	if len(b) < 24 || string(b[6:12]) != "\x02\x00\x00\x00\x00\x01" {
		return 0, false
	}
	// The kernel takes the VLAN tag out of the frame.
	if p := binary.BigEndian.Uint16(b[12:]); p == 0x88b5 && binary.BigEndian.Uint16(b[16:]) != 0x88b5 {
		return int(binary.BigEndian.Uint32(b[16:])), true
	}
	return int(binary.BigEndian.Uint32(b[20:])), true
}

// attachRouted does what vif-route does: the host is the guest's router.
func attachRouted(t testing.TB, n int, vif, wire link.Link) {
	t.Helper()
	for _, s := range []struct{ name, value string }{
		{"ip_forward", "1"}, {"conf/all/rp_filter", "0"}, {"conf/" + vif.Attrs().Name + "/rp_filter", "0"},
		{"conf/" + vif.Attrs().Name + "/proxy_arp", "1"},
	} {
		must(t, os.WriteFile("/proc/sys/net/ipv4/"+s.name, []byte(s.value), 0))
	}
	guest, world := routedAddrs(n)
	must(t, link.LinkSetHardwareAddr(vif, routerMAC))
	must(t, link.RouteAdd(&link.Route{LinkIndex: vif.Attrs().Index, Dst: host(guest), Scope: link.SCOPE_LINK}))
	must(t, link.RouteAdd(&link.Route{LinkIndex: wire.Attrs().Index, Dst: host(world), Scope: link.SCOPE_LINK}))
	must(t, link.NeighAdd(&link.Neigh{
		LinkIndex: wire.Attrs().Index, IP: world, State: link.NUD_PERMANENT,
		HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 3},
	}))
}

var routerMAC = net.HardwareAddr{2, 0, 0, 0, 0, 2}

func routedAddrs(n int) (guest, world net.IP) {
	return net.IPv4(10, 60, byte(n), 2).To4(), net.IPv4(10, 70, byte(n), 2).To4()
}

func host(ip net.IP) *net.IPNet { return &net.IPNet{IP: ip, Mask: net.CIDRMask(32, 32)} }

func udpFrame(guest, n, size int) []byte {
	from, to := routedAddrs(guest)
	b := make([]byte, max(size, 60))
	copy(b, routerMAC)
	copy(b[6:], []byte{2, 0, 0, 0, 0, 1})
	binary.BigEndian.PutUint16(b[12:], unix.ETH_P_IP)
	ip := b[14:]
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	copy(ip[12:], from)
	copy(ip[16:], to)
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(ip[i:]))
	}
	sum = sum>>16 + sum&0xffff
	binary.BigEndian.PutUint16(ip[10:], ^uint16(sum>>16+sum))
	binary.BigEndian.PutUint16(ip[22:], 9)
	binary.BigEndian.PutUint16(ip[24:], uint16(len(ip)-20))
	binary.BigEndian.PutUint32(ip[28:], uint32(n))
	return b
}

func udpNumber(b []byte) (n int, ok bool) {
	if len(b) < 60 || binary.BigEndian.Uint16(b[12:]) != unix.ETH_P_IP || b[14+9] != unix.IPPROTO_UDP || b[14+12] != 10 {
		return 0, false
	}
	return int(binary.BigEndian.Uint32(b[14+28:])), true
}

// untaggedFrame is for a switch whose flows would have to name the VLAN.
func untaggedFrame(_, n, size int) []byte { return broadcast(n, size, protocols[n%4]) }

// attachOVS makes a switch in the kernel's part of Open vSwitch, with the flows that
// its daemon would put there.
func attachOVS(t testing.TB, n int, vif, wire link.Link) {
	t.Helper()
	migratetest.Need(t, "openvswitch", func() error {
		_, err := link.GenlFamilyGet("ovs_datapath")
		return err
	})
	conn, err := netlink.Dial(unix.NETLINK_GENERIC, nil)
	must(t, err)
	defer conn.Close()
	// struct genlmsghdr and struct ovs_header; commands and attributes are those of
	// linux/openvswitch.h.
	const cmdNew = 1
	ask := func(family string, version byte, dp int, attrs []netlink.Attribute) {
		t.Helper()
		f, err := link.GenlFamilyGet(family)
		must(t, err)
		body, err := netlink.MarshalAttributes(attrs)
		must(t, err)
		data := binary.NativeEndian.AppendUint32([]byte{cmdNew, version, 0, 0}, uint32(dp))
		_, err = conn.Execute(netlink.Message{
			Header: netlink.Header{Type: netlink.HeaderType(f.ID), Flags: netlink.Request | netlink.Acknowledge},
			Data:   append(data, body...),
		})
		if err != nil {
			t.Fatalf("%s: %v", family, err)
		}
	}
	u32 := func(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
	nested := func(attrs ...netlink.Attribute) []byte {
		b, err := netlink.MarshalAttributes(attrs)
		must(t, err)
		return b
	}
	name := fmt.Sprint("ovs", n)
	ask("ovs_datapath", 2, 0, []netlink.Attribute{{Type: 1, Data: append([]byte(name), 0)}, {Type: 2, Data: u32(0)}})
	dp := byName(t, name).Attrs().Index
	ports := []link.Link{vif, wire}
	for i, l := range ports {
		ask("ovs_vport", 1, dp, []netlink.Attribute{
			{Type: 1, Data: u32(uint32(i + 1))},                // port
			{Type: 2, Data: u32(1)},                            // of a net device
			{Type: 3, Data: append([]byte(l.Attrs().Name), 0)}, // name
			{Type: 5, Data: u32(0)},                            // nobody to ask
		})
	}
	for i := range ports {
		in, out := uint32(i+1), uint32(len(ports)-i)
		ask("ovs_flow", 1, dp, []netlink.Attribute{
			{Type: netlink.Nested | 1, Data: nested(netlink.Attribute{Type: 3, Data: u32(in)}, netlink.Attribute{Type: 4, Data: make([]byte, 12)})},
			{Type: netlink.Nested | 7, Data: nested(netlink.Attribute{Type: 3, Data: u32(^uint32(0))}, netlink.Attribute{Type: 4, Data: make([]byte, 12)})},
			{Type: netlink.Nested | 2, Data: nested(netlink.Attribute{Type: 1, Data: u32(out)})},
		})
	}
}
