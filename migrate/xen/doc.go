// Package xen is the only place that knows Xen: the formats of its migration
// stream, and a running guest as the engine's migrate.Guest.
//
// The stream formats are those of docs/specs/libxc-migration-stream.pandoc
// (version 3) and libxl-migration-stream.pandoc (version 2) of Xen 4.17; they are
// unchanged in 4.20.
//
// Domain is a guest checkpointed by hypercalls of our own, all in pure Go; Memory the
// memory of one that is being restored here. Guest takes its checkpoints with
// libxenguest, in the helper process cmd/kemari-xcsave, and is what Domain is
// compared with. The device model of an HVM guest is QEMU, which Domain stops and whose
// state it takes by QMP.
package xen
