package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kemari/migrate/migratetest"
)

func TestInspect(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want intent
		err  string
	}{
		{args: nil, want: theirs},
		{args: []string{"list", "--all"}, want: theirs},
		{args: []string{"migrate", "g1", xen2}, want: theirs},
		{args: []string{"migrate", "--kemari", "g1", xen2}, want: ours},
		{args: []string{"migrate", "g1", xen2, "--live", "--p2p", "--verbose", "--kemari"}, want: ours},
		{args: []string{"-c", "xen:///system", "-rq", "migrate", "--kemari", "g1", xen2}, want: ours},
		{args: []string{"-cxen:///system", "--deb", "0", "--log=/x", "-k5", "-tK", "3", "--", "migrate", "--kemari", "g1", xen2}, want: ours},
		{args: []string{"migrate", "--domain", "g1", "--desturi=" + xen2, "--kemari", "--kemari-min=5"}, want: ours},
		{args: []string{"migrate --kemari g1 '" + xen2 + "'"}, want: ours},
		{args: []string{"-q", " \\\n migrate  g1\\ 2 \"" + xen2 + "\" --kemari # why"}, want: ours},

		// --kemari is something else here.
		{args: []string{"migrate", "g1", xen2, "--dname", "--kemari"}, want: theirs},
		{args: []string{"migrate", "--", "g1", xen2, "--kemari"}, want: theirs},
		{args: []string{"migrate", "g1", xen2, "--xml=--kemari"}, want: theirs},
		{args: []string{"migrate", "g1", xen2, "-kemari"}, want: theirs},
		{args: []string{"desc", "g1", "--kemari"}, want: theirs},
		{args: []string{"echo", "migrate", "--kemari"}, want: theirs},
		{args: []string{"echo migrate --kemari"}, want: theirs},
		{args: []string{"echo x # ; migrate --kemari g1 u"}, want: theirs},
		{args: []string{"echo 'migrate; migrate --kemari g1 u'"}, want: theirs},
		{args: []string{"-c", "migrate", "--kemari"}, want: theirs},

		// What virsh itself has to complain about or to answer.
		{args: []string{"--bogus", "migrate", "--kemari", "g1", xen2}, want: theirs},
		{args: []string{"-x", "migrate", "--kemari", "g1", xen2}, want: theirs},
		{args: []string{"-c"}, want: theirs},
		{args: []string{"--connect"}, want: theirs},
		{args: []string{"--keepalive", "3", "migrate", "--kemari", "g1", xen2}, want: theirs}, // ambiguous
		{args: []string{"--quiet=1", "migrate", "--kemari", "g1", xen2}, want: theirs},
		{args: []string{"--help", "migrate", "--kemari"}, want: theirs},
		{args: []string{"--version=long", "migrate", "--kemari", "g1", xen2}, want: theirs},
		{args: []string{"-V", "migrate", "--kemari", "g1", xen2}, want: theirs},
		{args: []string{"migrate --kemari \"g1"}, want: theirs},
		{args: []string{"migrate --kemari g1\\"}, want: theirs},

		{args: []string{"migrate", "--help"}, want: help},
		{args: []string{"help", "migrate"}, want: help},
		{args: []string{"migrate", "--kemari", "--help"}, want: help},
		{args: []string{"-q", "help migrate"}, want: help},
		{args: []string{"help"}, want: theirs},
		{args: []string{"help", "list"}, want: theirs},

		// Ours, and wrong.
		{args: []string{"list; migrate --kemari g1 " + xen2}, want: ours, err: "one command at a time"},
		{args: []string{"migrate", "--kemari"}, want: ours, err: "requires <domain> option"},
		{args: []string{"migrate", "--kemari", "g1"}, want: ours, err: "requires <desturi> option"},
		{args: []string{"migrate", "--kemari", "g1", xen2, "--bogus"}, want: ours, err: "doesn't support option --bogus"},
		{args: []string{"migrate", "--kemari=yes", "g1", xen2}, want: ours, err: "invalid '=' after option --kemari"},
		{args: []string{"migrate", "--kemari", "g1", xen2, "--live", "--live"}, want: ours, err: "--live already seen"},
		{args: []string{"migrate", "--kemari", "g1", xen2, "--domain", "g2"}, want: ours, err: "--domain already seen"},
		{args: []string{"migrate", "--kemari", "g1", xen2, "--migrateuri"}, want: ours, err: "expected syntax: --migrateuri <string>"},
		{args: []string{"migrate", "--kemari", "g1", xen2, "--bandwidth"}, want: ours, err: "expected syntax: --bandwidth <number>"},
		{args: []string{"migrate", "--kemari", "g1", xen2, "--offline"}, want: ours, err: "--offline cannot go with --kemari: a guest that"},
		{args: []string{"migrate", "--kemari", "g1", xen2, "--tunneled"}, want: ours, err: "--tunnelled cannot go"},
		{args: []string{"migrate", "--kemari", "g1", xen2, "--copy-storage-all"}, want: ours, err: "disks is not supported yet"},
		{args: []string{"migrate", "--kemari", "g1", xen2, "--timeout", "5"}, want: ours, err: "--timeout cannot go"},
		{args: []string{"migrate", "--kemari", "g1", xen2, "tcp://x", "vnc://x"}, want: ours, err: "--graphicsuri cannot go"},
		{args: append([]string{"migrate", "--kemari"}, strings.Fields(strings.Repeat("x ", 40))...), want: ours, err: "unexpected data 'x'"},
		{args: []string{"migrate", "--kemari", "g1", xen2, "--kemari-min", "5x"}, want: ours, err: "numeric value '5x' for <kemari-min>"},
		{args: []string{"migrate", "--kemari", "g1", xen2, "--kemari-max", "-5"}, want: ours, err: "numeric value '-5' for <kemari-max>"},
		{args: []string{"migrate", "--kemari", "g1", xen2, "--kemari-trigger", "moon"}, want: ours, err: "--kemari-trigger 'moon' is unknown; allowed: output, interval"},
		{args: []string{"migrate", "--kemari", "g1", xen2, "--kemari-arbiter", "etcd"}, want: ours, err: "--kemari-arbiter 'etcd' is not supported yet"},
	} {
		got, c := inspect(tt.args)
		if got != tt.want || (c.err == nil) != (tt.err == "") || c.err != nil && !strings.Contains(c.err.Error(), tt.err) {
			t.Errorf("%q: %v, error %v; want %v, %q", tt.args, got, c.err, tt.want, tt.err)
		}
	}
}

func TestInspectValues(t *testing.T) {
	_, c := inspect([]string{
		"-rqt", "-c", "xen:///system", "migrate", "--kemari", "--kemari-arbiter", "none", "--kemari-heartbeat=50",
		"g1", "--verbose", "--", xen2, "tcp://10.0.0.2:7000",
	})
	if c.err != nil {
		t.Fatal(c.err)
	}
	o := c.options
	got := fmt.Sprintln(c.connect, c.readonly, c.quiet, c.timing, o.domain, o.uri, o.dataURI, o.verbose, *o.settings.heartbeat, o.settings.arbiterNone, o.settings.min)
	want := fmt.Sprintln("xen:///system", true, true, true, "g1", xen2, "tcp://10.0.0.2:7000", true, "50ms", true, (*int)(nil))
	if got != want {
		t.Errorf("got  %swant %s", got, want)
	}
}

func TestSplitLine(t *testing.T) {
	for in, want := range map[string][][]string{
		"":                     nil,
		" \t ":                 nil,
		";; ;":                 nil,
		"a b;c\nd":             {{"a", "b"}, {"c"}, {"d"}},
		`a 'b c' "d e" f\ g`:   {{"a", "b c", "d e", "f g"}},
		`a'b'"c"d '\' "\"" ''`: {{"abcd", `\`, `"`, ""}},
		"a \\\n b\\\nc":        {{"a", "bc"}},
		"a # b ; c\nd":         {{"a"}, {"d"}},
		"a b#c":                {{"a", "b#c"}},
		"a 'b":                 {{"a", "b"}}, // as virsh has it
	} {
		got, err := splitLine(in)
		if err != nil || cmp.Diff(want, got) != "" {
			t.Errorf("%q: %q, %v; want %q", in, got, err, want)
		}
	}
}

// virsh's own words about a command line must be the ones inspect expects.
func TestOptionsAreVirshs(t *testing.T) {
	var text string
	migratetest.Need(t, "virsh 9.0", func() error {
		out, err := exec.Command("/usr/bin/virsh", "--version").Output()
		if err != nil {
			return err
		}
		if v := strings.TrimSpace(string(out)); !strings.HasPrefix(v, "9.0.") {
			return fmt.Errorf("virsh is version %s", v)
		}
		out, err = exec.Command("/usr/bin/virsh", "help", "migrate").Output()
		text = string(out)
		return err
	})
	_, text, _ = strings.Cut(text, "OPTIONS\n")
	var theirs, known []string
	for _, line := range strings.Split(text, "\n") {
		if f := strings.Fields(line); len(f) > 0 {
			name := strings.Trim(f[0], "[-]")
			theirs = append(theirs, name+" "+fmt.Sprint(len(f) > 1 && f[1] == "<number>"))
		}
	}
	for _, o := range options {
		if !strings.HasPrefix(o.name, "kemari") {
			known = append(known, o.name+" "+fmt.Sprint(o.kind == number))
		}
	}
	if d := cmp.Diff(theirs, known); d != "" {
		t.Errorf("-virsh +ours\n%s", d)
	}
}

func FuzzInspect(f *testing.F) {
	f.Add("migrate\x00--kemari\x00g1\x00u")
	f.Add("-qc\x00x\x00migrate --kemari g1 'u' \\\" ; list")
	f.Fuzz(func(t *testing.T, s string) {
		args := strings.Split(s, "\x00")
		what, _ := inspect(args)
		if what == ours && !strings.Contains(s, "kemari") {
			t.Fatal("not ours")
		}
	})
}

func TestRealVirsh(t *testing.T) {
	dir := t.TempDir()
	mk := func(name string, mode os.FileMode) string {
		p := filepath.Join(dir, name, "virsh")
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, nil, mode); err != nil {
			t.Fatal(err)
		}
		return p
	}
	me := mk("me", 0o755)
	mk("plainfile", 0o644)
	mk("before", 0o755)
	other := mk("other", 0o755)
	mk("after", 0o755)
	if err := os.MkdirAll(filepath.Join(dir, "link"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(me, filepath.Join(dir, "link", "virsh")); err != nil {
		t.Fatal(err)
	}
	var path []string
	for _, n := range []string{"", "nothing", "before", "me", "link", "plainfile", "other", "after"} {
		if n != "" {
			n = filepath.Join(dir, n)
		}
		path = append(path, n)
	}
	self := func() (os.FileInfo, error) { return os.Stat(me) }
	got, err := realVirsh(strings.Join(path, ":"), self)
	if err != nil || got != other {
		t.Errorf("found %s, %v; want %s", got, err, other)
	}
	if got, err := realVirsh(strings.Join(path[:6], ":"), self); err == nil && got != "/usr/bin/virsh" {
		t.Errorf("found %s", got)
	}
	// Where the package has put it aside.
	aside := filepath.Join(dir, "link", "virsh.distrib")
	if err := os.WriteFile(aside, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	if got, err := realVirsh(strings.Join(path, ":"), self); err != nil || got != aside {
		t.Errorf("found %s, %v; want %s", got, err, aside)
	}
	if err := os.Remove(aside); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(me, aside); err != nil { // which would start itself for ever
		t.Fatal(err)
	}
	if got, err := realVirsh(strings.Join(path, ":"), self); err != nil || got != other {
		t.Errorf("found %s, %v; want %s", got, err, other)
	}
	if _, err := realVirsh(dir, func() (os.FileInfo, error) { return nil, os.ErrNotExist }); err == nil {
		t.Error("found a virsh that may be ourselves")
	}
}
