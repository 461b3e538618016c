// Package sys is Xen's binary interface as the kernel's devices offer it:
// hypercalls and foreign mappings by /dev/xen/privcmd, memory that a hypercall may
// read and write by /dev/xen/hypercall, event channels by /dev/xen/evtchn.
//
// The structures are those of Xen's public headers for x86-64. Xen numbers its
// unstable part (domctl) and refuses a caller with another number; Open finds the
// one in use. What is used here is the same in all those it knows, 0x15 (Xen 4.17)
// to 0x17 (Xen 4.19 to 4.21), which was read in the headers of each; tests hold
// the sizes and offsets. Of sysctl nothing is used.
//
// It needs no cgo, so that one static program serves every Xen it knows.
//
// Errors of a hypercall are syscall.Errno, wrapped with the hypercall's name. What
// the hypervisor returns is trusted, as all of dom0 must; what it says about a
// guest's memory is what the guest made it.
package sys
