package xml

import (
	"encoding/xml"
	"fmt"
	"math/bits"
	"net/netip"
	"strconv"
	"strings"
)

// Reason is why a domain cannot be protected, and what can be done about it.
type Reason struct{ Text, Remedy string }

func (r Reason) String() string { return r.Text + ": " + r.Remedy }

// Ineligible returns all that stands in the way of protecting a domain, as far as
// its XML tells; nil if nothing does.
func Ineligible(domainXML string) []Reason {
	d, err := parseDomain(domainXML)
	if err != nil {
		return []Reason{{"the domain cannot be read (" + err.Error() + ")", "correct its XML"}}
	}
	var rs []Reason
	add := func(remedy, format string, a ...any) {
		rs = append(rs, Reason{fmt.Sprintf(format, a...), remedy})
	}

	if t := d.root.attr("type"); t != "xen" {
		add("protect it from a connection to Xen", "a domain of type '%s' is not a Xen guest", t)
	}
	os := d.root.first("os").first("type")
	const usePVH = "use a PVH guest, <type arch='x86_64' machine='xenpvh'>xenpvh</type>"
	switch typ := os.trimmed(); {
	case typ == "linux" || typ == "xen" || os.attr("machine") == "xenpv":
		add(usePVH, "a PV guest cannot be checkpointed, since Xen without shadow paging does not log which of its pages change")
	case typ != "xenpvh" && typ != "hvm":
		add(usePVH, "a guest of type '%s' is not supported", typ)
	}

	rs = append(rs, memoryReasons(d)...)
	if len(d.root.first("cpu").first("numa").named("cell")) > 0 {
		add("remove <numa> from <cpu>", "virtual NUMA cells are not supported")
	}
	for _, c := range d.root.children {
		if c.name == (xml.Name{Space: xenNamespace, Local: "commandline"}) {
			add("remove it", "<xen:commandline> gives the device model what is not looked at here, and output of it cannot be held back")
		}
	}
	devices := d.root.first("devices")
	if d.hasDeviceModel() {
		rs = append(rs, emulatedReasons(devices)...)
	}
	return append(rs, deviceReasons(devices)...)
}

// HasDeviceModel tells whether a domain is an HVM guest, which has a device model.
func HasDeviceModel(domainXML string) bool {
	d, err := parseDomain(domainXML)
	return err == nil && d.hasDeviceModel()
}

// Emulator returns the path of the device model that a domain's XML names, "" if none.
func Emulator(domainXML string) string {
	d, err := parseDomain(domainXML)
	if err != nil {
		return ""
	}
	return d.root.first("devices").first("emulator").trimmed()
}

func (d *document) hasDeviceModel() bool { return d.root.first("os").first("type").trimmed() == "hvm" }

// BootFiles returns the paths of the files that a device model opens whenever it starts,
// also for a guest that has booted long ago.
func BootFiles(domainXML string) []string {
	d, err := parseDomain(domainXML)
	if err != nil {
		return nil
	}
	var files []string
	for _, name := range []string{"kernel", "initrd"} {
		if f := d.root.first("os").first(name).trimmed(); f != "" {
			files = append(files, f)
		}
	}
	return files
}

// emulatedReasons are of devices that the device model emits to the network by, past
// what is held back, or that it may not be able to open on the standby. What it shows on
// its own screen, or writes to a terminal of the host, is not held back either: it goes
// no further by itself. Without a model libxl gives a guest an emulated network card as
// well.
func emulatedReasons(devices *node) []Reason {
	var rs []Reason
	for _, i := range devices.named("interface") {
		if m := i.first("model").attr("type"); m != "netfront" {
			what := "an emulated network card"
			if m != "" {
				what += " (" + m + ")"
			}
			rs = append(rs, Reason{
				what + " of an HVM guest has a way out of its own, on which output cannot be held back",
				"use <model type='netfront'/>, the PV driver's, in its <interface>",
			})
		}
	}
	for _, kind := range []string{"serial", "parallel"} {
		for _, c := range devices.named(kind) {
			if t := c.attr("type"); t != "pty" && t != "null" && t != "vc" {
				rs = append(rs, Reason{fmt.Sprintf("output of a %s port of type '%s' cannot be held back", kind, t), "use one of type 'pty', or remove it"})
			}
		}
	}
	for _, g := range devices.named("graphics") {
		listen := g.attr("listen")
		if a := g.first("listen").attr("address"); a != "" {
			listen = a
		}
		if ip, err := netip.ParseAddr(listen); listen != "" && (err != nil || !ip.IsUnspecified() && !ip.IsLoopback()) {
			rs = append(rs, Reason{"its screen listens at " + listen + ", an address that the standby does not have", "let it listen at 127.0.0.1 or 0.0.0.0"})
		}
		if g.attr("port") != "" && g.attr("port") != "-1" && g.attr("autoport") != "yes" {
			rs = append(rs, Reason{"its screen listens at port " + g.attr("port") + ", which may be taken on the standby", "use autoport='yes'"})
		}
	}
	return rs
}

func memoryReasons(d *document) []Reason {
	memory, err := kib(d.root.first("memory"))
	if err != nil {
		return []Reason{{"the memory's size cannot be read (" + err.Error() + ")", "correct <memory>"}}
	}
	var rs []Reason
	if c := d.root.first("currentMemory"); c != nil {
		current, err := kib(c)
		if err != nil {
			return []Reason{{"the current memory's size cannot be read (" + err.Error() + ")", "correct <currentMemory>"}}
		}
		if current != memory {
			rs = append(rs, Reason{
				fmt.Sprintf("the guest has %d KiB of its %d KiB of memory, and a ballooned guest cannot be checkpointed", current, memory),
				"make <currentMemory> equal to <memory> and start it again",
			})
		}
	}
	if d.root.first("maxMemory") != nil {
		rs = append(rs, Reason{"memory that can be plugged in (maxMemory) is not supported", "remove <maxMemory>"})
	}
	return rs
}

// MemoryKiB returns the size of a domain's memory.
func MemoryKiB(domainXML string) (uint64, error) {
	d, err := parseDomain(domainXML)
	if err != nil {
		return 0, err
	}
	return kib(d.root.first("memory"))
}

func deviceReasons(devices *node) []Reason {
	var rs []Reason
	for _, h := range devices.named("hostdev") {
		typ := h.attr("type")
		if typ == "" {
			typ = h.attr("mode")
		}
		rs = append(rs, passthrough(strings.ToUpper(typ)+" device"))
	}
	for range devices.named("redirdev") {
		rs = append(rs, passthrough("redirected USB device"))
	}
	if disks := devices.named("disk"); len(disks) > 0 {
		var names []string
		for _, k := range disks {
			names = append(names, k.first("target").attr("dev"))
		}
		rs = append(rs, Reason{
			"disks (" + strings.Join(names, ", ") + ") are not supported yet, since what the guest writes to them is not replicated",
			"use a guest that runs from its initrd, or wait for a release that replicates disks",
		})
	}
	for _, i := range devices.named("interface") {
		if b := i.first("backenddomain"); b != nil {
			rs = append(rs, Reason{
				fmt.Sprintf("output of an interface that domain '%s' serves cannot be held back", b.attr("name")),
				"remove <backenddomain>, so that the host serves it",
			})
		}
		switch typ := i.attr("type"); {
		case typ == "hostdev":
			rs = append(rs, passthrough("network device"))
		case typ != "bridge" && typ != "ethernet":
			rs = append(rs, Reason{
				fmt.Sprintf("an interface of type '%s' is not supported", typ),
				"use <interface type='bridge'>, or for a routed one 'ethernet' with <script path='vif-route'/>",
			})
		}
		if v := i.first("virtualport"); v != nil && v.attr("type") != "openvswitch" {
			rs = append(rs, Reason{
				fmt.Sprintf("an interface with a virtual port of type '%s' is not supported", v.attr("type")),
				"use a Linux bridge, or Open vSwitch with <virtualport type='openvswitch'/>",
			})
		}
	}
	return rs
}

func passthrough(what string) Reason {
	return Reason{"a " + what + " of the host is passed through, whose state cannot follow the guest", "remove it from the guest"}
}

// xenNamespace is that of libvirt's extensions for Xen.
const xenNamespace = "http://libvirt.org/schemas/domain/xen/1.0"

// kib reads a size as libvirt does: a number and a unit, which is KiB if nothing
// is said, rounded up to whole KiB.
func kib(n *node) (uint64, error) {
	v, err := strconv.ParseUint(n.trimmed(), 10, 64)
	if err != nil {
		return 0, err
	}
	unit := n.attr("unit")
	scale := uint64(1024)
	switch u := strings.ToLower(unit); u {
	case "":
	case "b", "byte", "bytes":
		scale = 1
	default:
		power := strings.IndexByte("kmgtpe", u[0]) + 1
		base := uint64(1024)
		switch {
		case power > 0 && u[1:] == "b":
			base = 1000
		case power == 0 || u[1:] != "" && u[1:] != "ib":
			return 0, fmt.Errorf("unknown unit '%s'", unit)
		}
		scale = 1
		for range power {
			scale *= base
		}
	}
	over, size := bits.Mul64(v, scale)
	if over != 0 || size+1023 < size {
		return 0, fmt.Errorf("%d %s is out of range", v, unit)
	}
	return (size + 1023) / 1024, nil
}
