package xen

import (
	"math/bits"

	"kemari/migrate/page"
)

// scanGap is how many pages of a hole are rather scanned than made an end of a run.
const scanGap = 1024

// population is where a guest has memory: a PVH guest of 160 MB has its last page
// just below 4 GiB, and nearly all between is a hole.
type population struct {
	words []uint64   // a bit for each pfn
	marks []uint64   // those, and where changes were seen without memory of the guest's
	pages int        // bits set
	scan  []page.Run // where to look for dirty bits: all pages, and small holes
	stale bool       // scan misses pages
}

func (p *population) reset(limit uint64) {
	if n := int(limit+63) / 64; n > len(p.words) {
		p.words, p.marks = make([]uint64, n), make([]uint64, n)
	} else {
		clear(p.words)
		clear(p.marks)
	}
	p.pages, p.stale = 0, true
}

func (p *population) has(pfn page.PFN) bool {
	w := uint64(pfn) / 64
	return w < uint64(len(p.words)) && p.words[w]>>(uint64(pfn)%64)&1 != 0
}

// word is 64 pages in a row.
func (p *population) word(i int) uint64 {
	if i >= len(p.words) {
		return 0
	}
	return p.words[i]
}

func (p *population) add(pfn page.PFN) {
	if w := uint64(pfn) / 64; w < uint64(len(p.words)) && !p.has(pfn) {
		p.words[w] |= 1 << (uint64(pfn) % 64)
		p.pages++
		p.note(pfn)
	}
}

// note makes the page one that is scanned. Xen marks pages of its own as changed,
// which it shows to the guest: without memory of the guest's, but to be counted.
func (p *population) note(pfn page.PFN) {
	if w := uint64(pfn) / 64; w < uint64(len(p.marks)) {
		p.marks[w] |= 1 << (uint64(pfn) % 64)
		p.stale = true
	}
}

// remove leaves scan as it is: a hole more to look at.
func (p *population) remove(pfn page.PFN) {
	if p.has(pfn) {
		p.words[uint64(pfn)/64] &^= 1 << (uint64(pfn) % 64)
		p.pages--
	}
}

// rescan makes scan anew. It takes time that grows with the guest, and is for while
// the guest runs.
func (p *population) rescan() {
	p.stale = false
	p.scan = p.scan[:0]
	for i, w := range p.marks {
		if w == 0 {
			continue
		}
		first := uint64(i)*64 + uint64(bits.TrailingZeros64(w))
		end := uint64(i)*64 + uint64(bits.Len64(w))
		if l := len(p.scan) - 1; l >= 0 && first-uint64(p.scan[l].First)-p.scan[l].N < scanGap {
			p.scan[l].N = end - uint64(p.scan[l].First)
		} else {
			p.scan = append(p.scan, page.Run{First: page.PFN(first), N: end - first})
		}
	}
}

// appendAll appends all pages from the word-th word on until dst is full, and
// returns the word to go on from; that is len(words) at the end.
func (p *population) appendAll(dst []page.PFN, word int) ([]page.PFN, int) {
	for ; word < len(p.words) && len(dst)+64 <= cap(dst); word++ {
		for w := p.words[word]; w != 0; w &= w - 1 {
			dst = append(dst, page.PFN(word*64+bits.TrailingZeros64(w)))
		}
	}
	return dst, word
}
