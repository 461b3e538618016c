package wire

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// Hello is what a primary says of itself. Both sides were told the same by the
// control connection; it is said again so that a mix-up is noticed at once.
type Hello struct {
	UUID      [16]byte // the guest's
	MemoryKiB uint64   // its memory, which bounds an epoch's size
}

// Append appends the 24 bytes of h to b.
func (h Hello) Append(b []byte) []byte {
	return binary.BigEndian.AppendUint64(append(b, h.UUID[:]...), h.MemoryKiB)
}

// ParseHello decodes a Hello frame's payload.
func ParseHello(b []byte) (Hello, error) {
	if len(b) != 24 {
		return Hello{}, fmt.Errorf("%w: hello of %d bytes", ErrFormat, len(b))
	}
	return Hello{UUID: [16]byte(b[:16]), MemoryKiB: binary.BigEndian.Uint64(b[16:])}, nil
}

// EpochEnd says what the epoch's data frames amount to, so that an epoch with a
// frame missing, doubled or out of order is refused as a whole.
type EpochEnd struct {
	Bytes uint64 // sum of the payloads
	CRC   uint32 // CRC32C of the frames' checksums, one after the other
}

// Append appends the 12 bytes of e to b.
func (e EpochEnd) Append(b []byte) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(b, e.Bytes), e.CRC)
}

// ParseEpochEnd decodes an EpochEnd frame's payload.
func ParseEpochEnd(b []byte) (EpochEnd, error) {
	if len(b) != 12 {
		return EpochEnd{}, fmt.Errorf("%w: epoch end of %d bytes", ErrFormat, len(b))
	}
	return EpochEnd{Bytes: binary.BigEndian.Uint64(b), CRC: binary.BigEndian.Uint32(b[8:])}, nil
}

// Add counts one data frame in. Its checksum covers its payload, epoch and
// generation, so the payload need not be gone through once more.
func (e *EpochEnd) Add(f Frame) {
	e.Bytes += uint64(len(f.Payload))
	e.CRC = crc32.Update(e.CRC, castagnoli, binary.BigEndian.AppendUint32(nil, f.CRC))
}
