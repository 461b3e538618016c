package page

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/klauspost/compress/s2"
)

// Decoder is the standby's side. It is used by one goroutine.
type Decoder struct {
	limit PFN
	base  func(pfn PFN, dst []byte) error
	page  [Size]byte // being decoded
}

// NewDecoder returns a Decoder of the records of a guest whose pages are below
// limit. Where a record is a delta it asks base for what the standby has of that
// page; an error of it is taken for having something else.
func NewDecoder(limit PFN, base func(pfn PFN, dst []byte) error) *Decoder {
	return &Decoder{limit: min(limit, MaxPFN+1), base: base}
}

// Decode decodes src, which must be whole records, and hands each page to out in
// their order. data is valid until out returns and must not be changed. It stops
// at the first error: one of out as it is, ErrFormat or ErrBase; pages handed out
// before are good by themselves, but what src was part of is not.
func (d *Decoder) Decode(src []byte, out func(pfn PFN, data []byte) error) error {
	for len(src) > 0 {
		r, err := d.next(src)
		if err != nil {
			return err
		}
		var p *[Size]byte
		switch {
		case r.kind == kindZero && len(r.body) == 0:
			p = &zero
		case r.kind == kindRaw && len(r.body) == Size:
			p = (*[Size]byte)(r.body)
		default:
			p = &d.page
			if err := d.fill(p, r); err != nil {
				return err
			}
		}
		if err := r.check(p); err != nil {
			return err
		}
		if err := out(r.pfn, p[:]); err != nil {
			return err
		}
		src = src[headerSize+len(r.body):]
	}
	return nil
}

// AppendPages decodes src as Decode does, but straight behind what data and pfns
// hold, and returns both longer; as they were if there is an error. A record of a
// few bytes becomes a page: how long they may get is for the caller to bound,
// before each call, by MaxPages.
func (d *Decoder) AppendPages(pfns []PFN, data, src []byte) ([]PFN, []byte, error) {
	toPFNs, to := pfns, data
	for len(src) > 0 {
		r, err := d.next(src)
		if err != nil {
			return pfns, data, err
		}
		n := len(to)
		to = slices.Grow(to, Size)[:n+Size]
		p := (*[Size]byte)(to[n:])
		if err := d.fill(p, r); err != nil {
			return pfns, data, err
		}
		if err := r.check(p); err != nil {
			return pfns, data, err
		}
		toPFNs = append(toPFNs, r.pfn)
		src = src[headerSize+len(r.body):]
	}
	return toPFNs, to, nil
}

// MaxPages is the number of pages that n bytes of records can become at most.
func MaxPages(n int) int { return n / headerSize }

// record is one that lies in src.
type record struct {
	kind   kind
	pfn    PFN
	header uint64
	sum    uint32
	body   []byte
}

// next looks at the record src begins with.
func (d *Decoder) next(src []byte) (record, error) {
	if len(src) < headerSize {
		return record{}, fmt.Errorf("%w: %d bytes are left", ErrFormat, len(src))
	}
	h := binary.BigEndian.Uint64(src)
	r := record{kind: kind(h >> 61), pfn: PFN(h) & MaxPFN, header: h, sum: binary.BigEndian.Uint32(src[8:])}
	n := int(h >> 48 & 0x1fff)
	switch {
	case r.kind == 0 || r.kind > kindLast:
		return record{}, fmt.Errorf("%w: kind %d", ErrFormat, r.kind)
	case r.pfn >= d.limit:
		return record{}, fmt.Errorf("%w: page %v is outside the guest, which ends at %v", ErrFormat, r.pfn, d.limit)
	case n > len(src)-headerSize:
		return record{}, fmt.Errorf("%w: %d bytes of page %v, %d are left", ErrFormat, n, r.pfn, len(src)-headerSize)
	}
	r.body = src[headerSize : headerSize+n]
	return r, nil
}

// fill makes p the page that r says.
func (d *Decoder) fill(p *[Size]byte, r record) error {
	switch r.kind {
	case kindZero:
		if len(r.body) == 0 {
			*p = zero
			return nil
		}
	case kindRaw:
		if len(r.body) == Size {
			*p = [Size]byte(r.body)
			return nil
		}
	case kindDelta:
		if err := d.base(r.pfn, p[:]); err != nil {
			return fmt.Errorf("%w: page %v: %w", ErrBase, r.pfn, err)
		}
		if patch(p, r.body) {
			return nil
		}
	case kindS2:
		// The length is looked at first: Decode would allocate what it says.
		if n, err := s2.DecodedLen(r.body); err == nil && n == Size {
			if _, err := s2.Decode(p[:], r.body); err == nil {
				return nil
			}
		}
	}
	return fmt.Errorf("%w: page %v, kind %d of %d bytes", ErrFormat, r.pfn, r.kind, len(r.body))
}

// check tells whether p is the page that was encoded.
func (r record) check(p *[Size]byte) error {
	if check(r.header, p) != r.sum {
		return fmt.Errorf("%w: page %v, kind %d", ErrBase, r.pfn, r.kind)
	}
	return nil
}
