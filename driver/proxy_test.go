package driver

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kemari/driver/rpc"
	"kemari/migrate/control"
)

func open(name *string, flags uint32) []byte {
	return (&rpc.ConnectOpenArgs{Name: name, Flags: flags}).Append(nil)
}

func TestOpen(t *testing.T) {
	up := newLibvirtd(t, nil)
	h := newHost(t, "xen1", up.path)
	rw, ro := client(t, h.rw), client(t, h.ro)
	for _, name := range []*string{
		nil, ptr(""), ptr("kemari:///system"), ptr("kemari+ssh://root@xen1/system"), ptr("kemari:///system?socket=/x"),
		ptr("xenkemari:///system"), ptr("xenkemari+ssh://root@xen1/system?no_tty=1"),
	} {
		b, err := remote(rw, rpc.ProcConnectOpen, open(name, 0))
		if want := open(ptr("test:///default"), 0); err != nil || !bytes.Equal(b, want) {
			t.Errorf("libvirtd was asked %q, %v", b, err)
		}
		wantURI := uri
		if name != nil && strings.HasPrefix(*name, "xenkemari") {
			wantURI = uriXen
		}
		b, err = remote(rw, rpc.ProcConnectGetURI, nil)
		if ret, e := rpc.DecodeConnectGetURIRet(b); err != nil || e != nil || ret.URI != wantURI {
			t.Errorf("%v: %v, %v", name, err, e)
		}
	}
	if b, err := remote(ro, rpc.ProcConnectOpen, open(nil, 0)); err != nil || !bytes.Equal(b, open(ptr("test:///default"), rpc.ConnectRO)) {
		t.Errorf("read-only: libvirtd was asked %q, %v", b, err)
	}
	for name, why := range map[string]string{
		"kemari:///session": "path is not /system",
		"kemari:///":        "path is not /system",
		"xen:///system":     "scheme is not kemari",
		"kemarix:///system": "scheme is not kemari",
		"+ssh://x/system":   "not a URI",
		"kemari:///sys%zz":  "not a URI",
	} {
		_, err := remote(rw, rpc.ProcConnectOpen, open(&name, 0))
		wantError(t, err, rpc.CodeInvalidArg, why, "use kemari:///system")
	}
	_, err := remote(rw, rpc.ProcConnectOpen, []byte{0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff})
	wantError(t, err, rpc.CodeRPC, "malformed")
}

func TestAnsweredHere(t *testing.T) {
	up := newLibvirtd(t, nil)
	h := newHost(t, "xen1", up.path)
	for _, path := range []string{h.rw, h.ro} {
		c := client(t, path)
		b, err := remote(c, rpc.ProcConnectGetURI, nil)
		if ret, e := rpc.DecodeConnectGetURIRet(b); err != nil || e != nil || ret.URI != uri {
			t.Errorf("URI: %v, %v, %v", ret, err, e)
		}
		for feature, want := range map[rpc.Int]rpc.Int{rpc.FeatureFDPassing: 0, rpc.FeatureProgramKeepalive: 1, 13: 13 /* the echo */} {
			b, err := remote(c, rpc.ProcConnectSupportsFeature, feature.Append(nil))
			if got, e := rpc.DecodeInt(b); err != nil || e != nil || *got != want {
				t.Errorf("feature %d: %v, %v, %v", feature, got, err, e)
			}
		}
		_, err = remote(c, rpc.ProcDomainOpenGraphicsFD, nil)
		if path == h.ro {
			wantError(t, err, rpc.CodeOperationDenied, "read only access prevents virDomainOpenGraphicsFD")
			_, err = c.Call(context.Background(), rpc.ProgramLXC, 1, 1, nil)
			wantError(t, err, rpc.CodeOperationDenied, "read only access prevents procedure 1 of lxc")
		} else {
			wantError(t, err, rpc.CodeUnsupported, "file descriptors")
		}
		_, err = c.Call(context.Background(), 0x12345678, 3, 1, nil)
		wantError(t, err, rpc.CodeRPC, "Cannot find program 305419896 version 3")
	}
	_, err := client(t, h.ro).Call(context.Background(), rpc.ProgramKemari, 1, procCheck, nil)
	wantError(t, err, rpc.CodeRPC, "Cannot find program")
	_, err = client(t, h.rw).Call(context.Background(), rpc.ProgramKemari, 2, procCheck, nil)
	wantError(t, err, rpc.CodeRPC, "version 2")
	_, err = client(t, h.rw).Call(context.Background(), rpc.ProgramKemari, 1, 99, nil)
	wantError(t, err, rpc.CodeRPC, "unknown procedure")
	if n := len(up.packets()); n != 2 {
		t.Errorf("libvirtd saw %d packets", n)
	}
}

// TestTransparent sends every kind of frame both ways and wants each back as it
// was, in order.
func TestTransparent(t *testing.T) {
	up := newLibvirtd(t, func(c net.Conn, p *rpc.Packet) *rpc.Packet { return p })
	h := newHost(t, "xen1", up.path)
	c := dial(t, h.rw)
	var sent []*rpc.Packet
	for i, n := range []int{0, 4, 1 << 10, 300 << 10, 4 << 20} {
		for _, typ := range []rpc.Type{rpc.Call, rpc.Stream, rpc.StreamHole, rpc.Message} {
			for _, prog := range []rpc.Program{rpc.ProgramRemote, rpc.ProgramQEMU, rpc.ProgramLXC} {
				sent = append(sent, &rpc.Packet{
					Header:  rpc.Header{Program: prog, Version: 1, Procedure: 201, Type: typ, Serial: rpc.Serial(i), Status: rpc.Continue},
					Payload: bytes.Repeat([]byte{byte(i)}, n),
				})
			}
		}
	}
	go func() {
		for _, p := range sent {
			rpc.WritePacket(c, p)
		}
	}()
	for _, want := range sent {
		got, err := rpc.ReadPacket(c)
		if err != nil || got.Header != want.Header || !bytes.Equal(got.Payload, want.Payload) {
			t.Fatalf("got %+v, %v, want %+v", got, err, want.Header)
		}
	}
}

func TestKeepalive(t *testing.T) {
	pong := make(chan rpc.Procedure, 1)
	up := newLibvirtd(t, func(c net.Conn, p *rpc.Packet) *rpc.Packet {
		if p.Program == rpc.ProgramKeepalive {
			pong <- p.Procedure
			return nil
		}
		return rpc.Keepalive(rpc.KeepalivePing)
	})
	h := newHost(t, "xen1", up.path)
	c := dial(t, h.rw)
	// Ours first: nobody asks libvirtd for it.
	if err := rpc.WritePacket(c, rpc.Keepalive(rpc.KeepalivePing)); err != nil {
		t.Fatal(err)
	}
	if p, err := rpc.ReadPacket(c); err != nil || p.Header != rpc.Keepalive(rpc.KeepalivePong).Header {
		t.Fatalf("%+v, %v", p, err)
	}
	rpc.WritePacket(c, &rpc.Packet{Header: rpc.Header{Program: rpc.ProgramRemote, Version: 1, Procedure: 4}})
	select {
	case p := <-pong:
		if p != rpc.KeepalivePong {
			t.Errorf("procedure %d", p)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("libvirtd's ping was not answered")
	}
}

func TestUpstreamFails(t *testing.T) {
	t.Run("not there", func(t *testing.T) {
		h := newHost(t, "xen1", filepath.Join(t.TempDir(), "none"))
		_, err := remote(client(t, h.rw), 4, nil)
		wantError(t, err, rpc.CodeNoConnect, "libvirtd cannot be reached", "systemctl")
	})
	for name, f := range map[string]func(c net.Conn, p *rpc.Packet) *rpc.Packet{
		"closes":      func(c net.Conn, p *rpc.Packet) *rpc.Packet { c.Close(); return nil },
		"mid-frame":   func(c net.Conn, p *rpc.Packet) *rpc.Packet { c.Write([]byte{0, 0, 1, 0, 9}); c.Close(); return nil },
		"huge length": func(c net.Conn, p *rpc.Packet) *rpc.Packet { c.Write(bytes.Repeat([]byte{0xff}, 64)); return nil },
		"descriptors": func(c net.Conn, p *rpc.Packet) *rpc.Packet {
			r := &rpc.Packet{Header: p.Reply(rpc.OK)}
			r.Type = rpc.ReplyWithFDs
			return r
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, "xen1", newLibvirtd(t, f).path)
			c := dial(t, h.rw)
			p := &rpc.Packet{Header: rpc.Header{Program: rpc.ProgramRemote, Version: 1, Procedure: 4, Serial: 77}}
			if err := rpc.WritePacket(c, p); err != nil {
				t.Fatal(err)
			}
			got, err := rpc.ReadPacket(c)
			if err != nil || got.Serial != 77 || got.Status != rpc.Failed {
				t.Fatalf("%+v, %v", got, err)
			}
			e, err := rpc.DecodeError(got.Payload)
			if err != nil {
				t.Fatal(err)
			}
			wantError(t, e, rpc.CodeRPC, "libvirtd has closed the connection", "; connect again once it runs")
			if _, err := rpc.ReadPacket(c); err != io.EOF {
				t.Errorf("then %v, want the end", err)
			}
		})
	}
}

func TestHostileClient(t *testing.T) {
	up := newLibvirtd(t, nil)
	h := newHost(t, "xen1", up.path)
	for name, b := range map[string][]byte{
		"huge length":  bytes.Repeat([]byte{0xff}, 64),
		"short length": binary.BigEndian.AppendUint32(nil, 3),
		"bad type":     append(binary.BigEndian.AppendUint32(nil, 28), bytes.Repeat([]byte{9}, 24)...),
	} {
		c := dial(t, h.rw)
		c.Write(b)
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Errorf("%s: answered", name)
		}
	}
	// Descriptors end the session too, but with a reason.
	c := dial(t, h.rw)
	rpc.WritePacket(c, &rpc.Packet{Header: rpc.Header{Program: rpc.ProgramRemote, Version: 1, Procedure: 309, Type: rpc.CallWithFDs}})
	if p, err := rpc.ReadPacket(c); err != nil || p.Status != rpc.Failed {
		t.Errorf("%+v, %v", p, err)
	}
	if _, err := rpc.ReadPacket(c); err != io.EOF {
		t.Error(err)
	}
	// Arguments that cannot be read go no further, wherever they are cut.
	args := (&rpc.MigratePerformArgs{Domain: rpc.Domain{Name: "g1"}, Flags: 1}).Append(nil)
	cl := client(t, h.rw)
	for n := range args {
		_, err := remote(cl, rpc.ProcDomainMigratePerform3Params, args[:n])
		wantError(t, err, rpc.CodeRPC, "malformed")
	}
	if n := len(up.packets()); n != 0 {
		t.Errorf("libvirtd saw %d packets", n)
	}
}

// TestSlowClient has one client that never reads; others must not notice.
func TestSlowClient(t *testing.T) {
	up := newLibvirtd(t, func(c net.Conn, p *rpc.Packet) *rpc.Packet {
		return &rpc.Packet{Header: p.Reply(rpc.OK), Payload: make([]byte, 1<<20)}
	})
	h := newHost(t, "xen1", up.path)
	slow := dial(t, h.rw)
	for i := range 4 {
		rpc.WritePacket(slow, &rpc.Packet{Header: rpc.Header{Program: rpc.ProgramRemote, Version: 1, Procedure: 4, Serial: rpc.Serial(i)}})
	}
	c := client(t, h.rw)
	for range 5 {
		if b, err := remote(c, 4, nil); err != nil || len(b) != 1<<20 {
			t.Fatal(err)
		}
	}
}

func TestTooManyClients(t *testing.T) {
	h := newHost(t, "xen1", newLibvirtd(t, nil).path)
	h.d.mu.Lock()
	h.d.clients = h.d.cfg.MaxClients
	h.d.mu.Unlock()
	if _, err := dial(t, h.rw).Read(make([]byte, 1)); err != io.EOF {
		t.Error(err)
	}
	h.d.mu.Lock()
	h.d.clients = 0
	h.d.mu.Unlock()
	if _, err := remote(client(t, h.rw), 4, nil); err != nil {
		t.Error(err)
	}
}

// protectedGuest makes h have a replicator for g1, as if one had been started.
func protectedGuest(t *testing.T, h *testHost, role control.Role, ph control.Phase) *process {
	t.Helper()
	paths := control.PathsFor(h.units.root, role, g1UUID)
	unit := unitName(unitReplicator, parseUUID(t, g1UUID))
	var cfg any = control.PrimaryConfig{Domain: "g1", UUID: g1UUID, Generation: 5, StandbyURI: "kemari+ssh://xen2/system"}
	if role == control.Standby {
		cfg = control.StandbyConfig{Domain: "g1", UUID: g1UUID, Generation: 5, PrimaryHost: "xen9"}
		unit = unitName(unitStandby, parseUUID(t, g1UUID))
	}
	if err := control.WriteConfig(paths, cfg); err != nil {
		t.Fatal(err)
	}
	if err := h.units.Start(context.Background(), unit); err != nil {
		t.Fatal(err)
	}
	p := h.units.running[unit]
	p.phase(ph)
	return p
}

func TestGuard(t *testing.T) {
	up := newLibvirtd(t, nil)
	h := newHost(t, "xen1", up.path)
	c := client(t, h.rw)
	dom := rpc.Domain{Name: "g1", UUID: parseUUID(t, g1UUID), ID: 7}
	plain := (&rpc.AbortJobArgs{Domain: dom}).Append(nil)
	payload := func(proc rpc.Procedure, g guardRule) []byte {
		switch {
		case g.snapshot:
			return append([]byte{0, 0, 0, 1, 's', 0, 0, 0}, plain...)
		case proc == rpc.ProcDomainMigratePerform3Params:
			return (&rpc.MigratePerformArgs{Domain: dom, Flags: 1}).Append(nil)
		case proc == rpc.ProcDomainMigrateBegin3Params:
			return (&rpc.MigrateBeginArgs{Domain: dom}).Append(nil)
		case proc == rpc.ProcDomainMigrateBegin3:
			return (&rpc.MigrateBegin3Args{Domain: dom}).Append(nil)
		}
		return append(bytes.Clone(plain), 1, 2, 3, 4) // arguments we do not know
	}
	all := func(f func(proc rpc.Procedure, g guardRule, err error)) {
		for proc, g := range guarded {
			_, err := remote(c, proc, payload(proc, g))
			f(proc, g, err)
		}
	}
	pass := func(proc rpc.Procedure, g guardRule, err error) {
		if err != nil {
			t.Errorf("procedure %d, not protected: %v", proc, err)
		}
	}
	all(pass)
	before := len(up.packets())
	p := protectedGuest(t, h, control.Primary, control.Copying)
	all(func(proc rpc.Procedure, g guardRule, err error) {
		wantError(t, err, rpc.CodeOperationInvalid, g.what+` guest "g1"`, g.harm, "end protection first with: virsh domjobabort g1")
	})
	if n := len(up.packets()); n != before {
		t.Errorf("libvirtd saw %d of the refused calls", n-before)
	}
	// Another guest, and what ends this one, are nobody's business.
	other := (&rpc.AbortJobArgs{Domain: rpc.Domain{Name: "g2"}}).Append(nil)
	if _, err := remote(c, rpc.ProcDomainSave, other); err != nil {
		t.Error(err)
	}
	for _, proc := range []rpc.Procedure{12 /* destroy */, 33 /* shutdown */, 34, 28, 27} {
		if _, err := remote(c, proc, plain); err != nil {
			t.Error(err)
		}
	}
	p.exit("")
	all(pass)
	_, err := remote(c, rpc.ProcDomainSave, []byte{0, 0, 0, 9})
	wantError(t, err, rpc.CodeRPC, "malformed")
}

// TestGuardSilentReplicator: one that does not answer may be at work.
func TestGuardSilentReplicator(t *testing.T) {
	h := newHost(t, "xen1", newLibvirtd(t, nil).path)
	paths := control.PathsFor(h.units.root, control.Primary, g1UUID)
	if err := os.MkdirAll(paths.Dir, 0o750); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", paths.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := client(t, h.rw)
	args := (&rpc.AbortJobArgs{Domain: rpc.Domain{Name: "g1", UUID: parseUUID(t, g1UUID)}}).Append(nil)
	done := make(chan error, 1)
	go func() {
		_, err := remote(c, rpc.ProcDomainSave, args)
		done <- err
	}()
	// Meanwhile the client's other calls go on.
	if _, err := remote(c, 4, nil); err != nil {
		t.Error(err)
	}
	select {
	case <-done:
		t.Error("answered at once")
	default:
	}
	wantError(t, <-done, rpc.CodeOperationInvalid, "while Kemari protects it")
}

func TestManagedMigration(t *testing.T) {
	h := newHost(t, "xen1", newLibvirtd(t, nil).path)
	c := client(t, h.rw)
	dom := rpc.Domain{Name: "g1", UUID: parseUUID(t, g1UUID), ID: 7}
	for proc, args := range map[rpc.Procedure][]byte{
		rpc.ProcDomainMigrateBegin3Params:   (&rpc.MigrateBeginArgs{Domain: dom, Flags: rpc.MigrateKemari}).Append(nil),
		rpc.ProcDomainMigrateBegin3:         (&rpc.MigrateBegin3Args{Domain: dom, Flags: rpc.MigrateKemari}).Append(nil),
		rpc.ProcDomainMigratePerform3Params: (&rpc.MigratePerformArgs{Domain: dom, Flags: rpc.MigrateKemari}).Append(nil),
	} {
		_, err := remote(c, proc, args)
		wantError(t, err, rpc.CodeArgumentUnsupp, "--p2p")
	}
	_, err := remote(client(t, h.ro), rpc.ProcDomainMigratePerform3Params, []byte("abcd"))
	wantError(t, err, rpc.CodeOperationDenied, "operation forbidden: read only access prevents virDomainMigratePerform3Params")
}

func TestAbortJob(t *testing.T) {
	up := newLibvirtd(t, nil)
	h := newHost(t, "xen1", up.path)
	c := client(t, h.rw)
	a := &rpc.AbortJobArgs{Domain: rpc.Domain{Name: "g1", UUID: parseUUID(t, g1UUID)}}
	if b, err := remote(c, rpc.ProcDomainAbortJob, a.Append(nil)); err != nil || len(b) == 0 {
		t.Errorf("a job of libvirtd's: %q, %v", b, err)
	}
	for _, role := range []control.Role{control.Primary, control.Standby} {
		p := protectedGuest(t, h, role, control.Copying)
		if b, err := remote(c, rpc.ProcDomainAbortJob, a.Append(nil)); err != nil || len(b) != 0 {
			t.Errorf("%s: %q, %v", role, b, err)
		}
		if p.status().Phase != control.Ended {
			t.Errorf("%s goes on", role)
		}
		<-p.served
	}
	a.HasFlags = true
	if b, err := remote(c, rpc.ProcDomainAbortJobFlags, a.Append(nil)); err != nil || len(b) == 0 {
		t.Errorf("with flags: %q, %v", b, err)
	}
}
