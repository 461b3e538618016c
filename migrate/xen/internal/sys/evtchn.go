package sys

import (
	"encoding/binary"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

const evtchnPath = "/dev/xen/evtchn"

// Port is our end of an event channel with a guest.
type Port struct {
	f    *os.File
	c    chan struct{}
	done chan struct{}
}

// BindPort binds to a port of the guest's that waits for us.
func BindPort(domain uint16, remote uint32) (*Port, error) {
	f, err := os.OpenFile(evtchnPath, os.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	b := bindInterdomain{domain: uint32(domain), port: remote}
	rc, err := f.SyscallConn()
	if err == nil {
		cerr := rc.Control(func(fd uintptr) {
			if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, ioctlBindInterdomain, uintptr(unsafe.Pointer(&b))); errno != 0 {
				err = errno
			}
		})
		if err == nil {
			err = cerr
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("bind to port %d of domain %d: %w", remote, domain, err)
	}
	p := &Port{f: f, c: make(chan struct{}, 1), done: make(chan struct{})}
	go p.read()
	return p, nil
}

// C receives when the guest, or the hypervisor for it, has signalled since the last
// receive; once at the beginning, as a fresh channel does.
func (p *Port) C() <-chan struct{} { return p.c }

// read takes signals and lets the next one come, until Close.
func (p *Port) read() {
	defer close(p.done)
	var b [16 * 4]byte
	for {
		n, err := p.f.Read(b[:])
		if err != nil {
			return
		}
		// What was read is masked until it is written back.
		n = n &^ 3
		if n == 0 || binary.NativeEndian.Uint32(b[:]) == 0 {
			continue
		}
		if _, err := p.f.Write(b[:n]); err != nil {
			return
		}
		select {
		case p.c <- struct{}{}:
		default: // one waits to be seen already
		}
	}
}

// Close unbinds. Idempotent.
func (p *Port) Close() {
	p.f.Close()
	<-p.done
}
