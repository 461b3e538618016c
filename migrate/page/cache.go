package page

import "math/bits"

// cache holds pages by pfn, at most as many as it was made for. Its memory is
// four slices without a pointer in them, so the garbage collector has nothing to
// follow, and a slot's page costs memory only once it is used.
//
// Which page has to go is decided by a clock with a count: a page that is found
// again gains a turn, up to maxTurns, and loses one whenever the hand passes. A
// page that was put in and never found again goes first, so that what is dirty
// once does not drive out what is dirty all the time.
type cache struct {
	pages []byte   // of each slot
	pfns  []PFN    // of each slot
	turns []uint8  // of each slot
	free  []uint32 // slots below used that are free
	used  uint32   // slots from here on were never used
	hand  uint32
	// index is a hash table of slots plus one, by pfn; linear probing, 0 is empty.
	index []uint32
	shift uint8
}

const maxTurns = 3

// maxCache bounds the number of pages, so that slots fit their type: 4 TiB.
const maxCache = 1 << 30

func newCache(pages int) *cache {
	pages = max(0, min(pages, maxCache))
	// At most half full, so that probes are short.
	log := max(1, bits.Len(uint(2*pages)))
	return &cache{
		pages: make([]byte, pages*Size),
		pfns:  make([]PFN, pages),
		turns: make([]uint8, pages),
		index: make([]uint32, 1<<log),
		shift: uint8(64 - log),
	}
}

// home is where in the index pfn should be.
func (c *cache) home(pfn PFN) uint32 {
	return uint32(uint64(pfn) * 0x9e3779b97f4a7c15 >> c.shift)
}

// find returns the place in the index of pfn, or of the gap where it would be.
func (c *cache) find(pfn PFN) uint32 {
	mask := uint32(len(c.index) - 1)
	i := c.home(pfn)
	for c.index[i] != 0 && c.pfns[c.index[i]-1] != pfn {
		i = (i + 1) & mask
	}
	return i
}

func (c *cache) page(slot uint32) *[Size]byte {
	return (*[Size]byte)(c.pages[int(slot)*Size:])
}

// get returns the page of pfn, to be changed in place, or nil.
func (c *cache) get(pfn PFN) *[Size]byte {
	slot := c.index[c.find(pfn)]
	if slot == 0 {
		return nil
	}
	slot--
	c.turns[slot] = min(c.turns[slot]+1, maxTurns)
	return c.page(slot)
}

// put returns a page for pfn, which must not be in the cache, with any content;
// nil if the cache is made for none.
func (c *cache) put(pfn PFN) *[Size]byte {
	if len(c.pfns) == 0 {
		return nil
	}
	slot := c.slot()
	c.pfns[slot], c.turns[slot] = pfn, 0
	c.index[c.find(pfn)] = slot + 1
	return c.page(slot)
}

// slot returns a free slot, making one if there is none.
func (c *cache) slot() uint32 {
	if n := len(c.free); n > 0 {
		slot := c.free[n-1]
		c.free = c.free[:n-1]
		return slot
	}
	if int(c.used) < len(c.pfns) {
		c.used++
		return c.used - 1
	}
	for {
		slot := c.hand
		if c.hand++; int(c.hand) == len(c.pfns) {
			c.hand = 0
		}
		if c.turns[slot] == 0 {
			c.unlink(c.find(c.pfns[slot]))
			return slot
		}
		c.turns[slot]--
	}
}

// drop takes pfn out.
func (c *cache) drop(pfn PFN) {
	i := c.find(pfn)
	if c.index[i] == 0 {
		return
	}
	slot := c.index[i] - 1
	c.unlink(i)
	c.free = append(c.free, slot)
}

// unlink empties the place i of the index and moves back what had to make way
// for it, so that no probe ends too early.
func (c *cache) unlink(i uint32) {
	mask := uint32(len(c.index) - 1)
	for j := i; ; {
		j = (j + 1) & mask
		if c.index[j] == 0 {
			break
		}
		// j may move to i unless its home lies behind i on the way to j.
		if home := c.home(c.pfns[c.index[j]-1]); (j-home)&mask >= (j-i)&mask {
			c.index[i] = c.index[j]
			i = j
		}
	}
	c.index[i] = 0
}

// reset empties the cache.
func (c *cache) reset() {
	clear(c.index)
	c.free, c.used, c.hand = c.free[:0], 0, 0
}
