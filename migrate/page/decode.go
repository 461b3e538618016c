package page

import (
	"encoding/binary"
	"fmt"

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
		if len(src) < headerSize {
			return fmt.Errorf("%w: %d bytes are left", ErrFormat, len(src))
		}
		h := binary.BigEndian.Uint64(src)
		k, n, pfn := kind(h>>61), int(h>>48&0x1fff), PFN(h)&MaxPFN
		switch {
		case k == 0 || k > kindLast:
			return fmt.Errorf("%w: kind %d", ErrFormat, k)
		case pfn >= d.limit:
			return fmt.Errorf("%w: page %v is outside the guest, which ends at %v", ErrFormat, pfn, d.limit)
		case n > len(src)-headerSize:
			return fmt.Errorf("%w: %d bytes of page %v, %d are left", ErrFormat, n, pfn, len(src)-headerSize)
		}
		data, err := d.page1(k, pfn, src[headerSize:headerSize+n])
		if err != nil {
			return err
		}
		if check(src[:8], data) != binary.BigEndian.Uint32(src[8:]) {
			return fmt.Errorf("%w: page %v, kind %d", ErrBase, pfn, k)
		}
		if err := out(pfn, data); err != nil {
			return err
		}
		src = src[headerSize+n:]
	}
	return nil
}

// page1 decodes one payload. What it returns lies in src, in d or is zero.
func (d *Decoder) page1(k kind, pfn PFN, src []byte) ([]byte, error) {
	switch k {
	case kindZero:
		if len(src) == 0 {
			return zero[:], nil
		}
	case kindRaw:
		if len(src) == Size {
			return src, nil
		}
	case kindDelta:
		if err := d.base(pfn, d.page[:]); err != nil {
			return nil, fmt.Errorf("%w: page %v: %w", ErrBase, pfn, err)
		}
		if patch(&d.page, src) {
			return d.page[:], nil
		}
	case kindS2:
		// The length is looked at first: Decode would allocate what it says.
		if n, err := s2.DecodedLen(src); err == nil && n == Size {
			if b, err := s2.Decode(d.page[:], src); err == nil {
				return b, nil
			}
		}
	}
	return nil, fmt.Errorf("%w: page %v, kind %d of %d bytes", ErrFormat, pfn, k, len(src))
}
