package driver

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"kemari/driver/rpc"
)

// Host is what two hosts compare before one protects the other's guests.
type Host struct {
	Name string `json:"name"`
	// Boot is the kernel's boot_id. Clones of one image share their machine-id
	// and at times their firmware's UUID, but never this.
	Boot string `json:"boot"`
	Xen  Xen    `json:"xen"`
}

// Xen is the hypervisor's version.
type Xen struct {
	Release string `json:"release"` // "4.17"; the streams of two releases may differ
	Extra   string `json:"extra"`   // ".7-pre"
}

func (x Xen) String() string { return x.Release + x.Extra }

// ReadHost tells about the host this process runs on.
func ReadHost() (Host, error) { return readHost("/") }

func readHost(root string) (Host, error) {
	var err error
	get := func(path string) string {
		b, e := os.ReadFile(filepath.Join(root, path))
		if e != nil && err == nil {
			err = e
		}
		return strings.TrimSpace(string(b))
	}
	h := Host{
		Name: get("proc/sys/kernel/hostname"),
		Boot: get("proc/sys/kernel/random/boot_id"),
	}
	if err != nil {
		return h, fmt.Errorf("this host's identity: %w", err)
	}
	h.Xen = Xen{
		Release: get("sys/hypervisor/version/major") + "." + get("sys/hypervisor/version/minor"),
		Extra:   get("sys/hypervisor/version/extra"),
	}
	if err != nil {
		return h, refuse(rpc.CodeConfigUnsupp, "this host does not run under Xen, or not as its dom0", "boot it with Xen")
	}
	return h, nil
}
