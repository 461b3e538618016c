// Package xenstore is a client of Xen's xenstore daemon, speaking the wire
// protocol of xen/include/public/io/xs_wire.h over the daemon's UNIX socket or
// the kernel's /dev/xen/xenbus.
//
// It holds what Kemari asks of xenstore and no more: reading, writing, listing
// and removing nodes, transactions, and watches. A watch says only that
// something changed: whoever waits on it reads again what it needs, so that
// events may be merged and none can be lost or pile up.
//
// The peer is trusted to be xenstore, not to be correct: lengths are checked
// before anything is allocated, a reply nobody waits for is ignored, and a
// malformed message ends the connection with an error and never with a panic.
//
// Why it is our own: the one Go module for it, github.com/joelnb/xenstore-go,
// allocates whatever length the peer names, panics on a reply it does not
// expect, holds its lock while it sends to an unbuffered channel, ignores the
// transaction id, knows no context, and brings a Windows backend, reflection
// and a logger along. What it would save is less than what would have to be
// put around it; and the hotplug program, which starts and ends within
// milliseconds, wants none of its dependencies.
//
// The package imports neither net nor anything outside the standard library
// and golang.org/x/sys, and it is safe for concurrent use.
package xenstore
