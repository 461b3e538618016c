package page

import (
	"encoding/binary"
	"math/bits"
)

// A delta's payload is, little-endian since words are taken from pages as they are,
//
//	eight bytes: bit i is set if line i (64 bytes of the page) has changed
//	for each of those lines
//	  four bytes: the lengths of its eight words' changes, four bits each, lowest first
//	  the changes: the exclusive or of old and new, without leading zero bytes
//
// Guests count, time and point: most changes are in a word's low bytes.

// maxDelta is from where on a delta is no longer worth its while.
const maxDelta = Size * 3 / 4

// maxLine is what one line can add to a delta; wordSize bytes more are written.
const (
	wordSize = 8
	maxLine  = 4 + lineSize
	stretch  = 8 // lines compared at once
)

// length is that of x without leading zero bytes.
func length(x uint64) int { return (bits.Len64(x) + 7) / 8 }

// diff writes the delta from base to p into dst, which must have room for
// maxDelta+maxLine+wordSize bytes, and makes base what p is. It returns the delta's
// length: 0 if base was p already, more than maxDelta if it was given up.
func diff(dst []byte, base, p *[Size]byte) int {
	var changed uint64
	n := 8
	dst = dst[:maxDelta+maxLine+wordSize]
	for i := 0; i < lines; i++ {
		// Most of a page is as it was, and the run time compares long stretches fastest.
		if i%stretch == 0 && *(*[stretch * lineSize]byte)(base[i*lineSize:]) == *(*[stretch * lineSize]byte)(p[i*lineSize:]) {
			i += stretch - 1
			continue
		}
		a := (*[lineSize]byte)(base[i*lineSize:])
		b := (*[lineSize]byte)(p[i*lineSize:])
		x0, x1, x2, x3 := word(a, 0)^word(b, 0), word(a, 1)^word(b, 1), word(a, 2)^word(b, 2), word(a, 3)^word(b, 3)
		x4, x5, x6, x7 := word(a, 4)^word(b, 4), word(a, 5)^word(b, 5), word(a, 6)^word(b, 6), word(a, 7)^word(b, 7)
		if x0|x1|x2|x3|x4|x5|x6|x7 == 0 {
			continue
		}
		changed |= 1 << i
		*a = *b
		if n > maxDelta {
			continue
		}
		// Every word is stored whole, and the next over its leading zeroes. The masks
		// change nothing: they spare the compiler the checks.
		l := (*[maxLine + wordSize]byte)(dst[n:])
		binary.LittleEndian.PutUint64(l[4:], x0)
		at, lengths := length(x0), uint32(length(x0))
		binary.LittleEndian.PutUint64(l[4+at&63:], x1)
		at, lengths = at+length(x1), lengths|uint32(length(x1))<<4
		binary.LittleEndian.PutUint64(l[4+at&63:], x2)
		at, lengths = at+length(x2), lengths|uint32(length(x2))<<8
		binary.LittleEndian.PutUint64(l[4+at&63:], x3)
		at, lengths = at+length(x3), lengths|uint32(length(x3))<<12
		binary.LittleEndian.PutUint64(l[4+at&63:], x4)
		at, lengths = at+length(x4), lengths|uint32(length(x4))<<16
		binary.LittleEndian.PutUint64(l[4+at&63:], x5)
		at, lengths = at+length(x5), lengths|uint32(length(x5))<<20
		binary.LittleEndian.PutUint64(l[4+at&63:], x6)
		at, lengths = at+length(x6), lengths|uint32(length(x6))<<24
		binary.LittleEndian.PutUint64(l[4+at&63:], x7)
		at, lengths = at+length(x7), lengths|uint32(length(x7))<<28
		binary.LittleEndian.PutUint32(l[:], lengths)
		n += 4 + at
	}
	if changed == 0 {
		return 0
	}
	binary.LittleEndian.PutUint64(dst, changed)
	return n
}

// low[n] selects the n low bytes of a word.
var low = [16]uint64{0, 1<<8 - 1, 1<<16 - 1, 1<<24 - 1, 1<<32 - 1, 1<<40 - 1, 1<<48 - 1, 1<<56 - 1, 1<<64 - 1}

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
	var tail [maxLine + wordSize]byte
	for ; changed != 0; changed &= changed - 1 {
		l := &tail
		if len(delta) >= len(l) {
			l = (*[maxLine + wordSize]byte)(delta)
		} else {
			// Words are loaded whole, so the last ones need something to follow.
			clear(tail[copy(tail[:], delta):])
		}
		lengths := binary.LittleEndian.Uint32(l[:])
		// None is above 8, and not all are 0.
		if lengths == 0 || (lengths>>3&0x11111111)*7&lengths != 0 {
			return false
		}
		to := (*[lineSize]byte)(p[bits.TrailingZeros64(changed)*lineSize:])
		if lengths == 0x88888888 { // common where a line is new: text, noise
			for j := 0; j < lineSize; j += wordSize {
				binary.LittleEndian.PutUint64(to[j:], binary.LittleEndian.Uint64(to[j:])^binary.LittleEndian.Uint64(l[4+j:]))
			}
			if len(delta) < maxLine {
				return false
			}
			delta = delta[maxLine:]
			continue
		}
		at := 0
		binary.LittleEndian.PutUint64(to[0:], word(to, 0)^binary.LittleEndian.Uint64(l[4+at&63:])&low[lengths>>0&15])
		at += int(lengths >> 0 & 15)
		binary.LittleEndian.PutUint64(to[8:], word(to, 1)^binary.LittleEndian.Uint64(l[4+at&63:])&low[lengths>>4&15])
		at += int(lengths >> 4 & 15)
		binary.LittleEndian.PutUint64(to[16:], word(to, 2)^binary.LittleEndian.Uint64(l[4+at&63:])&low[lengths>>8&15])
		at += int(lengths >> 8 & 15)
		binary.LittleEndian.PutUint64(to[24:], word(to, 3)^binary.LittleEndian.Uint64(l[4+at&63:])&low[lengths>>12&15])
		at += int(lengths >> 12 & 15)
		binary.LittleEndian.PutUint64(to[32:], word(to, 4)^binary.LittleEndian.Uint64(l[4+at&63:])&low[lengths>>16&15])
		at += int(lengths >> 16 & 15)
		binary.LittleEndian.PutUint64(to[40:], word(to, 5)^binary.LittleEndian.Uint64(l[4+at&63:])&low[lengths>>20&15])
		at += int(lengths >> 20 & 15)
		binary.LittleEndian.PutUint64(to[48:], word(to, 6)^binary.LittleEndian.Uint64(l[4+at&63:])&low[lengths>>24&15])
		at += int(lengths >> 24 & 15)
		binary.LittleEndian.PutUint64(to[56:], word(to, 7)^binary.LittleEndian.Uint64(l[4+at&63:])&low[lengths>>28&15])
		at += int(lengths >> 28 & 15)
		if len(delta) < 4+at {
			return false
		}
		delta = delta[4+at:]
	}
	return len(delta) == 0
}
