package page

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// naive goes bit by bit.
func naive(bitmap []uint64, populated []Run) (dst []PFN) {
	for _, r := range populated {
		for i := range r.N {
			pfn := uint64(r.First) + i
			if pfn < uint64(len(bitmap))*64 && bitmap[pfn/64]>>(pfn%64)&1 != 0 {
				dst = append(dst, PFN(pfn))
			}
		}
	}
	return dst
}

func TestRuns(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		word := rapid.OneOf(rapid.Just(uint64(0)), rapid.Just(^uint64(0)), rapid.Uint64(), rapid.Map(rapid.IntRange(0, 63), func(i int) uint64 { return 1 << i }))
		bitmap := make([]uint64, rapid.IntRange(0, 60).Draw(t, "words"))
		for range rapid.IntRange(0, 20).Draw(t, "dirty") {
			if len(bitmap) > 0 {
				bitmap[rapid.IntRange(0, len(bitmap)-1).Draw(t, "at")] = word.Draw(t, "word")
			}
		}
		var populated []Run
		for at := uint64(0); rapid.Bool().Draw(t, "more"); {
			at += rapid.Uint64Range(0, 700).Draw(t, "hole")
			n := rapid.Uint64Range(0, 3000).Draw(t, "length")
			populated = append(populated, Run{PFN(at), n})
			at += n
		}
		runs := AppendRuns(nil, bitmap, populated)
		if got, want := AppendPFNs(nil, runs), naive(bitmap, populated); !slices.Equal(got, want) {
			t.Fatalf("got %v, want %v", got, want)
		}
		for i := 1; i < len(runs); i++ {
			if runs[i-1].First+PFN(runs[i-1].N) >= runs[i].First {
				t.Fatalf("%v and %v are one", runs[i-1], runs[i])
			}
		}
	})
}

// A guest of 64 GiB, its dirty pages spread evenly.
func BenchmarkRuns(b *testing.B) {
	for _, dirty := range []int{0, 1000, 200000} {
		b.Run(fmt.Sprint(dirty, "-dirty"), func(b *testing.B) {
			bitmap := make([]uint64, 64<<30/Size/64)
			for i := range dirty {
				bitmap[i*len(bitmap)/dirty] |= 1 << (i % 64)
			}
			populated := []Run{{0, uint64(len(bitmap)) * 64}}
			var dst []Run
			for b.Loop() {
				dst = AppendRuns(dst[:0], bitmap, populated)
			}
		})
	}
}
