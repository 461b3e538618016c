package core

import "time"

// PrimaryState is where the primary stands towards the standby's copy.
//
//	          link up            epoch sent           promise over
//	Alone ─────────────► Copying ─────────► Protected ────────────► Asking
//	  ▲ ▲                 │   ▲                │   ▲    (arbiter)   │  │  │
//	  │ └──── link gone ──┘   └ it is not armed┘   └── link up ─────┘  │  │
//	  │                                        │                       │  │
//	  ├──── silence, without an arbiter ───────┘                       │  │
//	  └──────────────────────── granted ───────────────────────────────┘  │
//	                                                                      ▼
//	any ── the standby runs the guest ──────────────── denied ────► Destroying
//
//	Alone, when protection is to end, and Destroying ──► Over
//
// Ending is no state: whoever is asked to end gets to Alone first.
type PrimaryState uint8

const (
	Alone       PrimaryState = iota // no standby has a copy it may run; no connection
	Copying                         // neither, but pages are being sent to one
	Protected                       // the standby may run its copy: output is held
	Asking                          // the promise has run out: the guest is paused, the arbiter asked
	Destroying                      // the guest runs elsewhere; ours is being destroyed
	PrimaryOver                     // protection is over
)

// linkState is where the connection stands.
//
//	down ──► dialing ──► greeting ──► up
//	  ▲         │           │          │
//	  └─────────┴───────────┴──────────┘
type linkState uint8

const (
	down linkState = iota
	dialing
	greeting // Hello is sent
	up       // Welcome has come
)

// workState is where the epoch under way stands.
//
//	idle ──► passing ──► capturing ──► captured ──► idle
//	  └───────(no first copy)──▲            (acknowledged, or discarded)
type workState uint8

const (
	idle      workState = iota
	passing             // pages are copied while the guest runs
	capturing           // a checkpoint is being taken
	captured            // it is in the buffer, and sent if sent says so
)

// Passes of a copy while the guest runs: so many at most, and none any more once
// one had so few pages that they may as well be copied in the pause.
const (
	maxPasses = 5
	fewPages  = 256
)

// maxRefusals of one epoch in a row: after the first it is sent again, after the
// second everything is, after the last protection ends.
const maxRefusals = 4

// endPatience is the least time the standby has to confirm the end.
const endPatience = 5 * time.Second

// Primary is the state machine of the host the guest runs on.
type Primary struct {
	cfg  Config
	set  Settings
	acts []Action

	state  PrimaryState
	link   linkState
	work   workState
	now    Time
	listen Time // before this, silence proves nothing: we were not there to hear

	// The connection. round numbers the last Dial, hello the last Hello; joined is
	// the last round the standby is known to have joined.
	round, hello, joined Round
	dialAt               Time // next Dial
	greetBy              Time // Welcome is due
	beatAt               Time // next heartbeat
	heard                Time // last message
	echoed               Time // last stamp the standby has told: its promise counts from it
	shy                  bool // a Hello led nowhere: the arbiter answers before the next one
	lost                 Time // when the standby was lost, Never if it is there
	ever                 bool // it had a committed epoch once

	// The epoch under way, and the ones before. next is not used for two contents
	// that the standby could mix up.
	committed, next Epoch
	floor           Epoch // the oldest the standby may run, when covered: what left is in it
	epoch           Epoch // under way, while work is not idle
	sent            Round // captured was sent in this round; 0: not yet
	lastSent        Epoch
	warm            Round // in which what both sides cache is in step
	base            Epoch // of a copy: what the standby was last equal to
	passes, pages   int
	full            bool // the epoch under way has passes, so it cannot be sent again from the buffer
	all             bool // the epoch under way holds every page, since it is not known which changed
	recopy          bool // the next one has to
	drop            bool // what is being copied or captured is of no use any more
	refusals        int
	restart         bool // the standby ignores what comes of the epoch until it is told that it begins anew

	policy policy

	held   bool // output is, or is about to be, held
	sealed bool // a seal is outstanding
	paused bool // what is so
	gone   bool // the guest has ended

	ask asker

	ending bool // what is intended
	reason Reason
	endBy  Time
	told   Round // End was sent in this round
}

// NewPrimary returns the machine of a new protection. The first Step begins it.
func NewPrimary(cfg Config, set Settings, now Time) *Primary {
	p := &Primary{
		cfg: cfg, set: set, now: now, listen: now,
		dialAt: now, greetBy: Never, beatAt: Never, heard: now, lost: now, endBy: Never, next: 1,
	}
	p.policy.reset(now)
	p.ask.reset()
	return p
}

// maxRound of RecoverPrimary: no round comes after it.
const maxRound = ^Round(0)

// RecoverPrimary returns the machine that cleans up behind one whose process was
// killed with the guest running and its output held. It protects nothing: it asks
// the arbiter, if there is one, and lets the output go or destroys the guest.
func RecoverPrimary(cfg Config, now Time) *Primary {
	p := NewPrimary(cfg, Settings{}, now)
	p.ever, p.held = true, true
	p.ending, p.reason, p.endBy = true, CleanedUp, now
	p.round, p.hello, p.dialAt = maxRound, maxRound, Never
	if cfg.Arbitration == WithArbiter {
		p.state, p.ask.at = Asking, now
	}
	return p
}

// State returns where the machine stands.
func (p *Primary) State() PrimaryState { return p.state }

// Ending reports whether protection is coming to an end, and why.
func (p *Primary) Ending() (bool, Reason) { return p.ending, p.reason }

// Committed returns the last epoch that the standby is known to have committed.
func (p *Primary) Committed() Epoch { return p.committed }

// Paused reports whether the guest is paused for want of leave to run.
func (p *Primary) Paused() bool { return p.paused }

// Round returns the number of the last connection.
func (p *Primary) Round() Round { return p.round }

// Step takes an event that happened at now and returns what is to be done. A now
// before the last one counts as the last one.
func (p *Primary) Step(now Time, e Event) []Action {
	p.acts = p.acts[:0]
	if p.state == PrimaryOver {
		return nil
	}
	if due := p.Deadline(); due != Never && now > due.Add(p.cfg.Interval) {
		p.listen = now.Add(p.cfg.Interval)
	}
	p.now = max(p.now, now)
	p.event(&e)
	p.run()
	return p.acts
}

// do appends an action.
func (p *Primary) do(a Action) { p.acts = append(p.acts, a) }

func (p *Primary) send(m Message) {
	m.Generation, m.Round = p.cfg.Generation, p.round
	p.do(Action{Kind: Send, Round: p.round, Message: m})
}

func (p *Primary) event(e *Event) {
	switch e.Kind {
	case Received:
		p.received(&e.Message)
	case Gone:
		if e.Round == p.round && p.link != down {
			p.broken(p.now)
		}
	case DialFailed:
		if e.Round == p.round && p.link == dialing {
			p.broken(p.now.Add(p.cfg.Interval))
		}
	case Dialed:
		if e.Round == p.round && p.link == dialing {
			p.greet()
		}
	case Copied:
		if p.work == passing && e.Epoch == p.epoch {
			p.passed(e.Pages)
		}
	case Captured:
		if p.work == capturing && e.Epoch == p.epoch {
			p.capture(e)
		}
	case CheckpointFailed:
		if (p.work == passing || p.work == capturing) && e.Epoch == p.epoch {
			fault := !p.drop
			p.work, p.drop = idle, false
			if fault {
				p.end(Failed)
			}
		}
	case OutputHeld:
		p.policy.wanted = p.policy.wanted || p.set.Trigger == OnOutput
	case Flushed, LogFull:
		p.policy.wanted = true
	case DirtyLost:
		// What is captured already was found good when the bitmap was read.
		p.recopy = true
	case GuestEnded:
		p.gone = true
		p.end(GuestGone)
	case Change:
		if e.Settings.Validate() == nil {
			p.set = e.Settings
		}
	case Destroyed:
		if p.state == Destroying {
			p.finish()
		}
	case Answered:
		p.answered(e)
	case Stop:
		p.end(Asked)
	case Failure:
		p.end(Failed)
	}
}

func (p *Primary) received(m *Message) {
	if m.Type == Over && m.Generation == p.cfg.Generation {
		// In whatever round: it is a fact.
		if p.state != Destroying {
			p.do(Action{Kind: Send, Round: m.Round, Message: Message{Type: Heard, Generation: m.Generation, Round: m.Round}})
			p.destroy(TakenOver)
		}
		return
	}
	if m.Round != p.round || p.link != greeting && p.link != up {
		return // of a connection that is over
	}
	if m.Generation != p.cfg.Generation {
		p.refuse(BadGeneration)
		return
	}
	p.heard = p.now
	switch {
	case m.Type == Refuse && m.Reason == Silence:
		p.closed() // nobody did anything wrong
	case m.Type == Refuse:
		p.refused()
	case m.Type == Ended:
		p.standbyEnded()
	case p.link == greeting && m.Type == Welcome && m.Echo <= p.now:
		p.welcomed(m)
	case p.link == up && m.Type == Heartbeat && m.Echo <= p.now:
		p.echoed = max(p.echoed, m.Echo)
	case p.link == up && m.Type == Ack:
		if p.work != captured || p.sent != p.round || m.Epoch != p.epoch {
			p.refuse(OutOfOrder)
			return
		}
		p.commit()
	case p.link == up && m.Type == Resync:
		if p.work == idle || p.sent != p.round && !p.full || m.Epoch != p.epoch {
			p.refuse(OutOfOrder)
			return
		}
		p.again()
	case p.link == up && m.Type == Compared:
	default:
		p.refuse(BadMessage)
	}
}

// again: the standby has refused what it was sent of the epoch under way.
func (p *Primary) again() {
	switch {
	case p.work == captured && !p.full && p.refusals == 0:
		p.refusals, p.warm = 1, 0
		p.send(Message{Type: Restart, Epoch: p.epoch})
		p.transmit()
	case p.work == captured:
		p.refuse(OutOfStep) // the next Welcome tells whether it has it after all
	default:
		p.restart = true
		p.cancel()
		if p.refusals++; p.refusals >= maxRefusals {
			p.end(Refused)
		}
	}
}

// covered: the standby may have a copy that it may run.
func (p *Primary) covered() bool { return p.state == Protected || p.state == Asking }

// greet sends the Hello. With it, whatever was asked in an earlier round is given
// up, since the standby may join this one.
func (p *Primary) greet() {
	p.link, p.hello = greeting, p.round
	p.greetBy, p.beatAt = p.now.Add(p.cfg.Timeout), Never
	if !p.ever {
		p.greetBy = p.now.Add(p.cfg.Setup)
	}
	p.ask.giveUp()
	p.send(Message{
		Type: Hello, Session: p.cfg.Session, Epoch: p.floor, Next: p.next, Known: p.committed, Alone: !p.covered(),
		Stamp: p.now, Timeout: p.cfg.Timeout,
	})
}

// welcomed: the standby has joined the round. Whatever it asked or promised in an
// earlier one is void.
func (p *Primary) welcomed(m *Message) {
	has := p.work == captured && p.sent != 0 && m.Epoch == p.epoch // what we do not know it has
	if m.Armed && (!p.covered() || m.Epoch != p.committed && !has) || m.Epoch > p.lastSent {
		// What it has, or may run, is not what we left it with.
		p.hangUp(OutOfStep)
		p.end(OutOfStep)
		return
	}
	p.link, p.joined, p.restart = up, p.round, false
	p.beatAt, p.greetBy, p.lost = p.now, Never, Never
	p.echoed = max(p.echoed, m.Echo)
	if !m.Armed {
		p.base = 0
		if m.Epoch != 0 && (m.Epoch == p.committed || m.Epoch == p.lastSent) {
			p.base = p.committed
		}
		p.unarmed()
		if !p.ending {
			p.state = Copying
		}
		return
	}
	p.state = Protected
	switch {
	case p.work != captured:
	case has:
		p.commit()
	case p.full || p.refusals > 1:
		// The buffer holds only its last pass, or what was refused again and again.
		p.recopy = true
		p.discard()
	case !p.ending:
		p.transmit()
	}
}

// unarmed: the standby has no copy that it may run, by its own word or because the
// arbiter granted us to go on. Run lets the output flow.
func (p *Primary) unarmed() {
	p.state = Alone
	switch p.work {
	case captured:
		p.discard()
	case passing, capturing:
		p.cancel()
	}
	p.next = max(p.next, p.lastSent+1)
}

func (p *Primary) discard() {
	p.do(Action{Kind: Discard, Epoch: p.epoch})
	p.work, p.drop = idle, false
	p.recopy = p.recopy || p.all
}

func (p *Primary) cancel() {
	if (p.work == passing || p.work == capturing) && !p.drop {
		p.drop = true
		p.recopy = p.recopy || p.all
		p.do(Action{Kind: Cancel, Epoch: p.epoch})
	}
}

// alone is unarmed without the standby's word: what connection there is ends.
func (p *Primary) alone() {
	p.hangUp(GoingAlone)
	p.unarmed()
}

// lapse: the standby's promise has run out, or it does not let us end.
func (p *Primary) lapse() {
	p.state = Asking
	// Nothing that still comes in this round may count: what we ask is about it.
	p.hangUp(Silence)
	p.ask.at = p.now
	if p.now >= p.endBy { // a standby that does not confirm is tried again only if nobody answers
		p.shy, p.endBy = true, p.now.Add(endPatience)
	}
}

// refuse closes the connection with a word, so that the other side makes no more
// of it than that, and dials anew.
func (p *Primary) refuse(why Reason) {
	p.hangUp(why)
	p.refused()
}

func (p *Primary) hangUp(why Reason) {
	if p.link == greeting || p.link == up {
		p.send(Message{Type: Refuse, Reason: why})
		p.closed()
	}
}

func (p *Primary) closed() {
	if p.link != down {
		p.do(Action{Kind: Close, Round: p.round})
		p.broken(p.now)
	}
}

// refused: the same again, then everything anew, then no more.
func (p *Primary) refused() {
	p.closed()
	p.dialAt = p.now.Add(p.cfg.Interval / 4)
	if p.refusals++; p.refusals >= maxRefusals {
		p.end(Refused)
	}
}

// broken: there is no connection any more; the next Dial is at again.
func (p *Primary) broken(again Time) {
	p.shy = p.state == Asking && p.link == greeting
	p.link, p.dialAt = down, again
	p.greetBy, p.beatAt = Never, Never
	if p.lost == Never {
		p.lost = p.now
	}
	switch {
	case p.state == Copying:
		p.unarmed()
	case p.full && (p.work == passing || p.work == capturing):
		p.cancel() // the standby drops what it has staged of it
	}
}

func (p *Primary) standbyEnded() {
	p.closed()
	p.unarmed()
	p.end(PeerEnded)
}

// copy begins the first pass of an epoch that has passes.
func (p *Primary) copy() {
	p.all = p.recopy || p.base == 0 || p.state == Protected
	p.work, p.epoch, p.full, p.passes, p.sent = passing, p.next, true, 0, 0
	p.recopy = false
	if p.restart {
		p.restart, p.warm = false, 0
		p.send(Message{Type: Restart, Epoch: p.epoch})
	}
	p.do(Action{Kind: Copy, Round: p.round, Epoch: p.epoch, Base: p.base, Full: p.all, Cold: p.cold()})
}

// cold reports whether nothing was sent yet in this round.
func (p *Primary) cold() bool {
	c := p.warm != p.round
	p.warm = p.round
	return c
}

// passed: a pass over the pages is done.
func (p *Primary) passed(pages int) {
	if p.drop || p.recopy {
		p.work, p.drop = idle, false
		return
	}
	p.passes++
	few := pages <= fewPages || p.passes >= maxPasses || p.passes > 1 && pages > p.pages*3/4
	p.pages = pages
	if few {
		p.checkpoint()
		return
	}
	p.do(Action{Kind: Copy, Round: p.round, Epoch: p.epoch, Base: p.base})
}

func (p *Primary) checkpoint() {
	p.work, p.sent = capturing, 0
	p.held = true
	p.policy.begin(p.now)
	p.do(Action{Kind: Checkpoint, Epoch: p.epoch, Seal: !p.sealed})
}

// capture: the epoch is in the buffer.
func (p *Primary) capture(e *Event) {
	p.sealed = true
	p.policy.paused(e.Pause)
	p.recopy = p.recopy || e.Lost
	if p.drop || p.recopy {
		p.discard()
		return
	}
	p.work = captured
	if p.link != up {
		return
	}
	if p.state == Copying {
		// From here on the standby may become armed; if at all, it does so after now.
		p.state, p.floor = Protected, p.epoch
		p.echoed, p.heard = p.now, p.now
		p.ask.reset()
	}
	p.transmit()
}

// transmit sends what is captured.
func (p *Primary) transmit() {
	p.do(Action{Kind: SendEpoch, Round: p.round, Epoch: p.epoch, Cold: p.cold()})
	p.sent, p.lastSent = p.round, p.epoch
}

// commit: the standby has the epoch under way, whole.
func (p *Primary) commit() {
	p.do(Action{Kind: Release, Epoch: p.epoch})
	p.committed, p.floor, p.next = p.epoch, p.epoch, p.epoch+1
	p.work, p.sealed, p.refusals, p.ever = idle, false, 0, true
}

// answered: the arbiter has, or has not.
func (p *Primary) answered(e *Event) {
	if !p.ask.answered(e, p.now, &p.cfg) {
		return
	}
	p.shy = false
	switch {
	case e.Verdict == Denied && p.state == Asking:
		p.destroy(TakenOver)
	case e.Verdict == Denied:
		p.destroy(LeaseLost)
	case e.Verdict == Granted && p.state == Asking:
		p.alone()
	}
}

// destroy ends our copy: another one runs. Not one held packet may leave.
func (p *Primary) destroy(why Reason) {
	if p.state == Destroying {
		return
	}
	p.closed()
	p.cancel()
	p.state = Destroying
	p.ending, p.reason = true, why
	p.pause(true)
	p.do(Action{Kind: Destroy})
}

// end makes protection end as soon as the standby cannot take over any more.
func (p *Primary) end(why Reason) {
	if p.ending {
		return
	}
	p.ending, p.reason = true, why
	p.endBy = p.now.Add(max(p.cfg.Timeout, endPatience))
	p.cancel()
}

func (p *Primary) finish() {
	p.do(Action{Kind: Finish, Reason: p.reason})
	p.state = PrimaryOver
}
