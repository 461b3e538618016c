// Package output holds what a guest sends until the epoch that produced it is
// committed: the adapter for the network behind the engine's interface Output.
//
// Each interface of the guest (vif3.0) gets an ifb device (kemari3.0), to which
// a filter at its ingress redirects every frame of every protocol:
//
//	guest → vif3.0 ─ clsact, matchall, mirred redirect → kemari3.0 → bridge
//	                                                       │
//	         prio ─┬─ band 0   plug, open: frames from before the first Seal
//	               ├─ band 1   plug ┐
//	               ├─ …             ├ one epoch each, in turn
//	               └─ band 15  plug ┘
//
// The frames of one epoch are in one band. Seal turns the new frames to the next
// band, Release opens the band sealed before. Opened, it drains in order, and
// it is closed again long before its turn comes anew.
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
// epoch or Close. A frame belongs to the epoch during which it reached the vif's
// ingress; one that netback delivers late belongs to the next epoch, which is
// safe. None is lost by Open, Seal, Release, Close or Cleanup. They keep their
// order, but that frames sent at the moment when Close or Cleanup takes the plug
// away may overtake a few others.
//
// One epoch may hold Limit bytes in an interface; further frames are dropped (as
// any network may) and counted, see Plug.Drops.
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
