package core

import "time"

// StandbyState is where the standby stands.
//
//	         Hello            epoch committed        silence (no arbiter)
//	Waiting ───────► Receiving ─────────────► Ready ───────────────────► Silent
//	  ▲ ▲               │                     ▲  │ │ ◄── sign of life ──┘   │
//	  │ └── link gone ──┘                     │  │ │                        │ told to
//	  │                                Hello  │  │ └── silence (automatic) ─┤
//	  │                  silence or told to   │  ▼      granted             ▼
//	  └───── denied ───────────────────────── Judging ───────────────► TakingOver ──► Active
//
//	Waiting, Receiving, Ready, Silent ── asked to, or lost too long ──► Dropping ──► Parting ──► StandbyOver
//	TakingOver ─────────────────────── failed ────────────────────────────►
//
// While it is taking over or dropping it answers nobody: how that ends decides what is
// said. It goes on showing life on the connection it has, with an Echo that promises
// nothing more.
// Armed are Ready, Silent and Judging: there is a committed epoch that may be run.
// A copy that is no longer armed is kept while waiting, as the base of a resync.
type StandbyState uint8

const (
	Waiting     StandbyState = iota // nothing to run; no connection
	Receiving                       // neither, but pages come in, straight into the copy
	Ready                           // armed; connected, or not longer without than silence is borne
	Silent                          // armed, nothing heard, and nobody here may decide what that means
	Judging                         // armed, and the arbiter is asked
	TakingOver                      // it is decided: the guest will run here
	Active                          // the guest runs here
	Dropping                        // the copy is being destroyed
	Parting                         // it is no more; whoever asks is told, for a moment
	StandbyOver                     // protection is over here
)

const (
	// lingerFor bounds how long an old primary can come back and be told.
	lingerFor = time.Hour
	// tellEvery is how often one that is there is told: most likely it is dead, and the
	// guest needs the processor.
	tellEvery = time.Second
	// farewell is how long a primary may take to hear that protection has ended.
	farewell = time.Second
)

// Standby is the state machine of the host that keeps the copy.
type Standby struct {
	cfg  Config
	acts []Action

	state  StandbyState
	now    Time
	listen Time // before this, silence proves nothing: we were not there to hear

	round   Round
	up      bool
	met     bool    // a primary has come, of session
	session Session // nobody of another one can go on
	clean   bool    // the connection was closed by the other host, without a word
	busy    int     // what was received and is being dealt with: nobody listens meanwhile
	stale   bool    // nothing had come for long when something did
	heard   Time    // last sign of life; what is promised counts from it
	came    Time    // when something was received last
	stamp   Time    // the primary's last, to be told
	beatAt  Time
	timeout time.Duration // how long silence is borne

	epoch   Epoch // last committed; what the copy is, or last was, equal to
	next    Epoch // due
	seq     uint32
	staged  bool // some of next is in the buffer
	torn    bool // some of next is in the copy
	refused bool // what comes of next is ignored until it begins anew
	ever    bool

	took  bool // TakeOver has been given out: the guest runs, or is about to
	dueAt Time // when the promise has run out and it may be
	ask   asker
	pause bool // the guest that took over is paused: its grant has run out

	unsure bool // whether the copy runs, and so nothing may be said of it
	partBy Time
	reason Reason
}

// NewStandby returns the machine of a new protection, with an empty copy.
func NewStandby(cfg Config, now Time) *Standby {
	s := &Standby{cfg: cfg, now: now, listen: now, heard: now, beatAt: Never, next: 1, timeout: cfg.Timeout}
	s.ask.reset()
	return s
}

// State returns where the machine stands.
func (s *Standby) State() StandbyState { return s.state }

// Committed returns the epoch that was committed last.
func (s *Standby) Committed() Epoch { return s.epoch }

// Reason returns why it takes over or ends, once it does.
func (s *Standby) Reason() Reason { return s.reason }

// Round returns the number of the last connection.
func (s *Standby) Round() Round { return s.round }

// Connected reports whether there is a connection.
func (s *Standby) Connected() bool { return s.up }

// Seq returns how many parts of the epoch that is due have come.
func (s *Standby) Seq() uint32 { return s.seq }

// Armed reports whether there is a committed epoch that may be run.
func (s *Standby) Armed() bool { return s.state == Ready || s.state == Silent || s.state == Judging }

// Step takes an event that happened at now and returns what is to be done. A now
// before the last one counts as the last one.
func (s *Standby) Step(now Time, e Event) []Action {
	s.acts = s.acts[:0]
	if s.state == StandbyOver {
		return nil
	}
	if due := s.Deadline(); due != Never && now > due.Add(s.cfg.Interval) {
		s.listen = now.Add(s.timeout)
	}
	s.now = max(s.now, now)
	s.event(&e)
	s.run()
	return s.acts
}

func (s *Standby) do(a Action) { s.acts = append(s.acts, a) }

func (s *Standby) reply(r Round, m Message) {
	m.Generation, m.Round = s.cfg.Generation, r
	s.do(Action{Kind: Send, Round: r, Message: m})
}

func (s *Standby) send(m Message) {
	if s.up {
		s.reply(s.round, m)
	}
}

func (s *Standby) event(e *Event) {
	switch e.Kind {
	case Received:
		s.received(e)
	case Gone:
		if s.up && e.Round == s.round {
			s.clean = e.Clean
			s.broken()
			if s.state == Silent && s.closed() { // its host lives, and so there is nothing to be told
				s.state, s.heard = Ready, s.now
			}
		}
	case Bad:
		if s.up && e.Round == s.round && s.state < TakingOver {
			s.redo(BadData)
		}
	case Done:
		if s.busy > 0 {
			s.busy--
			s.heard = s.now
		}
	case FailOver:
		switch {
		case !s.Armed():
		case s.cfg.Arbitration == WithArbiter:
			s.judge()
		default:
			s.takeOver(Asked, s.now)
		}
	case TookOver:
		if s.state == TakingOver {
			s.state = Active
			if s.up {
				s.beatAt = s.now
			}
		}
	case TakeOverFailed:
		if s.state == TakingOver {
			s.unsure = e.Unsure
			s.drop(NotTaken)
		}
	case CopyDropped:
		switch {
		case s.state != Dropping:
		case s.unsure:
			s.finish()
		default:
			s.state, s.partBy = Parting, s.now.Add(farewell)
			s.send(Message{Type: Ended, Reason: s.reason})
		}
	case Answered:
		s.answered(e)
	case Stop:
		s.stop(Asked)
	case Failure:
		s.stop(Failed)
	}
}

func (s *Standby) stop(why Reason) {
	switch s.state {
	case TakingOver, Dropping, Parting:
	case Active:
		s.reason = why
		s.finish()
	default:
		s.drop(why)
	}
}

func (s *Standby) received(e *Event) {
	m := &e.Message
	if m.Generation != s.cfg.Generation {
		s.reply(m.Round, Message{Type: Refuse, Reason: BadGeneration})
		s.do(Action{Kind: Close, Round: m.Round})
		if m.Round == s.round && s.up {
			s.broken()
		}
		return
	}
	switch {
	case s.state >= TakingOver:
		s.late(m)
		return
	case m.Type == Hello && m.Timeout > s.cfg.Setup:
		// We could not promise to bear that.
		s.reply(m.Round, Message{Type: Refuse, Reason: BadMessage})
		s.do(Action{Kind: Close, Round: m.Round})
		return
	case m.Type == Hello && m.Round > s.round:
		s.greeted(m)
		return
	case m.Type == Hello && m.Round == s.round && s.up:
		s.refuse(StaleRound)
		return
	case m.Type == Hello:
		s.reply(m.Round, Message{Type: Refuse, Reason: StaleRound})
		s.do(Action{Kind: Close, Round: m.Round})
		return
	case m.Round != s.round || !s.up:
		return // of a connection that is over
	}
	if s.state == Silent {
		s.state = Ready
	}
	s.stale = s.stale || s.cfg.Stale > 0 && s.now.Sub(s.came) > s.cfg.Stale
	s.heard, s.came = s.now, s.now
	switch {
	case m.Type == Heartbeat && m.Stamp >= s.stamp:
		s.stamp = m.Stamp
	case (m.Type == Data || m.Type == EpochEnd) && s.refused:
	case m.Type == Data:
		if m.Epoch != s.next || m.Seq != s.seq {
			s.redo(OutOfOrder)
			return
		}
		s.seq++
		s.busy++
		direct := s.state == Receiving
		if direct {
			s.torn = true
		} else {
			s.staged = true
		}
		s.do(Action{Kind: Stage, Epoch: s.next, Direct: direct})
	case m.Type == EpochEnd:
		s.commit(m, &e.Tally)
	case m.Type == Restart && m.Epoch == s.next && s.state == Ready:
		s.restart()
	case m.Type == Sums && m.Epoch == s.epoch && s.state == Ready && s.seq == 0:
		s.busy++
		s.do(Action{Kind: Compare, Epoch: s.epoch})
	case m.Type == Handover && m.Epoch == s.epoch && s.state == Ready && s.seq == 0 && !s.stale:
		if s.cfg.Arbitration == WithArbiter {
			s.judge()
		} else {
			s.takeOver(HandedOver, s.now)
		}
	case m.Type == End:
		s.drop(PeerEnded)
	case m.Type == Refuse:
		s.do(Action{Kind: Close, Round: s.round})
		s.broken()
		if m.Reason == GoingAlone {
			s.state = Waiting
		}
	default:
		s.refuse(BadMessage)
	}
}

// late is what comes once it is decided that the guest runs here, or that the copy is
// no more: an old primary that lives after all must know that, once it is so.
func (s *Standby) late(m *Message) {
	if m.Type == Hello && (m.Round > s.round || !s.up) {
		s.join(m)
	}
	switch {
	case s.state == Active && m.Type == Heard:
		if s.ask.until == Never { // else the grant needs somebody who renews it
			s.finish()
		} else {
			s.beatAt = Never
		}
	case s.state == Active:
		s.reply(m.Round, Message{Type: Over})
		if s.up && m.Type == Hello {
			s.beatAt = s.now.Add(tellEvery)
		}
	case s.state == Parting && m.Type == Hello:
		s.reply(m.Round, Message{Type: Ended, Reason: s.reason})
	}
}

// join makes the connection of a Hello the one that counts.
func (s *Standby) join(m *Message) {
	if s.up {
		s.do(Action{Kind: Close, Round: s.round})
		s.broken()
	}
	s.round, s.up, s.clean = m.Round, true, false
}

// greeted: the primary has made a connection. Joining its round gives up whatever
// was asked or promised in an earlier one.
func (s *Standby) greeted(m *Message) {
	s.join(m)
	s.ask.reset()
	if s.met && m.Session != s.session || m.Known > s.epoch || s.epoch > m.Next {
		// It cannot go on with us, and so will go on with the guest alone. It hears so
		// once our copy can never run any more.
		s.drop(PrimaryLost)
		return
	}
	s.met, s.session = true, m.Session
	s.heard, s.came, s.stamp, s.stale = s.now, s.now, m.Stamp, false
	s.timeout = max(s.cfg.Timeout, m.Timeout)
	s.beatAt = s.now.Add(s.cfg.Interval)

	armed := s.epoch > 0 && !s.torn && !m.Alone && s.epoch >= m.Epoch
	s.state = Receiving
	if armed {
		s.state = Ready
	}
	s.next, s.seq = max(m.Next, s.epoch+1), 0
	s.send(Message{Type: Welcome, Epoch: s.epoch, Armed: armed, Echo: s.stamp})
}

// commit acknowledges the epoch that is due, if all of it is here.
func (s *Standby) commit(m *Message, got *Tally) {
	switch {
	case m.Epoch != s.next:
		s.redo(OutOfOrder)
		return
	case m.Tally != *got || got.Frames != s.seq || s.seq == 0:
		s.redo(BadCount)
		return
	}
	direct := s.state == Receiving
	s.do(Action{Kind: Commit, Epoch: s.next})
	s.epoch, s.next, s.seq = s.next, s.next+1, 0
	s.staged, s.torn, s.ever = false, false, true
	s.state = Ready
	s.send(Message{Type: Ack, Epoch: s.epoch})
	if !direct {
		s.busy++
		s.do(Action{Kind: Apply, Epoch: s.epoch})
	}
}

// redo refuses what came of an epoch. What went into the copy as it came is sent anew
// over another connection, all of it; else this one goes on.
func (s *Standby) redo(why Reason) {
	if s.state != Ready {
		s.refuse(why)
		return
	}
	s.restart()
	s.refused = true
	s.send(Message{Type: Resync, Epoch: s.next, Reason: why})
}

// restart drops what has come of an epoch that is not in the copy yet.
func (s *Standby) restart() {
	s.seq, s.refused = 0, false
	if s.staged {
		s.staged = false
		s.do(Action{Kind: Unstage})
	}
}

// refuse ends the connection with a word. What was committed stays.
func (s *Standby) refuse(why Reason) {
	if s.up {
		s.send(Message{Type: Refuse, Reason: why})
		s.do(Action{Kind: Close, Round: s.round})
		s.broken()
	}
}

// broken: there is no connection any more.
func (s *Standby) broken() {
	s.up, s.beatAt = false, Never
	s.restart()
	if s.state == Receiving {
		s.state = Waiting
	}
}

// judge asks the arbiter. Nothing that still comes in this round counts: what is
// asked is about it, and no more is promised in it.
func (s *Standby) judge() {
	if s.state != Judging {
		s.state = Judging
		s.ask.at = s.now
	}
	s.refuse(Silence)
}

func (s *Standby) answered(e *Event) {
	if !s.ask.answered(e, s.now, &s.cfg) {
		return
	}
	switch {
	case e.Verdict == Granted && s.state == Judging:
		s.takeOver(Silence, s.heard.Add(s.timeout))
	case e.Verdict == Denied && s.state == Judging:
		// The primary goes on alone. What it did since is not here.
		s.state = Waiting
		s.ask.reset()
	case e.Verdict == Denied && (s.state == TakingOver || s.state == Active):
		s.drop(LeaseLost)
	}
}

// takeOver is the decision. It is carried out once the primary has stopped.
func (s *Standby) takeOver(why Reason, when Time) {
	s.state, s.reason, s.dueAt = TakingOver, why, when
	s.restart()
}

func (s *Standby) drop(why Reason) {
	s.state, s.reason = Dropping, why
	s.ask.reset()
	s.do(Action{Kind: DropCopy})
}

func (s *Standby) finish() {
	if s.up {
		s.do(Action{Kind: Close, Round: s.round})
		s.up = false
	}
	s.do(Action{Kind: Finish, Reason: s.reason})
	s.state = StandbyOver
}

func (s *Standby) run() {
	switch s.state {
	case Parting:
		if s.now >= s.partBy || !s.up && s.reason != NotTaken {
			s.finish()
		}
		return
	case StandbyOver:
		return
	}
	if s.now >= s.judgement() {
		s.silent()
	}
	switch {
	case !s.up || s.now < s.beatAt:
	case s.state == Active:
		s.beatAt = s.now.Add(tellEvery)
		s.send(Message{Type: Over})
	default:
		s.beatAt = s.now.Add(s.cfg.Interval)
		s.send(Message{Type: Heartbeat, Echo: s.stamp})
	}
	if s.state == Dropping {
		return
	}
	if s.state == TakingOver && !s.took && s.now >= s.dueAt && s.now < s.ask.until {
		s.took = true
		s.do(Action{Kind: TakeOver, Epoch: s.epoch, Reason: s.reason})
	}
	if lapsed := s.took && s.now >= s.ask.until; lapsed != s.pause {
		s.pause = lapsed
		if lapsed {
			s.do(Action{Kind: Pause})
		} else {
			s.do(Action{Kind: Resume})
		}
	}
	if s.asks() && s.now >= s.ask.at {
		s.do(Action{Kind: Ask, Question: s.ask.put(s.now, Question{s.cfg.Generation, s.round, s.round})})
	}
}

func (s *Standby) asks() bool {
	return s.state == Judging || (s.state == TakingOver || s.state == Active) && s.ask.until != Never
}

// silent decides what silence means.
func (s *Standby) silent() {
	switch s.state {
	case Ready:
		switch {
		case s.cfg.Arbitration == WithArbiter:
			s.judge()
		case s.closed():
			s.drop(PrimaryLost)
		case s.cfg.Arbitration == Automatic && !s.clean:
			s.takeOver(Silence, s.now)
		default:
			s.state = Silent
		}
	case Waiting, Receiving:
		s.drop(PrimaryLost)
	case Active:
		s.finish()
	}
}

// closed: the primary is as good as lost, and its guest is not. A host that lost its
// power closes nothing, but the kernel of one whose replicator was killed does, and the
// guest runs on there.
func (s *Standby) closed() bool {
	return s.clean && s.cfg.GiveUp > 0 && s.cfg.Arbitration != WithArbiter
}

// judgement is when silent has something to decide.
func (s *Standby) judgement() Time {
	if s.busy > 0 && s.state < Silent {
		return Never // whatever comes meanwhile is not seen
	}
	switch s.state {
	case Ready:
		if s.closed() {
			return max(s.heard.Add(max(s.timeout, s.cfg.GiveUp)), s.listen)
		}
		return max(s.heard.Add(s.timeout), s.listen)
	case Waiting, Receiving:
		if s.ever && s.cfg.GiveUp == 0 {
			return Never
		}
		patience := s.cfg.GiveUp
		if !s.ever {
			patience = s.cfg.Setup
		}
		return max(s.heard.Add(patience), s.listen)
	case Active:
		if s.ask.until == Never { // else the grant needs somebody who renews it
			return s.dueAt.Add(lingerFor)
		}
	}
	return Never
}

// Deadline returns when the machine must be stepped, if nothing happens before.
func (s *Standby) Deadline() Time {
	switch s.state {
	case Parting:
		return s.partBy
	case Dropping:
		return s.beatAt
	case StandbyOver:
		return Never
	}
	t := min(s.judgement(), s.beatAt)
	if s.state == TakingOver && !s.took && s.now < s.ask.until {
		t = min(t, s.dueAt)
	}
	if s.took && !s.pause {
		t = min(t, s.ask.until)
	}
	if s.asks() {
		t = min(t, s.ask.at)
	}
	return t
}
