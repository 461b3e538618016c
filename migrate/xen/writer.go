package xen

import (
	"encoding/binary"
	"fmt"

	"kemari/migrate/page"
)

// maxBatch is how many pages a PAGE_DATA record may have.
const maxBatch = 1024

// AppendHeaders appends what begins the libxc stream of a PVH or HVM guest saved on
// that version of Xen: HeadersSize bytes.
func AppendHeaders(b []byte, major, minor uint16) []byte {
	b = binary.BigEndian.AppendUint64(b, ^uint64(0))
	b = binary.BigEndian.AppendUint32(b, 0x58454e46) // "XENF"
	b = binary.BigEndian.AppendUint32(b, 3)
	b = binary.BigEndian.AppendUint64(b, 0) // options: little-endian
	b = binary.LittleEndian.AppendUint32(b, 2)
	b = binary.LittleEndian.AppendUint16(b, 12) // pages of 2^12 bytes
	b = binary.LittleEndian.AppendUint16(b, 0)
	b = binary.LittleEndian.AppendUint32(b, uint32(major))
	return binary.LittleEndian.AppendUint32(b, uint32(minor))
}

// AppendRecord appends a record with its padding. The body may be at most MaxRecord
// bytes long.
func AppendRecord(b []byte, t RecordType, body []byte) []byte {
	b = appendRecordHeader(b, t, len(body))
	b = append(b, body...)
	return pad(b, len(body))
}

func appendRecordHeader(b []byte, t RecordType, n int) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(t))
	return binary.LittleEndian.AppendUint32(b, uint32(n))
}

func pad(b []byte, n int) []byte { return append(b, make([]byte, -n&7)...) }

// AppendPageData appends PAGE_DATA records of the pages: the i-th of data's is
// pfns[i]'s.
func AppendPageData(b []byte, pfns []page.PFN, data []byte) []byte {
	for len(pfns) > 0 {
		n := min(len(pfns), maxBatch)
		b = appendRecordHeader(b, RecordPageData, 8+n*(8+PageSize))
		b = binary.LittleEndian.AppendUint64(b, uint64(n))
		for _, p := range pfns[:n] {
			b = binary.LittleEndian.AppendUint64(b, uint64(p)) // type 0: an ordinary page
		}
		b = append(b, data[:n*PageSize]...)
		pfns, data = pfns[n:], data[n*PageSize:]
	}
	return b
}

// TSCInfo is what a TSC_INFO record says.
type TSCInfo struct {
	Mode, KHz, Incarnation uint32
	Nsec                   uint64
}

// AppendTSCInfo appends a TSC_INFO record.
func AppendTSCInfo(b []byte, t TSCInfo) []byte {
	b = appendRecordHeader(b, RecordTSCInfo, 24)
	b = binary.LittleEndian.AppendUint32(b, t.Mode)
	b = binary.LittleEndian.AppendUint32(b, t.KHz)
	b = binary.LittleEndian.AppendUint64(b, t.Nsec)
	b = binary.LittleEndian.AppendUint32(b, t.Incarnation)
	return binary.LittleEndian.AppendUint32(b, 0)
}

// HVMParam is one entry of an HVM_PARAMS record.
type HVMParam struct{ Index, Value uint64 }

// AppendHVMParams appends an HVM_PARAMS record of the parameters that are not zero;
// nothing if there is none.
func AppendHVMParams(b []byte, params []HVMParam) []byte {
	n := 0
	for _, p := range params {
		if p.Value != 0 {
			n++
		}
	}
	if n == 0 {
		return b
	}
	b = appendRecordHeader(b, RecordHVMParams, 8+16*n)
	b = binary.LittleEndian.AppendUint64(b, uint64(n))
	for _, p := range params {
		if p.Value != 0 {
			b = binary.LittleEndian.AppendUint64(b, p.Index)
			b = binary.LittleEndian.AppendUint64(b, p.Value)
		}
	}
	return b
}

// headRecords are the records of a stream's head, in order.
var headRecords = []RecordType{RecordCPUIDPolicy, RecordMSRPolicy, RecordStaticDataEnd}

// stateRecords are those of a checkpoint's state, in order.
var stateRecords = []RecordType{RecordTSCInfo, RecordHVMContext, RecordHVMParams}

// CheckHead checks a stream's head as Domain.Begin returns it: the headers,
// CPUID_POLICY, MSR_POLICY and STATIC_DATA_END, whole and nothing else.
func CheckHead(b []byte) error {
	if len(b) < HeadersSize {
		return fmt.Errorf("%w: head of %d bytes", ErrStream, len(b))
	}
	if err := CheckHeaders(b[:HeadersSize]); err != nil {
		return err
	}
	return checkRecords(b[HeadersSize:], headRecords)
}

// CheckState checks the state of a checkpoint: TSC_INFO, HVM_CONTEXT and
// HVM_PARAMS, whole and nothing else.
func CheckState(b []byte) error { return checkRecords(b, stateRecords) }

// checkRecords checks that b is a sequence of whole records of just these types.
func checkRecords(b []byte, want []RecordType) error {
	for _, t := range want {
		if len(b) < 8 {
			return fmt.Errorf("%w: ends before its record %#x", ErrStream, uint32(t))
		}
		if got := RecordType(binary.LittleEndian.Uint32(b)); got != t {
			return fmt.Errorf("%w: record %#x, want %#x", ErrStream, uint32(got), uint32(t))
		}
		size := binary.LittleEndian.Uint32(b[4:])
		padded := 8 + int64(size+7)&^7
		if size > MaxRecord || int64(len(b)) < padded {
			return fmt.Errorf("%w: record %#x of %d bytes in %d", ErrStream, uint32(t), size, len(b))
		}
		if err := checkBody(t, b[8:8+size]); err != nil {
			return err
		}
		b = b[padded:]
	}
	if len(b) > 0 {
		return fmt.Errorf("%w: %d bytes too many", ErrStream, len(b))
	}
	return nil
}

// checkBody checks the sizes that libxenguest's restore insists on.
func checkBody(t RecordType, b []byte) error {
	ok := true
	switch t {
	case RecordCPUIDPolicy:
		ok = len(b) > 0 && len(b)%24 == 0
	case RecordMSRPolicy:
		ok = len(b) > 0 && len(b)%16 == 0
	case RecordStaticDataEnd:
		ok = len(b) == 0
	case RecordTSCInfo:
		ok = len(b) == 24
	case RecordHVMContext:
		ok = len(b) > 0
	case RecordHVMParams:
		ok = len(b) >= 8 && uint64(binary.LittleEndian.Uint32(b))*16 == uint64(len(b)-8)
	}
	if !ok {
		return fmt.Errorf("%w: record %#x of %d bytes", ErrStream, uint32(t), len(b))
	}
	return nil
}
