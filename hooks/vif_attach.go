package hooks

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/mdlayher/packet"
	link "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Besides a bridge there are two ways to attach an interface. As with Xen's own
// scripts the program's name says which: nothing else that libxl hands over does,
// since it names a bridge for a routed interface too.
const (
	onBridge = ""
	onSwitch = "-openvswitch"
	routed   = "-route"
)

func attachmentOf(name string) string {
	for _, a := range []string{onSwitch, routed} {
		if strings.HasSuffix(filepath.Base(name), a) {
			return a
		}
	}
	return onBridge
}

// switchPort is what a guest's configuration asks for as bridge=: a switch, the VLAN
// of an access port, the VLANs of a trunk.
var switchPort = regexp.MustCompile(`^([^.:]+)(?:\.(\d+))?(?::(\d+(?::\d+)*))?$`)

// addToSwitch makes the interface a port of an Open vSwitch.
func (r *vifRun) addToSwitch() error {
	bridge, err := r.configured("bridge")
	if err != nil {
		return err
	}
	m := switchPort.FindStringSubmatch(bridge)
	if m == nil {
		return fmt.Errorf("bridge '%s' of Open vSwitch: want NAME, NAME.VLAN or NAME:VLAN:VLAN in <source bridge>", bridge)
	}
	if err := r.asPort(); err != nil {
		return err
	}
	args := []string{"--", "--if-exists", "del-port", r.dev, "--", "add-port", m[1], r.dev}
	if m[2] != "" {
		args = append(args, "tag="+m[2])
	}
	if m[3] != "" {
		args = append(args, "trunks="+strings.ReplaceAll(m[3], ":", ","))
	}
	domid := filepath.Base(filepath.Dir(r.path))
	vm, err := r.store.Read(r.ctx, "/local/domain/"+domid+"/vm")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, id := range []struct{ key, path string }{
		{"xen-vm-name", vm + "/name"}, {"xen-vm-uuid", vm + "/uuid"}, {"attached-mac", r.path + "/mac"},
	} {
		value, err := r.store.Read(r.ctx, id.path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		quoted, err := json.Marshal(value) // as Open vSwitch's database has its strings
		if err != nil {
			return err
		}
		args = append(args, "--", "set", "interface", r.dev, "external-ids:"+id.key+"="+string(quoted))
	}
	if err := r.vsctl(args...); err != nil {
		return fmt.Errorf("put %s on the Open vSwitch %s: %w", r.dev, m[1], err)
	}
	if err := r.net.setUp(r.dev, true); err != nil {
		return fmt.Errorf("set %s up: %w", r.dev, err)
	}
	return nil
}

// removeFromSwitch: the switch keeps a port whose interface is gone. Should it fail,
// the guest is to end all the same; who next has the name takes the port away first.
func (r *vifRun) removeFromSwitch() {
	_ = r.vsctl("--", "--if-exists", "del-port", r.dev)
	_ = r.net.setUp(r.dev, false)
}

// vsctl runs ovs-vsctl, which returns when the switch has done it.
func (r *vifRun) vsctl(args ...string) error {
	path := ""
	for _, p := range []string{"/usr/bin/ovs-vsctl", "/usr/local/bin/ovs-vsctl"} {
		if exists(r.Root + p) {
			path = r.Root + p
			break
		}
	}
	if path == "" {
		return errors.New("this host has no ovs-vsctl; install Open vSwitch (Debian: openvswitch-switch)")
	}
	// Its own time-out comes first, since it knows better what it waited for.
	cmd := exec.CommandContext(r.ctx, path, append([]string{"--timeout=8"}, args...)...)
	cmd.Env = r.Environ
	out, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	if cause := context.Cause(r.ctx); cause != nil {
		err = cause
	}
	return fmt.Errorf("ovs-vsctl: %w: %s; see: systemctl status openvswitch-switch, ovs-vsctl show", err, bytes.TrimSpace(out))
}

// addRouted makes the host the router of the guest: it has a route to the guest's
// addresses, and answers the guest's ARP requests for all others.
func (r *vifRun) addRouted() error {
	l, err := link.LinkByName(r.dev)
	if err != nil {
		return fmt.Errorf("interface %s: %w", r.dev, err)
	}
	ip, err := r.configured("ip")
	if err != nil {
		return err
	}
	var guest []*net.IPNet
	for _, s := range strings.Fields(ip) {
		dst, err := parseNet(s)
		if err != nil {
			return err
		}
		guest = append(guest, dst)
	}
	if err := r.net.setUp(r.dev, true); err != nil {
		return fmt.Errorf("set %s up: %w", r.dev, err)
	}
	if err := os.WriteFile(r.Root+"/proc/sys/net/ipv4/conf/"+r.dev+"/proxy_arp", []byte("1"), 0); err != nil {
		return fmt.Errorf("have the host answer ARP requests on %s: %w", r.dev, err)
	}
	// The host speaks to the guest by the address it has towards the world. Without
	// one it takes any other it has, which is no reason not to start a guest.
	uplink, own := r.uplink()
	if own != nil {
		if err := link.AddrReplace(l, &link.Addr{IPNet: &net.IPNet{IP: own, Mask: net.CIDRMask(32, 32)}}); err != nil {
			return fmt.Errorf("give %s the address %v: %w", r.dev, own, err)
		}
	}
	for _, dst := range guest {
		among := r.neighboursOf(dst, uplink) // while no route to the guest hides them
		if err := r.addRoute(l, dst, own); err != nil {
			return err
		}
		r.announce(among, dst)
	}
	return nil
}

func parseNet(s string) (*net.IPNet, error) {
	if _, n, err := net.ParseCIDR(s); err == nil {
		return n, nil
	}
	ip := net.ParseIP(s)
	if ip == nil {
		return nil, fmt.Errorf("guest's address '%s': want an IP address or network in <ip address>", s)
	}
	if v4 := ip.To4(); v4 != nil {
		ip = v4
	}
	return &net.IPNet{IP: ip, Mask: net.CIDRMask(8*len(ip), 8*len(ip))}, nil
}

func (r *vifRun) addRoute(l link.Link, dst *net.IPNet, own net.IP) error {
	// The emulated interface of an HVM guest goes before, as with vif-route.
	route := &link.Route{LinkIndex: l.Attrs().Index, Dst: dst, Scope: link.SCOPE_LINK, Priority: 2}
	if r.tap {
		route.Priority = 1
	}
	family := link.FAMILY_V6
	if dst.IP.To4() != nil {
		route.Src, family = own, link.FAMILY_V4
	}
	err := link.RouteAdd(route)
	if errors.Is(err, unix.EEXIST) {
		same, lerr := link.RouteListFiltered(family, route, link.RT_FILTER_DST|link.RT_FILTER_OIF)
		if lerr == nil && len(same) > 0 {
			return nil
		}
		return fmt.Errorf("%v is routed elsewhere already; see: ip route show %v; has another guest that address?", dst, dst)
	}
	if err != nil {
		return fmt.Errorf("route %v to %s: %w", dst, r.dev, err)
	}
	return nil
}

// uplink is the interface towards the world, and the host's address there: the one
// that the configuration names, else eth0, as with vif-route, else that of the
// default route, for libvirt has no way to name one.
func (r *vifRun) uplink() (name string, own net.IP) {
	candidates := []string{r.lookup("netdev")}
	if candidates[0] == "" {
		candidates = []string{"eth0"}
		routes, _ := link.RouteListFiltered(link.FAMILY_V4, &link.Route{Dst: nil}, link.RT_FILTER_DST)
		for _, route := range routes {
			if l, err := link.LinkByIndex(route.LinkIndex); err == nil {
				candidates = append(candidates, l.Attrs().Name)
			}
		}
	}
	for _, name := range candidates {
		l, err := link.LinkByName(name)
		if err != nil {
			continue
		}
		if addrs, err := link.AddrList(l, link.FAMILY_V4); err == nil && len(addrs) > 0 {
			return name, addrs[0].IP
		}
	}
	return "", nil
}

// neighboursOf is the interface on whose link a guest's address would be if it were not
// routed here: who asks for it asks there. Without one it is the uplink.
func (r *vifRun) neighboursOf(dst *net.IPNet, uplink string) string {
	routes, err := link.RouteGet(dst.IP)
	if err != nil || len(routes) == 0 || routes[0].Gw != nil {
		return uplink
	}
	l, err := link.LinkByIndex(routes[0].LinkIndex)
	if err != nil || l.Attrs().Name == r.dev {
		return uplink
	}
	return l.Attrs().Name
}

// announce tells the neighbours that a guest's address is to be found at this host
// now, where the host answers for it (proxy_arp): they would look for it at the host
// it comes from until they forget. The guest's own announcement stays on its link.
func (r *vifRun) announce(among string, dst *net.IPNet) {
	ip := dst.IP.To4()
	if ones, bits := dst.Mask.Size(); among == "" || ip == nil || ones != bits {
		return
	}
	answers := false
	for _, dev := range []string{"all", among} {
		b, _ := os.ReadFile(r.Root + "/proc/sys/net/ipv4/conf/" + dev + "/proxy_arp")
		answers = answers || bytes.HasPrefix(b, []byte("1"))
	}
	ifi, err := net.InterfaceByName(among)
	if !answers || err != nil || len(ifi.HardwareAddr) != 6 {
		return
	}
	c, err := packet.Listen(ifi, packet.Raw, unix.ETH_P_ARP, nil)
	if err != nil {
		return
	}
	defer c.Close()
	broadcast := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	_, _ = c.WriteTo(gratuitousARP(ifi.HardwareAddr, ip), &packet.Addr{HardwareAddr: broadcast})
}

// gratuitousARP asks all for an address and says that the asker has it.
func gratuitousARP(mac net.HardwareAddr, ip net.IP) []byte {
	b := append(bytes.Repeat([]byte{0xff}, 6), mac...)
	b = binary.BigEndian.AppendUint16(b, unix.ETH_P_ARP)
	b = append(b, 0, 1, 8, 0, 6, 4, 0, 1) // Ethernet, IPv4, their lengths, a request
	b = append(append(b, mac...), ip...)
	b = append(append(b, make([]byte, 6)...), ip...)
	return append(b, make([]byte, 60-len(b))...)
}

// removeRouted: the kernel removes the routes of an interface that goes down.
func (r *vifRun) removeRouted() {
	_ = r.net.setUp(r.dev, false)
	_ = r.net.flushIPv4(r.dev)
	_ = os.WriteFile(r.Root+"/proc/sys/net/ipv4/conf/"+r.dev+"/proxy_arp", []byte("0"), 0)
}
