package core_test

import (
	"time"

	"kemari/migrate/core"
)

// step gives an event to the machine of a host and carries out what it answers.
func (w *world) step(who int, e core.Event) {
	h := &w.hosts[who]
	var acts []core.Action
	w.steps++
	if w.tracing && e.Kind != core.Tick {
		w.logf("%s: %s", sides[who], eventText(&e))
	}
	if who == primary {
		if w.p == nil {
			return
		}
		acts = w.p.Step(h.local(w.now), e)
	} else {
		if w.s == nil {
			return
		}
		acts = w.s.Step(h.local(w.now), e)
	}
	for i := range acts {
		if w.tracing {
			w.logf("%s:     %s", sides[who], actionText(&acts[i]))
		}
		w.act(who, &acts[i])
	}
	var d core.Time
	if who == primary {
		d = w.p.Deadline()
		if w.p.State() == core.Protected {
			w.granted[0] = false // it runs on the standby's promise again
		}
	} else {
		d = w.s.Deadline()
	}
	h.wake = h.real(d)
	if h.wake != core.Never {
		h.wake = max(h.wake, w.now) + w.rnd(2*ms)
		if w.r.IntN(64) == 0 {
			h.wake += w.rnd(15 * ms)
		}
	}
}

func (w *world) conn(r core.Round) *conn {
	c := &w.conns[r%8]
	if c.round != r {
		return nil
	}
	return c
}

func (w *world) act(who int, a *core.Action) {
	switch a.Kind {
	case core.Send:
		w.sendFrame(who, frame{m: a.Message})
	case core.Close:
		if c := w.conn(a.Round); c != nil {
			w.hangUp(who, c)
		}
	case core.Ask:
		w.askArbiter(who, a.Question)
	case core.Finish:
		if who == primary && w.holding && w.guest {
			w.violate("the primary is done, and output is still held")
		}
	default:
		if who == primary {
			w.actPrimary(a)
		} else {
			w.actStandby(a)
		}
	}
}

// hangUp: the kernel of who closes; the other one learns of it in order.
func (w *world) hangUp(who int, c *conn) {
	if !c.open[who] {
		return
	}
	c.open[who] = false
	w.push(w.arrival(who, c), item{kind: itGone, host: uint8(1 - who), b: uint64(c.round), a: 1})
}

// arrival is when what is sent now arrives at the other side.
func (w *world) arrival(from int, c *conn) core.Time {
	at := max(w.now, w.cut[from]) + w.latency + w.rnd(w.latency/4)
	if w.now < w.lagEnd[from] {
		at += w.lag[from]
	}
	at = max(at, c.last[from])
	c.last[from] = at
	return at
}

func (w *world) sendFrame(from int, f frame) {
	c := w.conn(f.m.Round)
	if c == nil || !c.open[from] {
		return
	}
	switch f.m.Type {
	case core.Hello:
		w.hello = f.m.Round
	case core.Restart:
		w.txEpoch = 0
	}
	if t := w.tamper[from]; t != 0 && f.m.Type != core.Hello && f.m.Type != core.Welcome {
		w.tamper[from] = 0
		w.disturb(w.now)
		w.done[t]++
		switch t {
		case loseFrame:
			// A heartbeat's loss means nothing; that of an end is made good by time.
			w.logf("lost: %s", messageText(&f.m))
			return
		case repeatFrame:
			w.queue(from, c, f)
			if w.tamperHow&1 == 0 { // later: what was true once is no more
				w.keepBack(from, f)
				return
			}
		case swapFrames:
			w.keepBack(from, f)
			return
		case forgeFrame:
			w.forge(&f)
			w.logf("forged: %s", messageText(&f.m))
		}
	}
	w.queue(from, c, f)
	if k := w.keep[from]; k >= 0 {
		w.keep[from] = -1
		g := w.slab[k]
		w.give(k)
		if c := w.conn(g.m.Round); c != nil {
			w.queue(from, c, g)
		}
	}
}

// forge makes a frame one that must be refused or ignored. What a peer can only be
// trusted to say (an acknowledgement, that it is not armed) is not forged.
func (w *world) forge(f *frame) {
	switch w.tamperHow % 5 {
	case 0:
		f.m.Generation--
	case 1:
		f.m.Round--
	case 2:
		switch f.m.Type {
		case core.Ack:
			f.m.Epoch--
		case core.Data, core.EpochEnd:
			f.m.Epoch++
		case core.Heartbeat:
			f.m.Echo = core.Never - 1
		default:
			f.m.Generation++
		}
	case 3:
		switch f.m.Type {
		case core.EpochEnd:
			f.m.Tally.Pages++
		case core.Data:
			f.m.Seq++
		default:
			f.m.Round -= 2
		}
	case 4:
		if f.m.Type == core.Data {
			f.bad = true
		} else {
			f.m.Generation++
		}
	}
}

// keepBack lets f arrive after the next frame.
func (w *world) keepBack(from int, f frame) {
	if k := w.keep[from]; k >= 0 {
		w.give(k)
	}
	i := w.take()
	w.slab[i] = f
	w.keep[from] = i
}

func (w *world) queue(from int, c *conn, f frame) {
	i := w.take()
	w.slab[i] = f
	w.push(w.arrival(from, c), item{kind: itFrame, host: uint8(1 - from), a: i, b: uint64(c.round)})
}

func (w *world) later(d core.Time, who uint8, e core.Event) {
	i := w.take()
	w.slab[i].e = e
	w.push(w.now+d, item{kind: itEvent, host: who, inc: w.hosts[who].inc, a: i})
}

func (w *world) actPrimary(a *core.Action) {
	switch a.Kind {
	case core.Dial:
		at := max(w.now, w.cut[0], w.cut[1]) + 2*w.latency
		w.push(min(at, w.now+250*ms), item{kind: itDial, host: primary, inc: w.hosts[0].inc, b: uint64(a.Round)})
	case core.Copy:
		w.begin(a, itPass, ms+w.rnd(30*ms))
	case core.Checkpoint:
		if a.Seal && w.sealed != 0 {
			w.violate("sealed twice")
		}
		w.begin(a, itCapture, ms/2+w.rnd(8*ms))
	case core.Cancel:
		w.cancelled = true
		if w.r.IntN(2) == 0 { // it may also come too late
			return
		}
		w.working = false
		w.later(ms, primary, core.Event{Kind: core.CheckpointFailed, Epoch: w.work.Epoch})
	case core.SendEpoch:
		for i := range memory {
			if w.bufMask&(1<<i) != 0 {
				w.sendPage(a.Round, a.Epoch, i, w.buf[i])
			}
		}
		w.sendPage(a.Round, a.Epoch, -1, w.bufDepth)
		w.sendFrame(primary, frame{
			m:     core.Message{Type: core.EpochEnd, Generation: simGen, Round: a.Round, Epoch: a.Epoch, Tally: w.tx},
			depth: w.bufDepth, want: w.bufMem,
		})
	case core.Release:
		d := w.sealed
		w.sealed = 0
		w.changed = 0
		w.leaves(d)
	case core.Discard:
		w.bufMask = 0
	case core.Flow:
		d := max(w.sealed, w.pending)
		w.sealed, w.pending, w.holding, w.said = 0, 0, false, false
		w.leaves(d)
	case core.Pause:
		w.paused = true
		if w.now-w.hosts[0].thawed < ms {
			w.stands = true // before the guest has got to run
			return
		}
		w.push(w.now+w.rnd(15*ms), item{kind: itPaused, host: primary, inc: w.hosts[0].inc})
	case core.Resume:
		w.paused, w.stands = false, false
	case core.Destroy:
		w.guest, w.paused, w.stands = false, false, false
		w.sealed, w.pending, w.holding = 0, 0, false
		w.later(w.rnd(20*ms), primary, core.Event{Kind: core.Destroyed})
	}
}

func (w *world) sendPage(r core.Round, e core.Epoch, page int, val uint32) {
	if w.txEpoch != e || w.txRound != r {
		w.txEpoch, w.txRound, w.tx = e, r, core.Tally{}
	}
	w.sendFrame(primary, frame{m: core.Message{Type: core.Data, Generation: simGen, Round: r, Epoch: e, Seq: w.tx.Frames}, page: int8(page), val: val})
	tally(&w.tx, page, val)
}

func tally(t *core.Tally, page int, val uint32) {
	t.Frames++
	t.Pages++
	t.Bytes += 4096
	t.Sum = t.Sum*31 + val*7 + uint32(page)
}

// begin starts what takes the engine a while.
func (w *world) begin(a *core.Action, k itemKind, d core.Time) {
	if w.working {
		w.violate("two checkpoints at a time")
	}
	w.workID++
	w.work, w.working, w.cancelled = *a, true, false
	w.push(w.now+d, item{kind: k, host: primary, inc: w.hosts[0].inc, b: w.workID})
}

func (w *world) actStandby(a *core.Action) {
	switch a.Kind {
	case core.Stage:
		w.stage(a.Direct)
		w.unheard()
	case core.Unstage:
		w.stMask = 0
	case core.Commit:
		if w.unapplied {
			w.violate("exact state: an epoch was not applied before the next one")
		}
		w.comDepth, w.comMem = w.in.depth, w.in.want
		w.unapplied = true
		if w.stMask == 0 {
			w.unapplied = false
		}
	case core.Apply:
		w.apply()
		w.unheard()
	case core.Compare:
		w.unheard()
	case core.TakeOver:
		if !w.copyThere || w.running {
			w.violate("take-over without a copy, or twice")
			return
		}
		if w.unapplied {
			w.apply()
		}
		if w.smem != w.comMem {
			w.violate("exact state: the standby runs %v, epoch %d was %v", w.smem, a.Epoch, w.comMem)
		}
		if w.stMask != 0 {
			w.violate("exact state: a part of another epoch is still staged")
		}
		if w.sTold && !w.operator {
			w.violate("nothing lost: the standby takes over, told that the primary goes on alone")
		}
		w.running, w.fork = true, w.comDepth
		real := w.now-w.sHeard >= simTimeout-simTimeout/200 && !w.sClean
		switch w.cfg.Arbitration {
		case core.Automatic:
			w.fair = real || w.operator
			if !w.fair {
				w.violate("the standby takes over by itself, having heard of the primary %v ago, connection closed: %v", timeText(w.now-w.sHeard), w.sClean)
			}
		case core.NoArbiter:
			if !w.operator {
				w.violate("the standby takes over by itself")
			}
		case core.WithArbiter:
			switch {
			case !w.granted[standby]:
				w.violate("the standby takes over without a grant")
			case w.active != standby || w.expired():
				w.violate("one runner: the standby takes over on a grant that has run out")
			}
		}
		if w.outside > w.fork && !w.fair && !(w.cfg.Arbitration == core.NoArbiter && w.flowed) {
			w.violate("nothing lost: the outside has heard %d, the guest goes on from %d", w.outside, w.fork)
		}
		w.push(w.now+w.rnd(50*ms), item{kind: itTaken, host: standby, inc: w.hosts[1].inc})
	case core.DropCopy:
		w.copyThere = false
		if w.running {
			w.running = false
		}
		w.later(w.rnd(20*ms), standby, core.Event{Kind: core.CopyDropped})
	case core.Pause:
		w.sPaused = true
	case core.Resume:
		w.sPaused = false
	}
}

// unheard: what was received is being dealt with, for a while.
func (w *world) unheard() { w.later(w.rnd(2*ms), standby, core.Event{Kind: core.Done}) }

func (w *world) apply() {
	for i := range memory {
		if w.stMask&(1<<i) != 0 {
			w.smem[i] = w.staging[i]
		}
	}
	w.stMask, w.unapplied = 0, false
}

// askArbiter sends a question on its way. It is answered once, be it by no answer.
func (w *world) askArbiter(who int, q core.Question) {
	if w.freezeAsk > 0 && w.freeze(who, w.now+w.freezeAsk) {
		w.logf("%s: freezes for %v, having asked", sides[who], timeText(w.freezeAsk))
		w.disturb(w.now + w.freezeAsk)
		w.freezeAsk = 0
		w.done[freezeAsker]++
	}
	w.asks++
	w.open[who] = w.asks
	if w.now >= w.noAsk {
		i := w.take()
		w.slab[i].q, w.slab[i].ask = q, w.asks
		d := ms + w.rnd(ms)
		if w.now < w.slowEnd {
			d += w.rnd(w.slowAsk)
		}
		w.push(w.now+d, item{kind: itAsked, host: uint8(who), a: i})
	}
	w.answer(300*ms, who, w.asks, core.Event{Kind: core.Answered, Question: q})
}

func (w *world) answer(d core.Time, who int, ask uint32, e core.Event) {
	i := w.take()
	w.slab[i].e, w.slab[i].ask = e, ask
	w.push(w.now+d, item{kind: itEvent, host: uint8(who), inc: w.hosts[who].inc, a: i})
}

// judged is the arbiter's compare-and-swap.
func (w *world) judged(who uint8, f frame) {
	if w.ttl > 0 && w.active != 2 && w.round > 0 && w.now > w.expires+w.ttl/2 && w.r.IntN(2) == 0 {
		w.active = 2 // somebody else has claimed what was not renewed
	}
	e := core.Event{Kind: core.Answered, Question: f.q, Verdict: core.Denied}
	if w.round < f.q.Since || w.active == who {
		e.Verdict, e.For = core.Granted, time.Duration(w.ttl)
		w.round, w.active = max(w.round, f.q.Round), who
		w.expires = w.now + w.ttl
	}
	w.logf("arbiter: %v for the %s (%s)", e.Verdict, sides[who], questionText(f.q))
	if w.now >= w.noAnswer {
		w.answer(ms+w.rnd(ms), int(who), f.ask, e)
	}
}

func (w *world) dialed(r core.Round) {
	o := &w.hosts[standby]
	if !o.on || !o.alive || w.s == nil || w.s.State() == core.StandbyOver || o.frozen != 0 || w.now < w.cut[0] || w.now < w.cut[1] {
		w.step(primary, core.Event{Kind: core.DialFailed, Round: r})
		return
	}
	w.conns[r%8] = conn{round: r, open: [2]bool{true, true}}
	w.step(primary, core.Event{Kind: core.Dialed, Round: r})
}

// passed: a pass over the guest's memory is done.
func (w *world) passed() {
	w.working = false
	mask := w.dirty
	switch {
	case w.work.Full:
		mask, w.lost = 1<<memory-1, false
	case w.txEpoch != w.work.Epoch || w.txRound != w.work.Round:
		mask |= w.changed
	}
	w.changed |= w.dirty
	w.dirty = 0
	n := 0
	for i := range memory {
		if mask&(1<<i) != 0 {
			n++
			w.sendPage(w.work.Round, w.work.Epoch, i, w.mem[i])
		}
	}
	w.step(primary, core.Event{Kind: core.Copied, Epoch: w.work.Epoch, Pages: n * 200})
}

// captured: a checkpoint is taken, all at once.
func (w *world) captured() {
	if !w.guest || w.stands && w.cancelled {
		w.working = false
		w.step(primary, core.Event{Kind: core.CheckpointFailed, Epoch: w.work.Epoch})
		return
	}
	if w.stands { // it cannot suspend itself now
		w.push(w.now+2*ms, item{kind: itCapture, host: primary, inc: w.hosts[0].inc, b: w.workID})
		return
	}
	w.working = false
	if w.work.Seal {
		w.sealed, w.pending, w.holding = w.pending, 0, true
	}
	w.said = false
	w.bufMask, w.bufDepth = w.dirty, w.depth
	w.buf, w.bufMem = w.mem, w.mem
	w.changed |= w.dirty
	w.dirty = 0
	w.step(primary, core.Event{Kind: core.Captured, Epoch: w.work.Epoch, Pause: time.Millisecond, Lost: w.lost})
	w.lost = false
}

// lives: the guest on a host does something, and often says so.
func (w *world) lives(who int) {
	if who == standby {
		return // what it says there can only be more than is known
	}
	if !w.guest {
		return
	}
	w.push(w.now+3*ms+w.rnd(50*ms), item{kind: itGuest, host: primary})
	if !w.pRuns() {
		return
	}
	w.depth++
	i := w.r.IntN(memory)
	w.mem[i] = w.depth
	w.dirty |= 1 << i
	if w.r.IntN(2) == 0 {
		return
	}
	if !w.holding {
		w.leaves(w.depth)
		return
	}
	w.pending = w.depth
	if !w.said && w.p != nil {
		w.said = true
		w.later(ms/10, primary, core.Event{Kind: core.OutputHeld})
	}
}

// frame arrives.
func (w *world) frame(it item) {
	f := w.slab[it.a]
	w.give(it.a)
	c := w.conn(core.Round(it.b))
	h := &w.hosts[it.host]
	if c == nil || !c.open[it.host] || !h.alive {
		return
	}
	genuine := f.m.Generation == simGen && f.m.Round == core.Round(it.b)
	if it.host == primary {
		if genuine && w.p != nil && c.round == w.p.Round() {
			w.heardAt = w.now
			if f.m.Echo > 0 && f.m.Echo <= h.local(w.now) {
				w.echoAt = max(w.echoAt, h.real(f.m.Echo)-2)
			}
		}
		if genuine && f.m.Type == core.Welcome {
			w.welcomed = c.round
		}
		w.step(primary, core.Event{Kind: core.Received, Message: f.m})
		if genuine && f.m.Type == core.Over && w.p.State() != core.PrimaryOver && w.guest && !w.paused {
			w.violate("one runner: the primary was told that the guest runs elsewhere, and goes on")
		}
		return
	}
	if w.s == nil {
		return
	}
	if genuine && f.m.Type == core.Hello && f.m.Round > w.rxRound {
		w.rxRound, w.sClean, w.sTold = f.m.Round, false, f.m.Alone
	}
	if genuine && c.round == w.rxRound && f.m.Type == core.Refuse && f.m.Reason == core.GoingAlone {
		w.sTold = true
	}
	if f.m.Type == core.EpochEnd {
		w.sTold = false
	}
	if genuine && c.round == w.rxRound {
		w.sHeard = w.now
	}
	e := core.Event{Kind: core.Received, Message: f.m}
	switch f.m.Type {
	case core.Data:
		if f.m.Epoch != w.rxEpoch || f.m.Seq == 0 {
			w.rxEpoch, w.rx = f.m.Epoch, core.Tally{}
		}
		tally(&w.rx, int(f.page), f.val)
	case core.EpochEnd:
		e.Tally = w.rx
		w.rx = core.Tally{}
	}
	w.in, w.unfit = f, false
	w.step(standby, e)
	if w.unfit {
		w.step(standby, core.Event{Kind: core.Bad, Round: f.m.Round})
	}
}

// stage is what the standby's engine does with the frame just received.
func (w *world) stage(direct bool) {
	switch f := &w.in; {
	case f.bad:
		w.unfit = true
	case f.page < 0:
	case direct:
		w.smem[f.page] = f.val
	default:
		w.staging[f.page] = f.val
		w.stMask |= 1 << f.page
	}
}
