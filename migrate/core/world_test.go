package core_test

import (
	"fmt"
	"math/rand/v2"
	"time"

	"kemari/migrate/core"
)

type itemKind uint8

const (
	itFrame   itemKind = iota // a: frame, host: receiver
	itGone                    // a: conn slot, b: round, host: who learns
	itEvent                   // a: frame that holds the event, host
	itDial                    // b: round: the attempt is decided
	itPass                    // a pass is done
	itCapture                 // a checkpoint is done
	itPaused                  // the pause is so
	itAsked                   // a: frame: the question arrives
	itThaw                    // host
	itGuest                   // the guest does something
	itRecover                 // what cleans up behind a killed primary
	itTaken                   // TakeOver is done
	itEnded                   // protection has to be over
)

type item struct {
	at   core.Time
	seq  uint32
	kind itemKind
	host uint8
	inc  uint8 // incarnation of the process it is for
	a    int32
	b    uint64
}

func (x item) before(y item) bool { return x.at < y.at || x.at == y.at && x.seq < y.seq }

// frame is a message on its way, or an event about to happen.
type frame struct {
	m     core.Message
	e     core.Event
	page  int8 // Data
	val   uint32
	bad   bool
	depth uint32 // EpochEnd: the guest's history
	want  [memory]uint32
	q     core.Question
	ask   uint32 // of which Ask this is the question or the answer
}

type conn struct {
	round core.Round
	open  [2]bool
	last  [2]core.Time // by direction: nothing overtakes
}

type host struct {
	on     bool
	frozen core.Time // until; 0: not
	alive  bool      // the process
	inc    uint8
	offset core.Time
	drift  core.Time // in a million
	wake   core.Time // real time of the machine's deadline
	held   []item    // what happened to the process while it was frozen
	thawed core.Time
}

// world is one simulated protection.
type world struct {
	r     *rand.Rand
	pcg   rand.PCG
	now   core.Time
	seq   uint32
	heap  []item
	slab  []frame
	unuse []int32
	conns [8]conn

	hosts [2]host
	p     *core.Primary
	s     *core.Standby
	cfg   core.Config

	// The network.
	cut       [2]core.Time // by direction: until
	lag       [2]core.Time
	lagEnd    [2]core.Time
	latency   core.Time
	tamper    [2]faultKind // of the next frame; 0: none
	tamperHow uint32
	keep      [2]int32   // a frame to be overtaken by the next; -1: none
	hello     core.Round // of the last Hello that was sent
	welcomed  core.Round // of the last Welcome that arrived

	// The arbiter. active 2 is somebody else.
	round            core.Round
	active           uint8
	ttl              core.Time
	expires          core.Time
	noAsk, noAnswer  core.Time
	slowAsk, slowEnd core.Time
	freezeAsk        core.Time // for so long who asks next is frozen; 0: not
	granted          [2]bool
	asks             uint32
	open             [2]uint32 // the Ask not answered yet

	// The guest on the primary, and its output.
	guest           bool // there is one
	paused, stands  bool // by Pause; wanted and so
	mem             [memory]uint32
	depth           uint32
	dirty, changed  uint8
	lost            bool // log-dirty was off
	holding, said   bool
	pending, sealed uint32 // depth of the last held output
	work            core.Action
	working         bool
	workID          uint64
	cancelled       bool
	buf             [memory]uint32
	bufMask         uint8
	bufDepth        uint32
	bufMem          [memory]uint32
	txEpoch         core.Epoch
	txRound         core.Round
	tx              core.Tally
	heardAt, echoAt core.Time // what the primary really heard
	endAsked        core.Time
	quiet           core.Time // when all faults so far are over, and what came of them
	asked           bool      // somebody wants an end
	inPeace         bool      // the end was asked for in peace, and nothing happened since
	flowed          bool      // went alone while the standby was armed
	outside         uint32

	// The standby's copy.
	copyThere     bool
	smem, staging [memory]uint32
	stMask        uint8
	unapplied     bool
	comDepth      uint32
	comMem        [memory]uint32
	in            frame // being received
	rx            core.Tally
	unfit         bool
	rxEpoch       core.Epoch
	rxRound       core.Round
	sHeard        core.Time
	sClean        bool
	running       bool // its guest
	sPaused       bool
	fork          uint32
	fair          bool // the take-over was one that excuses two runners
	sTold         bool // that the primary goes on alone
	operator      bool

	faults  []fault
	next    int
	done    [faultKinds]int64
	steps   int64
	bad     string
	tracing bool
	trace   []string
}

func (w *world) logf(format string, args ...any) {
	if w.tracing {
		w.trace = append(w.trace, fmt.Sprintf("%10s ", timeText(w.now))+fmt.Sprintf(format, args...))
	}
}

func (w *world) violate(format string, args ...any) {
	if w.bad == "" {
		w.bad = fmt.Sprintf(format, args...)
		w.logf("VIOLATION: %s", w.bad)
	}
}

func (w *world) push(at core.Time, it item) {
	w.seq++
	it.at, it.seq = max(at, w.now), w.seq
	h := append(w.heap, it)
	i := len(h) - 1
	for i > 0 {
		up := (i - 1) / 2
		if !h[i].before(h[up]) {
			break
		}
		h[i], h[up] = h[up], h[i]
		i = up
	}
	w.heap = h
}

func (w *world) pop() item {
	h := w.heap
	top := h[0]
	n := len(h) - 1
	h[0] = h[n]
	h = h[:n]
	for i := 0; ; {
		c := 2*i + 1
		if c >= n {
			break
		}
		if c+1 < n && h[c+1].before(h[c]) {
			c++
		}
		if !h[c].before(h[i]) {
			break
		}
		h[i], h[c] = h[c], h[i]
		i = c
	}
	w.heap = h
	return top
}

func (w *world) take() int32 {
	if n := len(w.unuse); n > 0 {
		i := w.unuse[n-1]
		w.unuse = w.unuse[:n-1]
		w.slab[i] = frame{}
		return i
	}
	w.slab = append(w.slab, frame{})
	return int32(len(w.slab) - 1)
}

func (w *world) give(i int32) { w.unuse = append(w.unuse, i) }

func (w *world) rnd(d core.Time) core.Time {
	if d <= 0 {
		return 0
	}
	return core.Time(w.r.Int64N(int64(d)))
}

// local is what the clock of a host shows; real is when it will show it.
func (h *host) local(t core.Time) core.Time { return h.offset + t + t/1_000_000*h.drift }

func (h *host) real(t core.Time) core.Time {
	if t == core.Never {
		return core.Never
	}
	t -= h.offset
	return t - t/1_000_000*h.drift + 1
}

func (w *world) start(seed uint64, faults []fault) {
	old := *w
	*w = world{heap: old.heap[:0], slab: old.slab[:0], unuse: old.unuse[:0], trace: old.trace[:0], tracing: old.tracing, done: old.done, steps: old.steps}
	w.hosts[0].held, w.hosts[1].held = old.hosts[0].held[:0], old.hosts[1].held[:0]
	w.pcg.Seed(seed, 1)
	w.r = rand.New(&w.pcg)
	w.faults = faults
	w.cfg = core.Config{
		Generation: simGen, Arbitration: core.Arbitration([]uint8{0, 1, 2, 2, 2}[w.r.IntN(5)]),
		Interval: time.Duration(simInterval), Timeout: time.Duration(simTimeout), Margin: time.Duration(simMargin),
		Setup: 10 * time.Second, GiveUp: []time.Duration{0, 0, 4 * time.Second}[w.r.IntN(3)],
	}
	if w.r.IntN(3) == 0 {
		w.ttl = 2 * simTimeout
	}
	w.latency = []core.Time{ms / 10, ms, 10 * ms}[w.r.IntN(3)]
	for i := range w.hosts {
		h := &w.hosts[i]
		h.on, h.alive, h.wake = true, true, core.Never
		h.offset = core.Time(w.r.Int64N(int64(1000 * simTimeout)))
		h.drift = core.Time(w.r.IntN(2001) - 1000) // one in a thousand
	}
	w.keep = [2]int32{-1, -1}
	w.guest, w.copyThere = true, true
	w.depth = 1
	w.endAsked = core.Never
	w.p = core.NewPrimary(w.cfg, core.Settings{Trigger: core.Trigger(w.r.IntN(2)), Min: 5 * time.Millisecond, Max: 200 * time.Millisecond, PausedShare: 30}, w.hosts[0].local(0))
	w.s = core.NewStandby(w.cfg, w.hosts[1].local(0))
	w.hosts[0].wake, w.hosts[1].wake = 0, 0
	w.push(0, item{kind: itGuest, host: primary})
	w.logf("seed %d: arbitration %v, latency %v, grants for %v, giving up after %v", seed, w.cfg.Arbitration, timeText(w.latency), timeText(w.ttl), w.cfg.GiveUp)
}

// calm is how long the world goes on after the last fault, so that what can come
// back has come back.
const calm = 14000 * ms

func (w *world) run() {
	end := calm
	if n := len(w.faults); n > 0 {
		end += w.faults[n-1].at
	}
	for w.bad == "" {
		at, who := core.Never, -1
		if len(w.heap) > 0 {
			at, who = w.heap[0].at, 2
		}
		for i := range w.hosts {
			if h := &w.hosts[i]; h.on && h.alive && h.frozen == 0 && h.wake < at {
				at, who = h.wake, i
			}
		}
		if w.next < len(w.faults) && w.faults[w.next].at <= at {
			at, who = w.faults[w.next].at, 3
		}
		if who < 0 || at > end || w.over() {
			break
		}
		w.now = max(w.now, at)
		switch who {
		case 2:
			w.item(w.pop())
		case 3:
			f := w.faults[w.next]
			w.next++
			w.inject(f)
		default:
			w.step(who, core.Event{})
		}
		w.runners()
	}
	if w.bad == "" {
		w.settled()
	}
}

// over reports whether nothing can happen any more.
func (w *world) over() bool {
	pOver := !w.hosts[0].on || w.p == nil || w.p.State() == core.PrimaryOver
	sOver := !w.hosts[1].on || w.s == nil || w.s.State() == core.StandbyOver
	if w.p == nil && w.hosts[0].on {
		return false // it is about to be cleaned up behind
	}
	return pOver && (sOver || w.s.State() == core.Active && w.ttl == 0)
}

// settled: after a calm time, what could come back has.
func (w *world) settled() {
	p, s := &w.hosts[0], &w.hosts[1]
	pOn, sOn := p.on && w.p != nil, s.on && w.s != nil
	stolen := w.active == 2
	switch {
	case pOn && w.p.State() != core.PrimaryOver && sOn && w.s.State() < core.TakingOver:
		if w.p.State() != core.Protected || w.s.State() != core.Ready || w.paused {
			w.violate("nothing disturbs them, but the primary is %v, the standby %v, the guest paused: %v", w.p.State(), w.s.State(), w.paused)
		}
	case pOn && w.guest && !w.running && w.paused && !stolen:
		w.violate("the guest is paused for good; the primary is %v", w.p.State())
	case !p.on && sOn && w.s.Armed() && w.cfg.Arbitration != core.NoArbiter && !(w.cfg.Arbitration == core.Automatic && w.sClean) && !stolen:
		w.violate("the primary has no power, and the standby is %v", w.s.State())
	}
}

func (w *world) pRuns() bool {
	return w.guest && w.hosts[0].on && w.hosts[0].frozen == 0 && !w.stands
}

func (w *world) sRuns() bool {
	return w.running && w.hosts[1].on && w.hosts[1].frozen == 0 && !w.sPaused
}

// runners is the second invariant, judged after every single thing that happens.
func (w *world) runners() {
	p, s := w.pRuns(), w.sRuns()
	if p && s && !w.fair {
		w.violate("one runner: both copies run")
	}
	used := [2]bool{p && w.uncoveredP(), s && w.s != nil && w.s.State() != core.StandbyOver}
	for who := range used {
		if used[who] && w.granted[who] && (w.active == 2 || w.active == uint8(who) && w.expired()) {
			w.violate("one runner: a grant that ran out is still used")
		}
	}
}

// expired reports whether what the arbiter has granted last has run out.
func (w *world) expired() bool { return w.ttl > 0 && w.round > 0 && w.now > w.expires }

func (w *world) uncoveredP() bool {
	return w.p != nil && (w.p.State() == core.Alone || w.p.State() == core.Copying)
}

// leaves: the outside hears the primary's guest, up to depth.
func (w *world) leaves(depth uint32) {
	if depth == 0 {
		return
	}
	w.outside = max(w.outside, depth)
	if w.running && depth > w.fork && !w.fair {
		w.violate("nothing lost: output of %d leaves, the guest runs on elsewhere from %d", depth, w.fork)
	}
	s := w.s
	if s == nil || !w.hosts[1].on || !w.copyThere || w.running || s.State() != core.TakingOver && !s.Armed() || w.comDepth >= depth {
		return
	}
	// The standby might run what does not have this.
	switch w.cfg.Arbitration {
	case core.WithArbiter:
		if w.active != standby && w.round >= s.Round() {
			return
		}
		w.violate("output commit: output of %d leaves, the standby would run %d, and the arbiter has granted nothing", depth, w.comDepth)
	default:
		const slack = simTimeout / 200
		silent := w.now-w.heardAt >= simTimeout-slack || w.now-w.echoAt >= 2*simTimeout-slack
		if silent || w.now-w.endAsked >= 5000*ms-10*slack || w.p == nil || w.p.Round() == ^core.Round(0) {
			w.flowed = true
			return
		}
		w.violate("output commit: output of %d leaves, the standby would run %d, and was heard of %v ago", depth, w.comDepth, timeText(w.now-w.heardAt))
	}
}

var sides = [2]string{"primary", "standby"}

func (w *world) item(it item) {
	h := &w.hosts[it.host]
	switch it.kind {
	case itAsked:
		f := w.slab[it.a]
		w.give(it.a)
		w.judged(it.host, f)
		return
	case itEnded:
		if w.inPeace && (w.p.State() != core.PrimaryOver || w.s.State() != core.StandbyOver) {
			w.violate("a request to end: nothing disturbs it, but %v later the primary is %v, the standby %v", timeText(endWithin), w.p.State(), w.s.State())
		}
		return
	case itThaw:
		if h.on && h.frozen != 0 && w.now >= h.frozen {
			w.thaw(int(it.host))
		}
		return
	}
	if !h.on {
		w.forget(it)
		return
	}
	switch it.kind {
	case itGuest:
		w.lives(int(it.host))
		return
	case itRecover:
		if h.frozen != 0 {
			w.push(h.frozen+ms, it)
			return
		}
		w.recover()
		return
	case itPaused:
		if h.frozen != 0 {
			w.push(h.frozen, it)
		} else if w.paused {
			w.stands = true
		}
		return
	}
	if h.frozen != 0 {
		h.held = append(h.held, it)
		return
	}
	switch it.kind {
	case itFrame:
		w.frame(it)
	case itGone:
		c := &w.conns[it.b%8]
		if c.round == core.Round(it.b) && c.open[it.host] {
			c.open[it.host] = false
			if it.host == standby && it.b == uint64(w.rxRound) {
				w.sClean = w.sClean || it.a == 1
			}
			w.step(int(it.host), core.Event{Kind: core.Gone, Round: core.Round(it.b), Clean: it.a == 1})
		}
	default:
		if it.inc != h.inc || !h.alive {
			w.forget(it)
			return
		}
		w.process(it)
	}
}

// forget drops what was for a process or host that is no more.
func (w *world) forget(it item) {
	switch it.kind {
	case itFrame, itEvent:
		w.give(it.a)
	case itTaken:
		// libvirt runs it, whoever asked for it
	}
}

// process is what happens to a living process, but for the network.
func (w *world) process(it item) {
	switch it.kind {
	case itEvent:
		f := w.slab[it.a]
		w.give(it.a)
		if f.e.Kind == core.Answered {
			if w.open[it.host] != f.ask {
				return
			}
			w.open[it.host] = 0
			switch {
			case f.e.Verdict == core.Denied:
				w.granted[it.host] = false
			case f.e.Verdict == core.Granted && (it.host == standby || f.e.Question.Round >= w.hello): // else it was given up
				w.granted[it.host] = true
			}
		}
		w.step(int(it.host), f.e)
	case itDial:
		w.dialed(core.Round(it.b))
	case itPass:
		if w.working && it.b == w.workID {
			w.passed()
		}
	case itCapture:
		if w.working && it.b == w.workID {
			w.captured()
		}
	case itTaken:
		w.step(standby, core.Event{Kind: core.TookOver})
	}
}

func (w *world) thaw(who int) {
	h := &w.hosts[who]
	h.frozen, h.thawed = 0, w.now
	w.logf("%s: thaws", sides[who])
	if who == primary && w.paused {
		w.stands = true
	}
	held := h.held
	if h.alive {
		w.step(who, core.Event{})
	}
	for _, it := range held {
		w.push(w.now, it)
	}
	h.held = h.held[:0]
}

func (w *world) recover() {
	h := &w.hosts[primary]
	h.alive = true
	w.p = core.RecoverPrimary(w.cfg, h.local(w.now))
	w.step(primary, core.Event{})
}
