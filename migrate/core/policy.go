package core

import "time"

// policy decides when the next checkpoint is due.
type policy struct {
	began  Time          // the last one
	pause  time.Duration // that it cost
	wanted bool          // something asks for the next one
}

func (p *policy) reset(now Time) { *p = policy{began: now} }

func (p *policy) begin(now Time) { *p = policy{began: now} }

func (p *policy) paused(d time.Duration) { p.pause = min(max(d, 0), time.Hour) }

// due returns when. A checkpoint that cost a pause is followed by so much time that
// the pause is no more than the set share of both together; as this holds for each,
// it holds for any number.
func (p *policy) due(s *Settings) Time {
	share := time.Duration(s.PausedShare)
	shortest := max(s.Min, (p.pause*100+share-1)/share)
	if p.wanted {
		return p.began.Add(shortest)
	}
	return p.began.Add(max(shortest, s.Max))
}
