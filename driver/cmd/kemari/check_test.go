package main

import (
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"kemari/driver"
	"kemari/migrate/migratetest"
	"kemari/xml"
)

func TestCheckBothHosts(t *testing.T) {
	bad := &driver.Examination{Domain: "g1", UUID: uuid1, Standby: xen2, Reasons: []driver.HostsReason{
		{Host: "xen1", Text: "it is paused", Remedy: "resume it"}, {Host: "xen2", Text: "no way there"},
	}}
	good := &driver.Examination{Domain: "g1", UUID: uuid1, Standby: xen2, Reasons: []driver.HostsReason{}}
	own := xml.Raise(withElement(t, func(*xml.Element) {})) // as virtkemarid shows it
	gone := &net.OpError{Op: "dial", Net: "unix", Err: syscall.ECONNREFUSED}
	for _, tt := range []struct {
		name, xml, args string
		e               *driver.Examination
		err             error
		code            int
		out, errs       string
		asked           []string
	}{
		{"named, good", plain, "check g1 " + xen2, good, nil, 0, "Domain 'g1' can be protected by xen2\n", "", []string{"kemari:///system " + uuid1 + " " + xen2}},
		{"named, bad", plain, "check " + xen2 + " g1", bad, nil, 3, "Domain 'g1' cannot be protected:\n  - xen1: it is paused: resume it\n  - xen2: no way there\n", "", []string{"kemari:///system " + uuid1 + " " + xen2}},
		{"of the element", own, "check g1 -c xen+ssh://xen9/system", good, nil, 0, "Domain 'g1' can be protected by xen2\n", "", []string{"kemari+ssh://xen9/system " + uuid1 + " " + xen2}},
		{"all domains", own, "check", bad, nil, 0, "Domain 'g1' can be protected\n", "", nil},
		{"no element", plain, "check g1", bad, nil, 0, "Domain 'g1' can be protected\n", "", nil},
		{"no daemon", own, "check g1", nil, gone, 0, "Domain 'g1' can be protected\n", "note: " + xen2 + " was not asked: dial unix: connection refused\n", []string{"kemari:///system " + uuid1 + " " + xen2}},
		{"no daemon, and asked for", own, "check g1 " + xen2, nil, gone, 1, "", "error: dial unix: connection refused\n", []string{"kemari:///system " + uuid1 + " " + xen2}},
		{"another error", own, "check g1", nil, errors.New("no such domain"), 1, "", "error: no such domain\n", []string{"kemari:///system " + uuid1 + " " + xen2}},
		{"two standbys", plain, "check g1 " + xen2 + " " + xen2, nil, nil, 1, "", "error: unexpected '" + xen2 + "': one standby at a time\n", nil},
		{"no domain", plain, "check " + xen2, nil, nil, 1, "", "error: a URI goes with one DOMAIN; see kemari check --help\n", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, l, out, errs := newHost(t)
			l.xml, l.examination, l.examineErr = tt.xml, tt.e, tt.err
			code := kemari(t.Context(), h, strings.Fields(tt.args))
			if d := cmp.Diff([]string{tt.out, tt.errs}, []string{out.String(), errs.String()}); code != tt.code || d != "" || !slices.Equal(l.examined, tt.asked) {
				t.Errorf("exit status %d, asked %q (-want +got)\n%s", code, l.examined, d)
			}
		})
	}
	h, l, out, _ := newHost(t)
	l.examination = bad
	code := kemari(t.Context(), h, []string{"check", "g1", xen2, "--json"})
	var got []checked
	want := []checked{{Domain: "g1", UUID: uuid1, Standby: xen2, Reasons: bad.Reasons}}
	if err := json.Unmarshal(out.Bytes(), &got); code != 3 || err != nil || !cmp.Equal(got, want) {
		t.Errorf("exit status %d, %v\n%s", code, err, out)
	}
}

// TestShownElement: what virtkemarid shows at the top level is the domain's element
// all the same.
func TestShownElement(t *testing.T) {
	h, l, _, errs := newHost(t)
	l.xml = xml.Raise(withElement(t, func(e *xml.Element) { e.Autostart = true }))
	if !strings.Contains(l.xml, "<kemari autostart='yes'>") {
		t.Fatal(l.xml)
	}
	for _, args := range [][]string{{"protect", "g1"}, {"protect", "g1", "--autostart"}} {
		if code := kemari(t.Context(), h, args); code != 0 {
			t.Errorf("%v: exit status %d\n%s", args, code, errs)
		}
	}
	for _, p := range l.asked {
		if e, err := xml.FromDomain(p.XML); err != nil || e == nil || p.URI != xen2 || strings.Count(p.XML, "<kemari") != 1 {
			t.Errorf("%v in\n%s", err, p.XML)
		}
	}
	if len(l.asked) != 2 {
		t.Errorf("asked %d times", len(l.asked))
	}
}

func TestCompletions(t *testing.T) {
	all := []string{"--kemari", "--kemari-transport", "--kemari-trigger", "--kemari-min", "--kemari-max", "--kemari-paused", "--kemari-heartbeat", "--kemari-timeout", "--kemari-arbiter"}
	for _, tt := range []struct {
		words           []string
		theirs, offered []string
		only            bool
	}{
		{[]string{"migrate", "--k"}, []string{"migrate", "--k"}, all, false},
		{[]string{"migrate", "--live", ""}, []string{"migrate", "--live", ""}, all, false},
		{[]string{"migrate", "--kemari", "--kemari-"}, []string{"migrate", "--kemari-"}, all[1:], false},
		{[]string{"migrate", "--kemari", "te"}, []string{"migrate", "te"}, nil, false},
		{[]string{"migrate", "--kemari-min", "5", "--kemari-m"}, []string{"migrate", "--kemari-m"}, []string{"--kemari-max"}, false},
		{[]string{"migrate", "--kemari-min=5", "--kemari-m"}, []string{"migrate", "--kemari-m"}, []string{"--kemari-max"}, false},
		{[]string{"migrate", "--kemari-trigger", ""}, nil, []string{"output", "interval"}, true},
		{[]string{"migrate", "--kemari-trigger", "i"}, nil, []string{"interval"}, true},
		{[]string{"migrate", "--kemari-max", "1"}, nil, nil, true},
		{[]string{"migrate", "--li"}, []string{"migrate", "--li"}, nil, false},
	} {
		theirs, offered, only := completions(tt.words)
		if !slices.Equal(theirs, tt.theirs) || !slices.Equal(offered, tt.offered) || only != tt.only {
			t.Errorf("%q: %q, %q, %v", tt.words, theirs, offered, only)
		}
	}
	for _, words := range [][]string{{"complete", "--", "list", ""}, {"complete", "--", "migrate"}, {"migrate", "--", "migrate", ""}, nil} {
		if got, ok := completed(words); ok {
			t.Errorf("%q: %q", words, got)
		}
	}
}

// TestBashCompletion has bash complete kemari as a user's does.
func TestBashCompletion(t *testing.T) {
	migratetest.Need(t, "bash", func() error {
		_, err := exec.LookPath("bash")
		return err
	})
	dir := t.TempDir()
	script := "#!/bin/sh\nprintf '%s\\n' \"$*\" >>" + dir + "/asked\nprintf '%s\\n' status protect g1 --json\n"
	if err := os.WriteFile(filepath.Join(dir, "kemari"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ line, want, asked string }{
		{"kemari st", "status", "--generate-bash-completion"},
		{"kemari status g", "g1", "status --generate-bash-completion"},
		{"kemari status --j", "--json", "status --j --generate-bash-completion"},
		{"kemari protect g1 --trigger i", "interval", ""},
		{"kemari protect g1 --arbiter ", "none", ""},
		{"kemari unprotect -c k", "kemari:///system", ""},
	} {
		os.Remove(filepath.Join(dir, "asked"))
		words := strings.Split(tt.line, " ")
		cmd := exec.Command("bash", append([]string{"-c", `. ./kemari.bash
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
_kemari && printf '%s\n' "${COMPREPLY[@]}"`, "bash"}, words...)...)
		cmd.Env = []string{"PATH=" + dir + ":" + os.Getenv("PATH")}
		out, err := cmd.CombinedOutput()
		asked, _ := os.ReadFile(filepath.Join(dir, "asked"))
		if err != nil || strings.TrimSpace(string(out)) != tt.want || strings.TrimSpace(string(asked)) != tt.asked {
			t.Errorf("%q: %q, %v; asked %q", tt.line, out, err, asked)
		}
	}
}
