package sys

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// SlotPages is how many pages of a guest, in a row, one slot of a Window shows.
const SlotPages = 64

const slotSize = SlotPages * pageSize

// Window is a range of addresses at whose slots a domain's memory can be mapped.
// The mappings outlive the connection and even the domain, whose pages are not
// freed before they end. Its methods are called by one goroutine at a time.
type Window struct {
	c        *Conn
	domain   uint16
	writable bool
	mem      []byte // reserved; slots not mapped are inaccessible
	pfns     [SlotPages]uint64
	errs     [SlotPages]int32
}

// Window reserves a window of so many slots.
func (c *Conn) Window(domain uint16, slots int, writable bool) (*Window, error) {
	mem, err := unix.Mmap(-1, 0, slots*slotSize, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("reserve addresses for %d pages of domain %d: %w", slots*SlotPages, domain, err)
	}
	return &Window{c: c, domain: domain, writable: writable, mem: mem}, nil
}

// Map shows the pages from pfn first on in a slot, in place of what it showed. ok
// has a bit for each page that is there: only those may be touched.
func (w *Window) Map(slot int, first uint64) (ok uint64, err error) {
	addr := w.addr(slot)
	prot := uintptr(unix.PROT_READ)
	if w.writable {
		prot |= unix.PROT_WRITE
	}
	if _, _, errno := unix.Syscall6(unix.SYS_MMAP, addr, slotSize, prot, unix.MAP_SHARED|unix.MAP_FIXED, uintptr(w.c.privcmd), 0); errno != 0 {
		return 0, fmt.Errorf("map %s: %w", privcmdPath, errno)
	}
	for i := range w.pfns {
		w.pfns[i] = first + uint64(i)
	}
	if err := w.c.mapBatch(addr, w.domain, w.pfns[:], w.errs[:]); err != nil {
		return 0, errors.Join(err, w.Unmap(slot))
	}
	for i, e := range w.errs {
		if e == 0 {
			ok |= 1 << i
		}
	}
	return ok, nil
}

// Unmap empties a slot.
func (w *Window) Unmap(slot int) error {
	_, _, errno := unix.Syscall6(unix.SYS_MMAP, w.addr(slot), slotSize, unix.PROT_NONE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE|unix.MAP_FIXED, ^uintptr(0), 0)
	if errno != 0 {
		return fmt.Errorf("unmap: %w", errno)
	}
	return nil
}

func (w *Window) addr(slot int) uintptr {
	return uintptr(unsafe.Pointer(&w.mem[slot*slotSize : (slot+1)*slotSize][0]))
}

// Page is a page of a slot.
func (w *Window) Page(slot, i int) *[pageSize]byte {
	return (*[pageSize]byte)(w.mem[slot*slotSize+i*pageSize:])
}

// Close unmaps all. Idempotent.
func (w *Window) Close() error {
	if w.mem == nil {
		return nil
	}
	err := unix.Munmap(w.mem)
	w.mem = nil
	return err
}
