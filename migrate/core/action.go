package core

// ActionKind is what is to be done.
type ActionKind uint8

const (
	// Send sends Message on the connection of Message.Round. It does not wait for the
	// other side, and does nothing if the connection is gone.
	// Before an Ack: Commit. Before Ended: CopyDropped, not Unsure. Before Over: TookOver.
	// Before Heard: it is remembered, should we die before our copy does.
	Send ActionKind = iota + 1
	// Close closes the connection of Round once what was sent has left it, within a
	// short time. No event of this connection is needed any more.
	Close
	// Ask puts Question to the arbiter. Answered, always. A new one replaces what was
	// asked before.
	// Before, on the primary: Pause, unless a grant is only renewed in time.
	Ask

	// Of the primary.

	// Dial connects and authenticates. Dialed or DialFailed, with Round. Nothing is
	// sent before the Hello that follows.
	// Before: the connection before this one is closed.
	Dial
	// Copy sends pages as Data of Epoch while the guest runs: all, if Full (which
	// also turns log-dirty on anew), else those that changed since the last pass. The
	// first pass of an epoch that is not Full sends those changed since Base. If Cold,
	// nothing is assumed of what the other side caches. What an epoch's Tally counts
	// is all of its Data on this connection, in whatever passes. Copied or
	// CheckpointFailed.
	// The set of what changed since the last commit is kept until the next one, since
	// a broken connection makes all of it due again.
	Copy
	// Checkpoint suspends the guest, seals the output if Seal, reads what changed,
	// copies it and the processors' state to the buffer, and resumes the guest.
	// Captured or CheckpointFailed. Where not Seal, the seal before stands: what came
	// after it belongs to the epoch after this one, which is safe.
	// Before: the buffer is free, that is the epoch before was committed or is
	// discarded; no seal is outstanding if Seal.
	Checkpoint
	// Cancel ends a Copy or Checkpoint early. It is answered as they are.
	Cancel
	// SendEpoch sends what Checkpoint captured, as Data and EpochEnd of Epoch, on the
	// connection of Round. If Cold, nothing is assumed of what the other side caches,
	// and it is sent from the beginning.
	// Before: Captured, not Lost. From here on the standby may have it.
	SendEpoch
	// Release lets out the output that was sealed for Epoch.
	// Before: its Ack, or the word of a Welcome that the standby has it. Commits
	// writes likewise; what changed up to this epoch need not be kept any more.
	Release
	// Discard frees the buffer of Epoch without a commit. What it changed stays in
	// the set of what changed since the last one.
	// Before: the standby was never sent it, or its copy is not to be run, or all of
	// it will be sent again.
	Discard
	// Flow lets out all held output and holds no more until the next Seal.
	// Before: no standby has a copy it may run (it said so, or was never sent one),
	// or the arbiter granted to go on alone; or, without an arbiter, silence was borne
	// for the time-out, or the end was not confirmed in time.
	Flow
	// Pause stops the guest where it stands; Resume undoes it. They nest with a
	// Checkpoint's suspension, and a guest that is being taken over does not begin to
	// run in between. Idempotent.
	// Before Resume: a promise of the standby or a grant of the arbiter that lasts.
	Pause
	Resume
	// Destroy ends the guest here, and what it sent that is held is never let out. It
	// is tried until it succeeds. Destroyed.
	// Before: the standby has said that it runs the guest, or the arbiter has.
	Destroy

	// Of the standby.

	// Stage takes the pages of the Data just received: where they belong if Direct
	// (no copy is there that may be run), else into a buffer, from where only Apply
	// takes them. Done, and Bad before it if that fails. Until it is Done, the other side
	// is not heard, and not to blame.
	Stage
	// Unstage empties that buffer.
	Unstage
	// Commit makes the staged Epoch what TakeOver resumes, at once and as a whole.
	// Before: all of it is staged, and it is what the primary counted.
	Commit
	// Apply brings the committed Epoch into the copy. The next Stage and TakeOver
	// come after it. Done.
	Apply
	// Compare looks at what the copy has of the pages that the Sums just received
	// name, and answers the last ones with Compared. Done, and Bad before it if they
	// cannot be told.
	// Before: Apply.
	Compare
	// TakeOver resumes the guest from Epoch. TookOver or TakeOverFailed. If Reason is
	// HandedOver, it is first remembered that the primary goes on by itself if it does
	// not hear that this was done.
	// Before: the promise made to the primary has run out, and the arbiter has granted
	// it, which still holds: what a take-over does besides running the guest, such as
	// to announce it, a Pause does not undo. Without an arbiter, see the package's
	// comment. Epoch is committed, and whatever else is staged is dropped.
	TakeOver
	// DropCopy destroys the copy. CopyDropped.
	DropCopy

	// Finish is the last action: protection is over for Reason. Everything is closed,
	// log-dirty is off, the guest is left as it is. A grant for a time is renewed no
	// more: who else may have the guest is not this protection's any longer.
	// Before, on the primary: Flow, or Destroyed.
	Finish
)

// Action is something to be done. Fields its Kind does not name mean nothing.
type Action struct {
	Kind     ActionKind
	Round    Round
	Epoch    Epoch
	Base     Epoch // Copy: what the standby was last equal to
	Message  Message
	Question Question
	Reason   Reason

	Full, Seal, Cold, Direct bool
}
