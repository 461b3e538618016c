package wire

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// Hello is what a primary says of itself. Guest and memory both sides were told
// by the control connection; they are said again so that a mix-up is noticed at
// once.
type Hello struct {
	Lowest, Highest uint8    // versions of the format that it speaks
	UUID            [16]byte // the guest's
	MemoryKiB       uint64   // its memory
	Session         Session  // the same on every connection of one protection
	Committed       Epoch    // last one it knows to be committed; 0 for none
}

const helloSize = 4 + 16 + 8 + 8 + 8

// Append appends the 44 bytes of h to b.
func (h Hello) Append(b []byte) []byte {
	b = append(append(b, h.Lowest, h.Highest, 0, 0), h.UUID[:]...)
	b = binary.BigEndian.AppendUint64(b, h.MemoryKiB)
	b = binary.BigEndian.AppendUint64(b, uint64(h.Session))
	return binary.BigEndian.AppendUint64(b, uint64(h.Committed))
}

// ParseHello decodes a Hello frame's payload.
func ParseHello(b []byte) (Hello, error) {
	if len(b) != helloSize {
		return Hello{}, fmt.Errorf("%w: hello of %d bytes", ErrFormat, len(b))
	}
	h := Hello{
		Lowest: b[0], Highest: b[1], UUID: [16]byte(b[4:20]),
		MemoryKiB: binary.BigEndian.Uint64(b[20:]),
		Session:   Session(binary.BigEndian.Uint64(b[28:])),
		Committed: Epoch(binary.BigEndian.Uint64(b[36:])),
	}
	if b[2] != 0 || b[3] != 0 || h.Session == 0 || h.Lowest == 0 || h.Lowest > h.Highest {
		return Hello{}, fmt.Errorf("%w: hello with versions %d to %d, session %#x, flags %#x", ErrFormat, h.Lowest, h.Highest, uint64(h.Session), b[2:4])
	}
	return h, nil
}

// Choose returns the version that both sides speak: of those Hello offers the
// highest that is not above ours.
func (h Hello) Choose() (uint8, error) {
	if Version < h.Lowest || Version > h.Highest {
		return 0, fmt.Errorf("%w: theirs are %d to %d, ours %d; install the same release on both hosts", ErrVersion, h.Lowest, h.Highest, Version)
	}
	return Version, nil
}

// Welcome is a standby's answer to Hello.
type Welcome struct {
	Version   uint8 // of the format, for all that follows
	Committed Epoch // last one it has acknowledged; 0 for none
}

// Append appends the 12 bytes of w to b.
func (w Welcome) Append(b []byte) []byte {
	return binary.BigEndian.AppendUint64(append(b, w.Version, 0, 0, 0), uint64(w.Committed))
}

// ParseWelcome decodes a Welcome frame's payload.
func ParseWelcome(b []byte) (Welcome, error) {
	if len(b) != 12 {
		return Welcome{}, fmt.Errorf("%w: welcome of %d bytes", ErrFormat, len(b))
	}
	if b[0] != Version || b[1] != 0 || b[2] != 0 || b[3] != 0 {
		return Welcome{}, fmt.Errorf("%w: welcome to version %d, ours is %d", ErrVersion, b[0], Version)
	}
	return Welcome{Version: b[0], Committed: Epoch(binary.BigEndian.Uint64(b[4:]))}, nil
}

// EpochEnd says what the epoch's frames amount to, so that an epoch with a frame
// missing, doubled or out of order is refused as a whole.
type EpochEnd struct {
	Pages uint64 // page records in its Pages frames
	Bytes uint64 // sum of the payloads of its Head, Pages and State frames
	CRC   uint32 // CRC32C of these frames' checksums, one after the other
}

// Append appends the 20 bytes of e to b.
func (e EpochEnd) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, e.Pages)
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(b, e.Bytes), e.CRC)
}

// ParseEpochEnd decodes an EpochEnd frame's payload.
func ParseEpochEnd(b []byte) (EpochEnd, error) {
	if len(b) != 20 {
		return EpochEnd{}, fmt.Errorf("%w: epoch end of %d bytes", ErrFormat, len(b))
	}
	return EpochEnd{
		Pages: binary.BigEndian.Uint64(b), Bytes: binary.BigEndian.Uint64(b[8:]),
		CRC: binary.BigEndian.Uint32(b[16:]),
	}, nil
}

// Add counts one frame in; its pages are for the caller to count. The frame's
// checksum covers its payload, type, epoch and generation, so the payload need
// not be gone through once more.
func (e *EpochEnd) Add(f Frame) {
	e.Bytes += uint64(len(f.Payload))
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], f.CRC)
	e.CRC = crc32.Update(e.CRC, castagnoli, b[:])
}
