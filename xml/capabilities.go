package xml

import (
	"encoding/xml"
	"fmt"
	"strings"
)

// CapabilitiesNamespace is that of what we add to libvirt's capabilities. Clients
// read the elements they know and pass over those of other namespaces.
const CapabilitiesNamespace = "urn:kemari:capabilities:1.0"

// Announce adds to a host's capabilities what Kemari does there: the flag and the
// transports of a migration that asks for it, and for each kind of guest whether it
// can be protected and, if not, why. What is no capabilities stays as it is.
func Announce(capabilities string) string {
	d, err := parseDocument([]byte(capabilities))
	if err != nil || d.root.name != (xml.Name{Local: "capabilities"}) {
		return capabilities
	}
	var b strings.Builder
	fmt.Fprintf(&b, "<kemari xmlns='%s' version='1'>\n", CapabilitiesNamespace)
	fmt.Fprintf(&b, "  <migration flag='%d'>\n    <uri_transport>kemari+ssh</uri_transport>\n  </migration>\n", MigrateFlag)
	fmt.Fprintf(&b, "  <checkpoint>\n    <trigger>%s</trigger>\n    <trigger>%s</trigger>\n  </checkpoint>\n", TriggerOutput, TriggerInterval)
	for _, g := range d.root.named("guest") {
		typ := g.first("os_type").trimmed()
		for _, arch := range g.named("arch") {
			machines := arch.named("machine")
			if len(machines) == 0 {
				machines = []*node{nil}
			}
			for _, m := range machines {
				k := kind{arch.first("domain").attr("type"), typ, arch.attr("name"), m.trimmed()}
				fmt.Fprintf(&b, "  <guest type=%s arch=%s machine=%s %s\n", quote(k.os), quote(k.arch), quote(k.machine), k.verdict("  ", "guest"))
			}
		}
	}
	b.WriteString("</kemari>")
	return d.apply([]edit{d.insert(d.root, nil, b.String())})
}

// AnnounceDomain adds to the capabilities of one kind of guest whether it can be
// protected. What is no such capabilities stays as it is.
func AnnounceDomain(capabilities string) string {
	d, err := parseDocument([]byte(capabilities))
	if err != nil || d.root.name != (xml.Name{Local: "domainCapabilities"}) {
		return capabilities
	}
	k := kind{domain: d.root.first("domain").trimmed(), arch: d.root.first("arch").trimmed(), machine: d.root.first("machine").trimmed()}
	// They do not say what the operating system is called; Xen's machines do.
	k.os = map[string]string{"xenpvh": "xenpvh", "xenpv": "linux"}[k.machine]
	if k.os == "" {
		k.os = "hvm"
	}
	block := fmt.Sprintf("<kemari xmlns='%s' %s", CapabilitiesNamespace, k.verdict("", "kemari"))
	return d.apply([]edit{d.insert(d.root, nil, block)})
}

// MigrateFlag is VIR_MIGRATE_KEMARI.
const MigrateFlag = 1 << 30

// kind is a kind of guest.
type kind struct{ domain, os, arch, machine string }

// verdict is the end of an element's start tag, and what it holds.
func (k kind) verdict(indent, element string) string {
	rs := Ineligible(fmt.Sprintf("<domain type=%s><memory>1</memory><os><type arch=%s machine=%s>%s</type></os></domain>",
		quote(k.domain), quote(k.arch), quote(k.machine), escape(k.os)))
	if rs == nil {
		return "supported='yes'/>"
	}
	var b strings.Builder
	b.WriteString("supported='no'>\n")
	for _, r := range rs {
		fmt.Fprintf(&b, "%s  <reason remedy=%s>%s</reason>\n", indent, quote(r.Remedy), escape(r.Text))
	}
	b.WriteString(indent + "</" + element + ">")
	return b.String()
}

func escape(s string) string {
	q := quote(s)
	return q[1 : len(q)-1]
}
