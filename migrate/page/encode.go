package page

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/klauspost/compress/s2"
)

// Encoder is the primary's side. It is used by one goroutine; see the package's
// documentation for what its owner promises.
type Encoder struct {
	cache    *cache
	gauge    gauge
	squeezed []byte // room for a compressed page
}

// NewEncoder returns an Encoder that knows of no page what the standby has, and
// keeps at most cachePages of them: some 4112 bytes each. With 0 it never sends a
// delta, nor leaves a page out.
func NewEncoder(cachePages int) *Encoder {
	return &Encoder{cache: newCache(cachePages), squeezed: make([]byte, s2.MaxEncodedLen(Size))}
}

// Forget makes the Encoder not know any more what the standby has for pfn: a
// record of it was lost.
func (e *Encoder) Forget(pfn PFN) { e.cache.drop(pfn) }

// Reset makes the Encoder as new: nothing is known any more.
func (e *Encoder) Reset() { e.cache.reset() }

// Append encodes a page, data of Size bytes, after dst, and returns the longer
// slice; dst itself if the standby has that page already. It adds at most
// MaxEncoded bytes, and reallocates dst only if less than that is free. It panics
// if pfn is more than MaxPFN or data not one page.
func (e *Encoder) Append(dst []byte, pfn PFN, data []byte) []byte {
	if len(data) != Size || pfn > MaxPFN {
		panic(fmt.Sprintf("page: %d bytes of page %v", len(data), pfn))
	}
	p := (*[Size]byte)(data)
	dst = slices.Grow(dst, MaxEncoded)
	room := dst[len(dst):cap(dst)]
	body := room[headerSize:]

	known := e.cache.get(pfn)
	if isZero(p) {
		if known != nil {
			if *known == zero {
				return dst
			}
			*known = zero
		} else if known = e.cache.put(pfn); known != nil {
			*known = zero
		}
		return seal(dst, kindZero, 0, pfn, p)
	}

	k, n := kindRaw, Size
	if known != nil {
		switch d := diff(body, known, p); {
		case d == 0:
			return dst
		case d <= maxDelta:
			k, n = kindDelta, d
		}
	} else if known = e.cache.put(pfn); known != nil {
		*known = *p
	}
	if n > Size/2 && e.gauge.pays() {
		s := s2.Encode(e.squeezed, data)
		e.gauge.note(len(s))
		if len(s) < min(n, worthwhile) {
			k, n = kindS2, copy(body, s)
		}
	}
	if k == kindRaw {
		copy(body, data)
	}
	return seal(dst, k, n, pfn, p)
}

// seal puts the header before a payload of n bytes that lies behind dst's end
// already, and returns dst with the record.
func seal(dst []byte, k kind, n int, pfn PFN, p *[Size]byte) []byte {
	start := len(dst)
	dst = dst[:start+headerSize+n]
	h := dst[start : start+headerSize]
	binary.BigEndian.PutUint64(h, uint64(k)<<61|uint64(n)<<48|uint64(pfn))
	binary.BigEndian.PutUint32(h[8:], check(h[:8], p[:]))
	return dst
}

// worthwhile is what a compressed page must stay below.
const worthwhile = Size * 7 / 8

// gauge decides whether compressing is tried: always while it has paid of late,
// else on one page in sampleEvery, so that a guest whose pages do not compress
// costs next to nothing. The zero value tries.
type gauge struct {
	loss int32 // running mean of compressed size less worthwhile, times 16
	skip uint8
}

const sampleEvery = 32

func (g *gauge) pays() bool {
	if g.loss <= 0 {
		return true
	}
	g.skip++
	return g.skip%sampleEvery == 0
}

func (g *gauge) note(size int) {
	g.loss += int32(size) - worthwhile - g.loss/16
}
