package xml

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func files(t testing.TB, dir string) map[string][]byte {
	t.Helper()
	names, err := filepath.Glob(filepath.Join("testdata", dir, "*.xml"))
	if err != nil || len(names) == 0 {
		t.Fatalf("no files in %s: %v", dir, err)
	}
	m := map[string][]byte{}
	for _, n := range names {
		b, err := os.ReadFile(n)
		if err != nil {
			t.Fatal(err)
		}
		m[n] = b
	}
	return m
}

func TestGolden(t *testing.T) {
	for name, b := range files(t, "good") {
		e, err := Parse(b)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got, err := e.Format()
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if d := cmp.Diff(strings.TrimSpace(string(b)), string(got)); d != "" {
			t.Errorf("%s (-file +formatted)\n%s", name, d)
		}
	}
}

// The files of bad and relation begin with a comment that holds a part of the
// error they must give.
func TestRefused(t *testing.T) {
	for _, dir := range []string{"bad", "relation"} {
		for name, b := range files(t, dir) {
			line, _, _ := strings.Cut(string(b), " -->\n")
			want := strings.TrimPrefix(line, "<!-- error: ")
			if _, err := Parse(b); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: error %v, want %q", name, err, want)
			}
		}
	}
}

func TestParseLoose(t *testing.T) {
	prefixed := Default()
	prefixed.Autostart = true
	prefixed.Standby = &Standby{URI: "kemari+ssh://xen2/system"}
	prefixed.Checkpoint.Max = time.Second
	prefixed.Arbiter = &Arbiter{Type: ArbiterNone}
	for _, tt := range []struct {
		in   string
		want *Element
	}{
		{string(files(t, "loose")["testdata/loose/empty.xml"]), Default()},
		{string(files(t, "loose")["testdata/loose/prefixed.xml"]), prefixed},
		// As virDomainGetMetadata returns it: without its namespace.
		{"<kemari><checkpoint/></kemari>", Default()},
	} {
		got, err := Parse([]byte(tt.in))
		if err != nil {
			t.Errorf("%s: %v", tt.in, err)
		}
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("%s (-want +got)\n%s", tt.in, d)
		}
	}
}

func TestParseNotXML(t *testing.T) {
	for in, want := range map[string]string{
		"":                           "no element",
		"kemari":                     "text outside",
		"<kemari>":                   "unexpected EOF",
		"<kemari/><kemari/>":         "more than one root",
		"<kemari/>x":                 "text outside",
		"<!DOCTYPE kemari><kemari/>": "document type",
		"<kemari autostart='yes' autostart='no'/>":                    "kemari/@autostart: stands there twice",
		"<kemari>" + strings.Repeat(" ", MaxSize) + "</kemari>":       "allowed are 65536",
		"<kemari>" + strings.Repeat("<a>", maxElements) + "</kemari>": "allowed are 65536",
	} {
		if _, err := Parse([]byte(in)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: error %v, want %q", in, err, want)
		}
	}
}

func TestValidateRoundedTimes(t *testing.T) {
	e := Default()
	e.Checkpoint.Min = 1500 * time.Microsecond
	if _, err := e.Format(); err == nil || !strings.Contains(err.Error(), "whole number of milliseconds") {
		t.Errorf("a time that cannot be written: %v", err)
	}
}

// genElement draws valid elements.
func genElement(t *rapid.T) *Element {
	ms := func(name string, low, high int) time.Duration {
		return time.Duration(rapid.IntRange(low, high).Draw(t, name)) * time.Millisecond
	}
	e := Default()
	if rapid.Bool().Draw(t, "standby") {
		e.Standby = &Standby{URI: "kemari+ssh://" + rapid.StringMatching(`([a-z]{1,5}@)?x[a-z0-9.-]{0,20}(:[1-9][0-9]{0,3})?/system(\?[a-z]=[a-z&'"<>]{0,9})?`).Draw(t, "uri")}
		e.Autostart = rapid.Bool().Draw(t, "autostart")
	}
	e.Transport = rapid.SampledFrom(Transports).Draw(t, "transport")
	e.Checkpoint.Trigger = rapid.SampledFrom([]string{TriggerOutput, TriggerInterval}).Draw(t, "trigger")
	e.Checkpoint.Max = ms("max", 1, 10000)
	e.Checkpoint.Min = ms("min", 1, int(e.Checkpoint.Max.Milliseconds()))
	e.Checkpoint.Paused = rapid.IntRange(1, 100).Draw(t, "paused")
	e.Heartbeat.Interval = ms("interval", 10, 10000)
	e.Heartbeat.Timeout = ms("timeout", 3*int(e.Heartbeat.Interval.Milliseconds()), 60000)
	if rapid.Bool().Draw(t, "arbiter") {
		e.Arbiter = &Arbiter{Type: ArbiterNone, Automatic: rapid.Bool().Draw(t, "automatic")}
	}
	return e
}

func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := genElement(t)
		b, err := want.Format()
		if err != nil {
			t.Fatal(err)
		}
		got, err := Parse(b)
		if err != nil {
			t.Fatalf("%v in\n%s", err, b)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Fatal(d)
		}
	})
}

func FuzzParse(f *testing.F) {
	for _, dir := range []string{"good", "loose", "relation", "bad"} {
		for _, b := range files(f, dir) {
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := Parse(b)
		if (err == nil) != (e != nil) {
			t.Fatalf("element %v with error %v", e, err)
		}
		if err != nil {
			return
		}
		out, err := e.Format()
		if err != nil {
			t.Fatalf("parsed but not formatted: %v", err)
		}
		again, err := Parse(out)
		if err != nil {
			t.Fatalf("%v in\n%s", err, out)
		}
		if d := cmp.Diff(e, again); d != "" {
			t.Fatal(d)
		}
		if twice, _ := again.Format(); !bytes.Equal(out, twice) {
			t.Fatal("formatted in two ways")
		}
	})
}
