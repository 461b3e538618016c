package xen

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// qmp is a client of a QEMU's monitor. It speaks as much of QMP as a checkpoint needs
// and no library has: every call has a deadline, since the guest stands meanwhile;
// several commands go out at once; a file descriptor can go along; and what QEMU says
// is bounded. Its methods are called by one goroutine.
//
// QEMU keeps what it had to say to a client that has hung up, and says it to the next
// one. So lines before its greeting are passed over, and commands are numbered, by
// numbers that no other client has used.
type qmp struct {
	conn           *net.UnixConn
	r              *bufio.Reader
	greeting       json.RawMessage
	sent, answered uint64 // numbers of the last commands
}

const (
	// qmpTimeout bounds each answer, as libxl's does. An emulated host's takes some 50 ms,
	// one that has but a fifth of a processor took more than 5 s.
	qmpTimeout = 10 * time.Second
	// qmpLine bounds what QEMU says in one line: its greeting has 200 bytes, an answer to
	// what we ask less.
	qmpLine = 64 << 10
	// qmpEvents bounds how many events, and answers to others, may come before an answer.
	qmpEvents = 1000
)

// ErrQMP is a QEMU that says what it should not.
var ErrQMP = errors.New("unexpected answer of the device model")

// dialQMP connects to the monitor at a UNIX socket. A monitor speaks with one client
// at a time; another one's greeting comes when that is gone, or not within qmpTimeout.
func dialQMP(path string) (*qmp, error) {
	c, err := net.DialTimeout("unix", path, qmpTimeout)
	if err != nil {
		return nil, err
	}
	q := newQMP(c.(*net.UnixConn))
	if err := q.hello(); err != nil {
		q.Close()
		return nil, err
	}
	return q, nil
}

func newQMP(c *net.UnixConn) *qmp {
	n := rand.Uint64() >> 12 // JSON's numbers are exact up to 2^53
	return &qmp{conn: c, r: bufio.NewReaderSize(c, qmpLine), sent: n, answered: n}
}

func (q *qmp) hello() error {
	q.conn.SetDeadline(time.Now().Add(qmpTimeout))
	for range qmpEvents {
		var greeting struct{ QMP json.RawMessage }
		line, err := q.line()
		if err == nil {
			err = json.Unmarshal(line, &greeting)
		}
		if err != nil {
			return fmt.Errorf("the device model's greeting: %w", err)
		}
		if greeting.QMP != nil {
			q.greeting = greeting.QMP
			return q.do("qmp_capabilities", nil, nil)
		}
	}
	return fmt.Errorf("%w: no greeting", ErrQMP)
}

// line reads one line of QEMU's, valid until the next one.
func (q *qmp) line() ([]byte, error) {
	b, err := q.r.ReadSlice('\n')
	switch {
	case errors.Is(err, bufio.ErrBufferFull):
		return nil, fmt.Errorf("%w: a line of more than %d bytes", ErrQMP, qmpLine)
	case errors.Is(err, io.EOF):
		return nil, fmt.Errorf("the device model has hung up: %w", io.ErrUnexpectedEOF)
	}
	return bytes.TrimSpace(b), err
}

// send sends a command, whose answer await waits for. A file goes along with it.
func (q *qmp) send(command string, args any, file *os.File) error {
	q.conn.SetDeadline(time.Now().Add(qmpTimeout))
	b, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, q.sent + 1})
	if err != nil {
		return err
	}
	var oob []byte
	if file != nil {
		oob = unix.UnixRights(int(file.Fd()))
	}
	b = append(b, '\n')
	n, _, err := q.conn.WriteMsgUnix(b, oob, nil)
	if err == nil && n < len(b) {
		_, err = q.conn.Write(b[n:])
	}
	if err != nil {
		return fmt.Errorf("tell the device model to %s: %w", command, err)
	}
	q.sent++
	return nil
}

// await waits for the answer to the oldest command that has none, and puts what it
// returns into result unless that is nil.
func (q *qmp) await(command string, result any) error {
	q.conn.SetDeadline(time.Now().Add(qmpTimeout))
	q.answered++
	for range qmpEvents {
		line, err := q.line()
		if err != nil {
			return fmt.Errorf("%s: %w", command, err)
		}
		var a struct {
			ID     json.RawMessage `json:"id"`
			Event  string          `json:"event"`
			Return json.RawMessage `json:"return"`
			Error  *struct {
				Class string `json:"class"`
				Desc  string `json:"desc"`
			} `json:"error"`
		}
		if err := json.Unmarshal(line, &a); err != nil {
			return fmt.Errorf("%w to %s: %w", ErrQMP, command, err)
		}
		switch {
		case (a.Error != nil || a.Return != nil) && string(a.ID) != strconv.FormatUint(q.answered, 10): // another's
		case a.Error != nil:
			return fmt.Errorf("the device model refuses to %s: %s (%s)", command, a.Error.Desc, a.Error.Class)
		case a.Return != nil:
			if result == nil {
				return nil
			}
			if err := json.Unmarshal(a.Return, result); err != nil {
				return fmt.Errorf("%w to %s: %w", ErrQMP, command, err)
			}
			return nil
		case a.Event == "":
			return fmt.Errorf("%w to %s: neither an answer nor an event", ErrQMP, command)
		}
	}
	return fmt.Errorf("%w to %s: %d events and no answer", ErrQMP, command, qmpEvents)
}

// do is send and await.
func (q *qmp) do(command string, args, result any) error {
	if err := q.send(command, args, nil); err != nil {
		return err
	}
	return q.await(command, result)
}

func (q *qmp) Close() error { return q.conn.Close() }
