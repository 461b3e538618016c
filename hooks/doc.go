// Package hooks is what libvirt and Xen call at the events of a guest's life:
// libvirt's hook, which has guests protected when they start (Libxl), and Xen's
// hotplug script for network interfaces (VIF).
package hooks
