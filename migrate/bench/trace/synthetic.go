package trace

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"

	"kemari/migrate/page"
)

// Synthetic makes up a trace of a guest that never was. It is like those recorded
// from Linux guests in how much of a page changes: of a hundred dirty pages some
// fifty change in up to eight words (counters, times, list heads), thirty in a few
// lines (a stack, a slab), ten are filled (a file, the heap), a few become zero,
// and a few have not changed at all. The same seed makes the same trace.
func Synthetic(seed uint64, pages, epochs, dirty int) *Trace {
	r := rand.New(rand.NewPCG(seed, 0))
	guest := make([][page.Size]byte, pages)
	t := &Trace{About: fmt.Sprintf("synthetic, seed %d: %d pages, %d epochs of %d", seed, pages, epochs, dirty), Epochs: make([]Epoch, 1+epochs)}
	for i := range guest {
		fill(r, &guest[i])
		t.Epochs[0].Add(page.PFN(i), guest[i][:])
	}
	for e := range epochs {
		for _, pfn := range r.Perm(pages)[:min(dirty, pages)] {
			p := &guest[pfn]
			switch n := r.IntN(100); {
			case n < 50:
				for range 1 + r.IntN(8) {
					count(r, p, r.IntN(page.Size/8))
				}
			case n < 80:
				for range 1 + r.IntN(12) {
					at := r.IntN(page.Size/64) * 8
					for range 1 + r.IntN(8) {
						count(r, p, at+r.IntN(8))
					}
				}
			case n < 90:
				fill(r, p)
			case n < 93:
				*p = [page.Size]byte{}
			}
			t.Epochs[1+e].Add(page.PFN(pfn), p[:])
		}
	}
	return t
}

// count changes a word as a counter, or to an address near where it pointed.
func count(r *rand.Rand, p *[page.Size]byte, word int) {
	w := p[word*8:]
	x := binary.LittleEndian.Uint64(w)
	if r.IntN(2) == 0 {
		x += 1 + r.Uint64N(1000)
	} else {
		x = x>>24<<24 | r.Uint64N(1<<24)
	}
	binary.LittleEndian.PutUint64(w, x)
}

// fill makes a page of text, of pointers and small numbers, or of noise.
func fill(r *rand.Rand, p *[page.Size]byte) {
	switch n := r.IntN(10); {
	case n < 4:
		for b := p[:0]; len(b) < page.Size; {
			b = fmt.Appendf(b, "%s%d ", [...]string{"the ", "of ", "guest ", "memory ", "epoch=", "\t"}[r.IntN(6)], r.IntN(5000))
			copy(p[:], b)
		}
	case n < 8:
		for i := 0; i < page.Size; i += 8 {
			x := r.Uint64N(64)
			if r.IntN(3) == 0 {
				x = 0xffff888000000000 | r.Uint64N(1<<28)<<3
			}
			binary.LittleEndian.PutUint64(p[i:], x)
		}
	default:
		for i := 0; i < page.Size; i += 8 {
			binary.LittleEndian.PutUint64(p[i:], r.Uint64())
		}
	}
}
