package core_test

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kemari/migrate/core"
)

// The simulation: a primary, a standby, the network between them, an arbiter, a
// guest, somebody outside who hears the guest, and faults. What the machines must
// hold is judged by what really happened, never by what they think. The faults are
// in this file, what they are done to in world_test.go, and what the machines'
// actions do in engines_test.go.

var (
	simSeed   = flag.Uint64("sim.seed", 0, "run only this simulated world, with a trace")
	simWhole  = flag.Bool("sim.whole", false, "print the whole trace, not only its end")
	simFaults = flag.Int64("sim.faults", 1_000_000, "how many faults to simulate")
	simFirst  = flag.Uint64("sim.first", 1, "the number of the first world to simulate, from 1")
)

const (
	ms = core.Time(time.Millisecond)

	simInterval = 100 * ms
	simTimeout  = 500 * ms
	simMargin   = 100 * ms
	simGen      = 7

	primary, standby = 0, 1
	memory           = 4 // pages, of which one is as good as a thousand
)

// faultKind is what is done to the world.
type faultKind uint8

const (
	cutThere faultKind = iota // primary to standby
	cutBack
	cutBoth
	slowThere
	slowBack
	reset     // the connection, seen by both
	resetOne  // seen by one long before the other
	loseFrame // one frame, and the connection lives on: the peer lies
	repeatFrame
	swapFrames
	forgeFrame // of another generation, round, epoch, count or content
	freezePrimary
	freezeStandby
	freezeBoth
	loseQuestions
	loseAnswers
	slowArbiter
	freezeAsker // who next asks the arbiter, before it answers
	loseDirty
	loseDirtyUnseen // found only when the bitmap is read
	powerPrimary
	powerStandby
	killPrimary
	killStandby
	stopPrimary
	stopStandby
	endGuest
	failOver
	failPrimary
	failStandby
	faultKinds
)

var faultNames = [faultKinds]string{
	"cut there", "cut back", "cut both", "slow there", "slow back", "reset", "reset one", "lose frame", "repeat frame", "swap frames", "forge frame",
	"freeze primary", "freeze standby", "freeze both", "lose questions", "lose answers", "slow arbiter", "freeze asker", "lose dirty", "lose dirty unseen",
	"power primary", "power standby", "kill primary", "kill standby", "stop primary", "stop standby", "end guest", "fail over", "fail primary", "fail standby",
}

const firstFinal = powerPrimary // from here on a fault mostly ends the story

type fault struct {
	at   core.Time
	kind faultKind
	d    core.Time
	x    uint32
}

// plan draws the faults of a world.
func plan(r *rand.Rand, buf []fault) []fault {
	buf = buf[:0]
	pace := []core.Time{1, 1, 2, 8}[r.IntN(4)]
	t := core.Time(r.Int64N(int64(400 * ms)))
	for range 20 + r.IntN(60) {
		f := fault{at: t, x: r.Uint32()}
		if r.IntN(100) < 3 {
			f.kind = firstFinal + faultKind(r.IntN(int(faultKinds-firstFinal)))
		} else {
			f.kind = faultKind(r.IntN(int(firstFinal)))
		}
		f.d = span(r)
		buf = append(buf, f)
		if r.IntN(3) > 0 {
			t += pace * core.Time(r.Int64N(int64(60*ms)))
		} else {
			t += pace * span(r) / 8
		}
	}
	if r.IntN(8) == 0 { // the end is asked for in peace
		ends := [...]faultKind{stopPrimary, failPrimary, stopStandby, failStandby, endGuest}
		buf = append(buf, fault{at: t + 6*simTimeout + 2*peaceAfter, kind: ends[r.IntN(len(ends))]})
	}
	return buf
}

// span draws a length of time of an interesting size.
func span(r *rand.Rand) core.Time {
	switch r.IntN(8) {
	case 0, 1, 2:
		return core.Time(r.Int64N(int64(60 * ms)))
	case 3:
		return simTimeout - 120*ms + core.Time(r.Int64N(int64(240*ms)))
	case 4, 5:
		return core.Time(r.Int64N(int64(simTimeout)))
	case 6:
		return core.Time(r.Int64N(int64(2 * simTimeout)))
	default:
		return core.Time(r.Int64N(int64(6 * simTimeout)))
	}
}

// Peace is when no fault has had an effect for peaceAfter. If the end is asked for
// then, both hosts are done within endWithin.
const (
	peaceAfter = 1000 * ms
	endWithin  = 1500 * ms
)

// peace reports whether there is, and a connection that both know to be up, and
// nobody has asked for the end before: that request may have been lost.
func (w *world) peace() bool {
	if w.now < w.quiet || w.p == nil || w.s == nil || w.active == 2 {
		return false
	}
	for i := range w.hosts {
		if h := &w.hosts[i]; !h.on || !h.alive || h.frozen != 0 {
			return false
		}
	}
	c := w.conn(w.welcomed)
	return !w.asked && c != nil && c.open == [2]bool{true, true} && w.rxRound == w.welcomed && w.p.Round() == w.welcomed &&
		w.p.State() < core.Asking && w.s.State() < core.Judging
}

// disturb: a fault has an effect until then.
func (w *world) disturb(until core.Time) {
	w.quiet, w.inPeace = max(w.quiet, until+peaceAfter), false
}

// askEnd: somebody wants protection to end.
func (w *world) askEnd(peace bool) {
	w.asked, w.inPeace = true, peace
	if peace {
		w.push(w.now+endWithin, item{kind: itEnded})
	}
}

// kill ends a process; the kernel closes its connections.
func (w *world) kill(who int) {
	h := &w.hosts[who]
	h.alive, h.inc = false, h.inc+1
	for i := range w.conns {
		if c := &w.conns[i]; c.round != 0 {
			w.hangUp(who, c)
		}
	}
	if who == primary {
		w.p = nil
		w.working = false
		w.push(w.now+w.rnd(60*ms), item{kind: itRecover, host: primary})
		return
	}
	if !w.running { // the copy dies with it
		w.copyThere = false
		w.s = nil
	}
}

func (w *world) inject(f fault) {
	w.logf("fault: %s %v", faultNames[f.kind], timeText(f.d))
	until := w.now + f.d
	peace := w.peace()
	w.disturb(until)
	p, s := &w.hosts[0], &w.hosts[1]
	switch f.kind {
	case cutThere, cutBack, cutBoth, slowThere, slowBack, loseFrame, repeatFrame, swapFrames, forgeFrame:
		if !p.on || !s.on {
			return
		}
	case loseQuestions, loseAnswers, slowArbiter, freezeAsker:
		if w.cfg.Arbitration != core.WithArbiter {
			return
		}
	}
	switch f.kind {
	case cutThere:
		w.cut[0] = max(w.cut[0], until)
	case cutBack:
		w.cut[1] = max(w.cut[1], until)
	case cutBoth:
		w.cut[0], w.cut[1] = max(w.cut[0], until), max(w.cut[1], until)
	case slowThere, slowBack:
		dir := f.kind - slowThere
		w.lag[dir], w.lagEnd[dir] = core.Time(f.x)%(150*ms), until
	case reset, resetOne:
		any := false
		for i := range w.conns {
			c := &w.conns[i]
			if c.round == 0 || !c.open[0] && !c.open[1] {
				continue
			}
			any = true
			first := int(f.x & 1)
			w.push(w.now, item{kind: itGone, host: uint8(first), b: uint64(c.round)})
			if f.kind == resetOne {
				w.push(until, item{kind: itGone, host: uint8(1 - first), b: uint64(c.round)})
			} else {
				w.push(w.now, item{kind: itGone, host: uint8(1 - first), b: uint64(c.round)})
			}
		}
		if !any {
			return
		}
	case loseFrame, repeatFrame, swapFrames, forgeFrame:
		dir := f.x & 1
		w.tamper[dir], w.tamperHow = f.kind, f.x>>1
		return // it counts when it hits a frame
	case freezePrimary:
		if !w.freeze(primary, until) {
			return
		}
	case freezeStandby:
		if !w.freeze(standby, until) {
			return
		}
	case freezeBoth:
		w.freeze(primary, until)
		w.freeze(standby, until+f.d/8)
	case loseQuestions:
		w.noAsk = max(w.noAsk, until)
	case loseAnswers:
		w.noAnswer = max(w.noAnswer, until)
	case slowArbiter:
		w.slowAsk, w.slowEnd = f.d, w.now+simTimeout
	case freezeAsker:
		w.freezeAsk = f.d
		return // it counts when somebody asks
	case loseDirty, loseDirtyUnseen:
		if !w.guest || w.p == nil {
			return
		}
		w.dirty, w.lost = 0, true
		if f.kind == loseDirty {
			w.later(w.rnd(5*ms), primary, core.Event{Kind: core.DirtyLost})
		}
	case powerPrimary:
		if !p.on {
			return
		}
		p.on, w.guest, w.p = false, false, nil
	case powerStandby:
		if !s.on {
			return
		}
		s.on, w.s = false, nil
	case killPrimary:
		if !p.on || !p.alive || p.frozen != 0 || w.p.State() == core.PrimaryOver {
			return
		}
		w.kill(primary)
	case killStandby:
		if !s.on || !s.alive || s.frozen != 0 || w.running && w.ttl > 0 {
			return // whoever runs on a grant for a time needs somebody who renews it
		}
		w.kill(standby)
	case stopPrimary, failPrimary:
		w.askEnd(peace)
		w.endAsked = min(w.endAsked, w.now)
		w.later(0, primary, core.Event{Kind: plain[f.kind]})
	case stopStandby, failStandby:
		w.askEnd(peace)
		w.later(0, standby, core.Event{Kind: plain[f.kind]})
	case endGuest:
		w.askEnd(peace)
		w.guest = false
		w.endAsked = min(w.endAsked, w.now)
		w.later(0, primary, core.Event{Kind: core.GuestEnded})
	case failOver:
		// Without an arbiter, who orders it answers for the primary being off.
		if w.cfg.Arbitration != core.WithArbiter && p.on {
			return
		}
		w.operator = true
		w.later(0, standby, core.Event{Kind: core.FailOver})
	}
	w.done[f.kind]++
}

var plain = map[faultKind]core.EventKind{stopPrimary: core.Stop, failPrimary: core.Failure, stopStandby: core.Stop, failStandby: core.Failure}

func (w *world) freeze(who int, until core.Time) bool {
	h := &w.hosts[who]
	if !h.on || who == primary && w.p == nil {
		return false // who cleans up behind a killed process has to be in time
	}
	h.frozen = max(h.frozen, until)
	w.push(h.frozen, item{kind: itThaw, host: uint8(who)})
	return true
}

// simulate runs one world, and returns what it violated.
func simulate(w *world, seed uint64, faults []fault) string {
	w.start(seed, faults)
	w.run()
	return w.bad
}

// shrink leaves away every fault that is not needed for a violation.
func shrink(w *world, seed uint64, faults []fault) []fault {
	for size := len(faults) / 2; size > 0; size /= 2 {
		for i := 0; i+size <= len(faults); {
			less := slices.Delete(slices.Clone(faults), i, i+size)
			if simulate(w, seed, less) != "" {
				faults = less
			} else {
				i += size
			}
		}
	}
	return faults
}

// report tells the shortest story of a violation.
func report(seed uint64, faults []fault) string {
	w := &world{}
	if simulate(w, seed, faults) != "" {
		faults = shrink(w, seed, faults)
	}
	w.tracing = true
	bad := simulate(w, seed, faults)
	lines := slices.DeleteFunc(w.trace, func(s string) bool { return strings.Contains(s, "Heartbeat in round") })
	const most = 120
	if len(lines) > most && !*simWhole {
		lines = append(append(slices.Clone(lines[:1]), "…"), lines[len(lines)-most:]...)
	}
	return fmt.Sprintf("world %d, %d faults needed: %s\n%s\nagain: go test ./migrate/core -run Simulation -sim.seed %d", seed, len(faults), bad, strings.Join(lines, "\n"), seed)
}

func faultsOf(seed uint64, buf []fault) []fault {
	return plan(rand.New(rand.NewPCG(seed, 2)), buf)
}

func TestSimulation(t *testing.T) {
	if *simSeed != 0 {
		faults := faultsOf(*simSeed, nil)
		t.Log(report(*simSeed, faults))
		if simulate(&world{}, *simSeed, faults) != "" {
			t.Fail()
		}
		return
	}
	var worlds, faults, steps atomic.Int64
	var mu sync.Mutex
	var total [faultKinds]int64
	var failed atomic.Uint64
	began := time.Now()
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			w := &world{}
			var buf []fault
			for faults.Load() < *simFaults && failed.Load() == 0 {
				seed := *simFirst + uint64(worlds.Add(1)) - 1
				buf = faultsOf(seed, buf)
				w.steps = 0
				if simulate(w, seed, buf) != "" {
					failed.CompareAndSwap(0, seed)
				}
				steps.Add(w.steps)
				n := int64(0)
				for i := range w.done {
					n += w.done[i]
				}
				faults.Add(n)
				mu.Lock()
				for i := range w.done {
					total[i] += w.done[i]
					w.done[i] = 0
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if seed := failed.Load(); seed != 0 {
		t.Fatal(report(seed, faultsOf(seed, nil)))
	}
	var kinds []string
	for i, n := range total {
		kinds = append(kinds, fmt.Sprintf("%s %d", faultNames[i], n))
	}
	t.Logf("%d faults in %d worlds, %d steps, %v: %s", faults.Load(), worlds.Load(), steps.Load(), time.Since(began).Round(time.Millisecond), strings.Join(kinds, ", "))
}
