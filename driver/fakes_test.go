package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"kemari/driver/rpc"
	"kemari/migrate/control"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	g1UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"
	g1XML  = `<domain type='xen' id='7'><name>g1</name><uuid>` + g1UUID + `</uuid>
<memory unit='KiB'>131072</memory><currentMemory unit='KiB'>131072</currentMemory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='xenpvh'>xenpvh</type><kernel>/k</kernel></os>
<devices><interface type='bridge'><mac address='00:16:3e:00:00:01'/><source bridge='br0'/></interface></devices></domain>`
)

func ptr[T any](v T) *T { return &v }

func parseUUID(t testing.TB, s string) rpc.UUID {
	t.Helper()
	u, err := rpc.ParseUUID(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// hvmXML is g1XML as an HVM guest.
var hvmXML = strings.NewReplacer("machine='xenpvh'", "machine='xenfv'", ">xenpvh<", ">hvm<", "</interface>", "<model type='netfront'/></interface>",
	"<kernel>/k<", "<kernel>/proc/version<").Replace(g1XML)

// fakeLibvirt is what a driver itself sees of libvirtd.
type fakeLibvirt struct {
	guest  Guest
	err    error
	names  map[string]Known
	free   uint64
	next   string   // the XML of the next start, if it is another
	listed []uint32 // flags of the lists that were asked for

	defined   []string // the definitions that were made, "" for one that was taken away
	defineErr error
}

func (f *fakeLibvirt) Guest(id rpc.UUID) (Guest, error) {
	if f.err != nil {
		return Guest{}, f.err
	}
	if id != f.guest.UUID {
		return Guest{}, ErrNoGuest
	}
	return f.guest, nil
}
func (f *fakeLibvirt) Names() (map[string]Known, error) { return f.names, nil }
func (f *fakeLibvirt) Node() (Node, error)              { return Node{f.free, 9000000}, nil }
func (f *fakeLibvirt) Define(_ rpc.UUID, doc string) error {
	if f.defineErr == nil {
		f.defined = append(f.defined, doc)
	}
	return f.defineErr
}
func (f *fakeLibvirt) Close() error { return nil }

// fakeUnits runs the processes of a protection within the test. What a process
// does is its script, which gets the process with phase starting.
type fakeUnits struct {
	root    string
	scripts map[control.Role]func(*process) error // an error fails Start
	mu      sync.Mutex
	running map[string]*process
	started []string
}

var unitPattern = regexp.MustCompile(`^kemari-(replicator|standby)@([0-9a-f-]{36})\.service$`)

func (u *fakeUnits) Start(ctx context.Context, name string) error {
	m := unitPattern.FindStringSubmatch(name)
	if m == nil {
		return fmt.Errorf("no unit %q", name)
	}
	role := control.Standby
	if m[1] == "replicator" {
		role = control.Primary
	}
	p := &process{paths: control.PathsFor(u.root, role, m[2]), role: role}
	if role == control.Primary {
		if err := control.ReadConfig(p.paths, &p.primary); err != nil {
			return err
		}
		p.st = control.Status{Generation: p.primary.Generation, Domain: p.primary.Domain, Peer: p.primary.StandbyURI}
	} else {
		if err := control.ReadConfig(p.paths, &p.standby); err != nil {
			return err
		}
		p.st = control.Status{Generation: p.standby.Generation, Domain: p.standby.Domain, Peer: p.standby.PrimaryHost, Port: 49300}
	}
	p.st.Role, p.st.UUID, p.st.Phase = role, m[2], control.Starting
	u.mu.Lock()
	u.started = append(u.started, name)
	u.mu.Unlock()
	l, err := control.Listen(p.paths.Socket, 0)
	if err != nil {
		return err
	}
	ctx, p.cancel = context.WithCancel(context.WithoutCancel(ctx))
	p.served = make(chan struct{})
	go func() {
		defer close(p.served)
		control.ServeRequests(ctx, l, p.request)
	}()
	if err := u.scripts[role](p); err != nil {
		p.exit(err.Error())
		return err
	}
	u.mu.Lock()
	u.running[name] = p
	u.mu.Unlock()
	return nil
}

func (u *fakeUnits) Stop(_ context.Context, name string) error {
	u.mu.Lock()
	p := u.running[name]
	delete(u.running, name)
	u.mu.Unlock()
	if p != nil {
		p.exit("")
	}
	return nil
}

// process is a replicator or a standby.
type process struct {
	role    control.Role
	paths   control.Paths
	primary control.PrimaryConfig
	standby control.StandbyConfig
	cancel  context.CancelFunc
	served  chan struct{}

	mu     sync.Mutex
	st     control.Status
	set    []control.Checkpoint // what it was told to take up
	setErr error                // why it does not
	handed func() error         // on request, and what becomes of that; nil: it is handed over
	once   sync.Once
}

func (p *process) phase(ph control.Phase) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.st.Phase = ph
}

func (p *process) status() control.Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.st
}

func (p *process) request(_ context.Context, req control.Request) (control.Status, error) {
	if req.Checkpoint != nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.setErr == nil {
			p.set = append(p.set, *req.Checkpoint)
		}
		return p.st, p.setErr
	}
	if req.Op == control.OpSwitchover {
		if p.handed != nil {
			if err := p.handed(); err != nil {
				return control.Status{}, err
			}
		}
		p.tell(func(st *control.Status) { st.Phase, st.SwitchedOver = control.Ended, st.Peer })
		control.WriteLast(p.paths, p.status())
		go p.exit("")
	}
	if req.Op == control.OpAbort {
		p.phase(control.Ended)
		control.WriteLast(p.paths, p.status())
		go p.exit("")
	}
	return p.status(), nil
}

// exit leaves the last status behind.
func (p *process) exit(why string) {
	p.once.Do(func() {
		p.mu.Lock()
		p.st.Phase, p.st.Error = control.Ended, why
		p.mu.Unlock()
		control.WriteLast(p.paths, p.status())
		p.cancel()
	})
	<-p.served
}

// testHost is one host with its driver, serving on sockets of its own.
type testHost struct {
	Config
	d       *Driver
	units   *fakeUnits
	libvirt *fakeLibvirt
	host    Host
	qemu    string // its device model's version
	qemuErr error
	asked   []string // programs that were asked for their version
	rw, ro  string   // sockets
}

type lockedBuffer struct {
	mu sync.Mutex
	strings.Builder
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Builder.Write(p)
}

// shortDir is a temporary folder whose name leaves room for that of a socket,
// which t.TempDir's does not.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "k")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// newHost starts a driver in front of upstream, a socket.
func newHost(t *testing.T, name, upstream string) *testHost {
	t.Helper()
	dir := shortDir(t)
	h := &testHost{
		units: &fakeUnits{
			root: filepath.Join(dir, "run"), running: map[string]*process{},
			scripts: map[control.Role]func(*process) error{
				control.Primary: func(p *process) error { p.phase(control.Protected); return nil },
				control.Standby: func(p *process) error { p.phase(control.Waiting); return nil },
			},
		},
		libvirt: &fakeLibvirt{
			guest: Guest{Name: "g1", UUID: parseUUID(t, g1UUID), ID: 7, XML: g1XML, Running: true, State: "running", MemoryKiB: 131072},
			names: map[string]Known{}, free: 4 << 20,
		},
		host: Host{Name: name, Boot: "boot-of-" + name, Xen: Xen{"4.17", ".7"}},
		qemu: "QEMU 10.0.2",
		rw:   filepath.Join(dir, "sock"), ro: filepath.Join(dir, "sock-ro"),
	}
	buf := new(lockedBuffer)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of %s:\n%s", name, buf.String())
		}
	})
	h.Config = Config{
		UpstreamURI: "test:///default", UpstreamSocket: upstream, UpstreamSocketRO: upstream,
		Root: h.units.root, Units: h.units, MaxClients: 50,
		Log:     slog.New(slog.NewTextHandler(buf, &slog.HandlerOptions{Level: slog.LevelDebug})),
		Libvirt: func(context.Context) (Libvirt, error) { return h.libvirt, nil },
		Host:    func() (Host, error) { return h.host, nil },
		Version: func(_ context.Context, program string) (string, error) {
			h.asked = append(h.asked, program)
			return h.qemu, h.qemuErr
		},
		DeviceModel: func(domid uint32) *DeviceModel {
			return &DeviceModel{Program: "/usr/libexec/qemu", Version: "QEMU 10.0.2"}
		},
		Dial: func(context.Context, Target) (io.ReadWriteCloser, error) { return nil, errors.New("no way there") },
	}
	var err error
	if h.d, err = New(h.Config); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for path, ro := range map[string]bool{h.rw: false, h.ro: true} {
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			if err := h.d.Serve(ctx, l, ro); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		for unit := range h.units.running {
			h.units.Stop(context.Background(), unit)
		}
	})
	return h
}

// dialTo makes h reach the driver of there.
func (h *testHost) dialTo(there *testHost) {
	h.d.cfg.Dial = func(context.Context, Target) (io.ReadWriteCloser, error) { return net.Dial("unix", there.rw) }
}

// clean says what a protection left behind.
func (h *testHost) clean(t *testing.T) {
	t.Helper()
	eventually(t, "sessions give back their locks", func() bool {
		h.d.mu.Lock()
		defer h.d.mu.Unlock()
		return len(h.d.standbys) == 0
	})
	h.units.mu.Lock()
	defer h.units.mu.Unlock()
	for unit := range h.units.running {
		t.Errorf("%s: %s still runs", h.host.Name, unit)
	}
	filepath.WalkDir(h.units.root, func(path string, e os.DirEntry, err error) error {
		if err == nil && e.Name() == "config.json" {
			t.Errorf("%s: %s is left", h.host.Name, path)
		}
		return nil
	})
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	if len(h.d.attempts) != 0 {
		t.Errorf("%s: %d attempts are left", h.host.Name, len(h.d.attempts))
	}
}

// fakeLibvirtd answers the frames of every connection with answer, which may
// return nil for none.
type fakeLibvirtd struct {
	path   string
	answer func(c net.Conn, p *rpc.Packet) *rpc.Packet
	mu     sync.Mutex
	got    []*rpc.Packet
}

// newLibvirtd starts one that, unless answer says otherwise, echoes.
func newLibvirtd(t *testing.T, answer func(net.Conn, *rpc.Packet) *rpc.Packet) *fakeLibvirtd {
	t.Helper()
	f := &fakeLibvirtd{path: filepath.Join(shortDir(t), "libvirt-sock"), answer: answer}
	if answer == nil {
		f.answer = func(_ net.Conn, p *rpc.Packet) *rpc.Packet {
			return &rpc.Packet{Header: p.Reply(rpc.OK), Payload: p.Payload}
		}
	}
	accept(t, f.path, func(c net.Conn) {
		defer c.Close()
		for authenticated := false; ; {
			p, err := rpc.ReadPacket(c)
			if err != nil {
				return
			}
			// As a libvirtd with polkit does: not a word before that was asked for.
			if p.Program == rpc.ProgramRemote && p.Procedure == rpc.ProcAuthList {
				authenticated = true
				rpc.WritePacket(c, &rpc.Packet{Header: p.Reply(rpc.OK), Payload: (&rpc.AuthListRet{rpc.AuthNone}).Append(nil)})
				continue
			}
			if !authenticated {
				rpc.WritePacket(c, &rpc.Packet{Header: p.Reply(rpc.Failed), Payload: errMustAuthenticate.Append(nil)})
				continue
			}
			f.mu.Lock()
			f.got = append(f.got, p)
			f.mu.Unlock()
			if a := f.answer(c, p); a != nil && rpc.WritePacket(c, a) != nil {
				return
			}
		}
	})
	return f
}

// accept has every connection to the socket served until the test ends. The driver is
// to be started after it: its connections are to be gone by then.
func accept(t *testing.T, path string, serve func(net.Conn)) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { serve(c) })
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
}

func (f *fakeLibvirtd) packets() []*rpc.Packet {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]*rpc.Packet(nil), f.got...)
}

func dial(t *testing.T, path string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(20 * time.Second))
	t.Cleanup(func() { c.Close() })
	return c
}

func client(t *testing.T, path string) *rpc.Client {
	t.Helper()
	c := rpc.NewClient(dial(t, path))
	t.Cleanup(func() { c.Close() })
	return c
}

func remote(c *rpc.Client, proc rpc.Procedure, payload []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return c.Call(ctx, rpc.ProgramRemote, 1, proc, payload)
}

func wantError(t *testing.T, err error, code rpc.Code, parts ...string) {
	t.Helper()
	var e *rpc.Error
	if !errors.As(err, &e) {
		t.Errorf("got %v, want an error of libvirt's", err)
		return
	}
	if e.Code != code {
		t.Errorf("code %d, want %d: %v", e.Code, code, e)
	}
	for _, p := range parts {
		if !strings.Contains(e.Message, p) {
			t.Errorf("%q does not say %q", e.Message, p)
		}
	}
	if strings.Contains(e.Message, "\n") {
		t.Errorf("%q is more than a line", e.Message)
	}
}

// eventually waits for what another goroutine brings about.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if f() {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}
