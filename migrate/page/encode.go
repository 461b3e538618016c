package page

import (
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"github.com/klauspost/compress/s2"
)

// Encoder is the primary's side. It is used by one goroutine; see the package's
// documentation for what its owner promises.
type Encoder struct {
	cache    *cache
	gauge    gauge
	squeezed []byte // room for a compressed page
	stats    Stats
}

// Stats is what became of the pages that were encoded.
type Stats struct {
	Unchanged, Zero, Delta, Compressed, Raw uint64 // pages
	Bytes                                   uint64 // of records
}

// Stats returns the sums since the Encoder was made.
func (e *Encoder) Stats() Stats { return e.stats }

// NewEncoder returns an Encoder that knows of no page what the standby has, and
// keeps at most cachePages of them: some 4120 bytes each, on the heap but without
// pointers, in use once a page is. With 0 it never sends a delta, nor leaves a page
// out.
func NewEncoder(cachePages int) *Encoder {
	return &Encoder{cache: newCache(cachePages), squeezed: make([]byte, s2.MaxEncodedLen(Size))}
}

// Forget makes the Encoder not know any more what the standby has for pfn: a
// record of it was lost.
func (e *Encoder) Forget(pfn PFN) { e.cache.drop(pfn) }

// Reset makes the Encoder as new: nothing is known any more.
func (e *Encoder) Reset() { e.cache.reset() }

// SetLink says how many bytes a second the link takes, 0 if that is not known. A
// page is then compressed only while that takes less time than sending what it
// saves would; else, while it saves an eighth.
func (e *Encoder) SetLink(bytesPerSecond int64) { e.gauge.link = bytesPerSecond }

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
				e.stats.Unchanged++
				return dst
			}
			*known = zero
		} else if known = e.cache.put(pfn); known != nil {
			*known = zero
		}
		return e.seal(dst, kindZero, 0, pfn, p)
	}

	k, n := kindRaw, Size
	if known != nil {
		switch d := diff(body, known, p); {
		case d == 0:
			e.stats.Unchanged++
			return dst
		case d <= maxDelta:
			k, n = kindDelta, d
		}
	} else if known = e.cache.put(pfn); known != nil {
		*known = *p
	}
	if n > Size/2 && e.gauge.pays() {
		if s := e.squeeze(p); len(s) < min(n, worthwhile) {
			k, n = kindS2, copy(body, s)
		}
	}
	if k == kindRaw {
		copy(body, data)
	}
	return e.seal(dst, k, n, pfn, p)
}

// seal counts the record and puts the header before a payload of n bytes that lies behind dst's end
// already, and returns dst with the record.
func (e *Encoder) seal(dst []byte, k kind, n int, pfn PFN, p *[Size]byte) []byte {
	switch k {
	case kindZero:
		e.stats.Zero++
	case kindDelta:
		e.stats.Delta++
	case kindS2:
		e.stats.Compressed++
	case kindRaw:
		e.stats.Raw++
	}
	e.stats.Bytes += uint64(headerSize + n)
	start := len(dst)
	dst = dst[:start+headerSize+n]
	h := dst[start : start+headerSize]
	header := uint64(k)<<61 | uint64(n)<<48 | uint64(pfn)
	binary.BigEndian.PutUint64(h, header)
	binary.BigEndian.PutUint32(h[8:], check(header, p))
	return dst
}

// worthwhile is what a compressed page must stay below.
const worthwhile = Size * 7 / 8

// gauge decides whether compressing is tried: always while it has paid of late,
// else on one page in sampleEvery, so that a guest whose pages do not compress
// costs next to nothing. The zero value tries, and knows of no link.
type gauge struct {
	link        int64 // bytes a second; 0 is unknown
	size        mean  // of a compressed page, in bytes
	cost        mean  // of compressing one, in nanoseconds
	turn, tries uint8
}

// mean is a running mean over some sixteen values, times 16.
type mean int64

func (m *mean) add(x int64) { *m += mean(x) - *m/16 }

const (
	sampleEvery = 32 // pages one is tried though it does not pay
	timeEvery   = 16 // tries one is timed
	// fastest is the least time, in nanoseconds, that compressing a page can take. If
	// the link takes the whole page sooner, nothing is ever tried.
	fastest = 1000
)

// pays tells whether to try the next page.
func (g *gauge) pays() bool {
	good := int64(g.size)/16 <= worthwhile
	if g.link > 0 {
		if Size*1e9/g.link < fastest {
			return false
		}
		saved := Size - int64(g.size)/16
		good = good && float64(g.cost)/16*float64(g.link) <= float64(saved)*1e9
	}
	if !good {
		g.turn++
		return g.turn%sampleEvery == 0
	}
	return true
}

// squeeze compresses a page and takes note of what came of it.
func (e *Encoder) squeeze(p *[Size]byte) []byte {
	g := &e.gauge
	g.tries++
	timed := g.link > 0 && (g.tries%timeEvery == 1 || g.cost == 0)
	var begin time.Time
	if timed {
		begin = time.Now()
	}
	s := s2.Encode(e.squeezed, p[:])
	if timed {
		g.cost.add(int64(time.Since(begin)))
	}
	g.size.add(int64(len(s)))
	return s
}
