package driver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"kemari/driver/drivertest"
	"kemari/driver/rpc"
	"kemari/migrate/control"
)

// testUUID is the guest of test:///default.
const testUUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"

// stockLibvirtd starts libvirtd and returns its socket.
func stockLibvirtd(t *testing.T) string {
	t.Helper()
	return drivertest.StartLibvirtd(t).Socket
}

func virsh(t *testing.T, socket string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "virsh", append([]string{"-c", uri + "?socket=" + socket}, args...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	b, err := cmd.CombinedOutput()
	return string(b), err
}

// TestStockLibvirt has the real client and the real daemon on either side.
func TestStockLibvirt(t *testing.T) {
	upstream := stockLibvirtd(t)
	h := newHost(t, "xen1", upstream)
	h.d.cfg.Libvirt = func(ctx context.Context) (Libvirt, error) { return OpenLibvirt(ctx, upstream, "test:///default") }

	for _, c := range []struct {
		socket string
		args   []string
		want   string // in what it prints
		fails  bool
	}{
		{h.rw, []string{"list", "--all"}, "test   running", false},
		{h.rw, []string{"-k", "1", "-K", "2", "dumpxml", "test"}, testUUID, false},
		{h.rw, []string{"hostname"}, "", false},
		{h.rw, []string{"save", "test", filepath.Join(filepath.Dir(upstream), "saved")}, "saved", false},
		{h.rw, []string{"domjobabort", "test"}, "not supported by the connection driver", true},
		{h.rw, []string{"qemu-monitor-command", "test", "x"}, "not supported", true},
		{h.ro, []string{"list", "--all"}, "test   running", false},
		{h.ro, []string{"destroy", "test"}, "read only access prevents virDomainDestroy", true},
	} {
		out, err := virsh(t, c.socket, c.args...)
		if (err != nil) != c.fails || !strings.Contains(out, c.want) {
			t.Errorf("%v: %v\n%s", c.args, err, out)
		}
	}

	t.Run("events", func(t *testing.T) {
		cmd := exec.Command("virsh", "-c", uri+"?socket="+h.rw, "event", "--all", "--timeout", "20")
		out := new(lockedBuffer)
		cmd.Stdout, cmd.Stderr = out, out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "an event arrives", func() bool {
			virsh(t, h.rw, "suspend", "test")
			virsh(t, h.rw, "resume", "test")
			out.mu.Lock()
			defer out.mu.Unlock()
			return strings.Contains(out.Builder.String(), "Resumed") || strings.Contains(out.Builder.String(), "Suspended")
		})
		cmd.Process.Kill()
		cmd.Wait()
	})

	t.Run("driver's own connection", func(t *testing.T) {
		l, err := h.d.cfg.Libvirt(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		g, err := l.Guest(parseUUID(t, testUUID))
		if err != nil || g.Name != "test" || !g.Running || g.State != "running" || g.MemoryKiB == 0 || !strings.Contains(g.XML, "<domain type='test'") {
			t.Errorf("%+v, %v", g, err)
		}
		if _, err := l.Guest(rpc.UUID{1}); !errors.Is(err, ErrNoGuest) {
			t.Errorf("no such guest: %v", err)
		}
		if n, err := l.Names(); err != nil || n["test"] != (Known{parseUUID(t, testUUID), true}) {
			t.Errorf("%v, %v", n, err)
		}
		if v, err := l.Node(); err != nil || v.Version < 9000000 || v.FreeMemoryKiB == 0 {
			t.Errorf("%d, %v", v, err)
		}
	})

	t.Run("protect", func(t *testing.T) {
		// As the client library sends it; the guest of the test driver is no guest
		// of Xen, and the driver must say so.
		g := golibvirt.NewWithDialer(unixDialer(h.rw))
		if err := g.ConnectToURI(uri); err != nil {
			t.Fatal(err)
		}
		defer g.Disconnect()
		dom, err := g.DomainLookupByName("test")
		if err != nil {
			t.Fatal(err)
		}
		_, err = g.DomainMigratePerform3Params(dom, golibvirt.OptString{"kemari+ssh://xen2/system"}, nil, nil,
			golibvirt.MigratePeer2peer|golibvirt.MigrateLive|rpc.MigrateKemari)
		if err == nil || !strings.Contains(err.Error(), "not a Xen guest") {
			t.Errorf("%v", err)
		}
	})

	t.Run("guard", func(t *testing.T) {
		p := protectedGuest(t, h, control.Primary, control.Protected)
		for _, args := range [][]string{
			{"save", "test", "/nowhere/x"}, {"managedsave", "test"}, {"dump", "test", "/nowhere/x"}, {"setmem", "test", "1G"},
			{"setvcpus", "test", "1"}, {"snapshot-create", "test"},
		} {
			if out, err := virsh(t, h.rw, args...); err == nil || !strings.Contains(out, "while Kemari protects it") {
				t.Errorf("%v: %v\n%s", args, err, out)
			}
		}
		if out, err := virsh(t, h.rw, "domjobabort", "test"); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		<-p.served
		if out, err := virsh(t, h.rw, "snapshot-create", "test"); err != nil {
			t.Errorf("afterwards: %v\n%s", err, out)
		}
	})

	t.Run("standby has none", func(t *testing.T) {
		c := client(t, upstream)
		_, err := c.Call(context.Background(), rpc.ProgramKemari, 1, procCheck, nil)
		wantError(t, err, rpc.CodeRPC, fmt.Sprint(uint32(rpc.ProgramKemari)))
		var e *rpc.Error
		if errors.As(err, &e) && e.From != rpc.FromRPC {
			t.Errorf("from %d", e.From)
		}
	})
}

type unixDialer string

func (u unixDialer) Dial() (net.Conn, error) { return net.Dial("unix", string(u)) }
