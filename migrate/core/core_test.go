package core_test

import (
	"testing"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"kemari/migrate/core"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func config(a core.Arbitration) core.Config {
	return core.Config{
		Generation: simGen, Arbitration: a,
		Interval: 100 * time.Millisecond, Timeout: 500 * time.Millisecond, Margin: 100 * time.Millisecond, Setup: 10 * time.Second,
	}
}

func settings() core.Settings {
	return core.Settings{Max: 200 * time.Millisecond, PausedShare: core.DefaultPausedShare}
}

// pair is both machines with nothing between them and engines that take no time.
type pair struct {
	p     *core.Primary
	s     *core.Standby
	now   core.Time
	pause time.Duration
	queue []queued
	begun func() // at each Checkpoint
}

type queued struct {
	who int
	e   core.Event
}

func newPair(set core.Settings) *pair {
	x := &pair{p: core.NewPrimary(config(core.WithArbiter), set, 0), s: core.NewStandby(config(core.WithArbiter), 0)}
	x.step(primary, core.Event{})
	return x
}

func (x *pair) put(who int, e core.Event) { x.queue = append(x.queue, queued{who, e}) }

// step gives an event, and all that follows from it.
func (x *pair) step(who int, e core.Event) {
	x.put(who, e)
	for i := 0; i < len(x.queue); i++ {
		q := x.queue[i]
		var acts []core.Action
		if q.who == primary {
			acts = x.p.Step(x.now, q.e)
		} else {
			acts = x.s.Step(x.now, q.e)
		}
		for j := range acts {
			x.act(q.who, &acts[j])
		}
	}
	x.queue = x.queue[:0]
}

func (x *pair) act(who int, a *core.Action) {
	switch a.Kind {
	case core.Stage, core.Apply, core.Compare:
		x.put(standby, core.Event{Kind: core.Done})
	case core.Dial:
		x.put(primary, core.Event{Kind: core.Dialed, Round: a.Round})
	case core.Send:
		x.put(1-who, core.Event{Kind: core.Received, Message: a.Message})
	case core.Copy:
		x.put(primary, core.Event{Kind: core.Copied, Epoch: a.Epoch})
	case core.Checkpoint:
		if x.begun != nil {
			x.begun()
		}
		x.put(primary, core.Event{Kind: core.Captured, Epoch: a.Epoch, Pause: x.pause})
	case core.SendEpoch:
		m := core.Message{Type: core.Data, Generation: simGen, Round: a.Round, Epoch: a.Epoch}
		x.put(standby, core.Event{Kind: core.Received, Message: m})
		m.Type, m.Tally = core.EpochEnd, core.Tally{Frames: 1, Pages: 1}
		x.put(standby, core.Event{Kind: core.Received, Message: m, Tally: m.Tally})
	}
}

// tick lets time pass until either machine wants it.
func (x *pair) tick() {
	x.now = min(x.p.Deadline(), x.s.Deadline())
	if x.p.Deadline() == x.now {
		x.step(primary, core.Event{})
	}
	if x.s.Deadline() == x.now {
		x.step(standby, core.Event{})
	}
}

// However long pauses are and however much the guest talks, it stands still for
// checkpoints no longer than the set share, counted from one checkpoint to any other.
func TestPausedShare(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		set := settings()
		set.PausedShare = rapid.IntRange(1, 100).Draw(t, "share")
		set.Max = time.Duration(rapid.IntRange(1, 500).Draw(t, "max")) * time.Millisecond
		x := newPair(set)
		type mark struct {
			at     core.Time
			before time.Duration // paused
		}
		var marks []mark
		var total time.Duration
		x.begun = func() {
			x.pause = time.Duration(rapid.IntRange(0, 100_000).Draw(t, "pause")) * time.Microsecond
			marks = append(marks, mark{x.now, total})
			total += x.pause
		}
		for range 200 {
			if rapid.Bool().Draw(t, "talks") {
				x.step(primary, core.Event{Kind: core.OutputHeld})
			}
			x.tick()
		}
		if len(marks) < 3 {
			t.Fatalf("only %d checkpoints by %v", len(marks), timeText(x.now))
		}
		for i := range marks {
			for j := i + 1; j < len(marks); j++ {
				paused, all := marks[j].before-marks[i].before, marks[j].at.Sub(marks[i].at)
				if paused*100 > all*time.Duration(set.PausedShare) {
					t.Fatalf("paused for %v of %v, more than %d %%", paused, all, set.PausedShare)
				}
			}
		}
	})
}

func TestNoAllocation(t *testing.T) {
	x := newPair(settings())
	for range 100 {
		x.tick()
	}
	before := x.p.Committed()
	if n := testing.AllocsPerRun(1000, func() {
		x.step(primary, core.Event{Kind: core.OutputHeld})
		x.tick()
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if x.p.Committed() < before+500 || x.s.Committed() != x.p.Committed() {
		t.Errorf("committed %d, the standby %d", x.p.Committed(), x.s.Committed())
	}
}

func BenchmarkEpoch(b *testing.B) {
	x := newPair(settings())
	b.ReportAllocs()
	for b.Loop() {
		x.step(primary, core.Event{Kind: core.OutputHeld})
	}
	if x.p.Committed() == 0 {
		b.Fatal("nothing committed")
	}
}

// Whatever comes, in whatever order and however absurd, nothing panics, time goes
// on, and nothing is done after the end.
func TestAnything(t *testing.T) {
	number := rapid.Uint64Range(0, 4)
	huge := rapid.OneOf(number, number, rapid.Uint64())
	rapid.Check(t, func(t *rapid.T) {
		x := newPair(settings())
		for range rapid.IntRange(0, 50).Draw(t, "epochs") {
			x.tick()
		}
		now := x.now
		ends := [2]bool{}
		step := func(who int, e core.Event) {
			var acts []core.Action
			if who == primary {
				acts = x.p.Step(now, e)
			} else {
				acts = x.s.Step(now, e)
			}
			for _, a := range acts {
				if ends[who] {
					t.Fatalf("%s is done, and yet: %s", sides[who], actionText(&a))
				}
				ends[who] = a.Kind == core.Finish
			}
		}
		for range 60 {
			who := rapid.IntRange(0, 1).Draw(t, "who")
			q := core.Question{Generation: simGen, Since: core.Round(number.Draw(t, "since")), Round: core.Round(number.Draw(t, "asked"))}
			step(who, core.Event{
				Kind:  core.EventKind(rapid.IntRange(0, 32).Draw(t, "kind")),
				Round: core.Round(huge.Draw(t, "round")), Epoch: core.Epoch(huge.Draw(t, "epoch")),
				Message: core.Message{
					Type:       core.MessageType(rapid.IntRange(0, 18).Draw(t, "type")),
					Generation: core.Generation(rapid.SampledFrom([]int{simGen, simGen, simGen, 6}).Draw(t, "generation")),
					Round:      core.Round(huge.Draw(t, "of")), Epoch: core.Epoch(huge.Draw(t, "for")), Next: core.Epoch(huge.Draw(t, "next")),
					Alone: rapid.Bool().Draw(t, "alone"), Armed: rapid.Bool().Draw(t, "armed"),
					Stamp: core.Time(huge.Draw(t, "stamp")), Echo: core.Time(huge.Draw(t, "echo")), Timeout: time.Duration(huge.Draw(t, "timeout")),
					Reason: core.Reason(number.Draw(t, "reason")),
				},
				Pages: int(huge.Draw(t, "pages")), Pause: time.Duration(huge.Draw(t, "pause")), Lost: rapid.Bool().Draw(t, "lost"),
				Settings: settings(), Question: q, Verdict: core.Verdict(rapid.IntRange(0, 2).Draw(t, "verdict")), For: time.Duration(huge.Draw(t, "grant")),
			})
			for n := 0; ; n++ {
				d := x.p.Deadline()
				if who == standby {
					d = x.s.Deadline()
				}
				if d > now {
					break
				}
				if n == 10 {
					t.Fatalf("%s wants to be stepped again and again at %v", sides[who], timeText(now))
				}
				step(who, core.Event{})
			}
			now += core.Time(rapid.Int64Range(0, int64(300*ms)).Draw(t, "d"))
		}
	})
}

func TestValidate(t *testing.T) {
	good := config(core.Automatic)
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(c *core.Config){
		"generation":   func(c *core.Config) { c.Generation = 0 },
		"arbitration":  func(c *core.Config) { c.Arbitration = 9 },
		"no interval":  func(c *core.Config) { c.Interval = 0 },
		"time-out":     func(c *core.Config) { c.Timeout = c.Interval },
		"margin":       func(c *core.Config) { c.Margin = -1 },
		"large margin": func(c *core.Config) { c.Margin = 400 * time.Millisecond },
		"set-up":       func(c *core.Config) { c.Setup = 0 },
		"giving up":    func(c *core.Config) { c.GiveUp = -1 },
	} {
		c := config(core.Automatic)
		change(&c)
		if c.Validate() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	for name, s := range map[string]core.Settings{
		"zero":    {},
		"trigger": {Trigger: 2, Max: 1, PausedShare: 30},
		"min":     {Min: 2, Max: 1, PausedShare: 30},
		"share":   {Max: 1, PausedShare: 0},
		"share 2": {Max: 1, PausedShare: 101},
	} {
		if s.Validate() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
