package rpc

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// ErrXDR is wrapped by the errors of every message decoder.
var ErrXDR = errors.New("malformed RPC arguments")

// decoder reads XDR. After the first error it returns zero values, so that a
// message is decoded in one run and checked once, in done.
type decoder struct {
	b   []byte
	err error
}

func (d *decoder) fail(format string, a ...any) {
	if d.err == nil {
		d.err = fmt.Errorf("%w: "+format, append([]any{ErrXDR}, a...)...)
	}
	d.b = nil
}

// fixed takes n bytes and their padding to a multiple of four.
func (d *decoder) fixed(n int) []byte {
	padded := (n + 3) &^ 3
	if d.err != nil {
		return nil
	}
	if padded > len(d.b) {
		d.fail("%d bytes wanted, %d left", padded, len(d.b))
		return nil
	}
	for _, c := range d.b[n:padded] {
		if c != 0 {
			d.fail("padding is not zero")
			return nil
		}
	}
	v := d.b[:n:n]
	d.b = d.b[padded:]
	return v
}

func (d *decoder) uint32() uint32 {
	b := d.fixed(4)
	if b == nil {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

func (d *decoder) uint64() uint64 {
	b := d.fixed(8)
	if b == nil {
		return 0
	}
	return binary.BigEndian.Uint64(b)
}

// bool takes whatever is not zero for true, as libvirt does: digitalocean's
// go-libvirt says 1<<24 when it opens a connection.
func (d *decoder) bool() bool { return d.uint32() != 0 }

// opaque takes a counted string of bytes of at most limit. Never nil but after
// an error.
func (d *decoder) opaque(limit int) []byte {
	n := d.uint32()
	if uint64(n) > uint64(limit) {
		d.fail("length %d, at most %d allowed", n, limit)
	}
	return d.fixed(int(n))
}

func (d *decoder) string(limit int) string {
	s := string(d.opaque(limit))
	if strings.IndexByte(s, 0) >= 0 {
		d.fail("NUL in a string")
	}
	return s
}

// optString is XDR's pointer to a string: nil or a string.
func (d *decoder) optString(limit int) *string {
	if !d.bool() || d.err != nil {
		return nil
	}
	s := d.string(limit)
	return &s
}

// count takes the number of elements of an array of at most limit, each of at
// least size bytes.
func (d *decoder) count(limit, size int) int {
	n := d.uint32()
	if uint64(n) > uint64(limit) || uint64(n)*uint64(size) > uint64(len(d.b)) {
		d.fail("array of %d, at most %d allowed, %d bytes left", n, limit, len(d.b))
		return 0
	}
	return int(n)
}

// done returns the error, if any, or one if something was left over.
func (d *decoder) done() error {
	if d.err == nil && len(d.b) != 0 {
		d.fail("%d bytes after the last field", len(d.b))
	}
	return d.err
}

func appendUint32(b []byte, v uint32) []byte { return binary.BigEndian.AppendUint32(b, v) }
func appendUint64(b []byte, v uint64) []byte { return binary.BigEndian.AppendUint64(b, v) }

func appendFixed(b, v []byte) []byte {
	b = append(b, v...)
	return append(b, make([]byte, -len(v)&3)...)
}

func appendOpaque(b, v []byte) []byte {
	return appendFixed(appendUint32(b, uint32(len(v))), v)
}

func appendString(b []byte, s string) []byte { return appendOpaque(b, []byte(s)) }

func appendBool(b []byte, v bool) []byte {
	if v {
		return appendUint32(b, 1)
	}
	return appendUint32(b, 0)
}

func appendOptString(b []byte, s *string) []byte {
	b = appendBool(b, s != nil)
	if s == nil {
		return b
	}
	return appendString(b, *s)
}
