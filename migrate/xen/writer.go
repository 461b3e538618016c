package xen

import (
	"encoding/binary"
	"fmt"
	"slices"

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

// The libxl stream's record of a device model's state: behind the libxc stream.
const (
	emulatorRecord = 3 // EMULATOR_CONTEXT
	emulatorQEMU   = 2 // EMULATOR_QEMU_UPSTREAM
	emulatorHeader = 8 // which emulator, and the how manieth
)

// appendEmulator appends the end of the libxc stream, and the record of the libxl stream
// with the device model's state, which state appends.
func appendEmulator(b []byte, state func([]byte) ([]byte, error)) ([]byte, error) {
	b = AppendRecord(b, RecordEnd, nil)
	at := len(b)
	b = appendRecordHeader(b, emulatorRecord, 0)
	b = binary.LittleEndian.AppendUint64(b, emulatorQEMU)
	b, err := state(b)
	if err != nil {
		return b, err
	}
	n := len(b) - at - 8
	binary.LittleEndian.PutUint32(b[at+4:], uint32(n))
	return pad(b, n), nil
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

// CheckState checks the state of a checkpoint: TSC_INFO, HVM_CONTEXT and HVM_PARAMS,
// whole and nothing else; if the guest has a device model END and that one's
// EMULATOR_CONTEXT behind them.
func CheckState(b []byte, deviceModel bool) error {
	if !deviceModel {
		return checkRecords(b, stateRecords)
	}
	// Up to the record of the libxl stream it is the libxc stream.
	rest, err := cutRecords(b, append(slices.Clip(stateRecords), RecordEnd))
	if err != nil {
		return err
	}
	if len(rest) <= 8+emulatorHeader {
		return fmt.Errorf("%w: without the device model's state", ErrStream)
	}
	size := binary.LittleEndian.Uint32(rest[4:])
	switch {
	case binary.LittleEndian.Uint32(rest) != emulatorRecord || binary.LittleEndian.Uint64(rest[8:]) != emulatorQEMU:
		return fmt.Errorf("%w: what follows is not the state of QEMU", ErrStream)
	case size <= emulatorHeader || size > maxEmulator+emulatorHeader || int64(len(rest)) != 8+int64(size+7)&^7:
		return fmt.Errorf("%w: a device model's state of %d bytes in %d", ErrStream, size, len(rest))
	}
	return nil
}

// AppendTail appends what ends the streams of a guest that is to run from a state that
// CheckState has let pass.
func AppendTail(b, state []byte, deviceModel bool) []byte {
	b = append(b, state...)
	if !deviceModel {
		b = AppendRecord(b, RecordEnd, nil)
	}
	return AppendRecord(b, RecordEnd, nil) // of the libxl stream, which looks the same
}

// checkRecords checks that b is a sequence of whole records of just these types.
func checkRecords(b []byte, want []RecordType) error {
	rest, err := cutRecords(b, want)
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("%w: %d bytes too many", ErrStream, len(rest))
	}
	return err
}

// cutRecords checks that b begins with whole records of just these types, and returns
// the rest.
func cutRecords(b []byte, want []RecordType) ([]byte, error) {
	for _, t := range want {
		if len(b) < 8 {
			return nil, fmt.Errorf("%w: ends before its record %#x", ErrStream, uint32(t))
		}
		if got := RecordType(binary.LittleEndian.Uint32(b)); got != t {
			return nil, fmt.Errorf("%w: record %#x, want %#x", ErrStream, uint32(got), uint32(t))
		}
		size := binary.LittleEndian.Uint32(b[4:])
		padded := 8 + int64(size+7)&^7
		if size > MaxRecord || int64(len(b)) < padded {
			return nil, fmt.Errorf("%w: record %#x of %d bytes in %d", ErrStream, uint32(t), size, len(b))
		}
		if err := checkBody(t, b[8:8+size]); err != nil {
			return nil, err
		}
		b = b[padded:]
	}
	return b, nil
}

// checkBody checks the sizes that libxenguest's restore insists on.
func checkBody(t RecordType, b []byte) error {
	ok := true
	switch t {
	case RecordCPUIDPolicy:
		ok = len(b) > 0 && len(b)%24 == 0
	case RecordMSRPolicy:
		ok = len(b) > 0 && len(b)%16 == 0
	case RecordStaticDataEnd, RecordEnd:
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
