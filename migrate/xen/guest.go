package xen

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"kemari/migrate"
)

// What the helper ends with, apart from migrate.ErrGuestGone; see
// cmd/kemari-xcsave for its exit statuses.
var (
	ErrNoSuspend  = errors.New("the guest did not suspend when asked; its kernel hangs, or lacks Xen's suspend")
	ErrNoLogDirty = errors.New("log-dirty mode is refused by Xen; only PVH and HVM guests can be protected")
)

// Guest is a running domain, checkpointed by a kemari-xcsave process. Its
// checkpoints come as a stream; see Helper for them as the engine has them.
type Guest struct {
	cmd      *exec.Cmd
	commands io.WriteCloser
	stream   *os.File
	events   chan string   // the helper's lines
	exited   chan struct{} // closed when the helper is gone; err then says why
	err      error

	begun    bool // a checkpoint has been taken
	split    Splitter
	standing atomic.Bool        // the guest stands: hold what comes, don't send
	buf      []byte             // what is read at once
	hold     []byte             // what came while it stood
	send     func([]byte) error // of the checkpoint under way
	pages    int64
	complete bool // the checkpoint under way has been seen to its end

	destroy func(context.Context) error
	closing sync.Once
	log     *slog.Logger
}

// StartGuest begins to checkpoint domain domid by the given helper program. In
// the file mark the helper keeps what its --cleanup needs to know. Destroy ends
// the domain through whoever manages it.
func StartGuest(helper string, domid uint32, mark string, destroy func(context.Context) error, log *slog.Logger) (*Guest, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer w.Close()
	// The guest stands while the helper writes: the more fits, the fewer switches.
	if rc, err := r.SyscallConn(); err == nil {
		rc.Control(func(fd uintptr) { unix.FcntlInt(fd, unix.F_SETPIPE_SZ, 1<<20) })
	}
	g := &Guest{
		cmd: exec.Command(helper, strconv.FormatUint(uint64(domid), 10), mark), stream: r,
		buf: make([]byte, 1<<20), events: make(chan string, 4), exited: make(chan struct{}),
		destroy: destroy, log: log,
	}
	g.split = Splitter{Headers: g.out, Record: g.record}
	g.cmd.Stderr = os.Stderr // libxenguest's own words, for the journal
	g.cmd.ExtraFiles = []*os.File{w}
	var events io.ReadCloser
	if g.commands, err = g.cmd.StdinPipe(); err == nil {
		if events, err = g.cmd.StdoutPipe(); err == nil {
			err = g.cmd.Start()
		}
	}
	if err != nil {
		r.Close()
		return nil, fmt.Errorf("start the checkpoint helper: %w", err)
	}
	go g.follow(events)
	return g, nil
}

// follow passes the helper's events on until it ends, then says why it did.
func (g *Guest) follow(events io.Reader) {
	for s := bufio.NewScanner(events); s.Scan(); {
		g.events <- s.Text()
	}
	err := g.cmd.Wait()
	switch code := g.cmd.ProcessState.ExitCode(); code {
	case 0:
		g.err = errors.New("the checkpoint helper has ended")
	case 3:
		g.err = migrate.ErrGuestGone
	case 4:
		g.err = ErrNoSuspend
	case 5:
		g.err = ErrNoLogDirty
	default:
		g.err = fmt.Errorf("the checkpoint helper failed: %w", err)
	}
	close(g.exited)
}

// out passes stream bytes on, or holds them while the guest stands.
func (g *Guest) out(b []byte) error {
	if g.standing.Load() {
		g.hold = append(g.hold, b...)
		return nil
	}
	return g.send(b)
}

func (g *Guest) record(r Record) error {
	switch r.Type {
	case RecordPageData:
		n, err := CheckPageData(r.Body, 1<<52)
		if err != nil {
			return err
		}
		g.pages += int64(n)
	case RecordCheckpoint:
		g.complete = true
		return nil // marks the end of an epoch, which the frames around it do already
	case RecordEnd:
		return fmt.Errorf("%w: ended", ErrStream)
	}
	return g.out(r.Raw)
}

// capture reads one checkpoint's part of the stream.
func (g *Guest) capture() error {
	b := g.buf
	for g.complete = false; !g.complete; {
		n, err := g.stream.Read(b)
		if err != nil {
			return fmt.Errorf("checkpoint stream: %w", err)
		}
		if err := g.split.Push(b[:n]); err != nil {
			return err
		}
	}
	return nil
}

// Checkpoint takes one: it suspends the guest, calls seal while the guest stands,
// captures what changed since the last one (at the first: everything, most of it
// while the guest still runs), and resumes it. What it captured goes to send, in
// order and in whole headers or records; all but the first checkpoint's live part
// is sent after the guest has been resumed. A piece is valid until send returns.
//
// It blocks until all is sent. An error from seal or send, or ctx ending, ends it
// with that error; the guest then runs, and no further Checkpoint may be asked for.
// It returns migrate.ErrGuestGone if the guest ended. The helper begins the first
// one by itself.
func (g *Guest) Checkpoint(ctx context.Context, seal func() error, send func([]byte) error) (cp migrate.Checkpoint, err error) {
	g.send, g.pages, g.hold = send, 0, g.hold[:0]
	g.standing.Store(false)
	if g.begun {
		if err := g.goOn(); err != nil {
			return cp, err
		}
	}
	g.begun = true
	captured := make(chan error, 1)
	go func() { captured <- g.capture() }()
	defer func() {
		if err != nil {
			// The helper resumes the guest when it notices; the reader must not be
			// left behind with the caller's send.
			g.commands.Close()
			g.stream.SetReadDeadline(time.Unix(1, 0))
			<-captured
		}
	}()

	line, err := g.event(ctx, captured)
	if err != nil {
		return cp, err
	}
	g.standing.Store(true)
	var us, us2 float64
	if _, err := fmt.Sscanf(line, "suspended %f", &us); err != nil {
		return cp, fmt.Errorf("helper said %q: %w", line, err)
	}
	cp.Suspend = microseconds(us)
	if err := seal(); err != nil {
		return cp, fmt.Errorf("seal: %w", err)
	}
	if err := g.goOn(); err != nil {
		return cp, err
	}
	if line, err = g.event(ctx, captured); err != nil {
		return cp, err
	}
	if _, err := fmt.Sscanf(line, "resumed %f %f", &us, &us2); err != nil {
		return cp, fmt.Errorf("helper said %q: %w", line, err)
	}
	cp.Copy, cp.Resume = microseconds(us), microseconds(us2)

	select {
	case e := <-captured:
		captured <- e
		if e != nil {
			return cp, e
		}
	case <-ctx.Done():
		return cp, context.Cause(ctx)
	}
	cp.Pages = g.pages
	return cp, send(g.hold)
}

func microseconds(us float64) time.Duration { return time.Duration(us * float64(time.Microsecond)) }

func (g *Guest) goOn() error {
	if _, err := g.commands.Write([]byte{'g'}); err != nil {
		<-g.exited
		return g.err
	}
	return nil
}

// event waits for the helper's next word, or for what keeps it from coming.
func (g *Guest) event(ctx context.Context, captured chan error) (string, error) {
	failed := captured
	for {
		select {
		case line := <-g.events:
			return line, nil
		case <-g.exited:
			select {
			case line := <-g.events:
				return line, nil
			default:
				return "", g.err
			}
		case e := <-failed:
			captured <- e
			if e != nil && !errors.Is(e, io.EOF) {
				return "", e
			}
			failed = nil // the end of the stream: the helper's word says why, or that all is well
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	}
}

// Destroy ends the domain through whoever manages it.
func (g *Guest) Destroy(ctx context.Context) error {
	return g.destroy(ctx)
}

// Close: the helper, told to stop, leaves the guest
// running and log-dirty off.
func (g *Guest) Close() error {
	var err error
	g.closing.Do(func() {
		g.commands.Close()
		g.stream.Close() // it may be writing to us
		select {
		case <-g.exited:
		case <-time.After(40 * time.Second): // longer than a guest may take to suspend
			g.cmd.Process.Kill()
			<-g.exited
			err = errors.New("the checkpoint helper did not end when told to; it was killed")
		}
	})
	return err
}

// Cleanup takes back what a helper left that was killed: a guest that stands, a
// suspend under way, log-dirty mode. Idempotent.
func Cleanup(ctx context.Context, helper string, domid uint32, mark string) error {
	cmd := exec.CommandContext(ctx, helper, "--cleanup", strconv.FormatUint(uint64(domid), 10), mark)
	cmd.Stderr = os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("resume the guest: %w", err)
	}
	return nil
}
