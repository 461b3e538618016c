package driver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"kemari/driver/rpc"
)

// The names that a client may have for us; it is told the one it used.
const (
	uri = "kemari:///system"
	// Some clients, virt-manager among them, treat a connection as one to Xen only
	// if its scheme begins with xen.
	uriXen = "xenkemari:///system"
)

// checkName accepts every way to say kemari:///system, and returns the plain one.
// What stands before the path, and the query, was for the client to find us.
func checkName(name string) (string, error) {
	bad := func(why string) error {
		return refuse(rpc.CodeInvalidArg, fmt.Sprintf("%q is not a connection of the kemari driver: %s", name, why), "use "+uri)
	}
	u, err := url.Parse(name)
	if err != nil {
		return uri, bad("it is not a URI")
	}
	scheme, _, _ := strings.Cut(u.Scheme, "+")
	plain := map[string]string{"kemari": uri, "xenkemari": uriXen}[scheme]
	switch {
	case plain == "":
		return uri, bad("the scheme is not kemari")
	case u.Path != "/system":
		return uri, bad("the path is not /system")
	}
	return plain, nil
}

// libvirtDir is where libvirt's daemons listen.
const libvirtDir = "/run/libvirt"

// upstreamSockets returns where libvirt's daemon may listen, the best choice
// first: the driver's own daemon, then the one for all drivers.
func (c *Config) upstreamSockets(ro bool) []string {
	set := c.UpstreamSocket
	if ro && c.UpstreamSocketRO != "" {
		set = c.UpstreamSocketRO
	}
	if set != "" {
		return []string{set}
	}
	suffix := "-sock"
	if ro {
		suffix = "-sock-ro"
	}
	names := []string{"libvirt" + suffix}
	if u, err := url.Parse(c.UpstreamURI); err == nil && u.Scheme != "" {
		scheme, _, _ := strings.Cut(u.Scheme, "+")
		names = append([]string{"virt" + scheme + "d" + suffix}, names...)
	}
	dir := c.libvirtDir
	if dir == "" {
		dir = libvirtDir
	}
	for i, n := range names {
		names[i] = filepath.Join(dir, n)
	}
	return names
}

// upstreamSocket returns the first socket that is there, or else the last.
func (c *Config) upstreamSocket(ro bool) string {
	paths := c.upstreamSockets(ro)
	for _, p := range paths[:len(paths)-1] {
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	return paths[len(paths)-1]
}

// dialUpstream connects to libvirt's daemon. A socket may be a left-over of a
// daemon that does not run any more, so the next is tried if nobody listens.
func (c *Config) dialUpstream(ctx context.Context, ro bool) (net.Conn, error) {
	dialer := net.Dialer{Timeout: 10 * time.Second}
	var errs []error
	for _, path := range c.upstreamSockets(ro) {
		conn, err := dialer.DialContext(ctx, "unix", path)
		if err == nil {
			return conn, nil
		}
		errs = append(errs, err)
	}
	return nil, &rpc.Error{
		Code: rpc.CodeNoConnect, From: rpc.FromRPC,
		Message: fmt.Sprintf("libvirtd cannot be reached: %s; see systemctl status libvirtd", oneLine(errors.Join(errs...).Error())),
	}
}
