package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// Magic begins every frame: "KMRI", big-endian.
const Magic uint32 = 0x4b4d5249

// Version of the format. A reader refuses any other.
const Version uint8 = 1

// HeaderSize is the length of a frame's header in bytes.
const HeaderSize = 32

// MaxPayload bounds a frame's payload in bytes, and so what a reader allocates
// before it has checked anything.
const MaxPayload = 256 << 10

// Epoch numbers what lies between two checkpoints of one protection, from 1.
type Epoch uint64

// Generation numbers the protections of one guest. A frame of another one is
// refused.
type Generation uint64

// Type is what a frame means. Zero is invalid, so that a zeroed frame is.
type Type uint8

//go:generate go run golang.org/x/tools/cmd/stringer -type=Type -trimprefix=Type
const (
	TypeHello     Type = 1 // primary, first: payload Hello
	TypeWelcome   Type = 2 // standby's answer to Hello; no payload
	TypeData      Type = 3 // primary: the next bytes of the epoch's libxc stream
	TypeEpochEnd  Type = 4 // primary: the epoch is complete; payload EpochEnd
	TypeAck       Type = 5 // standby: the epoch is whole in its memory; no payload
	TypeHeartbeat Type = 6 // either: I live; no payload
	TypeEnd       Type = 7 // either: protection ends; payload is the reason in words
	TypeTakenOver Type = 8 // standby: the guest runs here now; end your copy

	typeLast = TypeTakenOver
)

// Sentinels a caller may decide on. ErrFormat and what wraps it mean that the
// connection cannot be used any further.
var (
	ErrFormat     = errors.New("not a frame of ours")
	ErrVersion    = fmt.Errorf("%w: another version", ErrFormat)
	ErrChecksum   = fmt.Errorf("%w: checksum is wrong", ErrFormat)
	ErrTooLong    = fmt.Errorf("%w: too long", ErrFormat)
	ErrGeneration = errors.New("frame of another generation")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Frame is one message. Payload is only valid until the next Read where it comes
// from a Reader.
type Frame struct {
	Type       Type
	Generation Generation
	Epoch      Epoch
	Payload    []byte
	CRC        uint32 // set by Append and Read
}

// Append appends the frame's encoding to b and sets CRC.
func (f *Frame) Append(b []byte) ([]byte, error) {
	if f.Type == 0 || f.Type > typeLast {
		return nil, fmt.Errorf("%w: type %d", ErrFormat, f.Type)
	}
	if len(f.Payload) > MaxPayload {
		return nil, fmt.Errorf("%w: payload of %d bytes", ErrTooLong, len(f.Payload))
	}
	start := len(b)
	b = binary.BigEndian.AppendUint32(b, Magic)
	b = append(b, Version, byte(f.Type), 0, 0)
	b = binary.BigEndian.AppendUint64(b, uint64(f.Generation))
	b = binary.BigEndian.AppendUint64(b, uint64(f.Epoch))
	b = binary.BigEndian.AppendUint32(b, uint32(len(f.Payload)))
	b = append(b, 0, 0, 0, 0)
	b = append(b, f.Payload...)
	f.CRC = checksum(b[start:start+28], f.Payload)
	binary.BigEndian.PutUint32(b[start+28:], f.CRC)
	return b, nil
}

func checksum(head, payload []byte) uint32 {
	return crc32.Update(crc32.Checksum(head, castagnoli), castagnoli, payload)
}

// Reader reads frames of one generation. It is not safe for concurrent use.
type Reader struct {
	r   io.Reader
	gen Generation
	buf []byte
}

// NewReader returns a Reader that refuses frames of any generation but gen. It
// reads ahead nothing; give it a buffered r.
func NewReader(r io.Reader, gen Generation) *Reader {
	return &Reader{r: r, gen: gen, buf: make([]byte, HeaderSize)}
}

// Read blocks for the next frame. Its payload is valid until the next Read. It
// returns io.EOF only between frames; a frame cut short is io.ErrUnexpectedEOF.
// The memory it holds never exceeds HeaderSize+MaxPayload.
func (r *Reader) Read() (Frame, error) {
	h := r.buf[:HeaderSize]
	if _, err := io.ReadFull(r.r, h); err != nil {
		return Frame{}, err
	}
	if m := binary.BigEndian.Uint32(h); m != Magic {
		return Frame{}, fmt.Errorf("%w: magic %#08x", ErrFormat, m)
	}
	if h[4] != Version {
		return Frame{}, fmt.Errorf("%w: theirs is %d, ours %d; install the same release on both hosts", ErrVersion, h[4], Version)
	}
	f := Frame{
		Type:       Type(h[5]),
		Generation: Generation(binary.BigEndian.Uint64(h[8:])),
		Epoch:      Epoch(binary.BigEndian.Uint64(h[16:])),
	}
	if f.Type == 0 || f.Type > typeLast || h[6] != 0 || h[7] != 0 {
		return Frame{}, fmt.Errorf("%w: type %d, flags %#x", ErrFormat, h[5], h[6:8])
	}
	n := binary.BigEndian.Uint32(h[24:])
	if n > MaxPayload {
		return Frame{}, fmt.Errorf("%w: payload of %d bytes", ErrTooLong, n)
	}
	if need := HeaderSize + int(n); cap(r.buf) < need {
		b := make([]byte, need)
		copy(b, h)
		r.buf = b
	}
	b := r.buf[:HeaderSize+int(n)]
	f.Payload = b[HeaderSize:]
	if _, err := io.ReadFull(r.r, f.Payload); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return Frame{}, err
	}
	if f.CRC = checksum(b[:28], f.Payload); f.CRC != binary.BigEndian.Uint32(b[28:]) {
		return Frame{}, fmt.Errorf("%w: %v frame", ErrChecksum, f.Type)
	}
	if f.Generation != r.gen {
		return Frame{}, fmt.Errorf("%w: %d, want %d", ErrGeneration, f.Generation, r.gen)
	}
	return f, nil
}
