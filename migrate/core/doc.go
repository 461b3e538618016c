// Package core is Kemari's protocol as two pure state machines, Primary and
// Standby: events go in, actions come out. It has no goroutine, no clock, no I/O
// and no log, so that every order of events can be tried; the engine in migrate
// drives it. It imports nothing of ours.
//
// # Driving a machine
//
//	for {
//		wait for an event, but no longer than until m.Deadline()
//		for _, a := range m.Step(now, event) { carry out a }   // Tick if it was the deadline
//	}
//
// Step is called by one goroutine. The slice it returns is valid until the next
// Step, and nothing is allocated once it has grown to its size. The actions are
// carried out in their order. One that is answered by an event (its comment names
// it) may go on while others are begun; every other has happened before the next
// begins. What an action's comment demands to have happened before, Step has seen
// to; it says so for who reads the engine, or changes it.
//
// Time is a monotonic clock's that goes on while the host is frozen or asleep
// (CLOCK_BOOTTIME). A late Step is noticed: silence proves nothing to who did not
// listen. After any standstill the machine must be stepped before the guest gets
// to run far: the guest of a thawed host runs for as long as that takes, its
// output held.
//
// # Rounds
//
// A protection has one Generation for its life. Each connection in it has a Round,
// numbered upwards by the primary. By answering a Hello the standby joins its
// round: it gives up every question it asked the arbiter in an earlier one, and
// refuses earlier rounds' connections. So after any break both begin with a clean
// slate, and what is late (a frame, a connection, an arbiter's answer) belongs to
// a round that is over and is ignored.
//
// # Who may run the guest
//
// A standby that holds a committed epoch which it may run is called armed. With an
// arbiter, the primary may run the guest
//
//   - while no standby can be armed: before the first epoch is sent, or once the
//     standby has said that it is not, or has dropped its copy; or
//   - on the standby's promise: each of its heartbeats tells the stamp of the last
//     heartbeat it had from the primary, and promises not to take over before the
//     heartbeat time-out has passed since it received it. So the primary may run
//     until that stamp, its own, plus the time-out less a margin; or
//   - because the arbiter granted it to go on alone. The standby's copy is then out
//     of date, and of use only as the base of a resync.
//
// When the promise has run out, the primary pauses the guest and asks. The standby
// asks as soon as its promise is over. Whoever is granted runs; whoever is refused
// ends its copy (the primary) or keeps it as a base (the standby). Who gets no
// answer goes on asking and runs nothing. A grant may be for a time, then it is
// renewed, and the guest pauses at its end less the margin.
//
// # The question
//
// A Question names the domain's generation, the round the asker is in, and the
// last round in which it knows the other one to be (Since). The arbiter keeps
// {generation, round, active host} and answers by compare-and-swap:
//
//	refused   if its record is of a later generation, or is of this one, in a round
//	          >= Since, and names another host
//	granted   else, and the record becomes {generation, Round, asker}, but that the
//	          round never goes back
//
// Asking again is harmless, and a question that was given up, but still reaches
// the arbiter, binds nobody: the round it was asked in is over.
//
// # What is refused
//
// What the standby cannot take of an epoch it refuses with Resync, while it keeps what
// is committed: it ignores what still comes of that epoch until Restart, and the
// primary sends it anew on the same connection. Where the pages have gone into the copy
// as they came, and where the primary refuses, the connection is closed with a word.
//
// # Who hears what of a take-over
//
// While it takes over the standby answers nobody, and shows life, so that who waits for
// the answer knows what for. Once the guest runs it says Over, again and again, until the
// primary has said Heard; if the copy could not be made to run it is dropped, and Ended
// is said. Where it is not known whether it runs nothing is said at all. A Hello of
// another process than the one that began, or of one that knows of another epoch than the
// standby has, is the end of protection: its sender goes on alone, and hears Ended once
// there is no copy any more.
//
// A standby that is asked to by Handover takes over from the last committed epoch, or
// asks the arbiter, if there is one. Primary does not send it yet.
//
// # What is guaranteed
//
//   - Output commit. Output is let out by Release, of an epoch the standby has
//     acknowledged, or by Flow, when no standby is armed or the arbiter granted it.
//   - One runner. As above, provided that clocks run at the same rate and pausing
//     takes no longer than the margin allows, taken together.
//   - Exact state. TakeOver is of one epoch, committed whole.
//   - Nothing lost. That epoch is not older than anything that was let out.
//
// # What is not, without an arbiter
//
// With NoArbiter the standby takes over only when it is told to, and the primary
// goes on alone when the standby is silent. Who tells it answers for the primary
// being off. If the primary had gone on alone before, what it did then is lost.
//
// A connection that the primary's host closed is no reason to take over, for its guest
// runs on: with GiveUp the copy is dropped when nobody comes back.
//
// With Automatic the standby also takes over when the primary has been silent for
// the time-out on a connection that was not closed, and the primary goes on alone
// as before. Each of both knows only that it hears nothing: if both live, both
// run, and the outside may hear both, until they hear each other. One runner and
// nothing lost do not hold then. Exact state does, on both; and the primary lets
// nothing out uncommitted before it has borne the silence, or has waited in vain
// for the standby to confirm the end.
//
// A primary whose process is killed cannot stop its guest. What was started to
// clean up behind it (RecoverPrimary) has to do so within the time-out less the
// margin and one interval.
package core
