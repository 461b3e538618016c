// Package systemd is what our processes ask of systemd: to start and stop the
// units of a protection, and to be told that they are ready and alive.
package systemd
