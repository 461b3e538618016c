package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// MaxLine bounds a request or a response.
const MaxLine = 64 << 10

// Op is what a Request asks for.
type Op string

const (
	OpStatus   Op = "status"   // answer with the Status
	OpAbort    Op = "abort"    // end protection; answered once it has ended on both sides
	OpFailover Op = "failover" // standby: take over now; answered once the guest runs here
	OpVerify   Op = "verify"   // primary: compare the standby's memory with the guest's; the answer is Status.Verified
	// primary: hand the guest over to the standby; answered once it runs there
	OpSwitchover Op = "switchover"

	// primary: take checkpoints as Request.Checkpoint says from now on
	OpCheckpoint Op = "checkpoint"
)

// Checkpoint is when checkpoints are taken.
type Checkpoint struct {
	Trigger string        `json:"trigger"` // "output" or "interval"
	Min     time.Duration `json:"min"`
	Max     time.Duration `json:"max"`
	Paused  int           `json:"paused"` // percent of its time that the guest stands still at most
}

// Request is one line from a client.
type Request struct {
	Op         Op          `json:"op"`
	Checkpoint *Checkpoint `json:"checkpoint,omitempty"` // of OpCheckpoint alone
}

// Response answers a Request: the Status after it, or Error.
type Response struct {
	Status *Status `json:"status,omitempty"`
	Error  string  `json:"error,omitempty"`
}

// ErrNotRunning is returned by Ask where no process listens.
var ErrNotRunning = errors.New("no such protection is running here")

// ErrUnanswered is returned by Ask of a process that took the request and ended.
var ErrUnanswered = errors.New("the process ended before it answered")

// Handler answers requests that are no more than an Op. It is called from several
// goroutines at once, may block, and must return when ctx ends.
type Handler func(ctx context.Context, op Op) (Status, error)

// RequestHandler is a Handler of whole requests.
type RequestHandler func(ctx context.Context, req Request) (Status, error)

// ErrSettings is what Serve answers to a request with settings.
var ErrSettings = errors.New("this version cannot change its settings while it runs")

// Listen opens the control socket, which the group libvirt may use if there is
// one, replacing a stale one.
func Listen(path string, gid int) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	mode := os.FileMode(0o600)
	if gid > 0 && os.Chown(path, 0, gid) == nil {
		mode = 0o660
	}
	if err := os.Chmod(path, mode); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Serve answers clients of l until ctx ends, then closes l and its connections
// and returns when the last handler has returned. It refuses requests with
// settings.
func Serve(ctx context.Context, l net.Listener, h Handler) error {
	return ServeRequests(ctx, l, func(ctx context.Context, req Request) (Status, error) {
		if req.Checkpoint != nil || req.Op == OpCheckpoint {
			return Status{}, ErrSettings
		}
		return h(ctx, req.Op)
	})
}

// ServeRequests is Serve for a handler that takes settings.
func ServeRequests(ctx context.Context, l net.Listener, h RequestHandler) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				c.Close() // it came in last, and must not wait for an answer
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("control socket: %w", err)
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			serveConn(ctx, c, h)
		}()
	}
}

func serveConn(ctx context.Context, c net.Conn, h RequestHandler) {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	s := bufio.NewScanner(c)
	s.Buffer(make([]byte, 0, 512), MaxLine)
	for s.Scan() {
		var req Request
		var resp Response
		if err := json.Unmarshal(s.Bytes(), &req); err != nil {
			resp.Error = "not a request: " + err.Error()
		} else if st, err := h(ctx, req); err != nil {
			resp.Error = err.Error()
		} else {
			resp.Status = &st
		}
		b, err := json.Marshal(resp)
		if err != nil {
			return
		}
		c.SetWriteDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Write(append(b, '\n')); err != nil {
			return
		}
	}
}

// Ask sends one request and waits for its answer, as long as ctx lasts. It
// returns ErrNotRunning if nobody listens at path.
func Ask(ctx context.Context, path string, op Op) (Status, error) {
	return ask(ctx, path, Request{Op: op})
}

// SetCheckpoint is Ask for OpCheckpoint.
func SetCheckpoint(ctx context.Context, path string, c Checkpoint) (Status, error) {
	return ask(ctx, path, Request{Op: OpCheckpoint, Checkpoint: &c})
}

func ask(ctx context.Context, path string, req Request) (Status, error) {
	op := req.Op
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		if isGone(err) {
			return Status{}, ErrNotRunning
		}
		return Status{}, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	b, err := json.Marshal(req)
	if err != nil {
		return Status{}, err
	}
	if _, err := c.Write(append(b, '\n')); err != nil {
		if errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
			err = ErrUnanswered
		}
		return Status{}, fmt.Errorf("ask %s: %w", op, err)
	}
	s := bufio.NewScanner(c)
	s.Buffer(make([]byte, 0, 4096), MaxLine)
	if !s.Scan() {
		if ctx.Err() != nil {
			return Status{}, context.Cause(ctx)
		}
		if errors.Is(s.Err(), bufio.ErrTooLong) {
			return Status{}, fmt.Errorf("ask %s: %w", op, s.Err())
		}
		return Status{}, fmt.Errorf("ask %s: %w", op, ErrUnanswered)
	}
	var resp Response
	if err := json.Unmarshal(s.Bytes(), &resp); err != nil {
		return Status{}, fmt.Errorf("ask %s: %w", op, err)
	}
	if resp.Error != "" {
		return Status{}, errors.New(resp.Error)
	}
	if resp.Status == nil {
		return Status{}, fmt.Errorf("ask %s: empty answer", op)
	}
	return *resp.Status, nil
}

// Look returns the status of the protection with files p: of the running
// process if there is one, else the final one it left, else ErrNotRunning.
func Look(ctx context.Context, p Paths) (Status, error) {
	s, err := Ask(ctx, p.Socket, OpStatus)
	// One that ends just then has left its final status, and soon its socket.
	for i := 0; i < 10 && errors.Is(err, ErrUnanswered) && ctx.Err() == nil; i++ {
		time.Sleep(20 * time.Millisecond)
		s, err = Ask(ctx, p.Socket, OpStatus)
	}
	if !errors.Is(err, ErrNotRunning) {
		return s, err
	}
	b, err := os.ReadFile(p.Last)
	if errors.Is(err, os.ErrNotExist) {
		return Status{}, ErrNotRunning
	}
	if err != nil {
		return Status{}, err
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return Status{}, fmt.Errorf("%s: %w", p.Last, err)
	}
	return s, nil
}

func isGone(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}
