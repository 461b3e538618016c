package driver

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"kemari/driver/rpc"
)

func TestUpstreamSockets(t *testing.T) {
	for _, c := range []struct {
		cfg    Config
		rw, ro []string
	}{
		{Config{UpstreamURI: "xen:///system"},
			[]string{"/run/libvirt/virtxend-sock", "/run/libvirt/libvirt-sock"},
			[]string{"/run/libvirt/virtxend-sock-ro", "/run/libvirt/libvirt-sock-ro"}},
		{Config{UpstreamURI: "qemu+unix:///system"},
			[]string{"/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock"},
			[]string{"/run/libvirt/virtqemud-sock-ro", "/run/libvirt/libvirt-sock-ro"}},
		{Config{UpstreamURI: "xen:///system", UpstreamSocket: "/a"}, []string{"/a"}, []string{"/a"}},
		{Config{UpstreamURI: "xen:///system", UpstreamSocket: "/a", UpstreamSocketRO: "/b"}, []string{"/a"}, []string{"/b"}},
		{Config{UpstreamURI: "xen:///system", UpstreamSocketRO: "/b"},
			[]string{"/run/libvirt/virtxend-sock", "/run/libvirt/libvirt-sock"}, []string{"/b"}},
	} {
		if got := c.cfg.upstreamSockets(false); !slices.Equal(got, c.rw) {
			t.Errorf("%+v: %q", c.cfg, got)
		}
		if got := c.cfg.upstreamSockets(true); !slices.Equal(got, c.ro) {
			t.Errorf("%+v, read-only: %q", c.cfg, got)
		}
	}
}

// TestUpstreamChoice has now this daemon, now that.
func TestUpstreamChoice(t *testing.T) {
	dir := shortDir(t)
	cfg := Config{UpstreamURI: "xen:///system", libvirtDir: dir}
	ctx := context.Background()
	which := func() string {
		c, err := cfg.dialUpstream(ctx, false)
		if err != nil {
			wantError(t, err, rpc.CodeNoConnect, "virtxend-sock", "libvirt-sock")
			return ""
		}
		defer c.Close()
		return filepath.Base(c.RemoteAddr().String())
	}
	listen := func(name string) net.Listener {
		l, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		return l
	}
	if got := which(); got != "" {
		t.Error(got)
	}
	libvirtd := listen("libvirt-sock")
	defer libvirtd.Close()
	if got := which(); got != "libvirt-sock" || filepath.Base(cfg.upstreamSocket(false)) != got {
		t.Errorf("libvirtd alone: %q", got)
	}
	virtxend := listen("virtxend-sock")
	if got := which(); got != "virtxend-sock" || filepath.Base(cfg.upstreamSocket(false)) != got {
		t.Errorf("both: %q", got)
	}
	virtxend.Close() // and leaves its socket behind
	if _, err := os.Stat(filepath.Join(dir, "virtxend-sock")); err != nil {
		t.Fatal(err)
	}
	if got := which(); got != "libvirt-sock" {
		t.Errorf("a left-over of virtxend: %q", got)
	}
}
