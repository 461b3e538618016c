package hooks

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kemari/migrate/xen/xenstore"
)

// VIF is one run of the hotplug script of a guest's network interface, in place
// of Xen's vif-bridge: that one is a shell script which forks dozens of
// programs, and is most of what a take-over takes. Under the names
// vif-kemari-openvswitch and vif-kemari-route it stands for vif-openvswitch and
// vif-route.
//
// It does what these of Xen 4.17 to 4.20 do, with these differences:
//   - taking an interface off a bridge that is gone, or one that is gone
//     itself, is no error;
//   - the guest is told its MTU under the right path also where the interface
//     has a name of its own;
//   - the ACCEPT rules for iptables are needed only where bridged frames pass
//     a FORWARD chain that might refuse them. There, and where hooks are to be
//     called (vif-post.d), Run turns into vif-bridge itself. Frames of a switch and
//     routed ones match none of these rules (physdev-is-bridged);
//   - a routed interface needs no eth0, and the neighbours are told that its address
//     has come to this host.
type VIF struct {
	Name    string   // of the program, as it was called
	Args    []string // the command line without the program's name
	Environ []string

	// Root is put before the paths of /sys, /proc, /etc and the rest; empty but
	// in tests.
	Root string
	// Dial connects to xenstore.
	Dial func() (*xenstore.Client, error)
	// Exec becomes another program.
	Exec func(path string, argv, environ []string) error
}

// vifTimeout is well below libxl's patience with a script (LIBXL_HOTPLUG_TIMEOUT,
// 40 s): who waits on xenstore for longer has a better error to tell than that.
const vifTimeout = 10 * time.Second

// bridge scripts give this address to a vif, so that no bridge takes it for its own.
var vifMAC = [6]byte{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff}

const (
	vifBridge = "/etc/xen/scripts/vif-bridge"
	vifRoute  = "/etc/xen/scripts/vif-route"
)

// vifRun is what Run has found out.
type vifRun struct {
	*VIF
	ctx   context.Context
	store *xenstore.Client
	net   *netdev

	command string // online, offline, add or remove
	tap     bool   // the emulated interface of an HVM guest, not the vif
	path    string // of the backend in xenstore, relative to dom0's
	dev     string // the interface, by the name it has in the end
}

// Run does what the arguments ask. Its error has been put into xenstore, where
// libxl looks for it.
func (v VIF) Run() error {
	r := &vifRun{VIF: &v}
	skip, err := r.parse()
	if err != nil || skip {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), vifTimeout)
	defer cancel()
	r.ctx = ctx
	if r.store, err = v.Dial(); err != nil {
		return err
	}
	defer r.store.Close()

	if err = r.do(); err != nil {
		// The error first: libxl reads it when it sees the status.
		return errors.Join(err,
			r.store.Write(ctx, r.path+"/hotplug-error", err.Error()),
			r.store.Write(ctx, r.path+"/hotplug-status", "error"))
	}
	if !r.tap && r.command == "online" {
		return r.store.Write(ctx, r.path+"/hotplug-status", "connected")
	}
	return nil
}

// Rehearse goes the way of a run without changing anything: what a take-over will
// need is then in memory and not on a disk. A standby calls it when it begins.
func (v VIF) Rehearse() error {
	ctx, cancel := context.WithTimeout(context.Background(), vifTimeout)
	defer cancel()
	r := &vifRun{VIF: &v, ctx: ctx, path: "/local/domain/0/backend/vif/rehearsal", dev: "rehearsal"}
	var err error
	if r.store, err = v.Dial(); err != nil {
		return err
	}
	defer r.store.Close()
	if r.net, err = openNetdev(); err != nil {
		return err
	}
	defer r.net.Close()
	if _, err := r.needsScript(); err != nil {
		return err
	}
	bridge, err := r.read("bridge")
	if err != nil {
		return err
	}
	bridge, _ = r.findBridge(bridge) // a host may have none
	_, _ = r.net.mtu(bridge)
	return nil
}

// lookup finds a variable: the command line goes before the environment.
func (v *VIF) lookup(name string) string {
	for _, list := range [][]string{v.Args, v.Environ} {
		for _, s := range list {
			if value, ok := strings.CutPrefix(s, name+"="); ok {
				return value
			}
		}
	}
	return ""
}

// parse reads arguments and environment as libxl sets them; skip if there is
// nothing to do for this kind of interface.
func (r *vifRun) parse() (skip bool, err error) {
	for _, a := range r.Args {
		if !strings.Contains(a, "=") {
			r.command = a
			break
		}
	}
	switch r.command {
	case "online", "offline", "add", "remove":
	default:
		return false, fmt.Errorf("command %q: want online, offline, add or remove", r.command)
	}
	r.path = r.lookup("XENBUS_PATH")
	switch t := r.lookup("type_if"); t {
	case "vif", "":
		// The vif comes with online and offline; its add and remove are udev's.
		if r.command == "add" || r.command == "remove" {
			return true, nil
		}
		r.dev = r.lookup("vif")
		if r.path == "" {
			return false, errors.New("XENBUS_PATH is not set")
		}
	case "tap":
		if r.command == "online" || r.command == "offline" {
			return true, nil
		}
		r.tap = true
		r.dev = r.lookup("INTERFACE")
		// Always by the device's name: this may be called for a device for which
		// the environment has no path.
		domid, devid, ok := strings.Cut(strings.TrimSuffix(strings.TrimPrefix(r.dev, "vif"), "-emu"), ".")
		if !ok {
			return false, fmt.Errorf("interface %q: want a name such as vif1.0-emu", r.dev)
		}
		r.path = "/local/domain/0/backend/vif/" + domid + "/" + devid
	default:
		return false, fmt.Errorf("interface type %q: want vif or tap", t)
	}
	if r.dev == "" {
		return false, errors.New("no interface is named in the environment")
	}
	return false, nil
}

// read returns a node of the backend, empty if it is not there.
func (r *vifRun) read(name string) (string, error) {
	s, err := r.store.Read(r.ctx, r.path+"/"+name)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	return s, err
}

func (r *vifRun) do() (err error) {
	adding := r.command == "online" || r.command == "add"
	if r.net, err = openNetdev(); err != nil {
		return err
	}
	defer r.net.Close()

	script, err := r.needsScript()
	if err != nil {
		return err
	}
	if script != "" {
		argv := append([]string{script}, r.Args...)
		if err := r.Exec(r.Root+script, argv, r.Environ); err != nil {
			return fmt.Errorf("become %s: %w", script, err)
		}
		return nil
	}

	name, err := r.read("vifname")
	if err != nil {
		return err
	}
	if name != "" {
		if r.tap {
			name += "-emu"
		}
		if adding {
			if err := r.rename(name); err != nil {
				return err
			}
		}
		r.dev = name
	}

	if !adding {
		return r.remove()
	}
	switch attachmentOf(r.Name) {
	case onSwitch:
		return r.addToSwitch()
	case routed:
		return r.addRouted()
	}
	bridge, err := r.configured("bridge")
	if err != nil {
		return err
	}
	if bridge, err = r.findBridge(bridge); err != nil {
		return err
	}
	return r.add(bridge)
}

// configured returns a setting: xenstore goes before arguments and environment.
func (r *vifRun) configured(name string) (string, error) {
	s, err := r.read(name)
	if s == "" && err == nil {
		s = r.lookup(name)
	}
	return s, err
}

// rename gives the interface the name chosen for it, unless another has it.
func (r *vifRun) rename(name string) error {
	if _, err := r.net.index(name); err == nil {
		return fmt.Errorf("rename interface %s: an interface %s exists", r.dev, name)
	}
	if err := r.net.rename(r.dev, name); err != nil {
		return fmt.Errorf("rename interface %s to %s: %w", r.dev, name, err)
	}
	return nil
}

// findBridge returns the bridge to use where the guest's configuration asks
// for the one given.
func (r *vifRun) findBridge(name string) (string, error) {
	sys := r.Root + "/sys/class/net/"
	isBridge := func(dev string) bool {
		_, err := os.Stat(sys + dev + "/bridge")
		return err == nil
	}
	if name == "" {
		all, _ := filepath.Glob(sys + "*/bridge")
		if len(all) == 0 {
			return "", errors.New("no bridge is configured for the interface, and the host has none")
		}
		return filepath.Base(filepath.Dir(all[0])), nil
	}
	if isBridge(name) {
		return name, nil
	}
	// Where xend made the bridges, xenbrX was later called ethX, and old
	// configurations still say xenbrX.
	if n, ok := strings.CutPrefix(name, "xenbr"); ok && isBridge("eth"+n) {
		return "eth" + n, nil
	}
	return "", fmt.Errorf("bridge %s: there is no such bridge on this host", name)
}

func (r *vifRun) add(bridge string) error {
	port, err := r.net.index(r.dev)
	if err != nil {
		return fmt.Errorf("interface %s: %w", r.dev, err)
	}
	if err := r.asPort(); err != nil {
		return err
	}
	if err := r.setMTU(bridge); err != nil {
		return err
	}
	if _, err := os.Stat(r.Root + "/sys/class/net/" + bridge + "/brif/" + r.dev); err != nil {
		if err := r.net.addPort(bridge, port); err != nil {
			return fmt.Errorf("put %s on bridge %s: %w", r.dev, bridge, err)
		}
	}
	if err := r.net.setUp(r.dev, true); err != nil {
		return fmt.Errorf("set %s up: %w", r.dev, err)
	}
	return nil
}

// asPort prepares an interface for being nothing but a port.
func (r *vifRun) asPort() error {
	if err := r.net.setUp(r.dev, false); err != nil {
		return fmt.Errorf("set %s down: %w", r.dev, err)
	}
	// Neither is worth a guest without a network, and vif-bridge thinks so too.
	_ = r.net.setMAC(r.dev, vifMAC)
	_ = r.net.flushIPv4(r.dev)
	return nil
}

// setMTU sets the configured MTU, else the bridge's, and tells the guest.
func (r *vifRun) setMTU(bridge string) error {
	s, err := r.read("mtu")
	if err != nil {
		return err
	}
	mtu, err := strconv.Atoi(s)
	if err != nil {
		if mtu, err = r.net.mtu(bridge); err != nil {
			return fmt.Errorf("mtu of %s: %w", bridge, err)
		}
	}
	if mtu <= 0 {
		return nil
	}
	// What the driver refuses, the guest is told all the same, as ever.
	_ = r.net.setMTU(r.dev, mtu)
	if r.tap {
		return nil
	}
	// backend/vif/DOMID/DEVID
	devid := filepath.Base(r.path)
	domid := filepath.Base(filepath.Dir(r.path))
	return r.store.Write(r.ctx, "/local/domain/"+domid+"/device/vif/"+devid+"/mtu", strconv.Itoa(mtu))
}

// remove takes the interface down and off what it is on. The kernel may have been
// faster.
func (r *vifRun) remove() error {
	switch attachmentOf(r.Name) {
	case onSwitch:
		r.removeFromSwitch()
		return nil
	case routed:
		r.removeRouted()
		return nil
	}
	port, err := r.net.index(r.dev)
	if err != nil {
		return nil
	}
	_ = r.net.setUp(r.dev, false)
	master, err := os.Readlink(r.Root + "/sys/class/net/" + r.dev + "/master")
	if err != nil {
		return nil
	}
	_ = r.net.removePort(filepath.Base(master), port)
	return nil
}

// needsScript returns Xen's script for what it alone can do, if there is some.
func (r *vifRun) needsScript() (string, error) {
	at := attachmentOf(r.Name)
	if at == onSwitch {
		return "", nil
	}
	if hooks, _ := filepath.Glob(r.Root + "/etc/xen/scripts/vif-post.d/*.hook"); len(hooks) > 0 {
		if at == routed {
			return vifRoute, nil
		}
		return vifBridge, nil
	}
	if at == routed || !exists(r.Root+"/usr/sbin/iptables", r.Root+"/sbin/iptables") {
		return "", nil // and so Xen's would do nothing either
	}
	ip, err := r.configured("ip")
	if err != nil {
		return "", err
	}
	// It may be that the interface is to send from these addresses only.
	if ip != "" || !forwardOpen(r.Root) {
		return vifBridge, nil
	}
	return "", nil
}

func exists(paths ...string) bool {
	for _, p := range paths {
		if unix.Access(p, unix.F_OK) == nil {
			return true
		}
	}
	return false
}
