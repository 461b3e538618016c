// Package wire is what primary and standby say to each other over the data
// connection: frames, each numbered and checksummed. FORMAT.md holds the format
// for people; this package is its only reader and writer.
//
// It knows nothing of sockets, Xen or libvirt, and does not authenticate: the
// connection it runs over (mutual TLS 1.3) does.
package wire
