package xml

import (
	"slices"
	"strings"
	"testing"
)

func TestEligible(t *testing.T) {
	for name, in := range map[string]string{
		"live":               domain(t, "live"),
		"no interface":       pvh("", ""),
		"Open vSwitch":       pvh("", "<interface type='bridge'><virtualport type='openvswitch'/></interface>"),
		"routed":             pvh("", "<interface type='ethernet'><script path='vif-route'/><ip address='192.0.2.7'/></interface>"),
		"HVM":                hvm("<interface type='bridge'><model type='netfront'/></interface>"),
		"screen":             hvm("<graphics type='vnc' port='5900' autoport='yes' listen='127.0.0.1'/><serial type='pty'/>"),
		"screen anywhere":    hvm("<graphics type='vnc' port='-1'><listen type='address' address='::'/></graphics>"),
		"memory, one in MiB": pvh("<currentMemory unit='KiB'>131072</currentMemory>", ""),
	} {
		if r := Ineligible(in); r != nil {
			t.Errorf("%s: %v", name, r)
		}
	}
}

// pvh is an eligible domain with more in it.
func pvh(top, devices string) string {
	return "<domain type='xen'><memory unit='MiB'>128</memory>" + top +
		"<os><type machine='xenpvh'>xenpvh</type></os><devices>" + devices + "</devices></domain>"
}

// hvm is pvh, as an HVM guest.
func hvm(devices string) string {
	return strings.ReplaceAll(pvh("", devices), "xenpvh'>xenpvh", "xenfv'>hvm")
}

func TestHasDeviceModel(t *testing.T) {
	for in, want := range map[string]bool{
		hvm(""): true, pvh("", ""): false, "<domain/>": false, "<domain": false,
		strings.ReplaceAll(pvh("", ""), "xenpvh'>xenpvh", "xenpv'>linux"): false,
	} {
		if got := HasDeviceModel(in); got != want {
			t.Errorf("%s: %v", in, got)
		}
	}
}

func TestDeviceModelFiles(t *testing.T) {
	const in = "<domain type='xen'><os><type>hvm</type><kernel> /boot/vmlinuz </kernel><initrd>/boot/initrd.img</initrd></os><devices><emulator>/opt/qemu</emulator></devices></domain>"
	if got := BootFiles(in); !slices.Equal(got, []string{"/boot/vmlinuz", "/boot/initrd.img"}) || Emulator(in) != "/opt/qemu" {
		t.Errorf("%q, %q", got, Emulator(in))
	}
	for _, in := range []string{hvm(""), "<domain", "<domain/>"} {
		if got := BootFiles(in); got != nil || Emulator(in) != "" {
			t.Errorf("%s: %q, %q", in, got, Emulator(in))
		}
	}
}

func TestIneligible(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want []string // a part of each reason, in order
	}{
		{strings.ReplaceAll(pvh("", ""), "xenpvh'>xenpvh", "xenpv'>linux"), []string{"PV guest cannot"}},
		{hvm("<serial type='tcp'/><serial type='pty'/><parallel type='file'/>"), []string{"serial port of type 'tcp'", "parallel port of type 'file'"}},
		{hvm("<graphics type='vnc' port='5901' autoport='no' listen='192.0.2.1'><listen type='address' address='192.0.2.1'/></graphics>"), []string{"listens at 192.0.2.1", "port 5901"}},
		{strings.Replace(hvm(""), "</domain>", "<x:commandline xmlns:x='http://libvirt.org/schemas/domain/xen/1.0'><x:arg value='-netdev'/></x:commandline></domain>", 1), []string{"<xen:commandline>"}},
		{hvm("<interface type='bridge'/>"), []string{"an emulated network card of an HVM guest"}},
		{hvm("<interface type='bridge'><model type='e1000'/></interface><hostdev type='pci'/>"), []string{"card (e1000)", "a PCI device"}},
		{strings.ReplaceAll(pvh("", ""), "xenpvh'>xenpvh", "pc'>exe"), []string{"type 'exe'"}},
		{strings.ReplaceAll(pvh("", ""), "'xen'", "'kvm'"), []string{"'kvm' is not a Xen guest"}},
		{pvh("<currentMemory unit='MiB'>64</currentMemory>", ""), []string{"65536 KiB of its 131072"}},
		{pvh("<currentMemory unit='furlong'>64</currentMemory>", ""), []string{"unknown unit 'furlong'"}},
		{pvh("<currentMemory unit='E'>64</currentMemory>", ""), []string{"out of range"}},
		{pvh("<maxMemory slots='4'>1</maxMemory>", ""), []string{"maxMemory"}},
		{pvh("<cpu><numa><cell id='0'/></numa></cpu>", ""), []string{"NUMA"}},
		{pvh("", "<hostdev mode='subsystem' type='pci'/><hostdev type='usb'/>"), []string{"a PCI device", "a USB device"}},
		{pvh("", "<interface type='hostdev'/>"), []string{"a network device of the host"}},
		{pvh("", "<interface type='bridge'><backenddomain name='netvm'/></interface>"), []string{"domain 'netvm' serves"}},
		{pvh("", "<interface type='network'/>"), []string{"interface of type 'network'"}},
		{pvh("", "<interface type='bridge'><virtualport type='midonet'/></interface>"), []string{"'midonet'"}},
		{pvh("", "<interface type='direct'><virtualport type='802.1Qbg'/></interface>"), []string{"interface of type 'direct'", "'802.1Qbg'"}},
		{pvh("", "<disk><target dev='xvda'/></disk><disk><target dev='xvdb'/></disk>"), []string{"disks (xvda, xvdb)"}},
		{"<domain type='xen'/>", []string{"guest of type ''", "memory's size"}},
		{"<domain", []string{"cannot be read"}},
		{
			"<domain type='xen'><memory>1</memory><currentMemory>0</currentMemory><os><type>linux</type></os><devices><disk/></devices></domain>",
			[]string{"PV guest", "0 KiB of its 1", "disks ()"},
		},
	} {
		got := Ineligible(tt.in)
		if len(got) != len(tt.want) {
			t.Errorf("%s\ngot %d reasons %v, want %q", tt.in, len(got), got, tt.want)
			continue
		}
		for i, r := range got {
			if !strings.Contains(r.Text, tt.want[i]) || r.Remedy == "" || !strings.HasPrefix(r.String(), r.Text+": ") {
				t.Errorf("%s\ngot %q, want %q", tt.in, r, tt.want[i])
			}
		}
	}
}

func TestKiB(t *testing.T) {
	for in, want := range map[string]uint64{
		"<m>7</m>": 7, "<m unit='b'>1</m>": 1, "<m unit='bytes'>2048</m>": 2, "<m unit='KB'>1024</m>": 1000,
		"<m unit='k'> 3 </m>": 3, "<m unit='MiB'>1</m>": 1024, "<m unit='G'>1</m>": 1 << 20, "<m unit='TiB'>1</m>": 1 << 30,
	} {
		d, err := parseDocument([]byte(in))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := kib(d.root); err != nil || got != want {
			t.Errorf("%s: %d (%v), want %d", in, got, err, want)
		}
	}
}
