package page

import "math/bits"

// Run is N pages from First on.
type Run struct {
	First PFN
	N     uint64
}

// AppendRuns appends the runs of set bits of a dirty bitmap to dst: bit i of word
// w stands for page 64*w+i. Only pages within populated are looked at, runs that
// ascend and do not overlap; what lies beyond the bitmap counts as clean.
//
// It goes by words and assumes that most are zero: a clean guest costs the reading
// of the bitmap's populated part and no more, whatever holes lie between.
func AppendRuns(dst []Run, bitmap []uint64, populated []Run) []Run {
	for _, r := range populated {
		first, end := uint64(r.First), uint64(r.First)+r.N
		end = min(end, uint64(len(bitmap))*64)
		for first < end {
			w := first / 64
			x := bitmap[w] >> (first % 64) << (first % 64)
			if last := w*64 + 64; last > end {
				x = x << (last - end) >> (last - end)
			}
			for x != 0 {
				i := bits.TrailingZeros64(x)
				n := bits.TrailingZeros64(^(x >> i))
				dst = appendRun(dst, PFN(w*64+uint64(i)), uint64(n))
				if i+n == 64 {
					break
				}
				x &= ^uint64(0) << (i + n)
			}
			first = w*64 + 64
			// What is clean is skipped eight words at a time.
			for first+512 <= end {
				b := bitmap[first/64:][:8]
				if b[0]|b[1]|b[2]|b[3]|b[4]|b[5]|b[6]|b[7] != 0 {
					break
				}
				first += 512
			}
		}
	}
	return dst
}

// appendRun appends a run, joined to the last one where it touches it.
func appendRun(dst []Run, first PFN, n uint64) []Run {
	if l := len(dst) - 1; l >= 0 && dst[l].First+PFN(dst[l].N) == first {
		dst[l].N += n
		return dst
	}
	return append(dst, Run{First: first, N: n})
}

// AppendPFNs appends the pages of runs to dst, one by one.
func AppendPFNs(dst []PFN, runs []Run) []PFN {
	for _, r := range runs {
		for i := range r.N {
			dst = append(dst, r.First+PFN(i))
		}
	}
	return dst
}
