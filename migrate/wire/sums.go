package wire

import (
	"encoding/binary"
	"fmt"
)

const (
	// MaxSums bounds the pages of one Sums frame: the standby does nothing else while
	// it looks at them.
	MaxSums = 4096
	// MaxDiffering bounds the pages that one Compared names, so that it is one frame.
	MaxDiffering = 32000

	maxPFN   = 1<<48 - 1
	sumsHead = 24 // bytes before the sums, and before the pages that differ
)

// Sums is what pages in a row were at an epoch: of each the XXH64 of its content,
// seed 0. The pages of a check come in ascending order, in as many frames as it
// takes.
type Sums struct {
	Total  uint64   // pages in the check
	Before uint64   // of them in earlier frames
	First  uint64   // pfn of the first one in this frame
	Sums   []uint64 // 1 to MaxSums
}

// Append appends the encoding of s to b.
func (s Sums) Append(b []byte) []byte { return appendWords(b, s.Total, s.Before, s.First, s.Sums) }

// ParseSums decodes a Sums frame's payload.
func ParseSums(b []byte) (Sums, error) {
	total, before, first, sums, err := parseWords("sums", b, MaxSums)
	if err != nil {
		return Sums{}, err
	}
	n := uint64(len(sums))
	if n == 0 || before >= total || n > total-before || first > maxPFN || n > maxPFN+1-first {
		return Sums{}, fmt.Errorf("%w: sums of %d pages from %#x on, after %d of %d", ErrFormat, n, first, before, total)
	}
	return Sums{total, before, first, sums}, nil
}

// Compared is what a standby found its copy to be, of all the pages of a check.
type Compared struct {
	Pages   uint64   // compared
	Differ  uint64   // of them, those that are not what the primary has
	Missing uint64   // of those that differ, the ones of which it has nothing
	PFNs    []uint64 // of those that differ the first, MaxDiffering at most, ascending
}

// Append appends the encoding of c to b.
func (c Compared) Append(b []byte) []byte {
	return appendWords(b, c.Pages, c.Differ, c.Missing, c.PFNs)
}

// ParseCompared decodes a Compared frame's payload.
func ParseCompared(b []byte) (Compared, error) {
	pages, differ, missing, pfns, err := parseWords("compared", b, MaxDiffering)
	if err != nil {
		return Compared{}, err
	}
	if differ > pages || missing > differ || uint64(len(pfns)) != min(differ, MaxDiffering) {
		return Compared{}, fmt.Errorf("%w: %d of %d pages differ, %d are missing, %d named", ErrFormat, differ, pages, missing, len(pfns))
	}
	for i, p := range pfns {
		if p > maxPFN || i > 0 && p <= pfns[i-1] {
			return Compared{}, fmt.Errorf("%w: page %#x differs, and comes out of order", ErrFormat, p)
		}
	}
	return Compared{pages, differ, missing, pfns}, nil
}

func appendWords(b []byte, x, y, z uint64, more []uint64) []byte {
	for _, w := range [...]uint64{x, y, z} {
		b = binary.BigEndian.AppendUint64(b, w)
	}
	for _, w := range more {
		b = binary.BigEndian.AppendUint64(b, w)
	}
	return b
}

func parseWords(what string, b []byte, most int) (x, y, z uint64, more []uint64, err error) {
	if len(b) < sumsHead || len(b)%8 != 0 || len(b) > sumsHead+8*most {
		return 0, 0, 0, nil, fmt.Errorf("%w: %s of %d bytes", ErrFormat, what, len(b))
	}
	more = make([]uint64, (len(b)-sumsHead)/8)
	for i := range more {
		more[i] = binary.BigEndian.Uint64(b[sumsHead+8*i:])
	}
	return binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint64(b[16:]), more, nil
}
