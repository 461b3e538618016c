package xml

import (
	"bytes"
	"cmp"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// What a domain's XML may hold at most. libvirt's RPC carries strings of up to
// 4 MiB; elements are counted too, because each costs more here than in the text.
const (
	maxDocument = 4 << 20
	maxElements = 50_000
)

// document is a parsed XML text that remembers where in it each element stands.
type document struct {
	src  []byte
	root *node
	all  []*node // in the order of their start tags
}

// node is an element. src[start:end] is all of it, src[start:tagEnd] its start
// tag, and src[closing:end] its end tag, which is empty for <name/>.
type node struct {
	name                        xml.Name
	attrs                       []xml.Attr
	text                        []byte // what stands directly in it, without its children
	start, tagEnd, closing, end int
	parent                      *node
	children                    []*node
}

func parseDocument(src []byte) (*document, error) {
	if len(src) > maxDocument {
		return nil, fmt.Errorf("document of %d bytes, allowed are %d", len(src), maxDocument)
	}
	d := &document{src: src}
	dec := xml.NewDecoder(bytes.NewReader(src))
	var open *node
	for {
		start := int(dec.InputOffset())
		tok, err := dec.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		end := int(dec.InputOffset())
		switch t := tok.(type) {
		case xml.StartElement:
			if open == nil && d.root != nil {
				return nil, errors.New("more than one root element")
			}
			if len(d.all) == maxElements {
				return nil, fmt.Errorf("more than %d elements", maxElements)
			}
			n := &node{name: t.Name, attrs: slices.Clone(t.Attr), start: start, tagEnd: end, parent: open}
			d.all = append(d.all, n)
			if open == nil {
				d.root = n
			} else {
				open.children = append(open.children, n)
			}
			open = n
		case xml.EndElement:
			// For <name/> the decoder makes up an end tag of no length.
			open.closing, open.end = start, end
			open = open.parent
		case xml.CharData:
			if open != nil {
				open.text = append(open.text, t...)
			} else if len(bytes.TrimSpace(t)) > 0 {
				return nil, errors.New("text outside of the root element")
			}
		case xml.Directive:
			// A document type can define entities, and with them content that
			// does not stand where it seems to stand.
			return nil, errors.New("a document type is not allowed")
		}
	}
	if d.root == nil {
		return nil, errors.New("no element")
	}
	return d, nil
}

// parseDomain is parseDocument for a <domain>.
func parseDomain(s string) (*document, error) {
	d, err := parseDocument([]byte(s))
	if err != nil {
		return nil, fmt.Errorf("domain XML: %w", err)
	}
	if d.root.name != (xml.Name{Local: "domain"}) {
		return nil, fmt.Errorf("domain XML: the root element is <%s>, not <domain>", d.root.name.Local)
	}
	return d, nil
}

// named returns the children called name, in no namespace, as libvirt's own are.
func (n *node) named(name string) []*node {
	if n == nil {
		return nil
	}
	var r []*node
	for _, c := range n.children {
		if c.name == (xml.Name{Local: name}) {
			r = append(r, c)
		}
	}
	return r
}

// first returns the first child called name, or nil; n may be nil.
func (n *node) first(name string) *node {
	if r := n.named(name); len(r) > 0 {
		return r[0]
	}
	return nil
}

// attr returns the value of an attribute in no namespace, "" if there is none.
func (n *node) attr(name string) string {
	if n == nil {
		return ""
	}
	for _, a := range n.attrs {
		if a.Name == (xml.Name{Local: name}) {
			return a.Value
		}
	}
	return ""
}

func (n *node) trimmed() string {
	if n == nil {
		return ""
	}
	return string(bytes.TrimSpace(n.text))
}

// edit replaces src[start:end].
type edit struct {
	start, end int
	text       string
}

// apply returns the document with the edits made. Edits must not overlap.
func (d *document) apply(edits []edit) string {
	// What is put in somewhere comes before what is taken out from there on.
	slices.SortFunc(edits, func(a, b edit) int { return cmp.Or(a.start-b.start, a.end-b.end) })
	var b strings.Builder
	at := 0
	for _, e := range edits {
		b.Write(d.src[at:e.start])
		b.WriteString(e.text)
		at = e.end
	}
	b.Write(d.src[at:])
	return b.String()
}

// remove takes an element out, and with it the white space that set it on a line
// of its own.
func (d *document) remove(n *node) edit {
	return edit{start: d.before(n.start), end: n.end}
}

// before moves left over white space.
func (d *document) before(at int) int {
	return len(bytes.TrimRight(d.src[:at], " \t\r\n"))
}

// removeAttr takes an attribute out of a start tag.
func (d *document) removeAttr(n *node, name string) (edit, bool) {
	// The decoder has accepted the tag, so that every name here is followed by
	// an equals sign and a quoted value.
	tag := d.src[n.start:n.tagEnd]
	i := bytes.IndexAny(tag, " \t\r\n/>")
	for i >= 0 && i < len(tag) {
		from := i
		for i < len(tag) && isSpace(tag[i]) {
			i++
		}
		eq := bytes.IndexByte(tag[i:], '=')
		if eq < 0 {
			break
		}
		key := string(bytes.TrimSpace(tag[i : i+eq]))
		i += eq + 1
		for i < len(tag) && isSpace(tag[i]) {
			i++
		}
		if i == len(tag) {
			break
		}
		quote := bytes.IndexByte(tag[i+1:], tag[i])
		if quote < 0 {
			break
		}
		i += quote + 2
		if key == name {
			return edit{start: n.start + from, end: n.start + i}, true
		}
	}
	return edit{}, false
}

// insert adds block to the children of parent: behind the child after, or last
// if after is nil. A block of several lines is indented as it is needed there.
func (d *document) insert(parent, after *node, block string) edit {
	if after != nil {
		inner, ownLine := d.indent(after)
		block = inner + indented(block, inner)
		if ownLine {
			block = "\n" + block
		}
		return edit{after.end, after.end, block}
	}
	indent, _ := d.indent(parent)
	inner := indent + "  "
	block = "\n" + inner + indented(block, inner)
	if parent.closing == parent.end { // <parent/>
		tag := string(d.src[parent.start:parent.tagEnd])
		open := strings.TrimRight(strings.TrimSuffix(tag, "/>"), " \t\r\n")
		name := open[1:]
		if i := strings.IndexAny(name, " \t\r\n"); i >= 0 {
			name = name[:i]
		}
		return edit{parent.start, parent.end, open + ">" + block + "\n" + indent + "</" + name + ">"}
	}
	at := max(d.before(parent.closing), parent.tagEnd)
	if !bytes.Contains(d.src[at:parent.closing], []byte("\n")) {
		block += "\n" + indent
	}
	return edit{at, at, block}
}

// indent returns the white space before an element, and whether it is all that
// stands before it on its line.
func (d *document) indent(n *node) (string, bool) {
	line := d.src[bytes.LastIndexByte(d.src[:n.start], '\n')+1 : n.start]
	if len(bytes.TrimLeft(line, " \t")) > 0 {
		return "", false
	}
	return string(line), true
}

func indented(block, indent string) string {
	return strings.ReplaceAll(block, "\n", "\n"+indent)
}

func isSpace(c byte) bool { return c == ' ' || c == '\t' || c == '\r' || c == '\n' }

// quote is how libvirt writes an attribute's value.
func quote(s string) string {
	return "'" + strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;", "'", "&apos;").Replace(s) + "'"
}
