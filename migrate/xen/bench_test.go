package xen

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"kemari/migrate/page"
	"kemari/migrate/xen/internal/sys"
)

// plainWindow shows ordinary memory, so that copying costs what it does natively.
type plainWindow struct {
	mem   []byte
	first []uint64 // by slot
}

func (w *plainWindow) Map(slot int, first uint64) (uint64, error) {
	w.first[slot] = first
	return ^uint64(0), nil
}
func (w *plainWindow) Unmap(int) error { return nil }
func (w *plainWindow) Page(slot, i int) *[page.Size]byte {
	return (*[page.Size]byte)(w.mem[(w.first[slot]+uint64(i))*page.Size:])
}
func (w *plainWindow) Close() error { return nil }

// BenchmarkCopy copies scattered pages of a guest of 256 MiB out of its mappings; the
// bare copy of the same pages is what it is measured against.
func BenchmarkCopy(b *testing.B) {
	const guest = 256 << 20 / page.Size
	w := &plainWindow{mem: make([]byte, guest*page.Size), first: make([]uint64, guest/sys.SlotPages)}
	for i := 0; i < len(w.mem); i += page.Size {
		w.mem[i] = 1
	}
	m := newMapping(w, guest/sys.SlotPages)
	m.grow(guest)
	for _, n := range []int{600, 8192} {
		var sets [8][]page.PFN // so that not all is in the cache
		for i := range sets {
			for _, p := range rand.Perm(guest)[:n] {
				sets[i] = append(sets[i], page.PFN(p))
			}
			slices.Sort(sets[i])
		}
		data := make([]byte, n*page.Size)
		clear(data)
		b.Run(fmt.Sprintf("pages=%d/bare", n), func(b *testing.B) {
			b.SetBytes(int64(n * page.Size))
			for i := range b.N {
				for j, p := range sets[i%len(sets)] {
					copy(data[j*page.Size:(j+1)*page.Size], w.mem[p*page.Size:])
				}
			}
		})
		b.Run(fmt.Sprintf("pages=%d/copyOut", n), func(b *testing.B) {
			b.SetBytes(int64(n * page.Size))
			b.ReportAllocs()
			for i := range b.N {
				if _, err := m.copyOut(b.Context(), sets[i%len(sets)], data); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// benchControl is a standing guest whose bitmap is given; it answers at once.
type benchControl struct {
	control
	bitmap []uint64
	count  uint32
	limit  uint64
}

func (x *benchControl) Bitmap() []uint64 { return x.bitmap }
func (x *benchControl) Limit() uint64    { return x.limit }

// BenchmarkDirty finds 1000 changed pages of a guest of 64 GiB.
func BenchmarkDirty(b *testing.B) {
	const limit = 64<<30/page.Size + 1<<20
	d := &Domain{all: []page.Run{{N: limit}}}
	d.pop.reset(limit)
	hole := func(p page.PFN) bool { return p >= 0xf0000 && p < 1<<20 }
	for p := range page.PFN(limit) {
		if !hole(p) {
			d.pop.add(p)
		}
	}
	d.pop.rescan()
	x := &benchControl{bitmap: make([]uint64, limit/64), limit: limit}
	d.xen = x
	for x.count < 1000 {
		if p := page.PFN(rand.IntN(limit)); !hole(p) && x.bitmap[p/64]>>(p%64)&1 == 0 {
			x.bitmap[p/64] |= 1 << (p % 64)
			x.count++
		}
	}
	pfns := make([]page.PFN, 0, 2000)
	b.ReportAllocs()
	best := time.Duration(1 << 62)
	for range b.N {
		start := time.Now()
		got, err := d.dirty(pfns, sys.Dirty{Pages: x.count}, false)
		best = min(best, time.Since(start))
		if err != nil || len(got) != 1000 {
			b.Fatal(len(got), err)
		}
	}
	b.ReportMetric(float64(best.Microseconds()), "best-µs")
}
