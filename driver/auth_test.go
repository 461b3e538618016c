package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
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

	"github.com/godbus/dbus/v5"

	"kemari/driver/drivertest"
	"kemari/driver/rpc"
	"kemari/migrate/migratetest"
)

// fakeAuthority answers as verdict says, which may block.
type fakeAuthority struct {
	absent  bool
	verdict func(ctx context.Context, s Subject, action string) error
}

func (f *fakeAuthority) Present(context.Context) bool { return !f.absent }
func (f *fakeAuthority) Check(ctx context.Context, s Subject, action string) error {
	return f.verdict(ctx, s, action)
}

const someUser = 70000 // nobody is

func TestDecide(t *testing.T) {
	const libvirtGroup = 12345
	me := uint32(os.Geteuid())
	present, absent := &fakeAuthority{}, &fakeAuthority{absent: true}
	for _, c := range []struct {
		name      string
		authority Authority
		require   bool
		cred      *peerCred
		rw, ro    access
	}{
		{"root", present, true, &peerCred{uid: 0}, granted, granted},
		{"the driver's own user", present, false, &peerCred{uid: me}, granted, granted},
		{"a user, polkit", present, false, &peerCred{uid: someUser}, mustAuthenticate, mustAuthenticate},
		{"a member, polkit", present, false, &peerCred{uid: someUser, gid: libvirtGroup}, mustAuthenticate, mustAuthenticate},
		{"a user, no polkit", absent, false, &peerCred{uid: someUser, gid: someUser}, denied, granted},
		{"a member, no polkit", absent, false, &peerCred{uid: someUser, gid: libvirtGroup}, granted, granted},
		{"a member by a supplementary group", absent, false, &peerCred{uid: someUser, groups: []uint32{7, libvirtGroup}}, granted, granted},
		{"a member, polkit required", absent, true, &peerCred{uid: someUser, gid: libvirtGroup}, mustAuthenticate, mustAuthenticate},
		{"a user, no authority", nil, false, &peerCred{uid: someUser}, denied, granted},
		{"a member, no authority", nil, false, &peerCred{uid: someUser, gid: libvirtGroup}, granted, granted},
		{"nobody knows who", absent, false, nil, denied, denied},
	} {
		d, err := New(Config{Units: &fakeUnits{}, Authority: c.authority, RequireAuthority: c.require})
		if err != nil {
			t.Fatal(err)
		}
		d.lookupGroup = func(string) (uint32, error) { return libvirtGroup, nil }
		for ro, want := range map[bool]access{false: c.rw, true: c.ro} {
			got, err := d.decide(context.Background(), c.cred, ro)
			if got != want || (got == denied) != (err != nil) {
				t.Errorf("%s, ro %v: %v, %v, want %v", c.name, ro, got, err, want)
			}
		}
		d.lookupGroup = func(string) (uint32, error) { return 0, errors.New("no such group") }
		if got, _ := d.decide(context.Background(), c.cred, false); got == granted && c.cred.uid != 0 && c.cred.uid != me {
			t.Errorf("%s: granted without the group", c.name)
		}
	}
}

// asUser makes the driver take all its clients for that user's.
func (h *testHost) asUser(c peerCred, a Authority) {
	h.d.readPeerCred = func(net.Conn) (*peerCred, error) { return &c, nil }
	h.d.cfg.Authority = a
}

func authTypes(t *testing.T, c *rpc.Client) rpc.AuthListRet {
	t.Helper()
	b, err := remote(c, rpc.ProcAuthList, nil)
	if err != nil {
		t.Fatal(err)
	}
	ret, err := rpc.DecodeAuthListRet(b)
	if err != nil {
		t.Fatal(err)
	}
	return *ret
}

func TestAuthenticate(t *testing.T) {
	up := newLibvirtd(t, nil)
	h := newHost(t, "xen1", up.path)
	var mu sync.Mutex
	asked := map[string]Subject{}
	refuse := true
	h.asUser(peerCred{pid: 4711, uid: someUser, gid: 7, start: 99}, &fakeAuthority{verdict: func(_ context.Context, s Subject, action string) error {
		mu.Lock()
		defer mu.Unlock()
		asked[action] = s
		if refuse {
			return authFailed("access denied by policy")
		}
		return nil
	}})
	others := func(c *rpc.Client) {
		t.Helper()
		for _, p := range []struct {
			rpc.Program
			rpc.Procedure
		}{{rpc.ProgramRemote, rpc.ProcConnectOpen}, {rpc.ProgramRemote, 12}, {rpc.ProgramRemote, 9999}, {rpc.ProgramQEMU, 1}, {rpc.ProgramKemari, procCheck}} {
			_, err := c.Call(context.Background(), p.Program, 1, p.Procedure, open(nil, 0))
			wantError(t, err, rpc.CodeRPC, "authentication required")
		}
	}
	for path, action := range map[string]string{h.rw: actionManage, h.ro: actionMonitor} {
		refuse = true
		c := client(t, path)
		others(c)
		if got := authTypes(t, c); !slices.Equal(got, rpc.AuthListRet{rpc.AuthPolkit}) {
			t.Errorf("%v", got)
		}
		_, err := remote(c, rpc.ProcAuthSASLInit, nil)
		wantError(t, err, rpc.CodeAuthFailed, "SASL")
		_, err = remote(c, rpc.ProcAuthPolkit, nil)
		wantError(t, err, rpc.CodeAuthFailed, "authentication failed: access denied by policy")
		others(c)
		if n := len(up.packets()); n != 0 {
			t.Fatalf("libvirtd saw %d packets", n)
		}
		mu.Lock()
		if s := asked[action]; s != (Subject{PID: 4711, Start: 99, UID: someUser}) {
			t.Errorf("%s was asked of %+v", action, asked)
		}
		refuse = false
		mu.Unlock()
		// The same connection may try again.
		b, err := remote(c, rpc.ProcAuthPolkit, nil)
		if ret, e := rpc.DecodeInt(b); err != nil || e != nil || *ret != 1 {
			t.Errorf("%v, %v", ret, err)
		}
		if got := authTypes(t, c); !slices.Equal(got, rpc.AuthListRet{rpc.AuthNone}) {
			t.Errorf("%v", got)
		}
		// Libvirtd is told who the client is, before anything else.
		_, err = remote(c, 4, nil)
		wantError(t, err, rpc.CodeInternal, "connection not open")
		if _, err := remote(c, rpc.ProcConnectOpen, open(nil, 0)); err != nil {
			t.Error(err)
		}
		if _, err := remote(c, 4, nil); err != nil {
			t.Error(err)
		}
		got := up.packets()
		if len(got) != 3 || got[0].Procedure != rpc.ProcConnectOpen || got[1].Procedure != rpc.ProcConnectSetIdentity || got[2].Procedure != 4 {
			t.Fatalf("libvirtd saw %+v", got)
		}
		id, err := rpc.DecodeSetIdentityArgs(got[1].Payload)
		if err != nil {
			t.Fatal(err)
		}
		numbers := map[string]uint64{}
		for _, p := range id.Params {
			numbers[p.Field] = p.Number
		}
		if want := map[string]uint64{"unix-user-id": someUser, "unix-group-id": 7, "process-id": 4711, "process-time": 99}; !maps.Equal(numbers, want) {
			t.Errorf("identity %v, want %v", numbers, want)
		}
		up.mu.Lock()
		up.got = nil
		up.mu.Unlock()
	}
}

// TestOpenAsFails: without its client's identity no connection is opened.
func TestOpenAsFails(t *testing.T) {
	noIdentity := func(p *rpc.Packet) *rpc.Packet {
		return rpc.ErrorReply(p.Header, &rpc.Error{Code: rpc.CodeOperationDenied, From: rpc.FromRPC, Message: "access denied"})
	}
	for name, c := range map[string]struct {
		answer func(c net.Conn, p *rpc.Packet) *rpc.Packet
		code   rpc.Code
		text   string
	}{
		"denied":      {func(_ net.Conn, p *rpc.Packet) *rpc.Packet { return noIdentity(p) }, rpc.CodeOperationDenied, "access denied"},
		"hangs up":    {func(c net.Conn, _ *rpc.Packet) *rpc.Packet { c.Close(); return nil }, rpc.CodeRPC, "while it was being opened"},
		"no reply":    {func(_ net.Conn, p *rpc.Packet) *rpc.Packet { return p }, rpc.CodeRPC, "while it was being opened"},
		"a bad error": {func(_ net.Conn, p *rpc.Packet) *rpc.Packet { return &rpc.Packet{Header: p.Reply(rpc.Failed)} }, rpc.CodeRPC, "malformed"},
	} {
		t.Run(name, func(t *testing.T) {
			up := newLibvirtd(t, func(conn net.Conn, p *rpc.Packet) *rpc.Packet {
				if p.Procedure == rpc.ProcConnectSetIdentity {
					return c.answer(conn, p)
				}
				return &rpc.Packet{Header: p.Reply(rpc.OK)}
			})
			h := newHost(t, "xen1", up.path)
			h.asUser(peerCred{pid: 1, uid: someUser, start: 1}, &fakeAuthority{verdict: func(context.Context, Subject, string) error { return nil }})
			cl := client(t, h.rw)
			if _, err := remote(cl, rpc.ProcAuthPolkit, nil); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				_, err := remote(cl, rpc.ProcConnectOpen, open(nil, 0))
				wantError(t, err, c.code, c.text)
				_, err = remote(cl, 12, nil)
				wantError(t, err, rpc.CodeInternal, "connection not open")
			}
		})
	}
}

// TestAuthenticateWaits: while a user types a password the connection lives, lets
// nothing through, and takes the question back when the client goes.
func TestAuthenticateWaits(t *testing.T) {
	h := newHost(t, "xen1", newLibvirtd(t, nil).path)
	began, ended := make(chan struct{}, 1), make(chan error, 1)
	h.asUser(peerCred{pid: 1, uid: someUser, start: 1}, &fakeAuthority{verdict: func(ctx context.Context, _ Subject, _ string) error {
		began <- struct{}{}
		<-ctx.Done()
		ended <- context.Cause(ctx)
		return context.Cause(ctx)
	}})
	c := client(t, h.rw)
	go remote(c, rpc.ProcAuthPolkit, nil)
	<-began
	_, err := remote(c, rpc.ProcAuthPolkit, nil)
	wantError(t, err, rpc.CodeAuthFailed, "begun already")
	_, err = remote(c, rpc.ProcConnectOpen, open(nil, 0))
	wantError(t, err, rpc.CodeRPC, "authentication required")
	c.Close()
	select {
	case err := <-ended:
		if !errors.Is(err, errClientGone) {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the question is still asked")
	}
}

func TestAuthenticateRefusals(t *testing.T) {
	h := newHost(t, "xen1", newLibvirtd(t, nil).path)
	never := &fakeAuthority{verdict: func(context.Context, Subject, string) error { t.Error("asked"); return nil }}
	h.asUser(peerCred{pid: 1, uid: someUser}, never)
	_, err := remote(client(t, h.rw), rpc.ProcAuthPolkit, nil)
	wantError(t, err, rpc.CodeAuthFailed, "process 1 has ended")

	never.absent = true
	for _, proc := range []rpc.Procedure{rpc.ProcAuthList, rpc.ProcAuthPolkit, rpc.ProcConnectOpen} {
		_, err = remote(client(t, h.rw), proc, nil)
		wantError(t, err, rpc.CodeAuthFailed, "not a member of the group libvirt")
	}
	if got := authTypes(t, client(t, h.ro)); !slices.Equal(got, rpc.AuthListRet{rpc.AuthNone}) {
		t.Errorf("reader: %v", got)
	}
	// A number that is nobody's any more is nobody.
	h.d.readPeerCred = func(net.Conn) (*peerCred, error) { return nil, errNoCred }
	if _, err := remote(client(t, h.rw), rpc.ProcAuthList, nil); err == nil {
		t.Error("a client that the kernel does not know is answered")
	}
}

// TestReadOnlySocket sends every procedure as a reader, and wants libvirtd to see
// those only that change nothing.
func TestReadOnlySocket(t *testing.T) {
	up := newLibvirtd(t, nil)
	h := newHost(t, "xen1", up.path)
	asReader := client(t, h.rw)
	if _, err := remote(asReader, rpc.ProcConnectOpen, open(nil, rpc.ConnectRO)); err != nil {
		t.Fatal(err)
	}
	// A later call cannot take it back.
	if _, err := remote(asReader, rpc.ProcConnectOpen, open(nil, 0)); err != nil {
		t.Fatal(err)
	}
	args := append((&rpc.AbortJobArgs{Domain: rpc.Domain{Name: "g1"}}).Append(nil), make([]byte, 8)...)
	for name, c := range map[string]*rpc.Client{"socket": client(t, h.ro), "flag": asReader} {
		up.mu.Lock()
		up.got = nil
		up.mu.Unlock()
		passed := 0
		for n := rpc.Procedure(1); n < 500; n++ {
			switch n {
			case rpc.ProcConnectOpen, rpc.ProcConnectGetURI, rpc.ProcConnectSupportsFeature, rpc.ProcAuthList, rpc.ProcAuthPolkit:
				continue // answered here, and tested elsewhere
			}
			may := rpc.ReadOnly(&rpc.Packet{Header: rpc.Header{Program: rpc.ProgramRemote, Version: 1, Procedure: n}, Payload: args})
			_, err := remote(c, n, args)
			var e *rpc.Error
			switch {
			case may && err == nil:
				passed++
			case !may && errors.As(err, &e) && (e.Code == rpc.CodeOperationDenied || e.Code == rpc.CodeAuthFailed):
			default:
				t.Errorf("%s: procedure %d: %v", name, n, err)
			}
		}
		got := up.packets()
		if len(got) != passed || passed < 150 {
			t.Errorf("%s: libvirtd saw %d packets, %d were let through", name, len(got), passed)
		}
		for _, p := range got {
			if !rpc.ReadOnly(p) {
				t.Errorf("%s: libvirtd saw %s", name, rpc.CallName(p))
			}
		}
	}
	// Secrets are not for readers.
	secret := (&rpc.DomainFlagsArgs{Domain: rpc.Domain{Name: "g1"}, Flags: 1}).Append(nil)
	_, err := remote(client(t, h.ro), 14, secret)
	wantError(t, err, rpc.CodeOperationDenied, "read only access prevents virDomainGetXMLDesc")
	// What is no call is not answered, and goes nowhere.
	before := len(up.packets())
	c := dial(t, h.ro)
	for _, typ := range []rpc.Type{rpc.Stream, rpc.StreamHole, rpc.Message, rpc.Reply} {
		rpc.WritePacket(c, &rpc.Packet{Header: rpc.Header{Program: rpc.ProgramRemote, Version: 1, Procedure: 208, Type: typ}})
	}
	rpc.WritePacket(c, rpc.Keepalive(rpc.KeepalivePing))
	if p, err := rpc.ReadPacket(c); err != nil || p.Program != rpc.ProgramKeepalive {
		t.Errorf("%+v, %v", p, err)
	}
	if n := len(up.packets()); n != before {
		t.Errorf("libvirtd saw %d packets of a stream", n-before)
	}
}

func TestPlaces(t *testing.T) {
	d, err := New(Config{Units: &fakeUnits{}, MaxClients: 8})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if !d.enter(someUser) {
			t.Error("no place for a user")
		}
	}
	if d.enter(someUser) {
		t.Error("a user got more than a quarter")
	}
	if !d.enter(someUser + 1) {
		t.Error("no place for another user")
	}
	for range 5 {
		if !d.enter(0) {
			t.Error("no place for root")
		}
	}
	if d.enter(0) || d.enter(someUser+2) {
		t.Error("a ninth place")
	}
	for range 2 {
		d.leave(someUser)
	}
	d.leave(someUser + 1)
	for range 5 {
		d.leave(0)
	}
	if d.clients != 0 || len(d.users) != 0 {
		t.Errorf("%d, %v are left", d.clients, d.users)
	}
}

func TestPeerCred(t *testing.T) {
	dir := shortDir(t)
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dial(t, filepath.Join(dir, "s"))
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	got, err := readPeerCred(c)
	if err != nil {
		t.Fatal(err)
	}
	groups, err := os.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	if int(got.pid) != os.Getpid() || int(got.uid) != os.Getuid() || int(got.gid) != os.Getgid() || got.start == 0 || len(got.groups) != len(groups) {
		t.Errorf("%+v, want groups %v", got, groups)
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if _, err := readPeerCred(a); !errors.Is(err, errNoCred) {
		t.Error(err)
	}
	tail := " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20\n"
	for line, want := range map[string]uint64{
		"7 (virsh)" + tail: 4242, "7 (a) b (c))" + tail: 4242, "7 (x" + tail: 0, "": 0, "7 (x) S 1 2": 0,
		"7 (x)" + strings.Replace(tail, "4242", "-1", 1): 0,
	} {
		if got := parseStart([]byte(line)); got != want {
			t.Errorf("%q: %d", line, got)
		}
	}
}

func FuzzParseStart(f *testing.F) {
	f.Add([]byte("7 (virsh) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20\n"))
	f.Fuzz(func(_ *testing.T, b []byte) { parseStart(b) })
}

// fakePolkit is what CheckAuthorization calls on a private bus.
type fakePolkit struct {
	mu       sync.Mutex
	asked    []string
	question string
	canceled chan string   // holds the question
	over     chan struct{} // closed then
}

type polkitSubject struct {
	Kind    string
	Details map[string]dbus.Variant
}

type polkitResult struct {
	Authorized, Challenge bool
	Details               map[string]string
}

func (f *fakePolkit) CheckAuthorization(s polkitSubject, action string, details map[string]string, flags uint32, question string) (polkitResult, *dbus.Error) {
	f.mu.Lock()
	f.asked = append(f.asked, fmt.Sprintf("%s pid=%v start=%v uid=%v action=%s flags=%d", s.Kind,
		s.Details["pid"].Value(), s.Details["start-time"].Value(), s.Details["uid"].Value(), action, flags))
	f.question = question
	f.mu.Unlock()
	switch action {
	case "yes", "org.libvirt.api.connect.write":
		return polkitResult{Authorized: true}, nil
	case "challenge":
		return polkitResult{Challenge: true}, nil
	case "dismissed":
		return polkitResult{Challenge: true, Details: map[string]string{"polkit.dismissed": "true"}}, nil
	case "error":
		return polkitResult{}, dbus.MakeFailedError(errors.New("action is not registered"))
	case "forever":
		<-f.over
	}
	return polkitResult{}, nil
}

func (f *fakePolkit) CancelCheckAuthorization(question string) *dbus.Error {
	f.canceled <- question
	close(f.over)
	return nil
}

// privateBus starts a message bus and makes it the system's.
func privateBus(t *testing.T) string {
	t.Helper()
	migratetest.Need(t, "dbus", func() error { _, err := exec.LookPath("dbus-daemon"); return err })
	dir := shortDir(t)
	if err := os.Chmod(dir, 0o755); err != nil { // libvirtd runs as another user
		t.Fatal(err)
	}
	socket, conf := filepath.Join(dir, "bus"), filepath.Join(dir, "conf")
	err := os.WriteFile(conf, []byte(`<busconfig><listen>unix:path=`+socket+`</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>`), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("dbus-daemon", "--nofork", "--config-file="+conf)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	eventually(t, "the bus listens", func() bool {
		c, err := net.Dial("unix", socket)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path="+socket)
	return socket
}

// startPolkit puts one on the bus.
func startPolkit(t *testing.T) *fakePolkit {
	t.Helper()
	bus, err := dbus.ConnectSystemBus()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { bus.Close() })
	f := &fakePolkit{canceled: make(chan string, 1), over: make(chan struct{})}
	if err := bus.Export(f, polkitPath, polkitIface); err != nil {
		t.Fatal(err)
	}
	if _, err := bus.RequestName(polkitName, 0); err != nil {
		t.Fatal(err)
	}
	return f
}

// TestAccessRules has a libvirtd whose own access rules are in force. They must
// meet the client, as they do without us, and not root.
func TestAccessRules(t *testing.T) {
	privateBus(t)
	f := startPolkit(t)
	l := drivertest.StartLibvirtd(t, `access_drivers = [ "polkit" ]`)
	h := newHost(t, "xen1", l.Socket)
	h.asUser(peerCred{pid: 4711, uid: someUser, gid: someUser, start: 99},
		&fakeAuthority{verdict: func(context.Context, Subject, string) error { return nil }})
	c := client(t, h.rw)
	if _, err := remote(c, rpc.ProcAuthPolkit, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := remote(c, rpc.ProcConnectOpen, open(nil, 0)); err != nil {
		t.Fatal(err)
	}
	// The test driver has no access rules, so all there is to ask for is what
	// libvirtd itself checks: that one may speak for another.
	if _, err := remote(c, rpc.ProcConnectSetIdentity, (&rpc.SetIdentityArgs{}).Append(nil)); err != nil {
		t.Fatal(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	want := []string{
		fmt.Sprintf("unix-process pid=%d start=%d uid=%d action=org.libvirt.api.connect.write flags=0", os.Getpid(), processStart(int32(os.Getpid())), os.Getuid()),
		"unix-process pid=4711 start=99 uid=70000 action=org.libvirt.api.connect.write flags=0",
	}
	if !slices.Equal(f.asked, want) {
		t.Errorf("polkit was asked %q, want %q", f.asked, want)
	}
}

func TestPolkit(t *testing.T) {
	ctx := context.Background()
	t.Run("no bus", func(t *testing.T) {
		t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path="+filepath.Join(t.TempDir(), "none"))
		p := new(Polkit)
		defer p.Close()
		if p.Present(ctx) {
			t.Error("present")
		}
		wantError(t, p.Check(ctx, Subject{}, "yes"), rpc.CodeAuthFailed, "polkit cannot be asked")
	})
	t.Run("a bus that is silent", func(t *testing.T) {
		path := filepath.Join(shortDir(t), "s")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path="+path)
		p := &Polkit{timeout: 50 * time.Millisecond}
		defer p.Close()
		if !p.Present(ctx) {
			t.Error("a failure opens a way around polkit")
		}
		wantError(t, p.Check(ctx, Subject{}, "yes"), rpc.CodeAuthFailed, "polkit cannot be asked")
	})
	t.Run("a bus that hangs up", func(t *testing.T) {
		path := filepath.Join(shortDir(t), "s")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		l.Close()
		t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path="+path)
		p := new(Polkit)
		defer p.Close()
		if !p.Present(ctx) {
			t.Error("a failure opens a way around polkit")
		}
	})
	privateBus(t)
	p := new(Polkit)
	defer p.Close()
	if p.Present(ctx) {
		t.Error("present on an empty bus")
	}
	wantError(t, p.Check(ctx, Subject{}, "yes"), rpc.CodeAuthFailed, "polkit does not answer")
	f := startPolkit(t)
	if !p.Present(ctx) {
		t.Error("not present")
	}
	s := Subject{PID: 4711, Start: 1 << 40, UID: 1000}
	if err := p.Check(ctx, s, "yes"); err != nil {
		t.Error(err)
	}
	if want := "unix-process pid=4711 start=1099511627776 uid=1000 action=yes flags=1"; !slices.Equal(f.asked, []string{want}) {
		t.Errorf("asked %q, want %q", f.asked, want)
	}
	for action, want := range map[string]struct {
		code rpc.Code
		text string
	}{
		"no":        {rpc.CodeAuthFailed, "access denied by policy"},
		"challenge": {rpc.CodeAuthUnavailable, "no polkit agent available to authenticate action 'challenge'"},
		"dismissed": {rpc.CodeAuthCancelled, "user cancelled"},
		"error":     {rpc.CodeAuthFailed, "not registered"},
	} {
		wantError(t, p.Check(ctx, s, action), want.code, want.text)
	}
	// Who goes takes the question back.
	ctx, cancel := context.WithCancelCause(ctx)
	time.AfterFunc(50*time.Millisecond, func() { cancel(errClientGone) })
	if err := p.Check(ctx, s, "forever"); !errors.Is(err, errClientGone) {
		t.Error(err)
	}
	if q := <-f.canceled; q != f.question {
		t.Errorf("question %q taken back, %q asked", q, f.question)
	}
}

// TestOtherUser has a real client of another user, with and without the group.
func TestOtherUser(t *testing.T) {
	migratetest.Need(t, "root", func() error {
		if os.Getuid() != 0 {
			return errors.New("only root can be another user")
		}
		return nil
	})
	upstream := stockLibvirtd(t)
	h := newHost(t, "xen1", upstream)
	const group = 54321
	h.d.lookupGroup = func(string) (uint32, error) { return group, nil }
	for _, path := range []string{h.rw, h.ro} {
		if err := os.Chmod(path, 0o666); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Dir(h.rw), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		socket string
		groups []uint32
		args   []string
		want   string
		fails  bool
	}{
		{h.rw, nil, []string{"list"}, "authentication failed: there is no polkit to ask, and user 65534 is not a member of the group libvirt", true},
		{h.rw, []uint32{1, group}, []string{"suspend", "test"}, "suspended", false},
		{h.ro, nil, []string{"list"}, "test   running", false},
		{h.ro, []uint32{group}, []string{"suspend", "test"}, "read only access prevents virDomainSuspend", true},
	} {
		cmd := exec.Command("virsh", append([]string{"-c", uri + "?socket=" + c.socket}, c.args...)...)
		cmd.Env = append(os.Environ(), "LC_ALL=C", "HOME=/nonexistent", "XDG_CACHE_HOME=/nonexistent")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534, Groups: c.groups}}
		out, err := cmd.CombinedOutput()
		if (err != nil) != c.fails || !strings.Contains(string(out), c.want) {
			t.Errorf("%s %v: %v\n%s", c.socket, c.args, err, out)
		}
	}
}
