// Package control is what one asks a running replicator or standby, and what
// they are told when they start. It is the only thing of the engine that the
// driver and the commands know.
//
// Each protection of a guest has, on each of its two hosts, a folder
// /run/kemari/ROLE/UUID with up to three files:
//
//	config.json   what the process is to do, written before its unit starts
//	control.sock  the socket this package speaks on, while the process runs
//	last.json     the final Status, left behind when the process has ended
//
// The protocol on the socket is one JSON object a line: a Request, answered by a
// Response. Lines are at most MaxLine bytes.
package control
