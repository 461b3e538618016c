package output

import (
	"errors"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"

	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// tap tells of the first frame on an interface, which it sees before the filter
// that redirects it.
//
// Under load it costs nothing per frame but a look at a full socket: the socket
// takes two or three frames of a byte each, and nobody reads them before the
// next Arm.
type tap struct {
	conn  *packet.Conn
	raw   syscall.RawConn
	index uint32
	held  chan<- struct{}

	tell chan struct{} // capacity 1: read
	done chan struct{}

	// mu is one for all taps of a plug. It makes it one act to take a frame and to
	// report it, so that none from before Arm is reported after it.
	mu    *sync.Mutex
	armed bool // the goroutine reads, or is told to
}

// snap is how much of a frame is kept: there is no frame of no bytes.
var snap = []bpf.Instruction{bpf.RetConstant{Val: 1}}

func openTap(vif string, index uint32, mu *sync.Mutex, held chan<- struct{}, log *slog.Logger) (*tap, error) {
	filter, err := bpf.Assemble(snap)
	if err != nil {
		return nil, err
	}
	ifi := &net.Interface{Index: int(index), Name: vif}
	conn, err := packet.Listen(ifi, packet.Raw, unix.ETH_P_ALL, &packet.Config{Filter: filter})
	if err != nil {
		return nil, err
	}
	t := &tap{conn: conn, index: index, held: held, mu: mu, tell: make(chan struct{}, 1), done: make(chan struct{})}
	if t.raw, err = conn.SyscallConn(); err == nil {
		err = t.control(func(fd int) error {
			return errors.Join(
				// What goes to the guest is no output.
				unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
				// The kernel makes it the least it allows.
				unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 1))
		})
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	go t.run(log.With("interface", vif))
	return t, nil
}

// Close ends the tap and waits for its goroutine.
func (t *tap) Close() {
	t.conn.Close() // interrupts a read
	close(t.tell)
	<-t.done
}

func (t *tap) run(log *slog.Logger) {
	defer close(t.done)
	for range t.tell {
		if err := t.wait(); err != nil {
			if !errors.Is(err, os.ErrClosed) {
				// Checkpoints go on, at the longest interval.
				log.Warn("cannot see the guest's output any more", "err", err)
			}
			return
		}
	}
}

// wait returns when a frame has come and was reported.
func (t *tap) wait() error {
	for {
		var err error
		if rerr := t.raw.Read(func(fd uintptr) bool {
			err = t.take(int(fd))
			return err != unix.EAGAIN
		}); rerr != nil {
			return rerr
		}
		// An interface that is set down, or removed, says so once. It may be set
		// up again; and who waits for one that is gone is closed in the end.
		if err != unix.ENETDOWN && err != unix.EINTR {
			return err
		}
	}
}

func (t *tap) take(fd int) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := recv(fd); err != nil {
		return err
	}
	t.armed = false
	select {
	case t.held <- struct{}{}:
	default:
	}
	return nil
}

// arm drops what is there and has the next frame reported. The caller holds mu.
func (t *tap) arm() {
	_ = t.control(func(fd int) error {
		// The socket holds no more than a few; the bound is for a frame that comes
		// with each read.
		for range 16 {
			if recv(fd) != nil {
				break
			}
		}
		return nil
	})
	if !t.armed {
		t.armed = true
		t.tell <- struct{}{} // cannot block: it was taken before armed was reset
	}
}

// gone asks whether the interface is still there. It takes no lock that others
// might hold for long.
func (t *tap) gone() bool {
	err := t.control(func(fd int) error {
		r, err := unix.NewIfreq("")
		if err != nil {
			return err
		}
		r.SetUint32(t.index)
		return unix.IoctlIfreq(fd, unix.SIOCGIFNAME, r)
	})
	return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO)
}

func (t *tap) control(f func(fd int) error) error {
	var err error
	if cerr := t.raw.Control(func(fd uintptr) { err = f(int(fd)) }); cerr != nil {
		return cerr
	}
	return err
}

// recv takes one frame, without waiting.
func recv(fd int) error {
	var b [1]byte
	_, _, err := unix.Recvfrom(fd, b[:], unix.MSG_DONTWAIT)
	return err
}
