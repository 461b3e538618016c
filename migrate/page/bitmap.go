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
// It goes by words and assumes that most are zero: what is clean costs the reading
// of the bitmap's populated part and no more, whatever holes lie between. Sixteen
// million pages, those of 64 GiB, are two megabytes of bitmap.
func AppendRuns(dst []Run, bitmap []uint64, populated []Run) []Run {
	for _, r := range populated {
		first, end := uint64(r.First), min(uint64(r.First)+r.N, uint64(len(bitmap))*64)
		if first >= end {
			continue
		}
		// The words at both ends count in part.
		w, last := first/64, (end-1)/64
		head, tail := ^uint64(0)<<(first%64), ^uint64(0)>>(63-(end-1)%64)
		if w == last {
			dst = appendWord(dst, w, bitmap[w]&head&tail)
			continue
		}
		dst = appendWord(dst, w, bitmap[w]&head)
		for w++; ; w++ {
			w += clean(bitmap[w:last])
			if w == last {
				break
			}
			dst = appendWord(dst, w, bitmap[w])
		}
		dst = appendWord(dst, last, bitmap[last]&tail)
	}
	return dst
}

// clean counts the words before the first that is not zero.
func clean(b []uint64) uint64 {
	i := 0
	for ; len(b)-i >= stride; i += stride {
		if *(*[stride]uint64)(b[i:]) != [stride]uint64{} {
			break
		}
	}
	for i < len(b) && b[i] == 0 {
		i++
	}
	return uint64(i)
}

// stride is how many words are looked at as one: enough that the run time compares
// them fast, few enough that finding the dirty one among them is.
const stride = 64

// appendWord appends the runs of word w, whose bits are x.
func appendWord(dst []Run, w, x uint64) []Run {
	for x != 0 {
		i := bits.TrailingZeros64(x)
		n := bits.TrailingZeros64(^(x >> i))
		dst = appendRun(dst, PFN(w*64+uint64(i)), uint64(n))
		x = x >> (i + n) << (i + n) // 0 if i + n is 64
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
