package xen

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// PageSize is the size of a page of guest memory, in bytes.
const PageSize = 4096

// RecordType is the type of a record of the libxc stream.
type RecordType uint32

// Record types of the libxc stream that a PVH or HVM guest's has.
const (
	RecordEnd           RecordType = 0x00
	RecordPageData      RecordType = 0x01
	RecordTSCInfo       RecordType = 0x08
	RecordHVMContext    RecordType = 0x09
	RecordHVMParams     RecordType = 0x0a
	RecordCheckpoint    RecordType = 0x0e
	RecordStaticDataEnd RecordType = 0x10
	RecordCPUIDPolicy   RecordType = 0x11
	RecordMSRPolicy     RecordType = 0x12
)

// HeadersSize is the length of what precedes the first record of a libxc stream:
// the image header (24 bytes) and the domain header (16).
const HeadersSize = 24 + 16

// MaxRecord bounds a record's body. A PAGE_DATA record has at most 1024 pages
// (MAX_BATCH_SIZE of xg_sr_common.h), and nothing else comes near.
const MaxRecord = 8 + 1024*(8+PageSize)

// ErrStream means that a stream is not one a guest could be restored from.
var ErrStream = errors.New("broken libxc stream")

// Record is one record of the libxc stream.
type Record struct {
	Type RecordType
	Body []byte // without padding
	Raw  []byte // header, body and padding, as in the stream
}

// CheckHeaders checks the HeadersSize bytes that begin a libxc stream: version 3,
// little-endian, of a guest that is not PV.
func CheckHeaders(b []byte) error {
	switch {
	case len(b) != HeadersSize:
		return fmt.Errorf("%w: headers of %d bytes", ErrStream, len(b))
	case binary.BigEndian.Uint64(b) != ^uint64(0) || binary.BigEndian.Uint32(b[8:]) != 0x58454e46:
		return fmt.Errorf("%w: no image header", ErrStream)
	case binary.BigEndian.Uint32(b[12:]) != 3:
		return fmt.Errorf("%w: version %d, want 3", ErrStream, binary.BigEndian.Uint32(b[12:]))
	case binary.BigEndian.Uint16(b[16:])&1 != 0:
		return fmt.Errorf("%w: big-endian", ErrStream)
	case binary.LittleEndian.Uint32(b[24:]) != 2:
		return fmt.Errorf("%w: guest of type %d, want 2 (HVM or PVH)", ErrStream, binary.LittleEndian.Uint32(b[24:]))
	case binary.LittleEndian.Uint16(b[28:]) != 12:
		return fmt.Errorf("%w: pages of 2^%d bytes", ErrStream, binary.LittleEndian.Uint16(b[28:]))
	}
	return nil
}

// Splitter cuts a libxc stream that comes in pieces of any size into its headers
// and records. It holds at most one record. The zero value is at the beginning of
// a stream.
type Splitter struct {
	buf     []byte
	begun   bool
	Headers func(b []byte) error // called once, with the checked headers
	Record  func(Record) error   // called with each record; valid until it returns
}

// Push takes the next piece. It calls Headers and Record as they become complete,
// and stops at the first error.
func (s *Splitter) Push(p []byte) error {
	for {
		need, err := s.need(p)
		if err != nil {
			return err
		}
		if len(s.buf)+len(p) < need || need == 0 {
			s.buf = append(s.buf, p...)
			return nil
		}
		// The common case, a whole record within p, is not copied.
		unit := p[:max(0, need-len(s.buf))]
		rest := p[len(unit):]
		if len(s.buf) > 0 {
			s.buf = append(s.buf, unit...)
			unit = s.buf
		}
		if err := s.deliver(unit); err != nil {
			return err
		}
		s.buf, p = s.buf[:0], rest
		if len(p) == 0 {
			return nil
		}
	}
}

// Partial tells whether a record has begun and is not complete.
func (s *Splitter) Partial() bool { return len(s.buf) > 0 }

// need is the length of the unit that begins with buf followed by p, or 0 while
// there is too little to know.
func (s *Splitter) need(p []byte) (int, error) {
	if !s.begun {
		return HeadersSize, nil
	}
	if len(s.buf)+len(p) < 8 {
		return 0, nil
	}
	var h [8]byte
	n := copy(h[:], s.buf)
	copy(h[n:], p)
	size := binary.LittleEndian.Uint32(h[4:])
	if size > MaxRecord {
		return 0, fmt.Errorf("%w: record of %d bytes", ErrStream, size)
	}
	return 8 + int(size+7)&^7, nil
}

func (s *Splitter) deliver(unit []byte) error {
	if !s.begun {
		if err := CheckHeaders(unit); err != nil {
			return err
		}
		s.begun = true
		return s.Headers(unit)
	}
	size := binary.LittleEndian.Uint32(unit[4:])
	return s.Record(Record{
		Type: RecordType(binary.LittleEndian.Uint32(unit)),
		Body: unit[8 : 8+size],
		Raw:  unit,
	})
}

// CheckPageData checks a PAGE_DATA record's body: its count, its length and that
// every pfn is below limit. It returns the number of pages with content.
func CheckPageData(b []byte, limit uint64) (pages int, err error) {
	if len(b) < 8 {
		return 0, fmt.Errorf("%w: PAGE_DATA of %d bytes", ErrStream, len(b))
	}
	n := int(binary.LittleEndian.Uint32(b))
	if n == 0 || n > 1024 || len(b) < 8+8*n {
		return 0, fmt.Errorf("%w: PAGE_DATA of %d pages in %d bytes", ErrStream, n, len(b))
	}
	for i := range n {
		e := binary.LittleEndian.Uint64(b[8+8*i:])
		if pfn := e & (1<<52 - 1); pfn >= limit {
			return 0, fmt.Errorf("%w: page %#x is outside the guest", ErrStream, pfn)
		}
		// The top four bits are the type: broken, unallocated (XTAB, XALLOC) pages
		// have no content.
		if typ := e >> 60; typ < 0xd {
			pages++
		}
	}
	if want := 8 + 8*n + PageSize*pages; len(b) != want {
		return 0, fmt.Errorf("%w: PAGE_DATA of %d bytes, want %d", ErrStream, len(b), want)
	}
	return pages, nil
}

// LibxlHeader begins a libxl stream (version 2, little-endian) and says that a
// libxc stream follows.
func LibxlHeader() []byte {
	b := binary.BigEndian.AppendUint64(nil, 0x4c6962786c466d74) // "LibxlFmt"
	b = binary.BigEndian.AppendUint32(b, 2)
	b = binary.BigEndian.AppendUint32(b, 0)
	b = binary.LittleEndian.AppendUint32(b, 1) // LIBXC_CONTEXT
	return binary.LittleEndian.AppendUint32(b, 0)
}
