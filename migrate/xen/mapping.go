package xen

import (
	"context"
	"errors"
	"math/bits"
	"runtime"
	"sync"

	"kemari/migrate/page"
	"kemari/migrate/xen/internal/sys"
)

// window is a sys.Window: slots at which SlotPages pages of a guest in a row can be
// mapped.
type window interface {
	Map(slot int, first uint64) (ok uint64, err error)
	Unmap(slot int) error
	Page(slot, i int) *[page.Size]byte
	Close() error
}

const (
	// mapSlots bounds the mappings: 12 GiB of a guest, three quarters of the mappings
	// Linux lets one process have, 24 MiB of page tables.
	mapSlots = 3 << 14
	// A copy of fewer pages is over before another thread has woken up.
	parallelPages = 256
	// How many pages are copied between two looks at the context.
	copyPages = 4096
)

// errPinned: all slots are in use by the pages being copied.
var errPinned = errors.New("no slot is free")

// mapping keeps pages of a guest mapped: those that are asked for again are found
// mapped, those asked for longest ago make room. Pages come and go by chunks of
// sys.SlotPages, a word of the dirty bitmap each.
//
// What is mapped is the memory that was at a pfn when it was mapped. Where the guest
// gives a page back to Xen and gets another one, the old one stays mapped. But Xen does
// not free a page that is mapped and counts it as the guest's still. So if count is as
// much as Xen counts, the guest has no page but those mapped, and none is at another's
// place; else distrust must be called before pages are copied. Only a guest that moved
// memory from one pfn to another (XENMAPSPACE_gmfn) would deceive that; kernels for PVH
// guests are not known to. Its methods are called by one goroutine.
type mapping struct {
	w     window
	known func(chunk int) uint64 // the guest's own pages of a chunk; nil: all
	count int                    // pages mapped that were known then
	anew  bool                   // what was mapped before this pass must not be copied
	pass  uint32
	of    []int32 // slot+1 by chunk; 0: not mapped
	slots []slot
	used  int // slots from there on are empty
	hand  int // of the clock that looks for a slot to take
	gen   uint32

	maps     int        // how often a chunk has been mapped
	vanished []page.PFN // pages copyOut found without memory
}

type slot struct {
	chunk int32  // or -1
	hot   bool   // used since the hand passed
	gen   uint32 // of the last use: in the current one it must not be taken
	pass  uint32 // in which it was mapped
	ok    uint64 // pages that are there
}

func newMapping(w window, slots int) *mapping {
	m := &mapping{w: w, slots: make([]slot, slots)}
	return m
}

// grow makes room for pfns below limit.
func (m *mapping) grow(limit uint64) {
	if n := int(limit+sys.SlotPages-1) / sys.SlotPages; n > len(m.of) {
		m.of = append(m.of, make([]int32, n-len(m.of))...)
	}
}

// distrust has what is copied from now on mapped anew first, each chunk once until the
// next call; or, if not bad, has what is mapped copied. The rest may stay mapped: Xen
// marks the page that gets memory as changed, so it is copied, and mapped right, the
// next time, and what is mapped and given back counts on both sides.
func (m *mapping) distrust(bad bool) {
	m.anew = bad
	m.pass++
}

// have maps a page if it is not, and tells whether there is memory.
func (m *mapping) have(p page.PFN) (bool, error) {
	chunk := uint64(p) / sys.SlotPages
	if chunk >= uint64(len(m.of)) {
		return false, nil
	}
	i := int(m.of[chunk]) - 1
	if i < 0 || m.anew && m.slots[i].pass != m.pass {
		var err error
		if i, err = m.load(int32(chunk)); err != nil {
			return false, err
		}
	}
	s := &m.slots[i]
	s.hot, s.gen = true, m.gen
	return s.ok>>(uint64(p)%sys.SlotPages)&1 != 0, nil
}

// page is a page that have has mapped in this generation.
func (m *mapping) page(p page.PFN) *[page.Size]byte {
	return m.w.Page(int(m.of[uint64(p)/sys.SlotPages])-1, int(uint64(p)%sys.SlotPages))
}

// load maps a chunk, anew if it is mapped.
func (m *mapping) load(chunk int32) (int, error) {
	i := int(m.of[chunk]) - 1
	if i >= 0 {
		m.empty(i)
	} else {
		var err error
		if i, err = m.free(); err != nil {
			return 0, err
		}
	}
	ok, err := m.w.Map(i, uint64(chunk)*sys.SlotPages)
	if err != nil {
		m.slots[i] = slot{chunk: -1}
		return 0, err
	}
	if m.known != nil {
		ok &= m.known(int(chunk))
	}
	m.maps++
	m.count += bits.OnesCount64(ok)
	m.slots[i] = slot{chunk: chunk, pass: m.pass, ok: ok}
	m.of[chunk] = int32(i) + 1
	return i, nil
}

// free finds a slot, taking it from another chunk if need be.
func (m *mapping) free() (int, error) {
	if m.used < len(m.slots) {
		m.used++
		return m.used - 1, nil
	}
	for range 2 * len(m.slots) {
		i := m.hand
		m.hand = (m.hand + 1) % len(m.slots)
		s := &m.slots[i]
		switch {
		case s.chunk < 0:
			return i, nil
		case s.gen == m.gen:
		case s.hot:
			s.hot = false
		default:
			m.empty(i)
			return i, nil
		}
	}
	return 0, errPinned
}

// again is have for a page that may have got or lost its memory: it is mapped anew.
func (m *mapping) again(p page.PFN) (bool, error) {
	chunk := uint64(p) / sys.SlotPages
	if chunk >= uint64(len(m.of)) {
		return false, nil
	}
	if _, err := m.load(int32(chunk)); err != nil {
		return false, err
	}
	return m.have(p)
}

// empty forgets what a slot shows.
func (m *mapping) empty(i int) {
	s := &m.slots[i]
	m.of[s.chunk] = 0
	m.count -= bits.OnesCount64(s.ok)
	*s = slot{chunk: -1}
}

// dropAll unmaps all: what the guest has given back is freed.
func (m *mapping) dropAll() {
	for i := range m.slots[:m.used] {
		if c := m.slots[i].chunk; c >= 0 {
			m.of[c] = 0
			m.w.Unmap(i) // fails only where memory is so short that mapping fails next
		}
		m.slots[i] = slot{chunk: -1}
	}
	m.used, m.hand, m.count = 0, 0, 0
}

// copyOut copies pages to data. Pages without memory are taken out of pfns and
// noted in vanished; it returns how many are left, with as many in data.
func (m *mapping) copyOut(ctx context.Context, pfns []page.PFN, data []byte) (int, error) {
	m.gen++
	m.vanished = m.vanished[:0]
	start, n := 0, 0
	flush := func() error {
		m.copyPart(pfns[start:n], data[start*page.Size:n*page.Size])
		start = n
		m.gen++
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return nil
	}
	for _, p := range pfns {
		ok, err := m.have(p)
		if errors.Is(err, errPinned) {
			if err = flush(); err == nil {
				ok, err = m.have(p)
			}
		}
		if err == nil && !ok {
			// It may have got memory after its chunk was mapped. What is to be copied of that
			// chunk goes first, since it is mapped anew.
			if err = flush(); err == nil {
				ok, err = m.again(p)
			}
		}
		if err != nil {
			return 0, err
		}
		if !ok {
			m.vanished = append(m.vanished, p)
			continue
		}
		pfns[n] = p
		if n++; n-start == copyPages {
			if err := flush(); err != nil {
				return 0, err
			}
		}
	}
	return n, flush()
}

// copyPart copies mapped pages, on several processors if that pays.
func (m *mapping) copyPart(pfns []page.PFN, data []byte) {
	workers := min(runtime.GOMAXPROCS(0), 4, len(pfns)/(parallelPages/2))
	if workers < 2 {
		m.copySome(pfns, data)
		return
	}
	var wg sync.WaitGroup
	share := (len(pfns) + workers - 1) / workers
	for len(pfns) > share {
		some, to := pfns[:share], data[:share*page.Size]
		wg.Go(func() { m.copySome(some, to) })
		pfns, data = pfns[share:], data[share*page.Size:]
	}
	m.copySome(pfns, data)
	wg.Wait()
}

func (m *mapping) copySome(pfns []page.PFN, data []byte) {
	for i, p := range pfns {
		*(*[page.Size]byte)(data[i*page.Size:]) = *m.page(p)
	}
}

// Close unmaps all. Idempotent.
func (m *mapping) Close() error { return m.w.Close() }
