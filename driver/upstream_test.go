package driver

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
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
		c, err := cfg.enterUpstream(ctx, false)
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
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				if p, err := rpc.ReadPacket(c); err == nil {
					rpc.WritePacket(c, &rpc.Packet{Header: p.Reply(rpc.OK), Payload: (&rpc.AuthListRet{rpc.AuthNone}).Append(nil)})
				}
				c.Close()
			}
		}()
		return l
	}
	if got := which(); got != "" {
		t.Error(got)
	}
	libvirtd := listen("libvirt-sock")
	defer libvirtd.Close()
	if got := which(); got != "libvirt-sock" {
		t.Errorf("libvirtd alone: %q", got)
	}
	virtxend := listen("virtxend-sock")
	if got := which(); got != "virtxend-sock" {
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

// TestUpstreamEndsAsOneComes: a libvirtd that ends when it was idle may do so just when
// a client comes, or the driver itself; neither learns of it.
func TestUpstreamEndsAsOneComes(t *testing.T) {
	up := newLibvirtd(t, nil)
	path := filepath.Join(shortDir(t), "libvirt-sock")
	var ends atomic.Bool // the next one who comes
	accept(t, path, func(c net.Conn) {
		defer c.Close()
		if ends.Swap(false) {
			return
		}
		to, err := net.Dial("unix", up.path)
		if err != nil {
			t.Error(err)
			return
		}
		var wg sync.WaitGroup
		wg.Go(func() { io.Copy(to, c); to.Close() })
		io.Copy(c, to)
		c.Close()
		wg.Wait()
	})
	for _, user := range []uint32{0, someUser} {
		h := newHost(t, "xen1", path)
		h.asUser(peerCred{pid: 4711, uid: user, gid: 7, start: 99}, &fakeAuthority{verdict: func(context.Context, Subject, string) error { return nil }})
		c := client(t, h.rw)
		if user != 0 {
			if _, err := remote(c, rpc.ProcAuthPolkit, nil); err != nil {
				t.Fatal(err)
			}
		}
		ends.Store(true)
		name := uri
		if _, err := remote(c, rpc.ProcConnectOpen, (&rpc.ConnectOpenArgs{Name: &name}).Append(nil)); err != nil {
			t.Errorf("user %d: %v", user, err)
		}
		if ends.Load() {
			t.Errorf("user %d: nobody has come", user)
		}
	}
	ends.Store(true)
	l, err := OpenLibvirt(t.Context(), path, "test:///default")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if ends.Load() {
		t.Error("the driver itself did not come")
	}
}
