// Package drivertest runs the real libvirtd for tests, as an unprivileged user with
// folders of its own, so that they can be tried side by side on any machine.
package drivertest
