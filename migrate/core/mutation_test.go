package core_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// A mutant is the package with one of its rules broken.
type mutant struct {
	rule   string
	file   string
	edits  [][2]string
	caught string // by which invariant; empty: whichever is first
}

func edit(old, new string) [][2]string { return [][2]string{{old, new}} }

var mutants = []mutant{
	{
		"release on the acknowledgement, not when it is sent", "primary.go",
		edit("p.sent, p.lastSent = p.round, p.epoch", "p.sent, p.lastSent = p.round, p.epoch\n\tp.do(Action{Kind: Release, Epoch: p.epoch})"),
		"output commit",
	},
	{
		"an acknowledgement counts for its epoch only", "primary.go",
		edit("if p.work != captured || p.sent != p.round || m.Epoch != p.epoch {", "if p.work != captured {"),
		"output commit",
	},
	{
		"no output is let go before the standby has confirmed the end", "primary.go",
		edit("\tp.cancel()\n}\n\nfunc (p *Primary) finish", "\tp.cancel()\n\tp.unarmed()\n}\n\nfunc (p *Primary) finish"),
		"output commit",
	},
	{
		"silence is borne for the time-out", "primary_time.go",
		edit("min(p.heard.Add(p.cfg.Timeout),", "min(p.heard.Add(p.cfg.Timeout/2),"),
		"output commit",
	},
	{
		"no answer is no grant, on the primary", "primary.go",
		edit("e.Verdict == Granted && p.state == Asking:", "e.Verdict != Denied && p.state == Asking:"),
		"",
	},
	{
		"no answer is no grant, on the standby", "standby.go",
		edit("e.Verdict == Granted && s.state == Judging:", "e.Verdict != Denied && s.state == Judging:"),
		"",
	},
	{
		"with an arbiter, the standby asks it", "standby.go",
		edit("case s.cfg.Arbitration == WithArbiter:\n\t\t\ts.judge()\n\t\tcase s.closed()", "case s.cfg.Arbitration == WithArbiter:\n\t\t\ts.takeOver(Silence, s.now)\n\t\tcase s.closed()"),
		"",
	},
	{
		"without automatic, the standby waits to be told", "standby.go",
		edit("s.cfg.Arbitration == Automatic && !s.clean", "!s.clean"),
		"takes over by itself",
	},
	{
		"a closed connection is no reason to take over", "standby.go",
		edit("s.cfg.Arbitration == Automatic && !s.clean", "s.cfg.Arbitration == Automatic"),
		"takes over by itself",
	},
	{
		"a primary that says so goes on alone", "standby.go",
		edit("if m.Reason == GoingAlone {", "if m.Reason == GoingAlone && s.epoch == 0 {"),
		"nothing lost",
	},
	{
		"a promise is kept after a grant", "standby.go",
		edit("s.takeOver(Silence, s.heard.Add(s.timeout))", "s.takeOver(Silence, s.now)"),
		"one runner",
	},
	{
		"a grant that has expired is none", "standby.go",
		edit("s.now >= s.dueAt && s.now < s.ask.until {", "s.now >= s.dueAt {"),
		"one runner",
	},
	{
		"whoever took over on a grant pauses at its end", "standby.go",
		edit("s.took && s.now >= s.ask.until; lapsed", "s.took && s.now >= s.ask.until && s.epoch == 0; lapsed"),
		"one runner",
	},
	{
		"a promise counts from the stamp, not from when it is heard", "primary_time.go",
		edit("p.echoed.Add(p.cfg.Timeout-p.cfg.Margin)", "p.heard.Add(p.cfg.Timeout-p.cfg.Margin)"),
		"one runner",
	},
	{
		"the primary stops a margin before the promise ends", "primary_time.go",
		edit("p.echoed.Add(p.cfg.Timeout-p.cfg.Margin)", "p.echoed.Add(p.cfg.Timeout)"),
		"one runner",
	},
	{
		"the guest is paused while the arbiter is asked", "primary_time.go",
		edit("p.pause(p.state == Asking ||", "p.pause("),
		"one runner",
	},
	{
		"the primary pauses at the end of its grant", "primary_time.go",
		edit("|| p.uncovered() && p.now >= p.ask.until)", ")"),
		"one runner",
	},
	{
		"a Hello gives up what was asked before", "primary.go",
		edit("\tp.ask.giveUp()\n", ""),
		"",
	},
	{
		"a question covers every round the standby may be in", "primary_time.go",
		edit("p.joined, p.hello})", "p.hello, p.hello})"),
		"",
	},
	{
		"the old primary ends its copy", "primary.go",
		edit("\t\t\tp.destroy(TakenOver)\n\t\t}\n", "\t\t}\n"),
		"one runner",
	},
	{
		"an epoch is applied whole", "standby.go",
		edit("direct := s.state == Receiving\n\t\tif direct {", "direct := true\n\t\tif direct {"),
		"exact state",
	},
	{
		"an epoch is complete, in order, and counted", "standby.go",
		[][2]string{{"|| m.Seq != s.seq", ""}, {"m.Tally != *got || got.Frames != s.seq ||", ""}},
		"exact state",
	},
	{
		"what was staged is dropped with its connection", "standby.go",
		edit("s.seq, s.refused = 0, false\n\tif s.staged {", "s.seq, s.refused = 0, false\n\tif false {"),
		"exact state",
	},
	{
		"a capture with lost bits is of no use", "primary.go",
		edit("p.recopy = p.recopy || e.Lost", ""),
		"exact state",
	},
	{
		"a full copy that was cut short stays due", "primary.go",
		edit("\t\tp.drop = true\n\t\tp.recopy = p.recopy || p.all\n", "\t\tp.drop = true\n"),
		"exact state",
	},
	{
		"an epoch that had passes cannot be sent again from the buffer", "primary.go",
		edit("case p.full || p.refusals > 1:", "case p.refusals > 1:"),
		"exact state",
	},
	{
		"a copy of before the primary went alone is not armed again", "primary.go",
		edit("p.state, p.floor = Protected, p.epoch", "p.state = Protected"),
		"",
	},
	{
		"a Hello of a primary that is alone disarms", "standby.go",
		edit("&& !m.Alone && s.epoch >= m.Epoch", "&& s.epoch >= m.Epoch"),
		"",
	},
	{
		"output flows only when no checkpoint is being taken", "primary_time.go",
		edit("if p.uncovered() && p.held && p.work != capturing {", "if p.uncovered() && p.held {"),
		"",
	},
	{
		"a request to end leads to an end", "primary_time.go",
		edit("p.told != p.round {", "p.told != p.round && p.epoch == 0 {"),
		"a request to end",
	},
}

// TestMutants shows that the simulation can fail: with any one rule broken it does.
func TestMutants(t *testing.T) {
	for _, m := range mutants {
		t.Run(m.rule, func(t *testing.T) {
			t.Parallel()
			src, err := os.ReadFile(m.file)
			if err != nil {
				t.Fatal(err)
			}
			text := string(src)
			for _, e := range m.edits {
				if n := strings.Count(text, e[0]); n != 1 {
					t.Fatalf("%q is in %s %d times; this test has to follow the code", e[0], m.file, n)
				}
				text = strings.Replace(text, e[0], e[1], 1)
			}
			dir := t.TempDir()
			mutated := filepath.Join(dir, m.file)
			if err := os.WriteFile(mutated, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			here, err := filepath.Abs(m.file)
			if err != nil {
				t.Fatal(err)
			}
			overlay, err := json.Marshal(map[string]map[string]string{"Replace": {here: mutated}})
			if err != nil {
				t.Fatal(err)
			}
			list := filepath.Join(dir, "overlay.json")
			if err := os.WriteFile(list, overlay, 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("go", "test", "-overlay", list, "-vet=off", "-count=1", "-run", "^TestSimulation$", ".", "-sim.first", strconv.FormatUint(*simFirst, 10))
			cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
			out, err := cmd.CombinedOutput()
			switch {
			case err == nil:
				t.Errorf("the simulation does not see it:\n%s", out)
			case !strings.Contains(string(out), "faults needed: "):
				t.Errorf("it failed otherwise:\n%s", out)
			case !strings.Contains(string(out), m.caught):
				t.Errorf("not seen as %q:\n%s", m.caught, out)
			default:
				_, what, _ := strings.Cut(string(out), "sim_test.go:")
				what, _, _ = strings.Cut(what, "\n")
				t.Log(what)
			}
		})
	}
}
