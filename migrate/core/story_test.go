package core_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"

	"kemari/migrate/core"
)

// A story is a pair of machines whose hosts, network, guest and arbiter do what the
// script says, at once and without any chance. Heartbeats and the parts of an epoch
// are not told.
//
//	start nobody|automatic|arbiter [grant=1s] [giveup=3s]
//	protected …                 the same, and the first 50 ms are not told
//	run 300ms                   time passes
//	output | flush | full       the guest sends; wants its writes safe; fills its log
//	settings [trigger=output|interval] [min=] [max=] [share=]
//	pause 30ms                  what a checkpoint costs from now on
//	hold | captured [lost] | failed     the next checkpoints wait; the one that waits is done
//	cut [there|back] | heal     nothing gets through; what was sent does
//	reset | kill primary        the connection breaks; the primary's process is killed
//	clean up                    behind it
//	freeze HOST | thaw HOST | power off HOST
//	arbiter silent|answers
//	corrupt 2                   so many epochs do not hold what they say they do
//	forge KIND                  a message arrives that should not
//	dirty lost | guest ended | stop HOST | fail over | refuse take-over
//	state
type story struct {
	t     *testing.T
	out   strings.Builder
	now   core.Time
	cfg   core.Config
	set   core.Settings
	p     *core.Primary
	s     *core.Standby
	off   [2]bool
	froze [2]bool
	todo  [2][]core.Event // what a frozen host will see

	cut     [2]bool
	line    [2][]core.Message // by direction
	round   core.Round
	open    bool
	dialing core.Round
	dialBy  core.Time

	seq      uint32
	pause    time.Duration
	holding  bool
	waiting  core.Epoch
	corrupt  int
	noTake   bool
	silent   bool
	grant    time.Duration
	arbRound core.Round
	arbHost  int
	ask      [2]core.Question
	askBy    [2]core.Time
	runs     [2]bool // the guest
}

func (x *story) say(format string, args ...any) {
	fmt.Fprintf(&x.out, "%7s  ", timeText(x.now))
	fmt.Fprintf(&x.out, format+"\n", args...)
}

func told(m *core.Message) bool {
	return m.Type != core.Heartbeat && m.Type != core.Data && m.Type != core.EpochEnd
}

// step gives an event to one machine and does what it answers.
func (x *story) step(who int, e core.Event) {
	if x.off[who] || x.machine(who) == nil || x.over(who) {
		return
	}
	if x.froze[who] {
		if e.Kind != core.Tick {
			x.todo[who] = append(x.todo[who], e)
		}
		return
	}
	if e.Kind != core.Tick && e.Kind != core.Done && (e.Kind != core.Received || told(&e.Message)) {
		x.say("%s: %s", sides[who], eventText(&e))
	}
	var acts []core.Action
	if who == primary {
		acts = x.p.Step(x.now, e)
	} else {
		acts = x.s.Step(x.now, e)
	}
	// What is done may step the machine again, which reuses the slice.
	for _, a := range append([]core.Action(nil), acts...) {
		if !(a.Kind == core.Send && !told(&a.Message) || a.Kind == core.Stage) {
			x.say("%s:   -> %s", sides[who], actionText(&a))
		}
		x.act(who, &a)
	}
}

type machine interface {
	Step(core.Time, core.Event) []core.Action
	Deadline() core.Time
}

func (x *story) machine(who int) machine {
	switch {
	case who == primary && x.p != nil:
		return x.p
	case who == standby && x.s != nil:
		return x.s
	}
	return nil
}

func (x *story) over(who int) bool {
	return who == primary && x.p.State() == core.PrimaryOver || who == standby && x.s.State() == core.StandbyOver
}

func (x *story) act(who int, a *core.Action) {
	switch a.Kind {
	case core.Send:
		if x.open && a.Message.Round == x.round {
			x.line[who] = append(x.line[who], a.Message)
		}
	case core.Close:
		if x.dialing == a.Round {
			x.dialing = 0
		}
		if who == primary && x.s.State() == core.Parting {
			x.todo[standby] = append(x.todo[standby], core.Event{Kind: core.Gone, Round: a.Round, Clean: true})
		}
	case core.Dial:
		x.dialing, x.dialBy = a.Round, x.now+250*ms
	case core.Copy:
		x.data(a)
		x.todo[who] = append(x.todo[who], core.Event{Kind: core.Copied, Epoch: a.Epoch, Pages: 100})
	case core.Checkpoint:
		x.waiting = a.Epoch
		if !x.holding {
			x.captured(false)
		}
	case core.Cancel:
		if x.waiting != 0 {
			x.waiting = 0
			x.todo[who] = append(x.todo[who], core.Event{Kind: core.CheckpointFailed, Epoch: a.Epoch})
		}
	case core.SendEpoch:
		x.data(a)
		x.line[who] = append(x.line[who], core.Message{Type: core.EpochEnd, Generation: simGen, Round: a.Round, Epoch: a.Epoch, Tally: core.Tally{Frames: x.seq}})
		x.seq = 0
	case core.Destroy:
		x.runs[who] = false
		x.todo[who] = append(x.todo[who], core.Event{Kind: core.Destroyed})
	case core.TakeOver:
		if x.noTake {
			x.todo[who] = append(x.todo[who], core.Event{Kind: core.TakeOverFailed})
			return
		}
		x.runs[who] = true
		x.todo[who] = append(x.todo[who], core.Event{Kind: core.TookOver})
	case core.Stage, core.Apply, core.Compare:
		x.todo[who] = append([]core.Event{{Kind: core.Done}}, x.todo[who]...)
	case core.DropCopy:
		x.todo[who] = append(x.todo[who], core.Event{Kind: core.CopyDropped})
	case core.Ask:
		x.ask[who], x.askBy[who] = a.Question, x.now+300*ms
	}
}

func (x *story) data(a *core.Action) {
	x.line[primary] = append(x.line[primary], core.Message{Type: core.Data, Generation: simGen, Round: a.Round, Epoch: a.Epoch, Seq: x.seq})
	x.seq++
}

func (x *story) captured(lost bool) {
	e := core.Event{Kind: core.Captured, Epoch: x.waiting, Pause: x.pause, Lost: lost}
	x.waiting = 0
	x.todo[primary] = append(x.todo[primary], e)
}

// settle lets everything happen that needs no time.
func (x *story) settle() {
	for busy := true; busy; {
		busy = false
		for who := range 2 {
			if len(x.todo[who]) > 0 && !x.froze[who] {
				e := x.todo[who][0]
				x.todo[who] = x.todo[who][1:]
				x.step(who, e)
				busy = true
			}
			if m := x.line[who]; len(m) > 0 && !x.cut[who] && !x.froze[1-who] {
				x.line[who] = m[1:]
				e := core.Event{Kind: core.Received, Message: m[0]}
				if m[0].Type == core.EpochEnd {
					e.Tally = m[0].Tally
					if x.corrupt > 0 {
						x.corrupt--
						e.Tally.Sum++
					}
				}
				if m[0].Round == x.round {
					x.step(1-who, e)
				}
				busy = true
			}
			if x.askBy[who] != 0 && !x.silent {
				x.askBy[who] = 0
				x.step(who, x.judge(who))
				busy = true
			}
		}
		if x.dialing != 0 && !x.cut[0] && !x.cut[1] && !x.froze[1] && !x.off[1] && x.s.State() != core.StandbyOver {
			x.round, x.open, x.dialing = x.dialing, true, 0
			x.line, x.seq = [2][]core.Message{}, 0
			x.step(primary, core.Event{Kind: core.Dialed, Round: x.round})
			busy = true
		}
	}
}

// judge is the arbiter.
func (x *story) judge(who int) core.Event {
	q := x.ask[who]
	e := core.Event{Kind: core.Answered, Question: q, Verdict: core.Denied}
	if x.arbRound < q.Since || x.arbHost == who {
		e.Verdict, e.For = core.Granted, x.grant
		x.arbRound, x.arbHost = max(x.arbRound, q.Round), who
	}
	return e
}

func (x *story) run(d core.Time) {
	end := x.now + d
	for {
		x.settle()
		next := end
		for who := range 2 {
			if m := x.machine(who); m != nil && !x.froze[who] && !x.off[who] {
				next = min(next, m.Deadline())
			}
			if x.askBy[who] != 0 {
				next = min(next, x.askBy[who])
			}
		}
		if x.dialing != 0 {
			next = min(next, x.dialBy)
		}
		if next >= end {
			x.now = end
			break
		}
		x.now = max(x.now, next)
		for who := range 2 {
			if m := x.machine(who); m != nil && m.Deadline() <= x.now {
				x.step(who, core.Event{})
			}
			if x.askBy[who] != 0 && x.askBy[who] <= x.now {
				x.askBy[who] = 0
				x.step(who, core.Event{Kind: core.Answered, Question: x.ask[who]})
			}
		}
		if x.dialing != 0 && x.dialBy <= x.now {
			r := x.dialing
			x.dialing = 0
			x.step(primary, core.Event{Kind: core.DialFailed, Round: r})
		}
	}
}

func (x *story) start(d *datadriven.TestData) {
	*x = story{t: x.t, pause: 2 * time.Millisecond, runs: [2]bool{true, false}}
	mode := map[string]core.Arbitration{"nobody": core.NoArbiter, "automatic": core.Automatic, "arbiter": core.WithArbiter}
	x.cfg = core.Config{
		Generation: simGen, Arbitration: mode[d.CmdArgs[0].Key],
		Interval: 100 * time.Millisecond, Timeout: 500 * time.Millisecond, Margin: 100 * time.Millisecond,
		Setup: 10 * time.Second, GiveUp: x.arg(d, "giveup"),
	}
	x.set = core.Settings{Max: 10 * time.Second, PausedShare: core.DefaultPausedShare}
	x.grant = x.arg(d, "grant")
	x.p, x.s = core.NewPrimary(x.cfg, x.set, 0), core.NewStandby(x.cfg, 0)
	x.step(primary, core.Event{})
}

func (x *story) arg(d *datadriven.TestData, key string) time.Duration {
	var s string
	if !d.MaybeScanArgs(x.t, key, &s) {
		return 0
	}
	v, err := time.ParseDuration(s)
	if err != nil {
		d.Fatalf(x.t, "%v", err)
	}
	return v
}

func (x *story) state() {
	side := func(who int, s fmt.Stringer, e core.Epoch) string {
		switch {
		case x.off[who]:
			return "off"
		case x.froze[who]:
			return fmt.Sprintf("frozen, %v, committed %d", s, e)
		}
		return fmt.Sprintf("%v, committed %d", s, e)
	}
	g := "runs nowhere"
	switch {
	case x.runs[0] && x.froze[0]:
		g = "frozen on the primary"
	case x.runs[0] && x.p != nil && x.p.Paused():
		g = "paused on the primary"
	case x.runs[0] && x.runs[1]:
		g = "runs on both"
	case x.runs[0]:
		g = "runs on the primary"
	}
	if x.runs[1] && !x.runs[0] {
		g = "runs on the standby"
	} else if x.runs[1] && g != "runs on both" {
		g += ", runs on the standby"
	}
	p := "killed"
	if x.p != nil {
		p = side(0, x.p.State(), x.p.Committed())
		if end, why := x.p.Ending(); end {
			p += "; ends: " + why.String()
		}
	}
	x.say("primary: %s", p)
	x.say("standby: %s", side(1, x.s.State(), x.s.Committed()))
	x.say("guest:   %s", g)
}

// forged are messages that arrive in the connection, but were never sent so.
var forged = map[string]func(x *story) (int, core.Message){
	"stale-generation": func(x *story) (int, core.Message) {
		return standby, core.Message{Type: core.Data, Generation: simGen - 1, Round: x.round, Epoch: x.p.Committed() + 1}
	},
	"stale-round": func(x *story) (int, core.Message) {
		return standby, core.Message{Type: core.Hello, Generation: simGen, Round: x.round - 1, Epoch: 1, Next: 2}
	},
	"repeated-epoch": func(x *story) (int, core.Message) {
		return standby, core.Message{Type: core.Data, Generation: simGen, Round: x.round, Epoch: x.s.Committed()}
	},
	"later-epoch": func(x *story) (int, core.Message) {
		return standby, core.Message{Type: core.Data, Generation: simGen, Round: x.round, Epoch: x.s.Committed() + 2}
	},
	"lying-count": func(x *story) (int, core.Message) {
		return standby, core.Message{Type: core.EpochEnd, Generation: simGen, Round: x.round, Epoch: x.s.Committed() + 1, Tally: core.Tally{Frames: 9}}
	},
	"repeated-ack": func(x *story) (int, core.Message) {
		return primary, core.Message{Type: core.Ack, Generation: simGen, Round: x.round, Epoch: x.p.Committed()}
	},
	"handover": func(x *story) (int, core.Message) {
		return standby, core.Message{Type: core.Handover, Generation: simGen, Round: x.round, Epoch: x.s.Committed()}
	},
	"early-handover": func(x *story) (int, core.Message) {
		return standby, core.Message{Type: core.Handover, Generation: simGen, Round: x.round, Epoch: x.s.Committed() + 1}
	},
	"heard": func(x *story) (int, core.Message) {
		return standby, core.Message{Type: core.Heard, Generation: simGen, Round: x.round}
	},
	"another-session": func(x *story) (int, core.Message) {
		return standby, core.Message{Type: core.Hello, Generation: simGen, Round: x.round + 1, Session: 9}
	},
	"sums": func(x *story) (int, core.Message) {
		return standby, core.Message{Type: core.Sums, Generation: simGen, Round: x.round, Epoch: x.s.Committed()}
	},
	"late-over": func(x *story) (int, core.Message) {
		return primary, core.Message{Type: core.Over, Generation: simGen - 1, Round: x.round}
	},
}

func (x *story) command(d *datadriven.TestData) string {
	x.out.Reset()
	arg := func(i int) string {
		if i < len(d.CmdArgs) {
			return d.CmdArgs[i].Key
		}
		return ""
	}
	host := func(i int) int {
		switch arg(i) {
		case "primary":
			return primary
		case "standby":
			return standby
		}
		d.Fatalf(x.t, "which host?")
		return 0
	}
	switch d.Cmd {
	case "start":
		x.start(d)
	case "protected":
		x.start(d)
		x.run(50 * ms)
		x.out.Reset()
		x.say("the guest is protected, epoch %d is committed", x.s.Committed())
	case "corrupt":
		if _, err := fmt.Sscan(arg(0), &x.corrupt); err != nil {
			d.Fatalf(x.t, "%v", err)
		}
	case "run":
		v, err := time.ParseDuration(arg(0))
		if err != nil {
			d.Fatalf(x.t, "%v", err)
		}
		x.run(core.Time(v))
	case "output":
		x.step(primary, core.Event{Kind: core.OutputHeld})
	case "flush":
		x.step(primary, core.Event{Kind: core.Flushed})
	case "full":
		x.step(primary, core.Event{Kind: core.LogFull})
	case "settings":
		for key, to := range map[string]*time.Duration{"min": &x.set.Min, "max": &x.set.Max} {
			if v := x.arg(d, key); v != 0 {
				*to = v
			}
		}
		d.MaybeScanArgs(x.t, "share", &x.set.PausedShare)
		var trigger string
		if d.MaybeScanArgs(x.t, "trigger", &trigger) {
			x.set.Trigger = map[string]core.Trigger{"output": core.OnOutput, "interval": core.OnInterval}[trigger]
		}
		if err := x.set.Validate(); err != nil {
			d.Fatalf(x.t, "%v", err)
		}
		x.step(primary, core.Event{Kind: core.Change, Settings: x.set})
	case "pause":
		var err error
		if x.pause, err = time.ParseDuration(arg(0)); err != nil {
			d.Fatalf(x.t, "%v", err)
		}
	case "hold":
		x.holding = true
	case "captured":
		x.holding = false
		x.captured(arg(0) == "lost")
	case "failed":
		x.holding = false
		x.todo[primary] = append(x.todo[primary], core.Event{Kind: core.CheckpointFailed, Epoch: x.waiting})
	case "cut":
		x.cut = [2]bool{arg(0) != "back", arg(0) != "there"}
	case "heal":
		x.cut = [2]bool{}
	case "reset", "kill":
		x.open, x.line = false, [2][]core.Message{}
		if d.Cmd == "kill" {
			x.p, x.dialing = nil, 0
		}
		x.step(primary, core.Event{Kind: core.Gone, Round: x.round})
		x.step(standby, core.Event{Kind: core.Gone, Round: x.round, Clean: d.Cmd == "kill"})
	case "clean":
		x.p = core.RecoverPrimary(x.cfg, x.now)
		x.step(primary, core.Event{})
	case "freeze":
		x.froze[host(0)] = true
	case "thaw":
		x.froze[host(0)] = false
		x.step(host(0), core.Event{})
	case "power":
		x.off[host(1)] = true
		if host(1) == primary {
			x.runs[0], x.dialing = false, 0
		}
	case "arbiter":
		x.silent = arg(0) == "silent"
	case "forge":
		who, m := forged[arg(0)](x)
		x.step(who, core.Event{Kind: core.Received, Message: m})
	case "dirty":
		x.step(primary, core.Event{Kind: core.DirtyLost})
	case "guest":
		x.runs[0] = false
		x.step(primary, core.Event{Kind: core.GuestEnded})
	case "stop":
		x.step(host(0), core.Event{Kind: core.Stop})
	case "fail":
		x.step(standby, core.Event{Kind: core.FailOver})
	case "refuse":
		x.noTake = true
	case "state":
		x.state()
	default:
		d.Fatalf(x.t, "unknown command %q", d.Cmd)
	}
	x.settle()
	if x.out.Len() == 0 {
		return "nothing\n"
	}
	return x.out.String()
}

func TestStories(t *testing.T) {
	stories, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(stories) < 30 {
		t.Fatalf("%d stories, %v", len(stories), err)
	}
	for _, path := range stories {
		t.Run(filepath.Base(path), func(t *testing.T) {
			x := &story{}
			datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
				x.t = t
				return x.command(d)
			})
		})
	}
}
