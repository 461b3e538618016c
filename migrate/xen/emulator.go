package xen

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// emulator is the device model of an HVM guest; see qemu. Its methods are called by
// one goroutine.
type emulator interface {
	// Log has it tell Xen from now on which of the guest's pages it changes itself.
	Log() error
	// Unlog ends that. It is no error if it does not.
	Unlog() error
	// Stop stops its clocks and devices, and begins to save their state, for Saved. While
	// it is stopped Xen answers the guest in its place, with nonsense: only for a guest
	// that stands.
	Stop() error
	// Saved waits for the state that Stop has begun to save, and appends it.
	Saved(b []byte) ([]byte, error)
	// Continue lets it go on, if it is stopped, before the guest goes on.
	Continue() error
	Close() error
}

// qemu is a guest's QEMU, spoken to by its second monitor: libxl and so libvirt use the
// first one, of which a client has to itself as long as it is connected; the second is
// for xentop alone, which does without when it gets no answer. So a connection can be
// kept, and none need be made while the guest stands.
//
// QEMU saves its state to a file, by a descriptor of ours of memory without a name.
type qemu struct {
	path string
	q    *qmp // nil: to be connected

	file  *os.File // what QEMU writes
	read  *os.File // the same, to be read
	set   int      // QEMU's name for file
	saves bool     // Stop has begun to save
}

// maxEmulator bounds a device model's state: that of one with all its devices takes
// some hundred KiB.
const maxEmulator = 8 << 20

func monitorPath(domid uint16) string {
	return fmt.Sprintf("/run/xen/qmp-libxenstat-%d", domid)
}

func openQEMU(path string) *qemu { return &qemu{path: path} }

// connect connects anew where the last connection has failed: answers of what was
// asked there must not be taken for those of what is asked next.
func (e *qemu) connect() error {
	if e.q != nil {
		return nil
	}
	if err := e.open(); err != nil {
		return err
	}
	q, err := dialQMP(e.path)
	if err != nil {
		return fmt.Errorf("connect to the device model: %w", err)
	}
	var added struct {
		Set *int `json:"fdset-id"`
	}
	if err = q.send("add-fd", nil, e.file); err == nil {
		err = q.await("add-fd", &added)
	}
	if err == nil && added.Set == nil {
		err = fmt.Errorf("%w to add-fd: no fdset-id", ErrQMP)
	}
	if err != nil {
		q.Close()
		return err
	}
	e.q, e.set = q, *added.Set
	return nil
}

// open makes the file. QEMU asks for a descriptor that is for writing only.
func (e *qemu) open() error {
	if e.file != nil {
		return nil
	}
	fd, err := unix.MemfdCreate("kemari-device-model", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("make memory for the device model's state: %w", err)
	}
	read := os.NewFile(uintptr(fd), "memfd")
	file, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_WRONLY, 0)
	if err != nil {
		read.Close()
		return err
	}
	e.read, e.file = read, file
	return nil
}

// failed drops a connection on which an answer may be outstanding.
func (e *qemu) failed(err error) error {
	if err != nil && e.q != nil {
		e.q.Close()
		e.q = nil
	}
	return err
}

func (e *qemu) do(command string, args, result any) error {
	if err := e.connect(); err != nil {
		return err
	}
	return e.failed(e.q.do(command, args, result))
}

type dirtyLog struct {
	Enable bool `json:"enable"`
}

func (e *qemu) Log() error { return e.do("xen-set-global-dirty-log", dirtyLog{true}, nil) }

// Unlog begins to log first: QEMU aborts when it is told to end what it does not do,
// as it is where libxl has ended it meanwhile.
func (e *qemu) Unlog() error {
	if err := e.Log(); err != nil {
		return err
	}
	return e.do("xen-set-global-dirty-log", dirtyLog{false}, nil)
}

func (e *qemu) Stop() error {
	if err := e.connect(); err != nil {
		return err
	}
	e.saves = false
	if err := e.file.Truncate(0); err != nil {
		return err
	}
	// QEMU writes on where the descriptor is.
	if _, err := e.file.Seek(0, 0); err != nil {
		return err
	}
	// Both at once: QEMU saves as soon as it has stopped. It keeps its disks, which it
	// would give up for a live migration.
	err := e.q.send("stop", nil, nil)
	if err == nil {
		err = e.q.send("xen-save-devices-state", struct {
			Filename string `json:"filename"`
			Live     bool   `json:"live"`
		}{fmt.Sprintf("/dev/fdset/%d", e.set), false}, nil)
	}
	if err == nil {
		err = e.q.await("stop", nil)
	}
	e.saves = err == nil
	return e.failed(err)
}

func (e *qemu) Saved(b []byte) ([]byte, error) {
	if !e.saves {
		return b, errors.New("the device model was not told to save its state")
	}
	e.saves = false
	if err := e.failed(e.q.await("xen-save-devices-state", nil)); err != nil {
		return b, err
	}
	info, err := e.read.Stat()
	if err != nil {
		return b, err
	}
	if info.Size() == 0 || info.Size() > maxEmulator {
		return b, fmt.Errorf("%w to xen-save-devices-state: a state of %d bytes", ErrQMP, info.Size())
	}
	n := len(b)
	b = slices.Grow(b, int(info.Size()))[:n+int(info.Size())]
	if _, err := e.read.ReadAt(b[n:], 0); err != nil {
		return b[:n], fmt.Errorf("read the device model's state: %w", err)
	}
	return b, nil
}

// Continue is done by cont, which is nothing for a QEMU that runs.
func (e *qemu) Continue() (err error) {
	if e.saves { // an answer is outstanding
		e.failed(errors.New("given up"))
		e.saves = false
	}
	began := time.Now()
	for try := range 3 {
		if try > 0 {
			time.Sleep(20 * time.Millisecond)
		}
		if time.Since(began) > qmpTimeout { // the guest waits
			break
		}
		if err = e.do("cont", nil, nil); err == nil {
			return nil
		}
	}
	return fmt.Errorf("let the device model go on: %w", err)
}

// Close is idempotent.
func (e *qemu) Close() error {
	var err error
	if e.q != nil {
		err = e.q.Close()
		e.q = nil
	}
	if e.file != nil {
		err = errors.Join(err, e.file.Close(), e.read.Close())
		e.file, e.read = nil, nil
	}
	return err
}
