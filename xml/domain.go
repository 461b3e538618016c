package xml

import (
	"encoding/xml"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
)

// FromDomain returns the element kept in a domain's <metadata>; nil, nil if there
// is none.
func FromDomain(domainXML string) (*Element, error) {
	d, err := parseDomain(domainXML)
	if err != nil {
		return nil, err
	}
	own := d.own()
	switch len(own) {
	case 0:
		return nil, nil
	case 1:
	default:
		return nil, errors.New("kemari: stands in <metadata> more than once")
	}
	return parseBounded(own[0])
}

func parseBounded(n *node) (*Element, error) {
	if size := n.end - n.start; size > MaxSize {
		return nil, fmt.Errorf("kemari: %d bytes, allowed are %d", size, MaxSize)
	}
	return parseElement(n)
}

// own returns our elements in the first <metadata>, the only one libvirt keeps.
func (d *document) own() []*node {
	meta := d.root.first("metadata")
	if meta == nil {
		return nil
	}
	var r []*node
	for _, c := range meta.children {
		if c.name == (xml.Name{Space: Namespace, Local: "kemari"}) {
			r = append(r, c)
		}
	}
	return r
}

// SetInDomain puts e in a domain's <metadata>, in place of the one that may be
// there, readable or not; nil only takes that out. Nothing else of the document
// changes.
func SetInDomain(domainXML string, e *Element) (string, error) {
	d, err := parseDomain(domainXML)
	if err != nil {
		return "", err
	}
	var block string
	if e != nil {
		b, err := e.Format()
		if err != nil {
			return "", err
		}
		block = string(b)
	}
	own := d.own()
	var edits []edit
	for i, n := range own {
		if i == 0 && e != nil {
			indent, _ := d.indent(n)
			edits = append(edits, edit{n.start, n.end, indented(block, indent)})
		} else {
			edits = append(edits, d.remove(n))
		}
	}
	if e != nil && len(own) == 0 {
		edits = append(edits, d.add(block))
	}
	return d.apply(edits), nil
}

// add is the edit that puts block in <metadata>, making that if need be where
// libvirt's own output has it.
func (d *document) add(block string) edit {
	if meta := d.root.first("metadata"); meta != nil {
		return d.insert(meta, nil, block)
	}
	var after *node
	for _, c := range d.root.children {
		switch c.name.Local {
		case "name", "uuid", "genid", "title", "description":
			after = c
		}
	}
	return d.insert(d.root, after, "<metadata>\n  "+indented(block, "  ")+"\n</metadata>")
}

// ForStandby returns the domain as it shall run on the standby: its interfaces
// attached by vifScript, and without what belongs to the running domain of the
// primary alone.
func ForStandby(domainXML, vifScript string) (string, error) {
	if !filepath.IsAbs(vifScript) {
		return "", fmt.Errorf("hotplug script '%s' is not an absolute path", vifScript)
	}
	d, err := parseDomain(domainXML)
	if err != nil {
		return "", err
	}
	var edits []edit
	drop := func(n *node, attr string) {
		if e, ok := d.removeAttr(n, attr); ok {
			edits = append(edits, e)
		}
	}
	drop(d.root, "id")
	for _, label := range d.root.named("seclabel") {
		for _, c := range label.children {
			// A static label is configuration; the image's never is.
			if c.name.Local == "imagelabel" || c.name.Local == "label" && label.attr("type") != "static" {
				edits = append(edits, d.remove(c))
			}
		}
	}
	devices := d.root.first("devices")
	if devices == nil {
		return d.apply(edits), nil
	}
	for _, dev := range devices.children {
		for _, c := range dev.named("alias") {
			// Names that begin with ua- were given by a user.
			if !strings.HasPrefix(c.attr("name"), "ua-") {
				edits = append(edits, d.remove(c))
			}
		}
		switch dev.name.Local {
		case "console", "serial", "parallel", "channel":
			drop(dev, "tty")
			if dev.attr("type") == "pty" {
				for _, c := range dev.named("source") {
					edits = append(edits, d.remove(c))
				}
			}
		case "interface":
			edits = append(edits, d.standbyInterface(dev, vifScript)...)
		}
	}
	return d.apply(edits), nil
}

func (d *document) standbyInterface(dev *node, vifScript string) []edit {
	var edits []edit
	for _, c := range dev.named("target") {
		// The names libxl makes hold the domain's number on this host.
		if strings.HasPrefix(c.attr("dev"), "vif") {
			edits = append(edits, d.remove(c))
		}
	}
	old := dev.named("script")
	vifScript, ok := standbyScript(dev, vifScript)
	if !ok {
		return edits
	}
	script := "<script path=" + quote(vifScript) + "/>"
	for i, c := range old {
		if i == 0 {
			edits = append(edits, edit{c.start, c.end, script})
		} else {
			edits = append(edits, d.remove(c))
		}
	}
	if len(old) == 0 {
		edits = append(edits, d.insert(dev, dev.first("source"), script))
	}
	return edits
}

// standbyScript returns what vifScript is called in place of one of Xen's hotplug
// scripts; it says no where the interface has another one, or may have none.
func standbyScript(dev *node, vifScript string) (string, bool) {
	switch dev.attr("type") {
	case "bridge", "ethernet": // libvirt's libxl driver takes no script for others
	default:
		return "", false
	}
	ours := filepath.Base(vifScript)
	dir, name := filepath.Split(dev.first("script").attr("path"))
	switch {
	case name == "" && dev.first("virtualport").attr("type") == "openvswitch":
		name = "vif-openvswitch" // so does libvirt
	case name == "":
		name = "vif-bridge"
	case strings.HasPrefix(name, ours): // it has been here before
	case dir != "" && dir != "/etc/xen/scripts/":
		return "", false
	}
	switch name {
	case "vif-bridge", ours:
		return vifScript, true
	case "vif-openvswitch", ours + "-openvswitch":
		return vifScript + "-openvswitch", true
	case "vif-route", ours + "-route":
		return vifScript + "-route", true
	}
	return "", false
}

// UUID returns a domain's UUID in libvirt's form: lower case, with hyphens.
func UUID(domainXML string) (string, error) {
	d, err := parseDomain(domainXML)
	if err != nil {
		return "", err
	}
	u := strings.ToLower(d.root.first("uuid").trimmed())
	ok := len(u) == 36
	for i := 0; ok && i < len(u); i++ {
		switch i {
		case 8, 13, 18, 23:
			ok = u[i] == '-'
		default:
			ok = strings.IndexByte("0123456789abcdef", u[i]) >= 0
		}
	}
	if !ok {
		return "", fmt.Errorf("domain XML: '%.40s' is not a UUID", u)
	}
	return u, nil
}
