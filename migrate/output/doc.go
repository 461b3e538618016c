// Package output holds what a guest sends until the epoch that produced it is
// committed: the adapter for the network behind the engine's interface Output.
//
// Each interface of the guest (vif3.0) gets an ifb device (kemari3.0), to which
// a filter at its ingress redirects every frame of every protocol:
//
//	guest → vif3.0 ─ clsact, matchall, mirred redirect → kemari3.0 → bridge
//	                                                       │
//	         prio ─┬─ band 0   plug ┐
//	               ├─ band 1   plug │ one epoch each, in turn; before the
//	               ├─ …             │ first Seal all frames are in band 0,
//	               └─ band 15  plug ┘ which is open then
//
// The frames of one epoch are in one band. Seal turns the new frames to the next
// band, Release allows the band sealed before to be opened. It is opened when those
// before it are empty, and closed again when it is empty itself and the next is due.
//
// # Why the order holds
//
// No two bands that have frames are ever open. Nothing else can be relied on: prio
// serves the lower band first, which is the wrong one where the numbers begin anew;
// and not even that is sure, since sch_plug opens a band without the queue's lock.
// If prio has just found one band closed, and that one and the next are opened
// before it gets on, it serves the next one first. A host's processor that is taken
// away at that moment for some milliseconds is enough. Nor may it be assumed that a
// band empties within some time: the kernel does that in a softirq, which on a host
// starved of processor time waits for its thread like everybody else, and a band
// that is closed or filled again meanwhile lets its old frames out an epoch late.
// So a band's length is asked for before the next is opened; that it is zero says
// all: the frames were taken out under the lock, are handed on in that order by
// whoever runs the queue, and no more can come.
//
// Release does not wait for a band that is not empty yet. It is looked at again
// every few milliseconds, and there is room for fourteen epochs in the meantime.
//
// # Why not one plug and its counters
//
// sch_plug can keep two epochs apart by itself (TCQ_PLUG_BUFFER counts what came
// so far, TCQ_PLUG_RELEASE_ONE lets that many out), but it changes these
// counters without the lock under which frames are counted. A frame which
// netback still delivers while the guest is already suspended can then undo the
// change, and the next release would let out as many frames too many, of an
// epoch that is not committed. Also, what is still queued when it first turns
// from passing to holding is never counted and would shift every later epoch.
// The band of a new frame, in contrast, changes under the queue's lock, and a
// plug which is only ever opened or closed as a whole counts nothing.
//
// # What is guaranteed
//
// After the first Seal has returned, no frame leaves before the Release of its
// epoch, Pass or Close. A frame belongs to the epoch during which it reached the
// vif's ingress; one that netback delivers late belongs to the next epoch, which is
// safe. Several interfaces of a guest have their epochs sealed and released
// together. No frame is lost or let out twice by Open, Seal, Release, Pass, Close or
// Cleanup, whenever a process is killed.
//
// Frames of one queue of an interface leave in the order in which they came, from
// Open to Close. There is one moment that needs help: when the redirect is removed,
// new frames no longer take the way through the plug and could overtake those that
// are on it. WithPause has the guest stand still for that; without it Close and
// Cleanup wait for a moment when nothing is on that way, but not for ever.
//
// Where the frames go on to, a bridge, Open vSwitch or the host's routes, makes no
// difference: all these come after the ingress, where the ifb gives them back. Open
// vSwitch deletes the ingress qdisc of its ports when it sets them up anew; it asks
// for one of the kind ingress, and is refused since ours is a clsact.
//
// One epoch may hold Limit bytes in an interface; further frames are dropped (as
// any network may), counted and logged, see Plug.Drops. The first frame of the epoch
// has asked for a checkpoint through Held long before.
//
// # What is not
//
// Close and Cleanup let out what is held. Who must not let it out, because
// another host goes on with the guest, has to end the guest first: with the vif
// gone, the ifb drops what comes out of it.
//
// What is redirected does not pass the vif's ingress a second time. Filters of
// somebody else there would be bypassed, so Open refuses to work beside them;
// chains of nftables at the ingress hook of the vif (family netdev) are not seen
// until Close. Everything the bridge does (ebtables, br_netfilter) is unharmed.
//
// All of it needs CAP_NET_ADMIN and CAP_NET_RAW and the kernel's modules ifb,
// sch_prio, sch_plug, sch_ingress, cls_matchall and act_mirred.
package output
