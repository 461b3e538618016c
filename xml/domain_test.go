package xml

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func domain(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile("testdata/domain/" + name + ".xml")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestForStandby(t *testing.T) {
	got, err := ForStandby(domain(t, "live"), "/usr/lib/kemari/vif-kemari")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(domain(t, "standby"), got); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	again, err := ForStandby(got, "/usr/lib/kemari/vif-kemari")
	if err != nil || again != got {
		t.Errorf("a second time: %v\n%s", err, cmp.Diff(got, again))
	}
}

func TestForStandbyOdd(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"<domain  id = \"1\" type='xen' />", "<domain type='xen' />"},
		{"<domain name=' id=3' id='1'/>", "<domain name=' id=3'/>"},
		{"<domain><devices><interface type='bridge'/></devices></domain>", "<domain><devices><interface type='bridge'>\n  <script path='/a&apos;b'/>\n</interface></devices></domain>"},
		{"<domain><devices><interface type='network'><script path='x'/></interface></devices></domain>", "<domain><devices><interface type='network'><script path='x'/></interface></devices></domain>"},
		{"<domain><seclabel type='static'><label>l</label><imagelabel>i</imagelabel></seclabel></domain>", "<domain><seclabel type='static'><label>l</label></seclabel></domain>"},
	} {
		got, err := ForStandby(tt.in, "/a'b")
		if err != nil || got != tt.want {
			t.Errorf("%s\n got %s (%v)\nwant %s", tt.in, got, err, tt.want)
		}
	}
	if _, err := ForStandby("<domain/>", "vif-kemari"); err == nil {
		t.Error("a script without a path was taken")
	}
	if _, err := ForStandby("<network/>", "/s"); err == nil {
		t.Error("a network was taken for a domain")
	}
}

// TestStandbyScript: each of Xen's scripts has its counterpart, and anybody's own
// stays.
func TestStandbyScript(t *testing.T) {
	const own = "/usr/libexec/kemari/vif-kemari"
	for _, tt := range []struct{ typ, virtualport, script, want string }{
		{"bridge", "", "", own},
		{"bridge", "", "vif-bridge", own},
		{"bridge", "", "/etc/xen/scripts/vif-bridge", own},
		{"bridge", "openvswitch", "", own + "-openvswitch"},
		{"bridge", "openvswitch", "vif-openvswitch", own + "-openvswitch"},
		{"bridge", "", "vif-openvswitch", own + "-openvswitch"},
		{"ethernet", "", "vif-route", own + "-route"},
		{"ethernet", "", "/etc/xen/scripts/vif-route", own + "-route"},
		{"ethernet", "", "", own}, // libxl takes vif-bridge
		{"ethernet", "", "/opt/kemari/vif-kemari-route", own + "-route"},
		{"bridge", "openvswitch", own + "-openvswitch", own + "-openvswitch"},
		{"bridge", "", "vif-nat", "vif-nat"},
		{"ethernet", "", "/opt/vif-route", "/opt/vif-route"},
		{"network", "", "", ""},
	} {
		in := "<domain><devices><interface type='" + tt.typ + "'>"
		if tt.virtualport != "" {
			in += "<virtualport type='" + tt.virtualport + "'/>"
		}
		if tt.script != "" {
			in += "<script path='" + tt.script + "'/>"
		}
		out, err := ForStandby(in+"</interface></devices></domain>", own)
		if err != nil {
			t.Fatal(err)
		}
		d, err := parseDomain(out)
		if err != nil {
			t.Fatal(err)
		}
		i := d.root.first("devices").first("interface")
		if got := i.first("script").attr("path"); got != tt.want || i.first("virtualport").attr("type") != tt.virtualport {
			t.Errorf("%+v: %s", tt, out)
		}
	}
}

const element = "<kemari xmlns='urn:kemari:domain:1.0' autostart='no'>\n" +
	"  <checkpoint trigger='output' min='5' max='200' unit='ms'/>\n" +
	"  <heartbeat interval='100' timeout='500' unit='ms'/>\n" +
	"</kemari>"

func at(indent string) string { return strings.ReplaceAll(element, "\n", "\n"+indent) }

func TestSetInDomain(t *testing.T) {
	for _, tt := range []struct{ name, in, want string }{
		{
			"no metadata",
			"<domain>\n  <name>g</name>\n  <uuid>u</uuid>\n  <memory>1</memory>\n</domain>\n",
			"<domain>\n  <name>g</name>\n  <uuid>u</uuid>\n  <metadata>\n    " + at("    ") + "\n  </metadata>\n  <memory>1</memory>\n</domain>\n",
		},
		{
			"empty metadata",
			"<domain>\n  <metadata/>\n</domain>",
			"<domain>\n  <metadata>\n    " + at("    ") + "\n  </metadata>\n</domain>",
		},
		{
			"metadata of others",
			"<domain>\n  <metadata>\n    <a xmlns='b'/>  <!-- c -->\n  </metadata>\n</domain>",
			"<domain>\n  <metadata>\n    <a xmlns='b'/>  <!-- c -->\n    " + at("    ") + "\n  </metadata>\n</domain>",
		},
		{
			"on one line",
			"<domain><name>g</name><metadata><a/></metadata></domain>",
			"<domain><name>g</name><metadata><a/>\n  " + at("  ") + "\n</metadata></domain>",
		},
		{
			"replaced, with a prefix and unreadable",
			"<domain>\n <metadata>\n  <k:kemari xmlns:k='urn:kemari:domain:1.0'><k:x/></k:kemari>\n </metadata>\n</domain>",
			"<domain>\n <metadata>\n  " + at("  ") + "\n </metadata>\n</domain>",
		},
		{
			"twice",
			"<domain><metadata><kemari xmlns='urn:kemari:domain:1.0'/><kemari xmlns='urn:kemari:domain:1.0'/></metadata></domain>",
			"<domain><metadata>" + element + "</metadata></domain>",
		},
		{
			"not in the second metadata, which libvirt drops",
			"<domain><metadata>" + element + "</metadata><metadata>" + element + "</metadata></domain>",
			"<domain><metadata>" + element + "</metadata><metadata>" + element + "</metadata></domain>",
		},
	} {
		got, err := SetInDomain(tt.in, Default())
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("%s (-want +got)\n%s", tt.name, d)
		}
	}
}

func TestSetInDomainRemoves(t *testing.T) {
	live := domain(t, "live")
	with, err := SetInDomain(live, Default())
	if err != nil {
		t.Fatal(err)
	}
	got, err := SetInDomain(with, nil)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(live, got); d != "" {
		t.Errorf("added and removed (-want +got)\n%s", d)
	}
	if got, err := SetInDomain(live, nil); err != nil || got != live {
		t.Errorf("nothing to remove, and yet changed: %v", err)
	}
	bad := Default()
	bad.Checkpoint.Trigger = "moon"
	if _, err := SetInDomain(live, bad); err == nil {
		t.Error("an invalid element was written")
	}
}

// A domain whose metadata holds all kinds of things of others keeps each of them.
func TestSetInDomainKeeps(t *testing.T) {
	piece := rapid.SampledFrom([]string{
		"<!-- <kemari/> -->", "<![CDATA[</metadata>]]>", "<a:b xmlns:a='urn:a' a:c=\"d'e\"/>", "\n\t", "text &amp; &#x41;",
		"<kemari xmlns='urn:other'>\n<x/></kemari>", "<?pi data?>", "<z><metadata/></z>",
	})
	rapid.Check(t, func(t *rapid.T) {
		before := strings.Join(rapid.SliceOf(piece).Draw(t, "before"), "")
		after := strings.Join(rapid.SliceOf(piece).Draw(t, "after"), "")
		e := genElement(t)
		old := element
		if rapid.Bool().Draw(t, "fresh") {
			old = ""
		}
		in := "<domain>\n  <metadata>" + before + old + after + "</metadata>\n  <description>d</description>\n</domain>"
		out, err := SetInDomain(in, e)
		if err != nil {
			t.Fatal(err)
		}
		got, err := FromDomain(out)
		if err != nil {
			t.Fatalf("%v in\n%s", err, out)
		}
		if d := cmp.Diff(e, got); d != "" {
			t.Fatal(d)
		}
		clean, err := SetInDomain(out, nil)
		if err != nil {
			t.Fatal(err)
		}
		want := strings.Fields(strings.Replace(in, old, "", 1))
		if d := cmp.Diff(strings.Join(want, ""), strings.Join(strings.Fields(clean), "")); d != "" {
			t.Fatalf("something else was changed\n%s", d)
		}
	})
}

func TestFromDomain(t *testing.T) {
	for in, want := range map[string]string{
		"<domain><metadata>" + element + element + "</metadata></domain>":                                                           "more than once",
		"<domain><metadata><kemari xmlns='urn:kemari:domain:1.0'>" + strings.Repeat(" ", MaxSize) + "</kemari></metadata></domain>": "allowed are 65536",
		"<domain><metadata><kemari xmlns='urn:kemari:domain:1.0'><x/></kemari></metadata></domain>":                                 "kemari/x: unknown",
		"<domain>" + strings.Repeat("<a/>", maxElements) + "</domain>":                                                              "more than 50000 elements",
		"<domain>" + strings.Repeat(" ", maxDocument) + "</domain>":                                                                 "allowed are",
		"<domstatus/>": "root element is <domstatus>",
		"<domain>":     "domain XML: ",
	} {
		e, err := FromDomain(in)
		if e != nil || err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, error %v, want %q", in, e, err, want)
		}
	}
	for _, in := range []string{
		domain(t, "live"),
		"<domain>" + element + "</domain>", // not in metadata, where libvirt drops it
		"<domain><metadata/><metadata>" + element + "</metadata></domain>",
		"<domain><devices><metadata>" + element + "</metadata></devices></domain>",
	} {
		if e, err := FromDomain(in); e != nil || err != nil {
			t.Errorf("%.60q: %v, %v, want none", in, e, err)
		}
	}
}

func FuzzFromDomain(f *testing.F) {
	f.Add(domain(f, "live"))
	f.Add("<domain><metadata/></domain>")
	f.Add("<domain id='1'><metadata>" + element + "</metadata><devices><console tty='x' type='pty'/></devices></domain>")
	f.Add("<domain><devices><interface type='bridge'><source/><target dev='vif1'/><alias name='x'/></interface></devices></domain>")
	f.Fuzz(func(t *testing.T, in string) {
		_, err := FromDomain(in)
		Ineligible(in)
		standby, errStandby := ForStandby(in, "/s")
		out, errSet := SetInDomain(in, Default())
		if err == nil && (errSet != nil || errStandby != nil) {
			t.Fatalf("read, but not changed: %v, %v", errSet, errStandby)
		}
		if errSet != nil {
			return
		}
		e, err := FromDomain(out)
		if err != nil {
			t.Fatalf("%v in\n%s", err, out)
		}
		if d := cmp.Diff(Default(), e); d != "" {
			t.Fatalf("%s in\n%s", d, out)
		}
		for _, s := range []string{out, standby} {
			if err := wellFormed(s); err != nil {
				t.Fatalf("%v in\n%s", err, s)
			}
		}
	})
}

func wellFormed(s string) error {
	d := xml.NewDecoder(strings.NewReader(s))
	for {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

func TestUUID(t *testing.T) {
	const want = "00000000-0000-4000-8000-0000000000a1"
	for in, ok := range map[string]bool{
		want: true, " " + strings.ToUpper(want) + "\n": true,
		"": false, want[1:]: false, want + "0": false, strings.Replace(want, "-", "0", 1): false,
		"../../../../../../../etc/shadow-000": false, want[:35] + ";": false, want[:35] + "g": false,
	} {
		got, err := UUID("<domain><uuid>" + in + "</uuid></domain>")
		if ok != (err == nil) || ok && got != want {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
	if _, err := UUID("<domain/>"); err == nil {
		t.Error("a UUID out of nothing")
	}
}
