package core

// asker is one side's business with the arbiter.
type asker struct {
	q     Question
	open  bool // asked, not answered
	asked Time
	at    Time // when to ask next
	until Time // end of the grant, less the margin; Never: there is none, or it is for good
}

func (a *asker) reset() { *a = asker{at: Never, until: Never} }

// put notes that q is asked now.
func (a *asker) put(now Time, q Question) Question {
	a.q, a.open, a.asked, a.at = q, true, now, Never
	return q
}

// giveUp makes an answer that still comes mean nothing; ask again at once if need be.
func (a *asker) giveUp() {
	if a.open {
		a.open, a.at = false, a.asked
	}
}

// answered notes an answer, and reports whether it is one to what is asked.
func (a *asker) answered(e *Event, now Time, cfg *Config) bool {
	if !a.open || e.Question != a.q {
		return false
	}
	a.open = false
	switch {
	case e.Verdict != Granted:
		a.at = now.Add(cfg.Interval)
	case e.For > 0:
		// It counts from the question: the arbiter may have granted it right then.
		a.until = a.asked.Add(e.For - cfg.Margin)
		a.at = a.asked.Add(e.For / 3)
	default:
		a.until, a.at = Never, Never
	}
	return true
}
