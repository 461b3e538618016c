// Package driver is the libvirt driver of Kemari. It stands between libvirt's
// clients and libvirtd, and speaks libvirt's RPC to both.
//
//	client ──► virtkemarid-sock ──► session ──► libvirtd (xen:///system)
//	                                   │
//	                                   ├─► protect ──ssh──► the standby's virtkemarid
//	                                   ├─► kemari-replicator@UUID (control socket)
//	                                   └─► guard: what may not be done to a protected guest
//
// Each client has a connection of its own to libvirtd, so that serials, callback
// numbers, events and streams pass through unchanged. What is not passed through
// is listed in intercept.go, guard.go and, as far as it is about what a protection
// looks like to libvirt's clients, in interpose:
//
//	element.go  <kemari> at the top level of a domain's XML; what may change in it
//	shadow.go   the standby's copy is a paused guest, and is left alone
//	job.go      the protection is the guest's job, with statistics; stats.go too
//	events.go   what happens to it is sent to whoever has registered
//	switchover.go  a migration of a protected guest to its standby; reprotect.go then
//	            has it protected the other way round; persist.go defines it there
//	            and undefines it here
//	migrate.go  every way to ask for it; capabilities.go says that one can
//	verdict.go  why the standby cannot be one; devicemodel.go for HVM guests
//
// The driver holds no guest's life in its hands. What protects a guest are
// processes of their own, which go on when this one ends; the driver's only
// memory is the protections that are being set up, and those it takes back when
// it must end.
//
// Authorisation: libvirtd sees root in us, so what a client may do is decided
// here, before anything of it is passed on. Root may do everything; others as
// polkit says of libvirt's own two actions, or, where there is no polkit, as
// members of the group libvirt (decide). Libvirtd is told who the client is, for its
// own rules (openAs). A reader, by the socket it came through or
// by its own wish, gets through only what is known to change nothing (rpc.ReadOnly),
// and libvirtd sees a read-only client of its own.
package driver
