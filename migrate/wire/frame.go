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
const Version uint8 = 3

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

// Session numbers, at random, what one process of a primary's sends: nobody else
// can go on with it. Zero is invalid.
type Session uint64

// Type is what a frame means. Zero is invalid, so that a zeroed frame is.
type Type uint8

//go:generate go run golang.org/x/tools/cmd/stringer -type=Type -trimprefix=Type
const (
	TypeHello     Type = 1  // primary, first on a connection: payload Hello
	TypeWelcome   Type = 2  // standby's answer to Hello: payload Welcome
	TypePages     Type = 3  // primary: pages of the epoch, as whole records of package page
	TypeEpochEnd  Type = 4  // primary: the epoch is complete; payload EpochEnd
	TypeAck       Type = 5  // standby: the epoch is whole in its memory; no payload
	TypeHeartbeat Type = 6  // either: I live; no payload
	TypeEnd       Type = 7  // either: protection ends; payload is the reason in words
	TypeTakenOver Type = 8  // standby: the guest runs here now; end your copy
	TypeHead      Type = 9  // primary, first of epoch 1: what the guest is; opaque here
	TypeState     Type = 10 // primary, after the epoch's pages: the next bytes of the guest's state; opaque here
	TypeResync    Type = 11 // standby: the epoch is refused, begin it anew; payload is the reason in words
	TypeRestart   Type = 12 // primary: the epoch begins anew, forget what came of it; no payload
	TypeSums      Type = 13 // primary, after the epoch's Ack: what pages of the guest were at it; payload Sums
	TypeCompared  Type = 14 // standby, after the last Sums: what its copy is; payload Compared
	TypeHandover  Type = 15 // primary, after the epoch's Ack: the guest stands here; run it from that epoch

	typeLast = TypeHandover
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
	CRC        uint32 // set by Append, Fill and Read
}

// Append appends the frame's encoding to b and sets CRC.
func (f *Frame) Append(b []byte) ([]byte, error) {
	start := len(b)
	b = append(Room(b), f.Payload...)
	if err := f.Fill(b[start:]); err != nil {
		return nil, err
	}
	return b, nil
}

// Room appends room for a frame's header. What is appended behind it becomes the
// frame's payload with Fill, so that it need not be copied.
func Room(b []byte) []byte { return append(b, make([]byte, HeaderSize)...) }

// Fill makes b, the room for a header and the payload behind it, the frame's
// encoding, and sets Payload and CRC.
func (f *Frame) Fill(b []byte) error {
	if f.Type == 0 || f.Type > typeLast {
		return fmt.Errorf("%w: type %d", ErrFormat, f.Type)
	}
	payload := b[HeaderSize:]
	if len(payload) > MaxPayload {
		return fmt.Errorf("%w: payload of %d bytes", ErrTooLong, len(payload))
	}
	binary.BigEndian.PutUint32(b, Magic)
	b[4], b[5], b[6], b[7] = Version, byte(f.Type), 0, 0
	binary.BigEndian.PutUint64(b[8:], uint64(f.Generation))
	binary.BigEndian.PutUint64(b[16:], uint64(f.Epoch))
	binary.BigEndian.PutUint32(b[24:], uint32(len(payload)))
	f.Payload, f.CRC = payload, checksum(b[:28], payload)
	binary.BigEndian.PutUint32(b[28:], f.CRC)
	return nil
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
