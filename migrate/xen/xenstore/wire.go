package xenstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
)

// op is the type of a message, XS_* of xs_wire.h.
type op uint32

const (
	opDirectory        op = 1
	opRead             op = 2
	opWatch            op = 4
	opUnwatch          op = 5
	opTransactionStart op = 6
	opTransactionEnd   op = 7
	opWrite            op = 11
	opMkdir            op = 12
	opRm               op = 13
	opWatchEvent       op = 15
	opError            op = 16
)

// String names the operation as errors show it.
func (o op) String() string {
	switch o {
	case opDirectory:
		return "list"
	case opRead:
		return "read"
	case opWatch:
		return "watch"
	case opUnwatch:
		return "unwatch"
	case opTransactionStart:
		return "start transaction"
	case opTransactionEnd:
		return "end transaction"
	case opWrite:
		return "write"
	case opMkdir:
		return "mkdir"
	case opRm:
		return "remove"
	case opWatchEvent:
		return "watch event"
	case opError:
		return "error"
	}
	return fmt.Sprintf("op %d", uint32(o))
}

const (
	headerLen  = 16
	maxPayload = 4096 // XENSTORE_PAYLOAD_MAX: more makes the daemon drop the connection
	maxPath    = 3072 // XENSTORE_ABS_PATH_MAX
)

// errTooLong is returned for what does not fit a message.
var errTooLong = errors.New("longer than xenstore takes")

// message is one frame in either direction.
type message struct {
	op      op
	id      uint32 // of the request, echoed in the reply
	tx      uint32
	payload []byte
}

// append adds the message in wire form, which is in host byte order.
func (m message) append(b []byte) []byte {
	b = binary.NativeEndian.AppendUint32(b, uint32(m.op))
	b = binary.NativeEndian.AppendUint32(b, m.id)
	b = binary.NativeEndian.AppendUint32(b, m.tx)
	b = binary.NativeEndian.AppendUint32(b, uint32(len(m.payload)))
	return append(b, m.payload...)
}

// readMessage reads one message. It returns io.EOF only between messages.
func readMessage(r io.Reader) (message, error) {
	var h [headerLen]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return message{}, err
	}
	n := binary.NativeEndian.Uint32(h[12:])
	if n > maxPayload {
		return message{}, fmt.Errorf("message of %d bytes: %w", n, errTooLong)
	}
	m := message{
		op:      op(binary.NativeEndian.Uint32(h[0:])),
		id:      binary.NativeEndian.Uint32(h[4:]),
		tx:      binary.NativeEndian.Uint32(h[8:]),
		payload: make([]byte, n),
	}
	if _, err := io.ReadFull(r, m.payload); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return message{}, err
	}
	return m, nil
}

// splitStrings returns the NUL-terminated strings of a payload; the last one
// need not be terminated.
func splitStrings(p []byte) []string {
	p = bytes.TrimSuffix(p, []byte{0})
	if len(p) == 0 {
		return nil
	}
	return strings.Split(string(p), "\x00")
}

// errnos are the errors that xenstore knows, which travel as their names.
var errnos = map[string]syscall.Errno{
	"EINVAL": syscall.EINVAL, "EACCES": syscall.EACCES, "EEXIST": syscall.EEXIST,
	"EISDIR": syscall.EISDIR, "ENOENT": syscall.ENOENT, "ENOMEM": syscall.ENOMEM,
	"ENOSPC": syscall.ENOSPC, "EIO": syscall.EIO, "ENOTEMPTY": syscall.ENOTEMPTY,
	"ENOSYS": syscall.ENOSYS, "EROFS": syscall.EROFS, "EBUSY": syscall.EBUSY,
	"EAGAIN": syscall.EAGAIN, "EISCONN": syscall.EISCONN, "E2BIG": syscall.E2BIG,
	"EPERM": syscall.EPERM,
}

// parseError turns the payload of an error reply into a Go error.
func parseError(p []byte) error {
	name := strings.TrimRight(string(p), "\x00")
	if e, ok := errnos[name]; ok {
		return e
	}
	return fmt.Errorf("error %q", name)
}

// checkPath refuses a path that would break the framing or the daemon's limit.
func checkPath(path string) error {
	switch {
	case path == "":
		return errors.New("empty path")
	case len(path) > maxPath:
		return errTooLong
	case strings.IndexByte(path, 0) >= 0:
		return errors.New("path with a NUL")
	}
	return nil
}
