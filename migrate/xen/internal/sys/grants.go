package sys

import (
	"fmt"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxGrantFrames bounds what is looked at of a guest's grant table. Xen's own bound is
// 64 frames unless it is told otherwise.
const maxGrantFrames = 1024

// Granted calls f for each page that the guest has granted another domain to write
// to, and says which. A page may come several times.
func (d *Domain) Granted(f func(pfn uint64, to uint16)) error {
	frames, version, err := d.grantTable()
	if err != nil {
		return err
	}
	// Not a frame more: Xen would make the table grow.
	table, err := unix.Mmap(d.c.privcmd, 0, frames*pageSize, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return os.NewSyscallError("mmap", err)
	}
	defer unix.Munmap(table)
	m := privcmdMapResource{domain: d.id, typ: resourceGrantTable, num: uint64(frames), addr: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(table))))}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(d.c.privcmd), ioctlMapResource, uintptr(unsafe.Pointer(&m)))
	runtime.KeepAlive(table)
	if errno != 0 {
		return fmt.Errorf("map the grant table of domain %d: %w", d.id, errno)
	}
	eachGrant(table, version, f)
	return nil
}

// eachGrant is Granted of a table of whole frames.
func eachGrant(table []byte, version uint32, f func(pfn uint64, to uint16)) {
	size := int(unsafe.Sizeof(grantEntry{}))
	if version == 2 {
		size = int(unsafe.Sizeof(grantEntry2{}))
	}
	for ; len(table) >= size; table = table[size:] {
		e := (*grantEntry)(unsafe.Pointer(&table[0]))
		flags, pfn := e.flags, uint64(e.frame)
		if flags&grantTypeMask != grantPermitAccess || flags&(grantReadOnly|grantSubPage) != 0 {
			continue
		}
		if version == 2 {
			pfn = (*grantEntry2)(unsafe.Pointer(&table[0])).frame
		}
		f(pfn, e.domain)
	}
}

// grantTable tells of the guest's grant table how many frames and of which version it is.
func (d *Domain) grantTable() (frames int, version uint32, err error) {
	d.c.mu.Lock()
	defer d.c.mu.Unlock()
	s, addr := at[grantSize](d.c.scratch, 0)
	*s = grantSize{domain: d.id}
	if _, err := d.c.call("get the grant table's size", hypercallGrant, grantQuerySize, addr, 1); err != nil {
		return 0, 0, err
	}
	if s.status != 0 || s.frames == 0 || s.frames > maxGrantFrames {
		return 0, 0, fmt.Errorf("the grant table's size: status %d, %d frames: %w", s.status, s.frames, syscall.ERANGE)
	}
	frames = int(s.frames)
	v, addr := at[grantVersion](d.c.scratch, 0)
	*v = grantVersion{domain: d.id}
	if _, err := d.c.call("get the grant table's version", hypercallGrant, grantGetVersion, addr, 1); err != nil {
		return 0, 0, err
	}
	if v.version > 2 {
		return 0, 0, fmt.Errorf("a grant table of version %d: %w", v.version, syscall.ENOTSUP)
	}
	return frames, v.version, nil
}
