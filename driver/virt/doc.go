// Package virt is what our commands ask of libvirt, as an ordinary client of it.
// It is the one user of the cgo binding; built with the tag libvirt_dlopen it
// needs libvirt's library only when it runs.
package virt
