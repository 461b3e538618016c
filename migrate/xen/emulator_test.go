package xen

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kemari/migrate/page"
	"kemari/migrate/xen/internal/sys"
)

// fakeQEMU is a device model's monitor, and as much of a device model as is asked of it.
type fakeQEMU struct {
	path string
	l    *net.UnixListener
	wg   sync.WaitGroup

	mu      sync.Mutex
	conn    net.Conn
	logs    bool
	stopped bool
	aborted bool // as QEMU does when told to end a log there is none of
	said    []string
	state   string
	file    *os.File
	answer  map[string]string // of a command, instead of doing it
	greet   string
	live    bool // a state was saved for a live migration
}

func newFakeQEMU(t tb) *fakeQEMU {
	t.Helper()
	f := &fakeQEMU{
		path: filepath.Join(tempDir(t), "qmp"), state: "QEVM", answer: map[string]string{},
		greet: `{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}}, "capabilities": ["oob"]}}`,
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: f.path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	f.l = l
	f.wg.Go(func() {
		for { // one client at a time
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			f.mu.Lock()
			f.conn = c
			f.mu.Unlock()
			f.serve(c)
		}
	})
	t.Cleanup(func() {
		l.Close()
		f.hangUp()
		f.wg.Wait()
		if f.file != nil {
			f.file.Close()
		}
	})
	return f
}

func (f *fakeQEMU) hangUp() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.conn != nil {
		f.conn.Close()
	}
}

// serve reads commands that come one a line, as ours do.
func (f *fakeQEMU) serve(c *net.UnixConn) {
	defer c.Close()
	fmt.Fprintf(c, "%s\r\n", f.greet)
	r := bufio.NewReader(&withFiles{c, f})
	for {
		line, err := r.ReadBytes('\n')
		if err != nil {
			return
		}
		var cmd struct {
			Execute   string
			Arguments map[string]any
			ID        json.RawMessage
		}
		if json.Unmarshal(line, &cmd) != nil {
			return
		}
		if !f.do(c, cmd.Execute, cmd.Arguments, string(cmd.ID)) {
			return
		}
	}
}

// withFiles takes the file that comes along.
type withFiles struct {
	c *net.UnixConn
	f *fakeQEMU
}

func (w *withFiles) Read(b []byte) (int, error) {
	oob := make([]byte, 64)
	n, k, _, _, err := w.c.ReadMsgUnix(b, oob)
	if err == nil && n == 0 {
		err = io.EOF
	}
	n = max(n, 0)
	if msgs, perr := unix.ParseSocketControlMessage(oob[:k]); perr == nil && len(msgs) == 1 {
		if fds, perr := unix.ParseUnixRights(&msgs[0]); perr == nil {
			w.f.mu.Lock()
			if w.f.file != nil {
				w.f.file.Close()
			}
			w.f.file = os.NewFile(uintptr(fds[0]), "state")
			w.f.mu.Unlock()
		}
	}
	return n, err
}

func (f *fakeQEMU) do(c net.Conn, what string, args map[string]any, id string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.said = append(f.said, what)
	if a, ok := f.answer[what]; ok {
		fmt.Fprintf(c, "%s\r\n", strings.ReplaceAll(a, "ID", id))
		return a != ""
	}
	if f.aborted {
		return false
	}
	result := "{}"
	switch what {
	case "qmp_capabilities":
	case "add-fd":
		result = `{"fd": 12, "fdset-id": 3}`
	case "stop", "cont":
		f.stopped = what == "stop"
		fmt.Fprintf(c, "%s\r\n", `{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}`)
	case "xen-set-global-dirty-log":
		on := args["enable"] == true
		if !on && !f.logs {
			f.aborted = true
			return false
		}
		f.logs = on
	case "xen-save-devices-state":
		if args["filename"] != "/dev/fdset/3" || f.file == nil {
			fmt.Fprintf(c, "{\"id\": %s, \"error\": {\"class\": \"GenericError\", \"desc\": \"no such file\"}}\r\n", id)
			return true
		}
		f.live = f.live || args["live"] != false
		f.file.WriteString(f.state)
	default:
		fmt.Fprintf(c, "{\"id\": %s, \"error\": {\"class\": \"CommandNotFound\", \"desc\": \"what?\"}}\r\n", id)
		return true
	}
	fmt.Fprintf(c, "{\"return\": %s, \"id\": %s}\r\n", result, id)
	return true
}

func (f *fakeQEMU) is(t *testing.T, stopped, logs bool) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.stopped != stopped || f.logs != logs || f.aborted || f.live {
		t.Errorf("stopped %v, logs %v, aborted %v, saved for a live migration %v", f.stopped, f.logs, f.aborted, f.live)
	}
}

func TestEmulator(t *testing.T) {
	f := newFakeQEMU(t)
	e := openQEMU(f.path)
	defer e.Close()
	if err := e.Log(); err != nil {
		t.Fatal(err)
	}
	f.is(t, false, true)
	for _, state := range []string{"a long state", "short", strings.Repeat("x", 100_000)} {
		f.mu.Lock()
		f.state = state
		f.mu.Unlock()
		if err := e.Stop(); err != nil {
			t.Fatal(err)
		}
		f.is(t, true, true)
		b, err := e.Saved([]byte("before "))
		if err != nil || string(b) != "before "+state {
			t.Errorf("%.40q, %v", b, err)
		}
		if err := e.Continue(); err != nil {
			t.Fatal(err)
		}
		f.is(t, false, true)
	}
	if _, err := e.Saved(nil); err == nil {
		t.Error("a state was saved that nobody asked for")
	}
	// Somebody else has ended the log.
	f.mu.Lock()
	f.logs = false
	f.mu.Unlock()
	for range 2 {
		if err := e.Unlog(); err != nil {
			t.Error(err)
		}
	}
	f.is(t, false, false)
	for range 2 {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Whatever the device model says instead of an answer is an error, and the next thing it
// is asked has no answer to what was asked before.
func TestEmulatorAnswers(t *testing.T) {
	many := strings.Repeat(`{"event": "STOP"}`+"\r\n", qmpEvents)
	for name, answer := range map[string]string{
		"error":                  `{"id": ID, "error": {"class": "GenericError", "desc": "no"}}`,
		"no JSON":                `hello`,
		"no answer":              `{}`,
		"a list":                 `[]`,
		"hangs up":               ``,
		"a long line":            `{"id": ID, "return": {"x": "` + strings.Repeat("x", qmpLine) + `"}}`,
		"events only":            many + `{"return": {}, "id": ID}`,
		"answers to others only": strings.Repeat(`{"return": {}, "id": 7}`+"\r\n", qmpEvents) + `{"return": {}, "id": ID}`,
	} {
		t.Run(name, func(t *testing.T) {
			for _, command := range []string{"qmp_capabilities", "stop", "xen-save-devices-state", "xen-set-global-dirty-log"} {
				f := newFakeQEMU(t)
				e := openQEMU(f.path)
				f.answer[command] = answer
				err := e.Log()
				if err == nil {
					if err = e.Stop(); err == nil {
						_, err = e.Saved(nil)
					}
				}
				if err == nil {
					t.Errorf("%s: took it", command)
				}
				f.mu.Lock()
				delete(f.answer, command)
				f.mu.Unlock()
				if err := errors.Join(e.Continue(), e.Unlog()); err != nil {
					t.Errorf("%s: afterwards: %v", command, err)
				}
				f.is(t, false, false)
				e.Close()
			}
		})
	}
	f := newFakeQEMU(t)
	f.answer["add-fd"] = `{"return": {}, "id": ID}`
	e := openQEMU(f.path)
	if err := e.Log(); !errors.Is(err, ErrQMP) {
		t.Errorf("a file without a name: %v", err)
	}
	e.Close()
	f = newFakeQEMU(t)
	f.greet = strings.Repeat(`{"hello": 1}`+"\r\n", qmpEvents)
	if err := openQEMU(f.path).Log(); !errors.Is(err, ErrQMP) {
		t.Errorf("no greeting: %v", err)
	}
	if err := openQEMU(filepath.Join(t.TempDir(), "none")).Log(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no monitor: %v", err)
	}
}

// What QEMU had to say to a client that has hung up is not taken for an answer.
func TestEmulatorSaysLate(t *testing.T) {
	f := newFakeQEMU(t)
	late := `{"return": {"fdset-id": 99}, "id": 1}` + "\r\n" + `{"error": {"class": "GenericError", "desc": "late"}, "id": 2}`
	f.greet = late + "\r\n" + f.greet + "\r\n" + late
	f.answer["stop"] = late + "\r\n" + `{"event": "STOP"}` + "\r\n" + `{"return": {}, "id": ID}`
	e := openQEMU(f.path)
	defer e.Close()
	if err := errors.Join(e.Log(), e.Stop()); err != nil || e.set != 3 {
		t.Errorf("%v, set %d", err, e.set)
	}
	if b, err := e.Saved(nil); err != nil || string(b) != f.state {
		t.Errorf("%q, %v", b, err)
	}
}

// A state that is larger than may be is refused, and so is none.
func TestEmulatorState(t *testing.T) {
	for _, size := range []int{0, maxEmulator, maxEmulator + 1} {
		f := newFakeQEMU(t)
		f.state = strings.Repeat("x", size)
		e := openQEMU(f.path)
		if err := e.Stop(); err != nil {
			t.Fatal(err)
		}
		if b, err := e.Saved(nil); (err == nil) != (size == maxEmulator) || err == nil && len(b) != size {
			t.Errorf("%d bytes: %d, %v", size, len(b), err)
		}
		e.Close()
	}
}

// hvm is a fixture with a device model.
func hvm(t *testing.T) (*fixture, *fakeXen, *fakeQEMU) {
	t.Helper()
	x := newFakeXen(128)
	x.info.DeviceModel = true
	for p := range page.PFN(20) {
		x.populate(p)
	}
	f, q := newFixture(t, x, 8), newFakeQEMU(t)
	f.susp.dm = openQEMU(q.path)
	x.running = func(bool) {
		q.mu.Lock()
		defer q.mu.Unlock()
		if q.stopped {
			t.Error("the guest goes on while its device model is stopped")
		}
	}
	return f, x, q
}

func TestDeviceModel(t *testing.T) {
	f, x, q := hvm(t)
	r := replica{}
	begin(t, f, r)
	q.is(t, false, true)
	var c Capture
	for i := range 3 {
		q.mu.Lock()
		q.state = fmt.Sprint("state ", i)
		q.mu.Unlock()
		x.write(3, byte(i))
		c.Hold = i == 2
		if err := f.Checkpoint(t.Context(), nothing, &c); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(r.take(&c.Pages), r.equal(x), CheckState(c.State, true)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(c.State, fmt.Append(nil, "state ", i)) {
			t.Errorf("without the device model's state: %q", c.State)
		}
		q.is(t, c.Hold, true)
	}
	if err := f.Resume(); err != nil {
		t.Error(err)
	}
	q.is(t, false, true)
	// It is stopped before what changed is read, so that what it does until then counts.
	var at []string
	q.mu.Lock()
	q.said = nil
	q.mu.Unlock()
	x.inClean = func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		at = slices.Clone(q.said)
		if !q.stopped {
			t.Error("it is not stopped when the pages are read")
		}
	}
	if err := f.Checkpoint(t.Context(), nothing, &Capture{}); err != nil || len(at) == 0 || at[0] != "stop" {
		t.Errorf("%v, after %q", err, at)
	}
	if err := f.Close(); err != nil || !x.runs() || x.log {
		t.Errorf("%v, runs %v, log-dirty %v", err, x.runs(), x.log)
	}
	q.is(t, false, false)
}

// Whoever ends Xen's log, as libxl does, has ended the device model's, too.
func TestDeviceModelLogAnew(t *testing.T) {
	f, x, q := hvm(t)
	begin(t, f, replica{})
	x.DisableLogDirty()
	x.EnableLogDirty()
	q.mu.Lock()
	q.logs = false
	q.mu.Unlock()
	if err := f.Checkpoint(t.Context(), nothing, &Capture{}); !errors.Is(err, ErrLogDirtyLost) {
		t.Fatal(err)
	}
	if _, err := f.Round(t.Context(), replica{}.take); err != nil {
		t.Fatal(err)
	}
	q.is(t, false, true)
}

// A device model that fails ends the checkpoint, and the guest goes on.
func TestDeviceModelFails(t *testing.T) {
	for _, command := range []string{"stop", "xen-save-devices-state", "cont"} {
		f, x, q := hvm(t)
		begin(t, f, replica{})
		q.mu.Lock()
		q.answer[command] = `{"id": ID, "error": {"class": "GenericError", "desc": "out of order"}}`
		q.mu.Unlock()
		if command == "cont" {
			x.running = nil // it is let go on without
		}
		err := f.Checkpoint(t.Context(), nothing, &Capture{})
		if err == nil || !strings.Contains(err.Error(), "out of order") || !x.runs() {
			t.Errorf("%s: %v, runs %v", command, err, x.runs())
		}
		q.mu.Lock()
		clear(q.answer)
		q.mu.Unlock()
		if err := f.Close(); err != nil || !x.runs() || x.log {
			t.Errorf("%s: %v, runs %v, log-dirty %v", command, err, x.runs(), x.log)
		}
		q.is(t, false, false)
	}
}

// What a killed process left: a guest and its device model that stand.
func TestCleanupDeviceModel(t *testing.T) {
	for mark, ours := range map[string]bool{"s": true, "": true, "r": false} {
		f, x, q := hvm(t)
		x.EnableLogDirty()
		x.Subscribe(12)
		q.logs, q.stopped = true, true
		f.answer(func() {})
		x.shutdown(sys.ShutdownSuspend)
		f.Domain.mark.f.WriteAt([]byte(mark), 0)
		for range 2 {
			if err := cleanup(t.Context(), x, &f.susp); err != nil {
				t.Error(err)
			}
		}
		if x.runs() != ours || x.log {
			t.Errorf("mark %q: runs %v, log-dirty %v", mark, x.runs(), x.log)
		}
		q.is(t, !ours, !ours) // what is somebody else's is left to him
	}
}

func TestCheckDeviceModel(t *testing.T) {
	x := newFakeXen(128)
	x.info.DeviceModel = true
	f := newFixture(t, x, 8)
	if err := f.check(t.Context()); err != nil || f.susp.dm == nil {
		t.Errorf("%v, %v", err, f.susp.dm)
	}
	x.noPV = true
	if err := f.check(t.Context()); !errors.Is(err, ErrNoPVDrivers) {
		t.Errorf("no PV drivers: %v", err)
	}
	f.boots = time.Minute // it is given up when asked to
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := f.check(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("no PV drivers yet: %v", err)
	}
	x.noPV = false
	f.store.Set("/local/domain/7/image/device-model-domid", "0")
	if err := f.check(t.Context()); err != nil {
		t.Error(err)
	}
	f.store.Set("/local/domain/7/image/device-model-domid", "9")
	if err := f.check(t.Context()); !errors.Is(err, ErrDeviceModel) {
		t.Errorf("stub domain: %v", err)
	}
	f.store.Set("/local/domain/7/image/device-model-domid", "0")
	f.store.Set("/local/domain/0/device-model/7/physmap/8000000/start_addr", "f0000000")
	if err := f.check(t.Context()); !errors.Is(err, ErrDeviceModel) {
		t.Errorf("an old QEMU: %v", err)
	}
}

func FuzzQMP(f *testing.F) {
	f.Add([]byte(`{"QMP": {}}` + "\n" + `{"return": {}, "id": 1}` + "\n" + `{"event": "STOP"}` + "\n" + `{"return": {"fdset-id": 1}, "id": 2}` + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		ours, theirs, err := socketPair()
		if err != nil {
			t.Fatal(err)
		}
		defer ours.Close()
		done := make(chan struct{})
		go func() {
			defer close(done)
			theirs.Write(b)
			theirs.CloseWrite()
			buf := make([]byte, 4096)
			for {
				if _, err := theirs.Read(buf); err != nil {
					break
				}
			}
			theirs.Close()
		}()
		q := newQMP(ours)
		q.sent, q.answered = 0, 0
		var v struct {
			Set *int `json:"fdset-id"`
		}
		if q.hello() == nil && q.do("add-fd", nil, &v) == nil && v.Set != nil && !bytes.Contains(b, []byte("fdset-id")) && !bytes.Contains(b, []byte(`\u`)) {
			t.Errorf("fdset %d of %q", *v.Set, b)
		}
		ours.Close()
		<-done
	})
}

func socketPair() (a, b *net.UnixConn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			return nil, nil, err
		}
		conns[i] = c.(*net.UnixConn)
	}
	return conns[0], conns[1], nil
}

func TestFindEmulator(t *testing.T) {
	proc := t.TempDir()
	for pid, cmdline := range map[string]string{
		"1":  "/sbin/init\x00",
		"20": "/usr/libexec/xen-qemu-system-i386\x00-xen-domid\x0017\x00-no-shutdown\x00",
		"21": "/usr/libexec/xen-qemu-system-i386\x00-xen-domid\x001\x00-no-shutdown\x00",
		"22": "grep\x00-xen-domid\x002\x00",
		"23": "/usr/bin/qemu\x00-xen-domid",
	} {
		if err := errors.Join(os.Mkdir(filepath.Join(proc, pid), 0o700), os.WriteFile(filepath.Join(proc, pid, "cmdline"), []byte(cmdline), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if p, err := findProgram(proc, 1); p != "/usr/libexec/xen-qemu-system-i386" || err != nil {
		t.Errorf("%q, %v", p, err)
	}
	for _, domid := range []uint16{2, 3, 7} {
		if p, err := findProgram(proc, domid); p != "" || err == nil {
			t.Errorf("domain %d: %q", domid, p)
		}
	}
	for greeting, want := range map[string]string{
		`{"version": {"qemu": {"micro": 7, "minor": 0, "major": 10}, "package": "Debian 1:10.0.7+ds-0+deb13u1+b1"}, "capabilities": ["oob"]}`: "QEMU emulator version 10.0.7 (Debian 1:10.0.7+ds-0+deb13u1+b1)",
		`{"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}}`:                                                          "QEMU emulator version 7.2.0",
		`{"version": 7}`: "",
	} {
		if v, err := qemuVersion([]byte(greeting)); v != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v", greeting, v, err)
		}
	}
}
