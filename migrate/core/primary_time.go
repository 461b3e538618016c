package core

// run decides what time decides, and brings what is so to what is intended.
func (p *Primary) run() {
	if p.state == Destroying || p.state == PrimaryOver {
		return
	}
	if p.now >= p.greetBy {
		p.hangUp(Silence)
	}
	p.judge()
	p.connect()
	p.pause(p.state == Asking || p.uncovered() && p.now >= p.ask.until)
	if p.asks() && p.now >= p.ask.at {
		p.do(Action{Kind: Ask, Question: p.ask.put(p.now, Question{p.cfg.Generation, p.joined, p.hello})})
	}
	if p.uncovered() && p.held && p.work != capturing {
		p.do(Action{Kind: Flow})
		p.held, p.sealed = false, false
	}
	p.begin()
	if p.ending && p.state == Alone && p.link == down && p.work == idle {
		p.pause(false)
		p.finish()
	}
}

func (p *Primary) uncovered() bool { return p.state == Alone || p.state == Copying }

// judge decides what silence means.
func (p *Primary) judge() {
	if p.now < p.judgement() {
		return
	}
	switch p.state {
	case Protected:
		if p.cfg.Arbitration == WithArbiter {
			p.lapse()
		} else {
			p.alone()
		}
	case Copying:
		p.hangUp(Silence)
	case Alone:
		if p.ending {
			p.closed() // a connection that is not up yet, or nobody who confirms
		} else {
			p.end(StandbyLost)
		}
	}
}

// judgement is when judge has something to decide.
func (p *Primary) judgement() Time {
	switch p.state {
	case Protected:
		if p.cfg.Arbitration == WithArbiter {
			return min(p.endBy, p.echoed.Add(p.cfg.Timeout-p.cfg.Margin))
		}
		silent := min(p.heard.Add(p.cfg.Timeout), p.echoed.Add(2*p.cfg.Timeout))
		return min(p.endBy, max(silent, p.listen))
	case Copying:
		return min(p.endBy, max(p.heard.Add(p.cfg.Setup), p.listen))
	case Alone:
		switch {
		case p.ending && p.link == down:
			return Never
		case p.ending && p.link == up:
			return p.endBy
		case p.ending:
			return p.now
		case p.lost == Never || p.ever && p.cfg.GiveUp == 0:
			return Never
		case p.ever:
			return p.lost.Add(p.cfg.GiveUp)
		default:
			return max(p.lost.Add(p.cfg.Setup), p.listen)
		}
	}
	return Never
}

// connect keeps the connection, as far as there is one or should be.
func (p *Primary) connect() {
	if p.dials() && p.now >= p.dialAt {
		p.round++
		p.link = dialing
		p.do(Action{Kind: Dial, Round: p.round})
	}
	if p.link != up {
		return
	}
	if p.ending && p.told != p.round {
		p.told = p.round
		p.send(Message{Type: End, Reason: p.reason})
	}
	if p.now >= p.beatAt {
		p.beatAt = p.now.Add(p.cfg.Interval)
		p.send(Message{Type: Heartbeat, Stamp: p.now})
	}
}

func (p *Primary) dials() bool {
	return p.link == down && !p.shy && p.hello != maxRound && (!p.ending || p.covered())
}

// asks reports whether the arbiter is to be asked as soon as ask.at has come. While
// a Hello is on its way it is not: the answer may end the question.
func (p *Primary) asks() bool {
	return p.state == Asking && p.link != greeting || p.uncovered() && p.ask.until != Never
}

// begin starts the next work, if it is due.
func (p *Primary) begin() {
	if !p.ready() {
		return
	}
	switch {
	case p.state == Copying || p.recopy:
		p.copy()
	case p.now >= p.policy.due(&p.set):
		p.epoch, p.full, p.all = p.next, false, false
		p.checkpoint()
	}
}

func (p *Primary) ready() bool {
	return p.work == idle && p.link == up && !p.ending && (p.state == Copying || p.state == Protected)
}

// pause makes the guest stand, or run again.
func (p *Primary) pause(want bool) {
	if want == p.paused || p.gone {
		return
	}
	p.paused = want
	if want {
		p.do(Action{Kind: Pause})
	} else {
		p.do(Action{Kind: Resume})
	}
}

// Deadline returns when the machine must be stepped, if nothing happens before.
func (p *Primary) Deadline() Time {
	if p.state == Destroying || p.state == PrimaryOver {
		return Never
	}
	t := min(p.judgement(), p.greetBy, p.beatAt)
	if p.dials() {
		t = min(t, p.dialAt)
	}
	if p.asks() {
		t = min(t, p.ask.at)
	}
	if p.uncovered() && !p.paused {
		t = min(t, p.ask.until)
	}
	if p.ready() {
		t = min(t, p.policy.due(&p.set))
	}
	return t
}
