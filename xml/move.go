package xml

import (
	"encoding/xml"
	"errors"
	"reflect"
	"strings"
)

// Lower moves the element from the top level of a domain, where people write it,
// to its place in <metadata>, where libvirt keeps it; in Namespace it is written
// anew there. An element in either place is checked. Nothing else changes, and
// without an element nothing at all.
func Lower(domainXML string) (string, error) {
	if !strings.Contains(domainXML, "kemari") {
		return domainXML, nil
	}
	d, err := parseDomain(domainXML)
	if err != nil {
		return "", err
	}
	top, own := d.top(), d.own()
	if len(top) > 1 || len(own) > 1 {
		return "", errors.New("kemari: stands in <domain>, or in its <metadata>, more than once")
	}
	var kept *Element
	if len(own) == 1 {
		if kept, err = parseBounded(own[0]); err != nil {
			return "", err
		}
	}
	if len(top) == 0 {
		return domainXML, nil
	}
	e, err := parseBounded(top[0])
	if err != nil {
		return "", err
	}
	edits := []edit{d.remove(top[0])}
	switch {
	case kept == nil:
		block, err := e.Format()
		if err != nil {
			return "", err
		}
		edits = append(edits, d.add(string(block)))
	case !reflect.DeepEqual(e, kept):
		return "", errors.New("kemari: stands both in <domain> and in its <metadata>, and the two differ; leave one out")
	}
	return d.apply(edits), nil
}

// Raise shows the element at the top level of a domain, where its <metadata>
// stands, and takes that out if nothing else is in it. One that cannot be read
// stays where it is, and so does all that is not ours.
func Raise(domainXML string) string {
	if !strings.Contains(domainXML, Namespace) {
		return domainXML
	}
	d, err := parseDomain(domainXML)
	if err != nil {
		return domainXML
	}
	own := d.own()
	if len(own) != 1 || len(d.top()) != 0 {
		return domainXML
	}
	e, err := parseBounded(own[0])
	if err != nil {
		return domainXML
	}
	b, err := e.Format()
	if err != nil {
		return domainXML
	}
	block := strings.Replace(string(b), " xmlns='"+Namespace+"'", "", 1)
	meta := own[0].parent
	rest := string(d.src[meta.tagEnd:own[0].start]) + string(d.src[own[0].end:meta.closing])
	if strings.TrimSpace(rest) == "" && len(meta.attrs) == 0 {
		indent, _ := d.indent(meta)
		return d.apply([]edit{{meta.start, meta.end, indented(block, indent)}})
	}
	return d.apply([]edit{d.remove(own[0]), d.insert(d.root, meta, block)})
}

// top returns our elements at the top level, in Namespace or, as libvirt's own
// are, in none.
func (d *document) top() []*node {
	r := d.root.named("kemari")
	for _, c := range d.root.children {
		if c.name == (xml.Name{Space: Namespace, Local: "kemari"}) {
			r = append(r, c)
		}
	}
	return r
}

// Name returns a domain's name, "" if it has none.
func Name(domainXML string) (string, error) {
	d, err := parseDomain(domainXML)
	if err != nil {
		return "", err
	}
	return d.root.first("name").trimmed(), nil
}
