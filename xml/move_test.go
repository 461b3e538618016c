package xml

import (
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	"pgregory.net/rapid"

	"kemari/migrate/migratetest"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestMove holds how the element travels: as it is given (in), as xen:///system
// keeps it (lowered) and as kemari:///system shows that (raised).
func TestMove(t *testing.T) {
	names, err := filepath.Glob("testdata/move/*.txtar")
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	for _, name := range names {
		a, err := txtar.ParseFile(name)
		if err != nil {
			t.Fatal(err)
		}
		want := map[string]string{}
		for _, f := range a.Files {
			want[f.Name] = string(f.Data)
		}
		in := want["in"]
		lowered, err := Lower(in)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		raised := Raise(lowered)
		if *update {
			a.Files = []txtar.File{{Name: "in", Data: []byte(in)}, {Name: "lowered", Data: []byte(lowered)}, {Name: "raised", Data: []byte(raised)}}
			if err := os.WriteFile(name, txtar.Format(a), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if d := cmp.Diff([]string{want["lowered"], want["raised"]}, []string{lowered, raised}); d != "" {
			t.Errorf("%s (-want +got)\n%s", name, d)
		}
		// What is shown can be given back, and is then kept and shown the same.
		again, err := Lower(raised)
		if err != nil || Raise(again) != raised {
			t.Errorf("%s: shown anew (%v)\n%s", name, err, cmp.Diff(raised, Raise(again)))
		}
		for what, doc := range map[string]string{"lowered": lowered, "again": again} {
			e, err := FromDomain(doc)
			if err != nil || (e == nil) != (name == "testdata/move/none.txtar") {
				t.Errorf("%s: the element of what was %s: %v, %v", name, what, e, err)
			}
		}
	}
}

func TestLowerRefuses(t *testing.T) {
	const own = "<metadata><kemari xmlns='urn:kemari:domain:1.0'/></metadata>"
	for in, want := range map[string]string{
		"<domain><kemari/><kemari/></domain>":                                                           "more than once",
		"<domain><kemari/><kemari xmlns='urn:kemari:domain:1.0'/></domain>":                             "more than once",
		"<domain>" + own + "<kemari autostart='no'><checkpoint max='7'/></kemari></domain>":             "the two differ",
		"<domain><kemari><x/></kemari></domain>":                                                        "kemari/x: unknown",
		"<domain><kemari autostart='yes'/></domain>":                                                    "needs a <standby",
		"<domain><metadata><kemari xmlns='urn:kemari:domain:1.0' autostart='yes'/></metadata></domain>": "needs a <standby",
		"<domain><kemari>" + strings.Repeat(" ", MaxSize) + "</kemari></domain>":                        "allowed are 65536",
		"<network><kemari/></network>":                                                                  "not <domain>",
		"<domain><kemari/>":                                                                             "domain XML",
	} {
		out, err := Lower(in)
		if out != "" || err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %q, %v, want %q", in, out, err, want)
		}
	}
}

// What cannot be read is shown as libvirt has it, so that it can be corrected.
func TestRaiseLeaves(t *testing.T) {
	for _, in := range []string{
		"", "<domain", "urn:kemari:domain:1.0",
		"<domain><metadata><kemari xmlns='urn:kemari:domain:1.0'><x/></kemari></metadata></domain>",
		"<domain><metadata>" + element + element + "</metadata></domain>",
		"<domain><metadata>" + element + "</metadata><kemari/></domain>",
		"<domain><devices>" + element + "</devices></domain>",
		"<network><metadata>" + element + "</metadata></network>",
	} {
		if out := Raise(in); out != in {
			t.Errorf("%q became %q", in, out)
		}
	}
}

// Whatever others have in a domain comes through both ways.
func TestMoveKeeps(t *testing.T) {
	piece := rapid.SampledFrom([]string{
		"<!-- <kemari/> -->", "<![CDATA[</metadata>]]>", "<a:b xmlns:a='urn:a' a:c=\"d'e\"/>", "\n\t", "text &amp; &#x41;",
		"<kemari xmlns='urn:other'>\n<x/></kemari>", "<?pi data?>", "<z><metadata/><kemari/></z>",
	})
	squeeze := func(s string) string { return strings.Join(strings.Fields(s), "") }
	rapid.Check(t, func(t *rapid.T) {
		pieces := func(label string) string { return strings.Join(rapid.SliceOf(piece).Draw(t, label), "") }
		e := genElement(t)
		own, err := e.Format()
		if err != nil {
			t.Fatal(err)
		}
		meta := ""
		if rapid.Bool().Draw(t, "metadata") {
			meta = "<metadata>" + pieces("inside") + "x</metadata>"
		}
		before, after := pieces("before"), pieces("after")
		with := func(own string) string { return "<domain>" + meta + before + own + after + "\n</domain>" }
		lowered, err := Lower(with(string(own)))
		if err != nil {
			t.Fatal(err)
		}
		got, err := FromDomain(lowered)
		if err != nil || !cmp.Equal(e, got) {
			t.Fatalf("%v\n%s", err, cmp.Diff(e, got))
		}
		raised := Raise(lowered)
		if again, err := Lower(raised); err != nil || squeeze(again) != squeeze(lowered) {
			t.Fatalf("%v\n%s\n%s", err, lowered, again)
		}
		d, err := parseDomain(raised)
		if err != nil || len(d.top()) != 1 {
			t.Fatalf("%v in\n%s", err, raised)
		}
		clean := d.apply([]edit{d.remove(d.top()[0])})
		if squeeze(clean) != squeeze(with("")) {
			t.Fatalf("something else was changed\n%s\n%s", with(""), clean)
		}
	})
}

func FuzzMove(f *testing.F) {
	f.Add(domain(f, "live"))
	f.Add("<domain><metadata>" + element + "</metadata></domain>")
	f.Add("<domain><name>n</name><kemari autostart='no'/><metadata><a/></metadata></domain>")
	f.Fuzz(func(t *testing.T, in string) {
		raised := Raise(in)
		if raised != in {
			if err := wellFormed(raised); err != nil {
				t.Fatalf("%v in\n%s", err, raised)
			}
		}
		lowered, err := Lower(in)
		if (err != nil) != (lowered == "") && in != "" {
			t.Fatalf("%q, %v", lowered, err)
		}
		if err != nil || lowered == in {
			return
		}
		if _, err := FromDomain(lowered); err != nil {
			t.Fatalf("%v in\n%s", err, lowered)
		}
		if again, err := Lower(Raise(lowered)); err != nil {
			t.Fatalf("%v in\n%s", err, again)
		}
	})
}

// TestDomainSchema has libvirt's own schema, with ours, judge what is shown.
func TestDomainSchema(t *testing.T) {
	migratetest.Need(t, "xmllint", func() error {
		if _, err := os.Stat("/usr/share/libvirt/schemas/domain.rng"); err != nil {
			return err
		}
		_, err := exec.LookPath("xmllint")
		return err
	})
	dir := t.TempDir()
	write := func(name, doc string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(doc), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	const head = "<domain type='xen'><name>g</name><memory>131072</memory><os><type arch='x86_64' machine='xenpvh'>xenpvh</type></os>"
	valid := map[string]bool{
		write("twice.xml", head+"<kemari/><kemari/></domain>"):                                false,
		write("wrong.xml", head+"<kemari><checkpoint min='x'/></kemari></domain>"):            false,
		write("foreign.xml", head+"<kemari xmlns='urn:other'/></domain>"):                     false,
		write("without.xml", head+"</domain>"):                                                true,
		write("metadata.xml", head+"<metadata>"+element+"</metadata></domain>"):               true,
		write("first.xml", strings.Replace(head, "<name>", "<kemari/><name>", 1)+"</domain>"): true,
	}
	names, _ := filepath.Glob("testdata/move/*.txtar")
	for _, name := range names {
		a, err := txtar.ParseFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range a.Files {
			if f.Name == "raised" {
				valid[write(filepath.Base(name)+".xml", string(f.Data))] = true
			}
		}
	}
	args := []string{"--noout", "--nonet", "--relaxng", "kemari-domain.rng"}
	for name := range valid {
		args = append(args, name)
	}
	out, _ := exec.Command("xmllint", args...).CombinedOutput()
	for name, ok := range valid {
		want := name + " validates"
		if !ok {
			want = name + " fails to validate"
		}
		if !strings.Contains(string(out), want) {
			t.Errorf("want %q in\n%s", want, out)
		}
	}
}
