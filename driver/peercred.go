package driver

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// peerCred is who is at the other end of a connection, as the kernel says. The
// process may have handed the connection on or have ended since.
type peerCred struct {
	pid      int32
	uid, gid uint32
	groups   []uint32 // the supplementary ones
	start    uint64   // when the process started, in ticks since boot; 0 if not known
}

func (p *peerCred) String() string { return fmt.Sprintf("uid=%d,pid=%d", p.uid, p.pid) }

var errNoCred = errors.New("the kernel does not say who the client is")

// readPeerCred asks the kernel.
func readPeerCred(c net.Conn) (*peerCred, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errNoCred
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoCred, err)
	}
	var cred *unix.Ucred
	var groups []uint32
	var failed error
	err = raw.Control(func(fd uintptr) {
		if cred, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); failed == nil {
			groups, failed = peerGroups(fd)
		}
	})
	if err := errors.Join(err, failed); err != nil {
		return nil, fmt.Errorf("%w: %w", errNoCred, err)
	}
	return &peerCred{pid: cred.Pid, uid: cred.Uid, gid: cred.Gid, groups: groups, start: processStart(cred.Pid)}, nil
}

// peerGroups is SO_PEERGROUPS, for which golang.org/x/sys/unix has no function.
func peerGroups(fd uintptr) ([]uint32, error) {
	groups := make([]uint32, 64)
	for {
		size := uint32(4 * len(groups))
		_, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case e == 0:
			return groups[:size/4], nil
		case e == unix.ERANGE && size > uint32(4*len(groups)): // size says how much is needed
			groups = make([]uint32, size/4)
		default:
			return nil, e
		}
	}
}

// processStart returns the start time that tells a process from a later one with
// its number, or 0.
func processStart(pid int32) uint64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	return parseStart(b)
}

// parseStart takes the 22nd field of /proc/PID/stat. The second, a name in
// brackets, may hold anything, so the last bracket counts.
func parseStart(b []byte) uint64 {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return 0
	}
	f := bytes.Fields(b[i+1:])
	if len(f) < 20 {
		return 0
	}
	n, err := strconv.ParseUint(string(f[19]), 10, 64)
	if err != nil {
		return 0
	}
	return n
}
