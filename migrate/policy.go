package migrate

import (
	"fmt"
	"time"
)

// Trigger is what asks for a checkpoint, apart from the longest interval.
type Trigger string

const (
	TriggerOutput   Trigger = "output"   // the first frame held in the epoch: Kemari's rule
	TriggerInterval Trigger = "interval" // nothing else
)

// DefaultShare is the part of its time that a guest stands still at most, where
// nothing else is asked for.
const DefaultShare = 0.3

// Policy says when a checkpoint is due.
type Policy struct {
	Trigger  Trigger
	Min, Max time.Duration // shortest and longest time from checkpoint to checkpoint
	// Share bounds the part of its time that the guest stands still for checkpoints:
	// after a long pause the next one is kept from coming sooner, whatever Min and Max
	// say. 0 is DefaultShare; 1 or more is no bound.
	Share float64
}

// Validate says what is wrong with a policy.
func (p Policy) Validate() error {
	switch {
	case p.Trigger != TriggerOutput && p.Trigger != TriggerInterval:
		return fmt.Errorf("checkpoint trigger %q, want %q or %q", p.Trigger, TriggerOutput, TriggerInterval)
	case p.Min < 0 || p.Max <= 0 || p.Min > p.Max:
		return fmt.Errorf("a checkpoint every %v at the soonest and %v at the latest", p.Min, p.Max)
	case !(p.Share >= 0): // nor NaN
		return fmt.Errorf("a paused share of %v", p.Share)
	}
	return nil
}

// after is how long after the beginning of a checkpoint that cost pause the next
// one may begin at the soonest, and must at the latest. Each pause lies in the
// time from its checkpoint to the next, so the bound on the share holds for every
// one of these times, and not only in the mean.
func (p Policy) after(pause time.Duration) (soonest, latest time.Duration) {
	share := p.Share
	if share == 0 {
		share = DefaultShare
	}
	soonest = p.Min
	if share < 1 {
		soonest = max(soonest, time.Duration(float64(pause)/share))
	}
	return soonest, max(p.Max, soonest)
}
