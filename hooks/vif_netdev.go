package hooks

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// netdev sets up interfaces by ioctl: a dozen calls of a microsecond each, and
// no library to load for them.
type netdev struct{ fd int }

func openNetdev() (*netdev, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return &netdev{fd: fd}, nil
}

func (n *netdev) Close() error { return unix.Close(n.fd) }

// ifreq is struct ifreq: a name, and a union that each request reads its own way.
type ifreq struct {
	name [unix.IFNAMSIZ]byte
	data [24]byte
}

func (n *netdev) do(req uint, dev string, fill func(*ifreq)) (*ifreq, error) {
	if dev == "" || len(dev) >= unix.IFNAMSIZ {
		return nil, unix.ENODEV
	}
	var r ifreq
	copy(r.name[:], dev)
	if fill != nil {
		fill(&r)
	}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(n.fd), uintptr(req), uintptr(unsafe.Pointer(&r)))
	if errno != 0 {
		return nil, errno
	}
	return &r, nil
}

func (r *ifreq) int() *int32     { return (*int32)(unsafe.Pointer(&r.data[0])) }
func (r *ifreq) flags() *uint16  { return (*uint16)(unsafe.Pointer(&r.data[0])) }
func (r *ifreq) family() *uint16 { return (*uint16)(unsafe.Pointer(&r.data[0])) } // of a sockaddr

func (n *netdev) index(dev string) (int, error) {
	r, err := n.do(unix.SIOCGIFINDEX, dev, nil)
	if err != nil {
		return 0, err
	}
	return int(*r.int()), nil
}

func (n *netdev) mtu(dev string) (int, error) {
	r, err := n.do(unix.SIOCGIFMTU, dev, nil)
	if err != nil {
		return 0, err
	}
	return int(*r.int()), nil
}

func (n *netdev) setMTU(dev string, mtu int) error {
	_, err := n.do(unix.SIOCSIFMTU, dev, func(r *ifreq) { *r.int() = int32(mtu) })
	return err
}

func (n *netdev) setMAC(dev string, mac [6]byte) error {
	_, err := n.do(unix.SIOCSIFHWADDR, dev, func(r *ifreq) {
		*r.family() = unix.ARPHRD_ETHER
		copy(r.data[2:], mac[:])
	})
	return err
}

// flushIPv4 removes the interface's address. A vif is new and has none, unless
// some rule of the host gave it one in between; IPv6 addresses have gone when
// it was set down.
func (n *netdev) flushIPv4(dev string) error {
	_, err := n.do(unix.SIOCSIFADDR, dev, func(r *ifreq) { *r.family() = unix.AF_INET })
	return err
}

func (n *netdev) setUp(dev string, up bool) error {
	now, err := n.do(unix.SIOCGIFFLAGS, dev, nil)
	if err != nil {
		return err
	}
	_, err = n.do(unix.SIOCSIFFLAGS, dev, func(r *ifreq) {
		*r.flags() = *now.flags() &^ unix.IFF_UP
		if up {
			*r.flags() |= unix.IFF_UP
		}
	})
	return err
}

func (n *netdev) rename(dev, name string) error {
	if len(name) >= unix.IFNAMSIZ {
		return unix.ENAMETOOLONG
	}
	_, err := n.do(unix.SIOCSIFNAME, dev, func(r *ifreq) { copy(r.data[:unix.IFNAMSIZ], name) })
	return err
}

func (n *netdev) addPort(bridge string, port int) error {
	_, err := n.do(unix.SIOCBRADDIF, bridge, func(r *ifreq) { *r.int() = int32(port) })
	return err
}

func (n *netdev) removePort(bridge string, port int) error {
	_, err := n.do(unix.SIOCBRDELIF, bridge, func(r *ifreq) { *r.int() = int32(port) })
	return err
}
