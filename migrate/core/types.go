package core

import (
	"errors"
	"fmt"
	"math"
	"time"
)

// Epoch numbers what lies between two checkpoints of one protection, from 1.
type Epoch uint64

// Generation numbers the protections of one guest.
type Generation uint64

// Session tells the processes apart that speak for a primary.
type Session uint64

// Round numbers the connections of one protection, from 1.
type Round uint64

// Time is a reading of a monotonic clock in nanoseconds. Only differences mean
// anything; it is never compared with another host's.
type Time int64

// Never is later than any time.
const Never Time = math.MaxInt64

// Add returns t plus d, at most Never.
func (t Time) Add(d time.Duration) Time {
	if d > 0 && t > Never-Time(d) || t == Never {
		return Never
	}
	return t + Time(d)
}

// Sub returns t minus u.
func (t Time) Sub(u Time) time.Duration { return time.Duration(t - u) }

// Arbitration is who decides whether one host may go on without the other.
type Arbitration uint8

//go:generate go run golang.org/x/tools/cmd/stringer -type=Arbitration,PrimaryState,StandbyState,EventKind,ActionKind,MessageType,Verdict -output=kind_string.go
//go:generate go run golang.org/x/tools/cmd/stringer -type=Reason -linecomment -output=reason_string.go
const (
	NoArbiter   Arbitration = iota // somebody who tells the standby to take over
	Automatic                      // each side for itself, by silence: one runner is not guaranteed
	WithArbiter                    // an arbiter
)

// Config is what both machines of a protection need to know. Both sides must have
// the same one.
type Config struct {
	Generation  Generation
	Arbitration Arbitration

	Interval time.Duration // from heartbeat to heartbeat
	Timeout  time.Duration // how long silence is borne
	// Margin is what the primary stops before the end of a promise or a grant: the
	// time to pause the guest, plus what the two clocks may differ in a Timeout.
	Margin time.Duration
	// Setup bounds the silence while no epoch has ever been committed: slow is better
	// than not at all then.
	Setup time.Duration
	// GiveUp is how long after a loss protection waits for the other side to come
	// back, for a resync. 0: for ever.
	GiveUp time.Duration
	// Stale is the silence after which the standby does not do what it finds on a
	// connection: it may have been asked to take over long ago. 0: it does.
	Stale time.Duration
	// Session is the primary's: a number of its process, which nobody else can go on
	// with. The standby has none.
	Session Session
}

// Validate refuses what cannot work.
func (c *Config) Validate() error {
	switch {
	case c.Generation == 0:
		return errors.New("generation 0")
	case c.Arbitration > WithArbiter:
		return fmt.Errorf("unknown %v", c.Arbitration)
	case c.Interval <= 0 || c.Timeout < 2*c.Interval:
		return fmt.Errorf("a heartbeat time-out of %v with an interval of %v", c.Timeout, c.Interval)
	case c.Margin < 0 || c.Timeout-c.Margin < 2*c.Interval:
		return fmt.Errorf("a margin of %v leaves less than two heartbeats of the time-out", c.Margin)
	case c.Setup < c.Timeout:
		return fmt.Errorf("a set-up time-out of %v, less than the heartbeat's", c.Setup)
	case c.GiveUp < 0:
		return fmt.Errorf("giving up after %v", c.GiveUp)
	}
	return nil
}

// Trigger is what asks for a checkpoint, apart from the longest interval.
type Trigger uint8

const (
	OnOutput   Trigger = iota // the first output in the epoch: Kemari's rule
	OnInterval                // the longest interval, a flush and a full log only
)

// Settings are what may be changed while a protection runs.
type Settings struct {
	Trigger  Trigger
	Min, Max time.Duration // shortest and longest time from checkpoint to checkpoint
	// PausedShare bounds the part of the time in which the guest stands still for
	// checkpoints, in percent, by making the shortest time longer where one pause
	// was long. It goes before Max.
	PausedShare int
}

// DefaultPausedShare is Settings.PausedShare where nobody has set it.
const DefaultPausedShare = 30

// Validate refuses what cannot work.
func (s *Settings) Validate() error {
	switch {
	case s.Trigger > OnInterval:
		return fmt.Errorf("unknown trigger %d", s.Trigger)
	case s.Min < 0 || s.Max < s.Min || s.Max <= 0:
		return fmt.Errorf("checkpoints from %v to %v", s.Min, s.Max)
	case s.PausedShare < 1 || s.PausedShare > 100:
		return fmt.Errorf("a paused share of %d %%", s.PausedShare)
	}
	return nil
}

// Reason says why a connection was refused or a protection ended.
type Reason uint8

const (
	NoReason Reason = iota // none

	// Of a refusal. The other side connects again, and both go on.
	BadGeneration // it is of another generation
	StaleRound    // it is of a connection that is over
	OutOfOrder    // an epoch or a part of one was repeated, left out or reordered
	BadCount      // what came is not what was said to be sent
	BadData       // what came cannot be understood
	BadMessage    // a message that cannot come here
	Silence       // it was silent
	GoingAlone    // the primary goes on alone: do not run what you have

	// Of an end.
	Asked       // somebody asked for it
	GuestGone   // the guest ended by itself
	Failed      // this side cannot go on
	PeerEnded   // the other side ended it
	StandbyLost // the standby is lost
	PrimaryLost // the primary is lost
	TakenOver   // the standby runs the guest; the primary's copy was destroyed
	HandedOver  // the primary asked the standby to take over
	OutOfStep   // the two sides cannot agree on what the standby has
	Refused     // the standby refused the same epoch again and again
	LeaseLost   // the arbiter gave the guest to somebody else
	CleanedUp   // the process was killed; nothing protects the guest any more
	NotTaken    // the copy could not be made to run
)

// MessageType is what a Message means.
type MessageType uint8

const (
	Hello     MessageType = iota + 1 // primary, first: Epoch, Next, Alone, Stamp, Timeout
	Welcome                          // standby's answer: Epoch, Armed, Echo
	Data                             // primary: a part of epoch Epoch, numbered by Seq from 0
	EpochEnd                         // primary: the epoch is complete; what Tally says was sent
	Ack                              // standby: Epoch is whole in its memory: committed
	Heartbeat                        // either: I live; Stamp (primary), Echo (standby)
	Refuse                           // either: Reason; this connection is over, make another
	End                              // primary: Reason; drop your copy and say Ended
	Ended                            // standby: Reason; my copy is dropped
	Over                             // standby: the guest runs here; destroy your copy
	Heard                            // primary: I have heard that it does
	Resync                           // standby: what came of Epoch is refused, for Reason; begin it anew
	Restart                          // primary: Epoch begins anew; forget what came of it
	Handover                         // primary: the guest stands here since Epoch; take over from it
	Sums                             // primary: what some pages were at Epoch
	Compared                         // standby: what the copy has of all that Sums named
)

// Message is what one side says to the other, without the pages. Every one
// carries the Generation and Round of its connection.
type Message struct {
	Type       MessageType
	Generation Generation
	Round      Round

	Epoch Epoch // Hello: the oldest that may be run. Welcome: the last that is committed
	Next  Epoch // Hello: the one that will be sent next, unless the standby has it
	Known Epoch // Hello: the last one that the primary knows the standby to have
	// Session, of a Hello, is the primary's.
	Session Session
	Alone   bool // Hello: none may be run, output leaves as it comes
	Armed   bool // Welcome: the copy may be run, and is of Epoch; else Epoch is what it was last equal to

	Stamp   Time          // the primary's clock when it sent this
	Echo    Time          // the last Stamp that came in: the promise counts from it
	Timeout time.Duration // Hello: the primary's, which the standby bears at least

	Seq    uint32 // Data
	Tally  Tally  // EpochEnd: what was sent
	Reason Reason // Refuse, End, Ended
}

// Tally counts what belongs to an epoch, so that nothing can be missing from it.
type Tally struct {
	Frames uint32
	Pages  uint64
	Bytes  uint64
	Sum    uint32 // over the frames, in their order
}

// Question is what an arbiter is asked, for this host. See the package's comment
// for the answer.
type Question struct {
	Generation Generation
	Since      Round // the other side may be in any round from this one on
	Round      Round // the asker's
}

// Verdict is an arbiter's answer.
type Verdict uint8

const (
	NoAnswer Verdict = iota // none came, or not in time: the question may have been granted all the same
	Granted
	Denied
)
