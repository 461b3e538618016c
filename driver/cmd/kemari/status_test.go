package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"kemari/driver/virt"
	"kemari/migrate/control"
	"kemari/xml"
)

func status1() control.Status {
	return control.Status{
		Role: control.Primary, Domain: "g1", UUID: uuid1, Phase: control.Protected, Peer: xen2,
		Arbiter: "none", Automatic: true, Risk: "both hosts may run the guest",
		Epoch: 10, PagesLast: 512, PauseLast: 4100, PauseSum: 39_000, CommitLag: 2345,
	}
}

func TestStatus(t *testing.T) {
	h, _, out, errs := newHost(t)
	say := func(want int, args ...string) string {
		t.Helper()
		out.Reset()
		errs.Reset()
		if code := kemari(t.Context(), h, append([]string{"status"}, args...)); code != want {
			t.Errorf("%q: exit status %d, want %d; errors %q", args, code, want, errs)
		}
		return out.String()
	}
	if got := say(0); got != "No domain is protected by or on this host.\n" {
		t.Errorf("of nothing: %q", got)
	}
	if got := say(0, "--json"); got != "[]\n" {
		t.Errorf("of nothing, as JSON: %q", got)
	}

	s1 := status1()
	s2 := control.Status{Role: control.Standby, Domain: "g2", UUID: uuid2, Phase: control.Copying, Peer: "xen9", CopyBytes: 50, CopyTotal: 200, Arbiter: "none"}
	running(t, h, s1, nil)
	running(t, h, s2, nil)
	ended(t, h, control.Status{
		Role: control.Primary, Domain: "a3", UUID: "00000000-0000-4000-8000-0000000000a3", Phase: control.Ended, Peer: xen2,
		Error: "the standby does not answer", Hint: "see its log", Risk: "none any more",
	})
	at := time.Date(2026, 7, 1, 12, 0, 0, 0, time.Local)
	ended(t, h, control.Status{
		Role: control.Standby, Domain: "g4", UUID: "00000000-0000-4000-8000-0000000000a4", Phase: control.Active, Peer: "xen9", Risk: "both hosts may run the guest",
		Failover: &control.Failover{Reason: "no heartbeat", At: at, Detect: 3_000_000, Takeover: 1_100_000},
	})
	// One that died without a word, one that was never begun, and a stray file.
	p := control.PathsFor(h.root, control.Primary, "00000000-0000-4000-8000-0000000000a5")
	if err := control.WriteConfig(p, control.PrimaryConfig{Domain: "g5"}); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(control.PathsFor(h.root, control.Primary, "x").Dir, 0o750); err != nil {
		t.Fatal(err)
	}

	want := `DOMAIN  ROLE     PHASE        PEER                       EPOCH  PAUSE   AVERAGE  PAGES  LAG     ARBITER
a3      primary  ended        kemari+ssh://xen2/system   -      -       -        -      -       -
g1      primary  protected    kemari+ssh://xen2/system   10     4.1 ms  3.9 ms   512    2.3 ms  none, automatic
g2      standby  copying 25%  xen9                       -      -       -        -      -       none, manual
g4      standby  active       xen9                       -      -       -        -      -       -
g5      primary  ended        -                          -      -       -        -      -       -

a3 (primary): the standby does not answer; see its log

g1 (primary): risk: both hosts may run the guest

g4 (standby): took over at 2026-07-01 12:00:00: no heartbeat; noticed after 3000.0 ms, running again after another 1100.0 ms

g5 (primary): its process does not run, or not yet; see journalctl -u kemari-replicator@00000000-0000-4000-8000-0000000000a5
`
	want = strings.ReplaceAll(want, "system   ", "system  ")
	want = strings.ReplaceAll(want, "xen9                       ", "xen9                      ")
	want = strings.ReplaceAll(want, "-                          -      -", "-                         -      -")
	want = strings.ReplaceAll(want, "PEER                       ", "PEER                      ")
	if d := cmp.Diff(want, say(0)); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}

	var got []control.Status
	if err := json.Unmarshal([]byte(say(0, "g1", "--json")), &got); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]control.Status{s1}, got); d != "" {
		t.Error(d)
	}
	say(0, uuid1)
	for _, name := range []string{"g2", "a3", "g4", "g5", "nobody"} {
		say(exitUnprotected, name)
		if want := "error: domain '" + name + "' is not protected\n"; errs.String() != want {
			t.Errorf("errors %q, want %q", errs, want)
		}
		say(exitUnprotected, "--json", "g1", name)
		if errs.Len() > 0 {
			t.Errorf("errors %q besides JSON", errs)
		}
	}
}

func TestStatusUnknown(t *testing.T) {
	h, _, out, errs := newHost(t)
	p := control.PathsFor(h.root, control.Standby, uuid1)
	if err := control.WriteConfig(p, control.StandbyConfig{Domain: "g1"}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.Last, []byte("{"), 0o640); err != nil {
		t.Fatal(err)
	}
	code := kemari(t.Context(), h, []string{"status", "g1"})
	if got := out.String(); code != exitUnprotected || !strings.Contains(got, "g1      standby  unknown") || !strings.Contains(got, "unexpected end of JSON input; see journalctl -u kemari-standby@"+uuid1) {
		t.Errorf("exit status %d, output %q, errors %q", code, got, errs)
	}
}

func TestFailover(t *testing.T) {
	for _, tt := range []struct {
		name, args, answer string
		tty                bool
		phase              control.Phase // before; "" is none here
		after              control.Phase
		fails              error
		out, err           string
	}{
		{name: "yes", args: "g1 --yes", phase: control.Ready, after: control.Active, out: "Domain 'g1' runs on this host now\n"},
		{name: "asked", args: uuid1, tty: true, answer: "yes\n", phase: control.Ready, after: control.Active, out: "Domain 'g1' runs on this host now\n", err: "Is that host dead"},
		{name: "not sure", args: "g1", tty: true, answer: "y\n", phase: control.Ready, err: "nothing was done"},
		{name: "no terminal", args: "g1", phase: control.Ready, err: "two running copies of the guest; be sure it is dead and say --yes"},
		{name: "not here", args: "g1 --yes", err: "this host is not the standby of domain 'g1'"},
		{name: "no domain", err: "no DOMAIN given"},
		{name: "two", args: "g1 g2", err: "unexpected 'g2'"},
		{name: "fails", args: "g1 --yes", phase: control.Copying, fails: errors.New("no epoch yet"), err: "failover of domain 'g1': no epoch yet"},
		{name: "late", args: "g1 --yes", phase: control.Ready, after: control.Ended, err: "failover of domain 'g1': it is ended"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, _, out, errs := newHost(t)
			h.in, h.inTTY = strings.NewReader(tt.answer), tt.tty
			if tt.phase != "" {
				s := control.Status{Role: control.Standby, Domain: "g1", UUID: uuid1, Phase: tt.phase, Peer: "xen1"}
				running(t, h, s, func(_ context.Context, op control.Op) (control.Status, error) {
					if op == control.OpFailover {
						s.Phase = tt.after
						return s, tt.fails
					}
					return s, nil
				})
			}
			code := kemari(t.Context(), h, append([]string{"failover"}, strings.Fields(tt.args)...))
			if (code == 0) != (tt.out != "") || out.String() != tt.out || !strings.Contains(errs.String(), tt.err) {
				t.Errorf("exit status %d, output %q, errors %q; want %q, %q", code, out, errs, tt.out, tt.err)
			}
		})
	}
}

func TestVerify(t *testing.T) {
	equal := &control.Verified{Epoch: 1234, Pages: 32768, Pause: 412_000}
	for _, tt := range []struct {
		name, args string
		role       control.Role // "" is none here
		phase      control.Phase
		answer     *control.Verified
		fails      error
		code       int
		out, err   string
	}{
		{name: "equal", args: "g1", role: control.Primary, answer: equal,
			out: "g1: epoch 1234: 32768 pages compared, all equal (paused 0.41 s)\n"},
		{name: "differ", args: uuid1, role: control.Primary, code: 1, answer: &control.Verified{
			Epoch: 7, Pages: 100, Pause: 9_000, Differ: 2, Differing: []string{"0x1f", "0xfeffc"}, Missing: 1,
			Shared: 1, SharedPages: []control.SharedPage{{Page: "0x9", By: "console ring"}}, Moved: 3, Unread: 4, Note: "it is late"},
			out: "g1: epoch 7: 100 pages compared, 2 differ (paused 0.01 s)\n" +
				"  2 differ: 0x1f, 0xfeffc\n" +
				"  1 of those that differ are not there at all\n" +
				"  1 differ that others write to at any time, which is no fault: 0x9 (console ring)\n" +
				"  3 were written to by others while the guest stood, and compared as of the checkpoint\n" +
				"  4 were left out: they could not be read, and no checkpoint has them\n" +
				"  note: it is late\n"},
		{name: "many", args: "g1", role: control.Primary, code: 1, answer: &control.Verified{Pages: 100, Differ: 65, Differing: []string{"0x1"}},
			out: "g1: epoch 0: 100 pages compared, 65 differ (paused 0.00 s)\n  65 differ: 0x1, …\n"},
		{name: "shared", args: "g1", role: control.Primary, answer: &control.Verified{Pages: 100, Shared: 1, SharedPages: []control.SharedPage{{Page: "0x9", By: "xenstore ring"}}},
			out: "g1: epoch 0: 100 pages compared, all equal but for shared ones (paused 0.00 s)\n" +
				"  1 differ that others write to at any time, which is no fault: 0x9 (xenstore ring)\n"},
		{name: "cannot", args: "g1", role: control.Primary, fails: errors.New("the connection broke"), code: 2, err: "error: verify domain 'g1': the connection broke\n"},
		{name: "too old", args: "g1", role: control.Primary, code: 2, err: "before Kemari was upgraded"},
		{name: "standby", args: "g1", role: control.Standby, code: 2, err: "error: this host is the standby of domain 'g1'; say this on xen1, where it runs\n"},
		{name: "ended", args: "g1", role: control.Primary, phase: control.Ended, code: 2, err: "domain 'g1' is not protected"},
		{name: "nobody", args: "g1", code: 2, err: "domain 'g1' is not protected"},
		{name: "no domain", code: 2, err: "no DOMAIN given"},
		{name: "two", args: "g1 g2", code: 2, err: "unexpected 'g2'"},
		{name: "no such option", args: "g1 --speed", code: 2, err: "flag provided but not defined: -speed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, _, out, errs := newHost(t)
			if tt.phase == "" {
				tt.phase = control.Protected
			}
			if tt.role != "" {
				s := control.Status{Role: tt.role, Domain: "g1", UUID: uuid1, Phase: tt.phase, Peer: "xen1"}
				running(t, h, s, func(_ context.Context, op control.Op) (control.Status, error) {
					if op == control.OpVerify {
						s.Verified = tt.answer
						return s, tt.fails
					}
					return s, nil
				})
			}
			args := append([]string{"verify"}, strings.Fields(tt.args)...)
			if code := kemari(t.Context(), h, args); code != tt.code || out.String() != tt.out || !strings.Contains(errs.String(), tt.err) || errs.Len() > 0 != (tt.err != "") {
				t.Errorf("exit status %d, output %q, errors %q; want %d, %q, %q", code, out, errs, tt.code, tt.out, tt.err)
			}
			if tt.answer == nil {
				return
			}
			out.Reset()
			var got verified
			code := kemari(t.Context(), h, append(args, "--json"))
			if err := json.Unmarshal(out.Bytes(), &got); err != nil || code != tt.code || got.Domain != "g1" || got.UUID != uuid1 || got.Equal != (code == 0) {
				t.Errorf("exit status %d, %v, %s", code, err, out)
			}
			if d := cmp.Diff(tt.answer, got.Verified); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestUnprotect(t *testing.T) {
	h, l, out, errs := newHost(t)
	if code := kemari(t.Context(), h, []string{"unprotect", "g1"}); code != 0 || out.String() != "Domain 'g1' is not protected any more\n" {
		t.Errorf("exit status %d, output %q, errors %q", code, out, errs)
	}
	l.abort = func() error { return &virt.Error{Message: "no job is active"} }
	if code := kemari(t.Context(), h, []string{"unprotect", "g1", "-c", "xen:///system"}); code != 1 || errs.String() != "error: no job is active\n" {
		t.Errorf("exit status %d, errors %q", code, errs)
	}
	if d := cmp.Diff([]string{defaultURI, defaultURI}, l.uris); d != "" {
		t.Error(d)
	}
}

func TestCheck(t *testing.T) {
	h, l, out, errs := newHost(t)
	if code := kemari(t.Context(), h, []string{"check", "g1"}); code != 0 || out.String() != "Domain 'g1' can be protected\n" || !l.readonly {
		t.Errorf("exit status %d, output %q, errors %q", code, out, errs)
	}
	l.xml = strings.Replace(withElement(t, func(*xml.Element) {}), "output", "moon", 1)
	l.xml = strings.Replace(l.xml, "xenpvh'>xenpvh", "xenpv'>linux", 1)
	out.Reset()
	code := kemari(t.Context(), h, []string{"check"})
	if got := out.String(); code != exitUnprotected || errs.Len() > 0 || !strings.HasPrefix(got, "Domain 'g1' cannot be protected:\n  - a PV guest cannot") ||
		!strings.Contains(got, "  - its element is wrong: kemari/checkpoint/@trigger: unknown value 'moon'") {
		t.Errorf("exit status %d, output %q, errors %q", code, got, errs)
	}
	out.Reset()
	code = kemari(t.Context(), h, []string{"check", "g1", "--json"})
	var got []checked
	if err := json.Unmarshal(out.Bytes(), &got); err != nil || code != exitUnprotected || len(got) != 1 || len(got[0].Reasons) != 2 || got[0].Eligible || got[0].Reasons[0].Remedy == "" {
		t.Errorf("exit status %d, %+v, %v", code, got, err)
	}
	if code := kemari(t.Context(), h, []string{"check", "g7"}); code != 1 || !strings.Contains(errs.String(), "Domain not found") {
		t.Errorf("exit status %d, errors %q", code, errs)
	}
}

func TestCommandLine(t *testing.T) {
	for args, want := range map[string]string{
		"chek":               "unknown command 'chek'",
		"status --speed":     "flag provided but not defined: -speed",
		"protect":            "no DOMAIN given",
		"protect g1":         "nothing says which host shall protect it",
		"protect g1 a b":     "unexpected 'b'",
		"protect g1 --min":   "flag needs an argument: -min",
		"protect g1 --min x": "numeric value 'x' for <min> option is malformed",
		"unprotect":          "no DOMAIN given",
		"unprotect -- -g1":   "Domain not found: no domain with matching name '-g1'",
	} {
		h, _, _, errs := newHost(t)
		if code := kemari(t.Context(), h, strings.Fields(args)); code != 1 || !strings.HasPrefix(errs.String(), "error: ") || !strings.Contains(errs.String(), want) {
			t.Errorf("%s: exit status %d, errors %q, want %q", args, code, errs, want)
		}
	}
}

func TestCompletion(t *testing.T) {
	h, _, out, _ := newHost(t)
	running(t, h, status1(), nil)
	kemari(t.Context(), h, []string{"status", "--generate-bash-completion"})
	if out.String() != "g1\n" {
		t.Errorf("offered %q", out)
	}
}
