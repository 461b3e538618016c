// Package daemon finds the daemon of libvirt that serves a connection on this host,
// and the way in. It is the driver's and the standby's, since both must talk to the same
// one: a host may have one daemon for all drivers (libvirtd), or one for each (virtxend).
package daemon
