package sys

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	pageSize = 4096

	privcmdPath = "/dev/xen/privcmd"
	bufferPath  = "/dev/xen/hypercall"
)

// ErrVersion means that the running Xen numbers its domctl interface as none that
// is known here.
var ErrVersion = errors.New("this version of Xen is not known")

// versions of the domctl interface in which all that is used here is the same.
var versions = [...]uint32{
	0x15, // Xen 4.17
	0x17, // Xen 4.19, 4.20, 4.21
	0x16, // Xen 4.18
}

// Conn is one opened hypercall device. It is safe for concurrent use.
type Conn struct {
	mu      sync.Mutex // guards scratch, and the descriptors against Close
	privcmd int
	buffers int // or -1
	scratch *buffer
	version uint32
	release string
}

// Open opens the hypercall device and finds out which Xen runs.
func Open() (*Conn, error) {
	fd, err := unix.Open(privcmdPath, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("no %s: this host does not run Xen, or its xen-privcmd module is not loaded: %w", privcmdPath, err)
		}
		return nil, fmt.Errorf("open %s: %w", privcmdPath, err)
	}
	c := &Conn{privcmd: fd, buffers: -1}
	if c.buffers, err = unix.Open(bufferPath, unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		c.buffers = -1 // older than Linux 4.18, or not given to us
	}
	if c.scratch, err = c.newBuffer(pageSize); err == nil {
		err = c.probe()
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// Release is the running Xen's, as in "4.17.7".
func (c *Conn) Release() string { return c.release }

// Version is the running Xen's, as a stream's domain header has it.
func (c *Conn) Version() (major, minor uint16) {
	fmt.Sscanf(c.release, "%d.%d", &major, &minor)
	return major, minor
}

// Close closes the device. What was mapped through it stays until unmapped.
// Idempotent.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.privcmd < 0 {
		return nil
	}
	c.scratch.free()
	if c.buffers >= 0 {
		unix.Close(c.buffers)
	}
	err := unix.Close(c.privcmd)
	c.privcmd, c.buffers = -1, -1
	return err
}

// call makes one hypercall.
func (c *Conn) call(what string, op uint64, args ...uint64) (int64, error) {
	h := privcmdHypercall{op: op}
	copy(h.arg[:], args)
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(c.privcmd), ioctlHypercall, uintptr(unsafe.Pointer(&h)))
	if errno != 0 {
		return 0, fmt.Errorf("%s: %w", what, errno)
	}
	return int64(r), nil
}

func (c *Conn) probe() error {
	v, err := c.call("xen version", hypercallVersion, versionVersion)
	if err != nil {
		return err
	}
	extra := c.scratch.mem[:16]
	clear(extra)
	if _, err := c.call("xen extra version", hypercallVersion, versionExtraVersion, c.scratch.addr()); err != nil {
		return err
	}
	c.release = fmt.Sprintf("%d.%d%s", v>>16, v&0xffff, unix.ByteSliceToString(extra))
	for _, c.version = range versions {
		// Of dom0, which is always there.
		op, _ := at[domctl](c.scratch, 0)
		*op = domctl{cmd: domctlGetInfo, version: c.version}
		_, err := c.call("get information on domain 0", hypercallDomctl, c.scratch.addr())
		if !errors.Is(err, unix.EACCES) { // what another version is answered with
			return err
		}
	}
	return fmt.Errorf("%w: Xen %s, with a domctl interface that is none of %#x; install a Kemari made for it, or run Xen 4.17 to 4.21",
		ErrVersion, c.release, versions)
}

// buffer is memory that a hypercall may read and write: it is not swapped, moved
// or copied on write, not even when another thread forks.
type buffer struct{ mem []byte }

func (c *Conn) newBuffer(size int) (*buffer, error) {
	size = (size + pageSize - 1) &^ (pageSize - 1)
	if c.buffers >= 0 {
		b, err := unix.Mmap(c.buffers, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return nil, fmt.Errorf("map %s: %w", bufferPath, err)
		}
		return &buffer{b}, nil
	}
	b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_LOCKED)
	if err == nil {
		if err = unix.Madvise(b, unix.MADV_DONTFORK); err != nil {
			unix.Munmap(b)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("memory for hypercalls: %w", os.NewSyscallError("mmap", err))
	}
	clear(b) // no page may be shared with another process any more
	return &buffer{b}, nil
}

func (b *buffer) addr() uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b.mem)))) }

func (b *buffer) free() {
	if b != nil && b.mem != nil {
		unix.Munmap(b.mem)
		b.mem = nil
	}
}

// at is the structure at an offset of the buffer, and the hypercall's address of it.
func at[T any](b *buffer, off uintptr) (*T, uint64) {
	var t T
	return (*T)(unsafe.Pointer(&b.mem[off : off+unsafe.Sizeof(t)][0])), b.addr() + uint64(off)
}

// payload is the operation's own structure within a domctl.
func payload[T any](op *domctl) *T { return (*T)(unsafe.Pointer(&op.u)) }

// mapBatch maps pages of a domain at addr, the beginning of a fresh mapping of the
// device of that size. errs gets the error of each.
func (c *Conn) mapBatch(addr uintptr, domain uint16, pfns []uint64, errs []int32) error {
	m := privcmdMapBatch{
		num: uint32(len(pfns)), domain: domain, addr: uint64(addr),
		arr: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(pfns)))),
		err: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(errs)))),
	}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(c.privcmd), ioctlMapBatch, uintptr(unsafe.Pointer(&m)))
	runtime.KeepAlive(pfns)
	runtime.KeepAlive(errs)
	// ENOENT: all went well, but a page is paged out, as its error says.
	if errno != 0 && errno != unix.ENOENT {
		return fmt.Errorf("map %d pages of domain %d: %w", len(pfns), domain, errno)
	}
	return nil
}
