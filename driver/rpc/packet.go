package rpc

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Program is the number of an RPC program.
type Program uint32

// The programs that may be spoken on a libvirt socket.
const (
	ProgramRemote    Program = 0x20008086
	ProgramQEMU      Program = 0x20008087
	ProgramLXC       Program = 0x00068000
	ProgramKeepalive Program = 0x6b656570 // "keep"
	ProgramKemari    Program = 0x4b454d41 // "KEMA", ours
)

func (p Program) String() string {
	switch p {
	case ProgramRemote:
		return "remote"
	case ProgramQEMU:
		return "qemu"
	case ProgramLXC:
		return "lxc"
	case ProgramKeepalive:
		return "keepalive"
	case ProgramKemari:
		return "kemari"
	}
	return fmt.Sprintf("program %#x", uint32(p))
}

// Procedure is a number within a program.
type Procedure int32

// Serial ties a reply, or the data of a stream, to its call.
type Serial uint32

// Type is what kind of message a frame carries.
type Type uint32

// The types of virNetMessageType.
const (
	Call         Type = iota // client to server: arguments
	Reply                    // server to client: result or error
	Message                  // either way: event, keepalive
	Stream                   // either way: stream data
	CallWithFDs              // Call with file descriptors beside it
	ReplyWithFDs             // Reply with file descriptors beside it
	StreamHole               // either way: a hole in stream data
)

// Status is how a call or a stream fares.
type Status uint32

// The values of virNetMessageStatus.
const (
	OK       Status = iota
	Failed          // the payload is a RemoteError
	Continue        // more stream data follows
)

const (
	lenSize    = 4
	headerSize = 24
	// MaxFrame is the longest frame, its length word included. libvirt's
	// VIR_NET_MESSAGE_MAX does not count that word.
	MaxFrame = 32<<20 + lenSize
	// MaxPayload is what a frame can carry.
	MaxPayload = MaxFrame - lenSize - headerSize
)

// ErrFrame is wrapped by the errors about frames that cannot be.
var ErrFrame = errors.New("not a libvirt RPC frame")

// Header is the fixed part of a frame.
type Header struct {
	Program   Program
	Version   uint32
	Procedure Procedure
	Type      Type
	Serial    Serial
	Status    Status
}

// Reply returns the header of the reply to a call with header h.
func (h Header) Reply(s Status) Header {
	h.Type, h.Status = Reply, s
	return h
}

// Packet is one frame, decoded.
type Packet struct {
	Header
	Payload []byte
}

// ParsePacket decodes one whole frame. The payload is a part of b.
func ParsePacket(b []byte) (*Packet, error) {
	if len(b) < lenSize+headerSize {
		return nil, fmt.Errorf("%w: %d bytes, shorter than a header", ErrFrame, len(b))
	}
	if n := binary.BigEndian.Uint32(b); uint64(n) != uint64(len(b)) || n > MaxFrame {
		return nil, fmt.Errorf("%w: length %d in a frame of %d bytes", ErrFrame, n, len(b))
	}
	w := func(i int) uint32 { return binary.BigEndian.Uint32(b[lenSize+4*i:]) }
	p := &Packet{
		Header: Header{
			Program: Program(w(0)), Version: w(1), Procedure: Procedure(w(2)),
			Type: Type(w(3)), Serial: Serial(w(4)), Status: Status(w(5)),
		},
		Payload: b[lenSize+headerSize:],
	}
	if p.Type > StreamHole {
		return nil, fmt.Errorf("%w: type %d", ErrFrame, p.Type)
	}
	if p.Status > Continue {
		return nil, fmt.Errorf("%w: status %d", ErrFrame, p.Status)
	}
	return p, nil
}

// ReadPacket reads one frame. It returns io.EOF if the stream ends between
// frames and io.ErrUnexpectedEOF if it ends within one. The packet is the
// caller's to keep.
func ReadPacket(r io.Reader) (*Packet, error) {
	var word [lenSize]byte
	if _, err := io.ReadFull(r, word[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(word[:])
	if n < lenSize+headerSize || n > MaxFrame {
		return nil, fmt.Errorf("%w: length %d", ErrFrame, n)
	}
	b, err := readGrowing(r, word[:], int(n))
	if err != nil {
		return nil, err
	}
	return ParsePacket(b)
}

// readGrowing reads until have is n bytes long. Memory grows with what has
// arrived, not with what was announced, so that a length alone costs nothing.
func readGrowing(r io.Reader, have []byte, n int) ([]byte, error) {
	const first = 64 << 10
	b := make([]byte, len(have), min(n, first))
	copy(b, have)
	for len(b) < n {
		if len(b) == cap(b) {
			bigger := make([]byte, len(b), min(n, 4*cap(b)))
			copy(bigger, b)
			b = bigger
		}
		got, err := io.ReadFull(r, b[len(b):cap(b)])
		b = b[:len(b)+got]
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return nil, err
		}
	}
	return b, nil
}

// Append appends the frame to b. It returns an error if the payload is too long.
func (p *Packet) Append(b []byte) ([]byte, error) {
	if len(p.Payload) > MaxPayload {
		return nil, fmt.Errorf("%w: payload of %d bytes", ErrFrame, len(p.Payload))
	}
	for _, w := range [...]uint32{
		uint32(lenSize + headerSize + len(p.Payload)),
		uint32(p.Program), p.Version, uint32(p.Procedure),
		uint32(p.Type), uint32(p.Serial), uint32(p.Status),
	} {
		b = binary.BigEndian.AppendUint32(b, w)
	}
	return append(b, p.Payload...), nil
}

// WritePacket writes the frame in one Write.
func WritePacket(w io.Writer, p *Packet) error {
	b, err := p.Append(make([]byte, 0, lenSize+headerSize+len(p.Payload)))
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}

// The procedures of ProgramKeepalive, version 1.
const (
	KeepalivePing Procedure = 1
	KeepalivePong Procedure = 2
)

// Keepalive returns a ping or a pong.
func Keepalive(proc Procedure) *Packet {
	return &Packet{Header: Header{
		Program: ProgramKeepalive, Version: 1, Procedure: proc, Type: Message,
	}}
}
