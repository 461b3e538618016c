package core

import "time"

// EventKind is what happened.
type EventKind uint8

// Events that report what became of an action carry the number of it: Round of
// Dial and Close, Epoch of Copy and Checkpoint. Those of an older number are
// ignored.
const (
	Tick     EventKind = iota // time has passed, nothing else
	Received                  // Message, from the connection of round Message.Round; Tally for EpochEnd
	Gone                      // the connection of Round is gone; Clean: closed by the other host

	// Of the primary.
	Dialed           // Dial: the connection of Round stands and is authenticated
	DialFailed       // Dial: it does not
	Copied           // Copy: all pages of the pass are sent; Pages
	Captured         // Checkpoint: the epoch is in the buffer, the guest resumed; Pause, Pages, Lost
	CheckpointFailed // Copy or Checkpoint: it was cancelled or failed; the guest runs
	OutputHeld       // the first output in this epoch is held
	Flushed          // the guest wants to know that its writes are safe
	LogFull          // the write log has no more room
	DirtyLost        // log-dirty was off for a while: what the guest changed is not known
	GuestEnded       // the guest shut down, crashed or was destroyed by somebody else
	Change           // the operator changed the Settings; what Validate refuses is ignored
	Destroyed        // Destroy: done

	// Of the standby.
	Bad            // what Stage was to take cannot be understood, or is outside the guest; before any later Received
	Done           // Stage, Apply or Compare: it is carried out, Bad or not
	FailOver       // the operator orders to take over, and answers for it where there is no arbiter
	TookOver       // TakeOver: the guest runs here
	TakeOverFailed // TakeOver: it does not, but for Unsure: that is not known
	CopyDropped    // DropCopy: done

	// Of both.
	Answered // Ask: Question, Verdict, and For
	Stop     // somebody asks to end protection
	Failure  // something this side needs does not work any more
)

// Event is something that happened. Fields its Kind does not name are ignored.
type Event struct {
	Kind    EventKind
	Round   Round
	Epoch   Epoch
	Message Message
	Tally   Tally // of what came in since the last epoch, in this connection
	Clean   bool

	Pages int
	Pause time.Duration // how long the guest stood still
	Lost  bool          // log-dirty was found to have been off since the bitmap was read before

	Unsure bool // TakeOverFailed

	Settings Settings

	Question Question
	Verdict  Verdict
	For      time.Duration // Granted: how long from when it was asked; 0: for good
}
