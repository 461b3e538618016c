// Package migrate is Kemari's engine: the loops of the primary, which takes
// checkpoints of a running guest and sends them, and of the standby, which keeps
// the last committed one and takes over from it.
//
// # What it guarantees
//
//   - Output commit. From the first committed epoch on, what the guest sends is
//     held in the Output until the standby has acknowledged the epoch it was sent
//     in. Output is let go uncommitted only where protection ends: asked for, and
//     then the standby has first confirmed that it dropped its copy; or the
//     standby is lost, see below.
//   - Exact state. The standby takes over from one epoch that it held and checked
//     as a whole before it acknowledged it. A torn epoch is dropped.
//
// # What it does not guarantee yet
//
// One runner: without an arbiter, two hosts that lose sight of each other cannot
// know which of them is dead. A standby takes over on silence only if it was told
// to by name. The primary, on silence, asks over a new connection first, and holds
// the guest's output meanwhile: for a quarter of the time-out until it is let in,
// then for AnswerTimeout, as long as a take-over may last, until the standby has said
// that it has not taken over.
// One that cannot be reached, or does not say, is silent: the primary goes on alone.
// After a partition both may then run the guest. A primary that hears "taken over"
// ends its copy without letting its held output go.
//
// A connection that is closed, rather than silent, is no reason to take over: a
// host that lost its power closes nothing, but the kernel of a host whose
// replicator was killed does, and its guest runs on.
//
// # The primary's epoch
//
//	wait for a trigger ─► suspend, seal output, capture, resume ─► encode, send ─► ack ─► release output ─┐
//	       ▲                                                                                              │
//	       └──────────────────────────────────────────────────────────────────────────────────────────────┘
//
// One epoch is under way at a time, since the plug of Linux' traffic control can
// have one sealed epoch outstanding. From the resume on the guest runs.
//
// Epoch 1 is the first copy. Most of it is sent in rounds while the guest runs, and
// goes into the shadow as it comes: there is nothing to take over from yet. A later
// epoch is received whole and decoded against what the last one left, checked,
// acknowledged, and only then brought into the shadow; the primary keeps what it
// captured until then, so that it can be sent again.
//
// # When something breaks
//
// A connection that breaks is replaced by the primary within the heartbeat
// time-out, its output held meanwhile. Hello and Welcome tell what each side has:
// either the acknowledgement was lost, or the epoch is sent again from its
// beginning. What the primary believes of the standby's pages it believes of
// committed epochs only, so nothing else is sent again. Only a copy of all memory, the
// first or a later one, begins anew, maxCopies times at most: its pages are not kept.
//
// A standby that is silent for longer, over a new connection as well, and may not
// take over by itself is looked for
// (PrimaryConfig.Rejoin), while the guest goes on alone, its output let go. When it
// is back, the epoch that was under way is sent, then one with all that changed
// since; from there on output is held again. For that one the guest stands for as
// long as it takes to copy all that.
//
// An epoch that the standby refuses (it says why) is sent again without reference
// to what the standby has, maxRefusals times at most. What it refuses in an epoch
// whose pages are not kept, the first one above all, ends protection.
//
// # A switchover
//
// Primary.Switchover hands the guest over to the standby for good. The guest's last
// checkpoint leaves it standing, all it has sent leaves, and only then the standby is
// asked to take over. If it does not, the guest goes on where it stands. While that is
// not known the guest stands: ten seconds of silence, and what it takes to ask the
// standby over another connection, at most. The standby's process must not be killed
// in the moment between the guest running there and the primary hearing of it: the
// primary would take it to be lost, and let its copy go on.
//
// # Whether the copy is one
//
// Primary.Verify has one checkpoint sum up every page of the guest, looked up and
// read anew, and the standby compare what its copy has of them once that epoch is
// applied. Both keep the other's epochs waiting for as long as they take.
//
// # Who decides
//
// The standby does what the machine of migrate/core says; Standby's comment tells how.
// The primary's decisions are still made here, where its loops are.
//
// The package knows no Xen and no libvirt: Guest, Output and Shadow are what it
// needs of them, given by migrate/xen, migrate/output and migrate/shadow.
package migrate
