package page

import (
	"encoding/binary"
	"math/bits"
)

// A delta's payload is
//
//	eight bytes: bit i is set if line i (64 bytes of the page) has changed
//	for each of those lines: a byte whose bit j is set if word j has changed,
//	then the exclusive or of old and new of each of those words
//
// everything little-endian, since the words are taken from the page as they are.

// maxDelta is from where on a delta is no longer worth its while.
const maxDelta = Size * 3 / 4

// maxLine is what one line can add to a delta.
const maxLine = 1 + lineSize

// nonzero is 1 if x is not 0, else 0.
func nonzero(x uint64) uint64 { return (x | -x) >> 63 }

// diff writes the delta from base to p into dst, which must have room for
// maxDelta+maxLine bytes, and makes base what p is. It returns the delta's
// length: 0 if base was p already, more than maxDelta if it was given up.
func diff(dst []byte, base, p *[Size]byte) int {
	var changed uint64
	n := 8
	dst = dst[:maxDelta+maxLine]
	for i := range lines {
		a := (*[lineSize]byte)(base[i*lineSize:])
		b := (*[lineSize]byte)(p[i*lineSize:])
		x := [8]uint64{
			word(a, 0) ^ word(b, 0), word(a, 1) ^ word(b, 1), word(a, 2) ^ word(b, 2), word(a, 3) ^ word(b, 3),
			word(a, 4) ^ word(b, 4), word(a, 5) ^ word(b, 5), word(a, 6) ^ word(b, 6), word(a, 7) ^ word(b, 7),
		}
		if x[0]|x[1]|x[2]|x[3]|x[4]|x[5]|x[6]|x[7] == 0 {
			continue
		}
		changed |= 1 << i
		*a = *b
		if n > maxDelta {
			continue
		}
		mask := uint64(0)
		for j, w := range x {
			mask |= nonzero(w) << j
		}
		dst[n] = byte(mask)
		n++
		for m := mask; m != 0; m &= m - 1 {
			binary.LittleEndian.PutUint64(dst[n:], x[bits.TrailingZeros64(m)])
			n += 8
		}
	}
	if changed == 0 {
		return 0
	}
	binary.LittleEndian.PutUint64(dst, changed)
	return n
}

// patch applies a delta to p. It returns false if delta is none.
func patch(p *[Size]byte, delta []byte) bool {
	if len(delta) < 8 {
		return false
	}
	changed := binary.LittleEndian.Uint64(delta)
	delta = delta[8:]
	if changed == 0 {
		return false
	}
	for ; changed != 0; changed &= changed - 1 {
		if len(delta) == 0 {
			return false
		}
		l := (*[lineSize]byte)(p[bits.TrailingZeros64(changed)*lineSize:])
		mask := delta[0]
		delta = delta[1:]
		if mask == 0 || len(delta) < 8*bits.OnesCount8(mask) {
			return false
		}
		for ; mask != 0; mask &= mask - 1 {
			w := l[bits.TrailingZeros8(mask)*8:]
			binary.LittleEndian.PutUint64(w, binary.LittleEndian.Uint64(w)^binary.LittleEndian.Uint64(delta))
			delta = delta[8:]
		}
	}
	return len(delta) == 0
}
