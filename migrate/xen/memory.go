package xen

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"kemari/migrate/page"
	"kemari/migrate/xen/internal/sys"
	"kemari/migrate/xen/xenstore"
)

// ErrNotPopulated: a page has no memory, at least not yet.
var ErrNotPopulated = errors.New("the guest has no memory at this page")

// memorySlots bounds the mappings of a Memory: 4 GiB of the guest.
const memorySlots = mapSlots

// Memory is a domain's memory, read and written from outside: that of a domain being
// restored here, page by page as the stream has populated it. While it is open the
// domain's memory is not freed, not even when the domain is destroyed. Its methods
// are called by one goroutine.
type Memory struct {
	m       *mapping
	highest func() (uint64, error)
	conn    interface{ Close() error }
}

// FindDomain returns the id of the domain with this UUID, and waits for it to exist
// until ctx ends. libxl writes the UUID when it has made a domain, before it gives it
// memory.
func FindDomain(ctx context.Context, uuid string) (uint32, error) {
	store, err := xenstore.Dial()
	if err != nil {
		return 0, err
	}
	defer store.Close()
	for {
		ids, err := store.List(ctx, "/local/domain")
		if err != nil {
			return 0, fmt.Errorf("list the domains: %w", err)
		}
		for _, s := range ids {
			id, err := strconv.ParseUint(s, 10, 15)
			if err != nil || id == 0 {
				continue
			}
			if vm, err := store.Read(ctx, "/local/domain/"+s+"/vm"); err == nil && vm == "/vm/"+uuid {
				return uint32(id), nil
			}
		}
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("find the domain %s: %w", uuid, context.Cause(ctx))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// EndDomain has the hypervisor end whatever domain of this host has the UUID, without
// asking who manages it. Nil means that none runs any more.
func EndDomain(ctx context.Context, uuid [16]byte) error {
	store, err := xenstore.Dial()
	if err != nil {
		return err
	}
	defer store.Close()
	ids, err := store.List(ctx, "/local/domain")
	if err != nil {
		return fmt.Errorf("list the domains: %w", err)
	}
	conn, err := sys.Open()
	if err != nil {
		return err
	}
	defer conn.Close()
	for _, s := range ids {
		id, err := strconv.ParseUint(s, 10, 15)
		if err != nil || id == 0 {
			continue
		}
		if err := endIf(conn, uint16(id), uuid); err != nil {
			return fmt.Errorf("end domain %d: %w", id, err)
		}
	}
	return nil
}

func endIf(conn *sys.Conn, id uint16, uuid [16]byte) error {
	d, err := conn.Domain(id)
	if errors.Is(err, sys.ErrNoDomain) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.Close()
	info, err := d.Info()
	switch {
	case errors.Is(err, sys.ErrNoDomain):
		return nil
	case err != nil:
		return err
	case info.Handle != uuid || info.Dying:
		return nil
	}
	return d.Destroy()
}

// OpenMemory opens the memory of a domain of this host.
func OpenMemory(domid uint32) (*Memory, error) {
	conn, err := sys.Open()
	if err != nil {
		return nil, err
	}
	d, err := conn.Domain(uint16(domid))
	if err != nil {
		conn.Close()
		return nil, err
	}
	w, err := conn.Window(uint16(domid), memorySlots, true)
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &Memory{newMapping(w, memorySlots), d.HighestPage, conn}, nil
}

// have maps a page if there is memory. What was looked at before it was populated is
// looked at again.
func (m *Memory) have(p page.PFN) (bool, error) {
	if chunk := uint64(p) / sys.SlotPages; chunk >= uint64(len(m.m.of)) {
		top, err := m.highest()
		if err != nil || uint64(p) > top {
			return false, err
		}
		m.m.grow(top + 1)
	}
	m.m.gen++
	ok, err := m.m.have(p)
	if err == nil && !ok {
		ok, err = m.m.again(p)
	}
	return ok, err
}

// ReadPage copies a page to dst, or returns ErrNotPopulated.
func (m *Memory) ReadPage(p page.PFN, dst []byte) error {
	ok, err := m.have(p)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("%w: %v", ErrNotPopulated, p)
	}
	copy(dst[:page.Size], m.m.page(p)[:])
	return nil
}

// WritePages copies the i-th page of data to pfns[i], for all i. Those that have no
// memory yet are left out: missing are their indexes.
func (m *Memory) WritePages(pfns []page.PFN, data []byte) (missing []int, err error) {
	if len(data) != len(pfns)*page.Size {
		return nil, fmt.Errorf("%d pages in %d bytes", len(pfns), len(data))
	}
	for i, p := range pfns {
		ok, err := m.have(p)
		if err != nil {
			return missing, err
		}
		if !ok {
			missing = append(missing, i)
			continue
		}
		*m.m.page(p) = [page.Size]byte(data[i*page.Size:])
	}
	return missing, nil
}

// Close unmaps all. Idempotent.
func (m *Memory) Close() error { return errors.Join(m.m.Close(), m.conn.Close()) }
