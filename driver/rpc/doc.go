// Package rpc is as much of libvirt's RPC as the driver touches: frames, the
// XDR of a handful of messages, errors, keepalive, and a small client.
//
// A frame is a 32-bit length that counts itself, six 32-bit words of header, and
// a payload, all big-endian. The peer may be anybody who can open the socket,
// so no length is believed: a decoder checks it against what is there and
// against the limit of libvirt's remote_protocol.x before it allocates.
//
// Decoders are stricter than libvirt's: padding must be zero, a string free of
// NUL, and nothing may follow the last field. What libvirt would read differently
// from us must not get past us.
package rpc
