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

// CheckHead checks what Guest.Begin returns: the headers, then each static record
// at most once, STATIC_DATA_END last.
func CheckHead(b []byte) error {
	if err := CheckHeaders(b[:min(len(b), HeadersSize)]); err != nil {
		return err
	}
	var order []RecordType
	err := Records(b[HeadersSize:], func(r Record) error {
		order = append(order, r.Type)
		return nil
	})
	if err == nil {
		err = once(order, RecordCPUIDPolicy, RecordMSRPolicy, RecordStaticDataEnd)
	}
	if err == nil && (len(order) == 0 || order[len(order)-1] != RecordStaticDataEnd) {
		err = fmt.Errorf("%w: no end of the static records", ErrStream)
	}
	return err
}

// CheckState checks what resumes the processors: TSC_INFO where there is one,
// HVM_CONTEXT and HVM_PARAMS, in this order, each with content.
func CheckState(b []byte) error {
	var order []RecordType
	err := Records(b, func(r Record) error {
		if len(r.Body) == 0 {
			return fmt.Errorf("%w: record %#x is empty", ErrStream, uint32(r.Type))
		}
		order = append(order, r.Type)
		return nil
	})
	if err == nil {
		err = once(order, RecordTSCInfo, RecordHVMContext, RecordHVMParams)
	}
	if n := len(order); err == nil && (n < 2 || order[n-2] != RecordHVMContext || order[n-1] != RecordHVMParams) {
		err = fmt.Errorf("%w: records %#x are no state of a guest", ErrStream, order)
	}
	return err
}

// once checks that there are only records of these types, in this order.
func once(got []RecordType, types ...RecordType) error {
	for _, t := range types {
		if len(got) > 0 && got[0] == t {
			got = got[1:]
		}
	}
	if len(got) > 0 {
		return fmt.Errorf("%w: record of type %#x has no place here", ErrStream, uint32(got[0]))
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
