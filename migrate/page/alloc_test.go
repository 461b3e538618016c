//go:build !race

package page

import (
	"math/rand/v2"
	"testing"
)

// With the race detector pools, S2's among them, lose things on purpose.
func TestNoAllocation(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	var pages [16][Size]byte
	e, buf := NewEncoder(8), make([]byte, 0, 64*MaxEncoded)
	n := testing.AllocsPerRun(500, func() {
		buf = buf[:0]
		for i := range pages {
			scribble(r, &pages[i])
			buf = e.Append(buf, PFN(i), pages[i][:])
		}
		e.Forget(3)
	})
	if n != 0 {
		t.Errorf("encoding 16 pages allocates %v times", n)
	}
	for _, s := range samples() {
		d := NewDecoder(guestPages, func(_ PFN, dst []byte) error { copy(dst, s.base[:]); return nil })
		out := func(PFN, []byte) error { return nil }
		if n := testing.AllocsPerRun(500, func() { d.Decode(s.record, out) }); n != 0 {
			t.Errorf("decoding %s allocates %v times", s.name, n)
		}
		pfns, data := make([]PFN, 0, 1), make([]byte, 0, Size)
		if n := testing.AllocsPerRun(500, func() { d.AppendPages(pfns, data, s.record) }); n != 0 {
			t.Errorf("appending %s allocates %v times", s.name, n)
		}
	}
}
