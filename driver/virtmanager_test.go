package driver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	golibvirt "github.com/digitalocean/go-libvirt"

	"kemari/driver/rpc"
	"kemari/migrate/control"
	"kemari/migrate/migratetest"
)

// The calls of a migration that a client manages, beside those the driver looks into.
const (
	procFinish3Params  rpc.Procedure = 306
	procConfirm3Params rpc.Procedure = 307
)

// movable is libvirtd with test:///default, which migrates no guest, but for the calls
// of a migration: to them it answers as Xen's driver does, and the guest goes.
type movable struct {
	path string
	own  *golibvirt.Libvirt // the test's connection; while it is there the guests stay

	mu       sync.Mutex
	asked    []string
	incoming string // the XML of the guest that is to come
}

func newMovable(t *testing.T) *movable {
	t.Helper()
	upstream := stockLibvirtd(t)
	m := &movable{path: filepath.Join(shortDir(t), "libvirt-sock"), own: golibvirt.NewWithDialer(unixDialer(upstream))}
	if err := m.own.ConnectToURI("test:///default"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.own.Disconnect() })
	accept(t, m.path, func(c net.Conn) {
		defer c.Close()
		up, err := net.Dial("unix", upstream)
		if err != nil {
			t.Error(err)
			return
		}
		m.serve(c, up)
	})
	return m
}

// serve passes everything on but what answer answers.
func (m *movable) serve(c, up net.Conn) {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer up.Close()
	var mu sync.Mutex // over writing to c
	reply := func(p *rpc.Packet) error {
		mu.Lock()
		defer mu.Unlock()
		return rpc.WritePacket(c, p)
	}
	wg.Go(func() {
		defer c.Close()
		for {
			p, err := rpc.ReadPacket(up)
			if err != nil || reply(p) != nil {
				return
			}
		}
	})
	for {
		p, err := rpc.ReadPacket(c)
		if err != nil {
			return
		}
		b, ours, err := m.answer(p)
		switch {
		case err != nil:
			err = reply(rpc.ErrorReply(p.Header, err))
		case ours:
			err = reply(&rpc.Packet{Header: p.Reply(rpc.OK), Payload: b})
		default:
			err = rpc.WritePacket(up, p)
		}
		if err != nil {
			return
		}
	}
}

// answer gives the reply's payload to a call that is one of a migration.
func (m *movable) answer(p *rpc.Packet) (b []byte, ours bool, err error) {
	ask := func(format string, a ...any) {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.asked = append(m.asked, fmt.Sprintf(format, a...))
	}
	if p.Program != rpc.ProgramRemote || p.Type != rpc.Call {
		return nil, false, nil
	}
	noCookie := rpc.Opaque(nil).Append(nil)
	switch p.Procedure {
	case rpc.ProcConnectSupportsFeature:
		const v3, p2p, params = 6, 4, 13
		f, err := rpc.DecodeInt(p.Payload)
		if err != nil || *f != v3 && *f != p2p && *f != params {
			return nil, false, err
		}
		return rpc.Int(1).Append(nil), true, nil
	case rpc.ProcDomainMigrateBegin3Params:
		a, err := rpc.DecodeMigrateBeginArgs(p.Payload)
		if err != nil {
			return nil, true, err
		}
		ask("begin %s %#x", a.Domain.Name, a.Flags)
		x, err := m.own.DomainGetXMLDesc(golibvirtDomain(a.Domain), 0)
		return xdrString(noCookie, x), true, err
	case rpc.ProcDomainMigratePrepare3Params:
		// Of the same layout as perform's, without the domain and its URI.
		none := append(with(rpc.Domain{}), 0, 0, 0, 0)
		a, err := rpc.DecodeMigratePerformArgs(append(none, p.Payload...))
		if err != nil {
			return nil, true, err
		}
		given := map[string]string{}
		for _, v := range a.Params {
			given[v.Field] = v.String
		}
		ask("prepare %s", given["migrate_uri"])
		m.mu.Lock()
		m.incoming = given["destination_xml"]
		m.mu.Unlock()
		return append(noCookie, 0, 0, 0, 0), true, nil // and no URI: it was given one
	case rpc.ProcDomainMigratePerform3Params:
		a, err := rpc.DecodeMigratePerformArgs(p.Payload)
		if err != nil {
			return nil, true, err
		}
		ask("perform %s", a.Domain.Name)
		return noCookie, true, nil
	case procFinish3Params:
		m.mu.Lock()
		x := m.incoming
		m.mu.Unlock()
		d, err := m.own.DomainCreateXML(x, 0)
		ask("finish %s", d.Name)
		return append(with(rpc.Domain{Name: d.Name, UUID: rpc.UUID(d.UUID), ID: d.ID}), noCookie...), true, err
	case procConfirm3Params:
		d, err := rpc.DecodeDomainPrefix(p.Payload)
		if err != nil {
			return nil, true, err
		}
		ask("confirm %s", d.Name)
		return nil, true, m.own.DomainDestroy(golibvirtDomain(*d))
	}
	return nil, false, nil
}

func golibvirtDomain(d rpc.Domain) golibvirt.Domain {
	return golibvirt.Domain{Name: d.Name, UUID: golibvirt.UUID(d.UUID), ID: d.ID}
}

func (m *movable) calls() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.asked)
}

const python = "/usr/bin/python3" // the one that Debian's packages are for

// screen starts a display that nobody sees and returns the environment for programs
// that are to appear on it, with folders of its own.
func screen(t *testing.T) []string {
	t.Helper()
	migratetest.Need(t, "virt-manager", func() error {
		for _, p := range []string{"virt-manager", "Xvfb", "dbus-run-session", "/usr/libexec/at-spi-bus-launcher"} {
			if _, err := exec.LookPath(p); err != nil {
				return err
			}
		}
		return exec.Command(python, "-c", "import gi; gi.require_version('Atspi', '2.0')").Run()
	})
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	x := exec.Command("Xvfb", "-displayfd", "3", "-screen", "0", "1280x1024x24", "-nolisten", "tcp")
	x.ExtraFiles = []*os.File{w}
	err = x.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { x.Process.Signal(syscall.SIGTERM); x.Wait() })
	r.SetReadDeadline(time.Now().Add(30 * time.Second))
	display, err := io.ReadAll(r) // it closes it
	if err != nil {
		t.Fatalf("Xvfb has no display: %v", err)
	}
	dir := shortDir(t)
	env := []string{
		"PATH=" + os.Getenv("PATH"), "LC_ALL=C.UTF-8", "HOME=" + dir, "DISPLAY=:" + strings.TrimSpace(string(display)),
		"GDK_BACKEND=x11", "GSETTINGS_BACKEND=memory", "PYTHONFAULTHANDLER=1",
	}
	for _, v := range []string{"XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"} {
		env = append(env, v+"="+dir)
	}
	return env
}

// TestVirtManager has virt-manager as the client, driven by what it offers to people
// who cannot see the screen.
func TestVirtManager(t *testing.T) {
	// By the scheme it decides how to write a migration's address. Of the two Xen's
	// driver takes the second alone.
	for scheme, address := range map[string]string{"kemari": "tcp:%s:49152", "xenkemari": "%s:8002"} {
		t.Run(scheme, func(t *testing.T) { virtManager(t, scheme, address) })
	}
}

func virtManager(t *testing.T, scheme, address string) {
	env := screen(t)
	there := newMovable(t)
	b := newHost(t, "xen2", there.path)
	here := newMovable(t)
	a := newHost(t, "xen1", here.path)
	for h, m := range map[*testHost]*movable{a: here, b: there} {
		h.d.cfg.Libvirt = func(ctx context.Context) (Libvirt, error) { return OpenLibvirt(ctx, m.path, "test:///default") }
	}
	a.dialTo(b)
	p, s := protectedGuest(t, a, control.Primary, control.Protected), protectedGuest(t, b, control.Standby, control.Ready)
	s.tell(func(st *control.Status) { st.Domain = "test" })
	// The copy is paused and not defined, until it is what runs. The guest itself goes.
	test := golibvirt.Domain{Name: "test", UUID: golibvirt.UUID(parseUUID(t, testUUID)), ID: 1}
	if err := errors.Join(there.own.DomainSuspend(test), there.own.DomainUndefine(test)); err != nil {
		t.Fatal(err)
	}
	p.handed = func() error {
		s.phase(control.Active)
		return errors.Join(there.own.DomainResume(test), here.own.DomainDestroy(test))
	}
	const mover = "<domain type='test'><name>mover</name><uuid>0b1f4a3e-5b0c-4f3a-9f52-0d7f3a1f2c11</uuid>" +
		"<memory>65536</memory><os><type>hvm</type></os></domain>"
	if _, err := here.own.DomainCreateXML(mover, 0); err != nil {
		t.Fatal(err)
	}

	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "dbus-run-session", "--", python, "testdata/virtmanager.py",
		scheme+":///system?socket="+a.rw, scheme+":///system?socket="+b.rw)
	var said, log bytes.Buffer
	cmd.Env, cmd.Stdout, cmd.Stderr = env, &said, &log
	// All that it starts ends with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Run(); err != nil {
		b := log.String()
		t.Errorf("%v\n%s", err, b[max(0, len(b)-8000):])
	}
	for _, want := range []string{
		// Were it not connected, it would say so behind the name.
		"lists " + scheme + ", mover Running, test Running, " + scheme + ", test Paused\n",
		", " + testUUID + ", ", ", CPUs, Memory, Boot Options, VirtIO Disk 1, NIC :dd:ee:ff\n",
		"lists " + scheme + ", mover Paused, test Running, ",
		// For Kemari it can ask, and that does not go with the flags that it gives no choice of.
		`refused Unable to migrate guest: cannot protect guest "mover": protection does not go with tunnelled, persistent, undefinesource`,
		// Of a protected guest it asks for a switchover, with the same flags.
		"lists " + scheme + ", mover Running, " + scheme + ", test Running\n",
		"lists " + scheme + ", " + scheme + ", mover Running, test Running\n",
	} {
		if !strings.Contains(said.String(), want) {
			t.Errorf("missing: %s", want)
		}
	}
	if t.Failed() {
		t.Logf("what virt-manager showed:\n%s", said.String())
	}
	// It is defined where it runs, and no more where it was.
	if _, err := here.own.DomainLookupByUUID(test.UUID); !golibvirt.IsNotFound(err) {
		t.Errorf("the guest is still known where it was: %v", err)
	}
	if is, err := there.own.DomainIsPersistent(test); err != nil || is != 1 {
		t.Errorf("the guest is not defined where it is: %d, %v", is, err)
	}
	// Nothing of the refused one went any further, nor of the switchover. 0x19 is live,
	// persistent and undefinesource.
	name, err := there.own.ConnectGetHostname()
	if err != nil {
		t.Fatal(err)
	}
	if got, want := here.calls(), []string{"begin mover 0x19", "perform mover", "confirm mover"}; !slices.Equal(got, want) {
		t.Errorf("the source was asked %q, want %q", got, want)
	}
	if got, want := there.calls(), []string{"prepare " + fmt.Sprintf(address, name), "finish mover"}; !slices.Equal(got, want) {
		t.Errorf("the destination was asked %q, want %q", got, want)
	}
}
