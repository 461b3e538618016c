package xen

import (
	"encoding/binary"
	"fmt"

	"kemari/migrate/page"
)

// Records hands the records of b, part of a libxc stream, to f, in order. It
// stops at the first error; b must end with a whole record.
func Records(b []byte, f func(Record) error) error {
	for len(b) > 0 {
		if len(b) < 8 {
			return fmt.Errorf("%w: %d bytes are left", ErrStream, len(b))
		}
		size := binary.LittleEndian.Uint32(b[4:])
		if size > MaxRecord {
			return fmt.Errorf("%w: record of %d bytes", ErrStream, size)
		}
		n := 8 + int(size+7)&^7
		if n > len(b) {
			return fmt.Errorf("%w: record of %d bytes, %d are left", ErrStream, n, len(b))
		}
		r := Record{Type: RecordType(binary.LittleEndian.Uint32(b)), Body: b[8 : 8+size], Raw: b[:n]}
		if err := f(r); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// appendPages appends the pages of a PAGE_DATA record's body that have content.
func appendPages(body []byte, add func(page.PFN, []byte)) error {
	if _, err := CheckPageData(body, 1<<52); err != nil {
		return err
	}
	n := int(binary.LittleEndian.Uint32(body))
	entries, data := body[8:8+8*n], body[8+8*n:]
	for i := range n {
		e := binary.LittleEndian.Uint64(entries[8*i:])
		if e>>60 >= 0xd { // without content
			continue
		}
		add(page.PFN(e&(1<<52-1)), data[:PageSize])
		data = data[PageSize:]
	}
	return nil
}
