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
// to by name; the primary goes on alone on silence. After a partition both may
// then run the guest. A primary that hears "taken over" ends its copy without
// letting its held output go.
//
// A connection that is closed, rather than silent, is no reason to take over: a
// host that lost its power closes nothing, but the kernel of a host whose
// replicator was killed does, and its guest runs on.
//
// # The primary's epoch
//
//	wait for a trigger ─► suspend, seal output, copy, resume ─► send ─► ack ─► release output ─┐
//	       ▲                                                                                   │
//	       └───────────────────────────────────────────────────────────────────────────────────┘
//
// One epoch is under way at a time, since the plug of Linux' traffic control can
// have one sealed epoch outstanding.
//
// The package knows no Xen and no libvirt: Guest, Output and Shadow are what it
// needs of them, given by migrate/xen, migrate/output and migrate/shadow.
package migrate
