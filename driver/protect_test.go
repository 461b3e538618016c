package driver

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kemari/driver/rpc"
	"kemari/migrate/control"
)

// pair is two hosts, the first of which reaches the second.
func pair(t *testing.T) (a, b *testHost) { return pairOn(t, newLibvirtd(t, nil).path) }

func pairOn(t *testing.T, upstream string) (a, b *testHost) {
	b = newHost(t, "xen2", upstream)
	a = newHost(t, "xen1", upstream)
	a.dialTo(b)
	// A guest is protected when its standby is ready.
	a.units.scripts[control.Primary] = func(p *process) error {
		b.units.mu.Lock()
		defer b.units.mu.Unlock()
		for _, s := range b.units.running {
			s.phase(control.Ready)
		}
		p.phase(control.Protected)
		return nil
	}
	return a, b
}

func performArgs(t testing.TB) *rpc.MigratePerformArgs {
	return &rpc.MigratePerformArgs{
		Domain: rpc.Domain{Name: "g1", UUID: parseUUID(t, g1UUID), ID: 7},
		URI:    ptr("kemari+ssh://xen2/system"),
		Flags:  rpc.MigrateKemari | rpc.MigratePeer2Peer | rpc.MigrateLive,
	}
}

func protectCall(t *testing.T, h *testHost, a *rpc.MigratePerformArgs) error {
	t.Helper()
	b, err := remote(client(t, h.rw), rpc.ProcDomainMigratePerform3Params, a.Append(nil))
	if err == nil && string(b) != "\x00\x00\x00\x00" {
		t.Errorf("reply %q, want an empty cookie", b)
	}
	return err
}

func TestProtect(t *testing.T) {
	a, b := pair(t)
	args := performArgs(t)
	args.Params = []rpc.TypedParam{
		{Field: "migrate_uri", Type: rpc.ParamString, String: "tcp://10.0.0.2"},
		{Field: "bandwidth", Type: rpc.ParamULLong, Number: 5},
		{Field: "destination_xml", Type: rpc.ParamString, String: strings.Replace(g1XML, "<memory", `<metadata>
<kemari xmlns='urn:kemari:domain:1.0'><checkpoint trigger='interval' min='10' max='20' unit='ms' paused='40%'/>
<heartbeat interval='50' timeout='900' unit='ms'/><arbiter type='none' automatic='yes'/></kemari></metadata><memory`, 1)},
	}
	before := uint64(time.Now().UnixMilli())
	if err := protectCall(t, a, args); err != nil {
		t.Fatal(err)
	}
	pri := a.units.running["kemari-replicator@"+g1UUID+".service"]
	sby := b.units.running["kemari-standby@"+g1UUID+".service"]
	if pri == nil || sby == nil {
		t.Fatal("a process is missing")
	}
	p, s := pri.primary, sby.standby
	for what, ok := range map[string]bool{
		"generation": p.Generation >= before && p.Generation == s.Generation,
		"names":      p.Domain == "g1" && p.UUID == g1UUID && s.Domain == "g1" && s.UUID == g1UUID,
		"guest":      p.DomID == 7 && p.MemoryKiB == 131072 && s.MemoryKiB == 131072,
		"address":    p.StandbyAddr == "10.0.0.2:49300" && p.StandbyURI == "kemari+ssh://xen2/system",
		"checkpoint": p.Checkpoint == control.Checkpoint{Trigger: "interval", Min: 10 * time.Millisecond, Max: 20 * time.Millisecond, Paused: 40},
		"heartbeat":  p.Heartbeat == s.Heartbeat && p.Heartbeat == control.Heartbeat{Interval: 50 * time.Millisecond, Timeout: 900 * time.Millisecond},
		"arbiter":    p.Arbiter == s.Arbiter && p.Arbiter == control.Arbiter{Type: "none", Automatic: true},
		"primary":    s.PrimaryHost == "xen1",
		"vif script": strings.Contains(s.DomainXML, vifScript),
	} {
		if !ok {
			t.Errorf("%s: %+v\n%+v", what, p, s)
		}
	}
	pc, _ := p.Channel.Credential()
	sc, _ := s.Channel.Credential()
	if pc != s.Channel.Peer || sc != p.Channel.Peer || pc == sc || p.Channel.Transport != control.TransportTLS {
		t.Error("the credentials do not fit")
	}
	// The standby's copy stays when the connection has gone.
	time.Sleep(50 * time.Millisecond)
	if sby.status().Phase == control.Ended {
		t.Error("the shadow went with the connection")
	}
	// A second protection, and what is not safe, is refused.
	wantError(t, protectCall(t, a, args), rpc.CodeOperationInvalid, "standby kemari+ssh://xen2/system already", "domjobabort g1")
	wantError(t, protectCall(t, b, args), rpc.CodeOperationInvalid, "this host is its standby (ready)", "runs on xen1")
}

// An HVM guest's standby is asked for what the guest's own device model is, or for what
// its definition says.
func TestProtectHVM(t *testing.T) {
	for program, doc := range map[string]string{
		"/usr/libexec/qemu": hvmXML,
		"/opt/qemu":         strings.Replace(hvmXML, "<devices>", "<devices><emulator>/opt/qemu</emulator>", 1),
	} {
		a, b := pair(t)
		a.libvirt.guest.XML = doc
		if err := protectCall(t, a, performArgs(t)); err != nil {
			t.Error(err)
		}
		if !slices.Equal(b.asked, []string{program}) {
			t.Errorf("asked %q, want %s", b.asked, program)
		}
	}
}

// The version of a program that anybody could have put there is not asked for.
func TestProgramVersion(t *testing.T) {
	dir := t.TempDir()
	program := func(name, script string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o600), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	if v, err := programVersion(t.Context(), program("good", `[ "$*" = -version ] && echo "QEMU 1"; echo more`, 0o755)); (v != "QEMU 1" || err != nil) && os.Getuid() == 0 {
		t.Errorf("%q, %v", v, err)
	}
	for path, want := range map[string]string{
		program("writable", "echo QEMU 1", 0o777):                 "only root can change",
		program("silent", "", 0o755):                              "an answer of 0 bytes",
		program("broken", "echo it is broken >&2; exit 3", 0o755): "exit status 3, it is broken",
		dir:                     "only root can change",
		filepath.Join(dir, "x"): "no such file",
	} {
		if v, err := programVersion(t.Context(), path); v != "" || err == nil || !strings.Contains(err.Error(), want) && os.Getuid() == 0 {
			t.Errorf("%s: %q, %v", path, v, err)
		}
	}
}

// TestProtectRefused has all that stands in the way, each alone.
func TestProtectRefused(t *testing.T) {
	param := func(field, v string) func(*testHost, *testHost, *rpc.MigratePerformArgs) {
		return func(_, _ *testHost, args *rpc.MigratePerformArgs) {
			args.Params = append(args.Params, rpc.TypedParam{Field: field, Type: rpc.ParamString, String: v})
		}
	}
	for name, c := range map[string]struct {
		change func(a, b *testHost, args *rpc.MigratePerformArgs)
		code   rpc.Code
		say    []string
	}{
		"not running": {func(a, _ *testHost, _ *rpc.MigratePerformArgs) { a.libvirt.err = ErrNoGuest }, rpc.CodeOperationInvalid, []string{"not running", "virsh start g1"}},
		"paused": {func(a, _ *testHost, _ *rpc.MigratePerformArgs) {
			a.libvirt.guest.Running, a.libvirt.guest.State = false, "paused"
		}, rpc.CodeOperationInvalid, []string{"it is paused"}},
		"old id":     {func(_, _ *testHost, args *rpc.MigratePerformArgs) { args.Domain.ID = 6 }, rpc.CodeOperationInvalid, []string{"6 is now 7"}},
		"other name": {func(_, _ *testHost, args *rpc.MigratePerformArgs) { args.Domain.Name = "g9" }, rpc.CodeInvalidArg, []string{`is "g1"`}},
		"job":        {func(a, _ *testHost, _ *rpc.MigratePerformArgs) { a.libvirt.guest.Job = true }, rpc.CodeOperationInvalid, []string{"saving, dumping or migrating"}},
		"ineligible": {func(a, _ *testHost, _ *rpc.MigratePerformArgs) {
			a.libvirt.guest.XML = strings.NewReplacer("xenpvh", "linux", "<devices>", "<devices><disk type='file'><target dev='xvda'/></disk>").Replace(g1XML)
		}, rpc.CodeConfigUnsupp, []string{"(1) a PV guest", "(2) disks (xvda)"}},
		"element": {func(a, _ *testHost, _ *rpc.MigratePerformArgs) {
			a.libvirt.guest.XML = strings.Replace(g1XML, "<memory", "<metadata><kemari xmlns='urn:kemari:domain:1.0'><arbiter type='etcd'/></kemari></metadata><memory", 1)
		}, rpc.CodeConfigUnsupp, []string{"arbiter 'etcd' is not supported yet"}},
		"no certificates": {func(a, _ *testHost, _ *rpc.MigratePerformArgs) {
			a.d.cfg.PKI = "/nowhere"
			a.libvirt.guest.XML = strings.Replace(g1XML, "<memory", "<metadata><kemari xmlns='urn:kemari:domain:1.0'><transport type='pki'/></kemari></metadata><memory", 1)
		}, rpc.CodeConfigUnsupp, []string{"/nowhere/CA/cacert.pem", "leave the transport out"}},
		"no xen": {func(a, _ *testHost, _ *rpc.MigratePerformArgs) {
			a.d.cfg.Host = func() (Host, error) { return readHost("/nowhere") }
		}, rpc.CodeOperationFailed, []string{"identity"}},
		"flags":       {func(_, _ *testHost, args *rpc.MigratePerformArgs) { args.Flags |= 1<<15 | 1<<4 | 1<<27 }, rpc.CodeArgumentUnsupp, []string{"undefinesource, postcopy, bit 27"}},
		"uri":         {func(_, _ *testHost, args *rpc.MigratePerformArgs) { args.URI = ptr("kemari+tls://xen2/system") }, rpc.CodeInvalidArg, []string{"kemari+ssh"}},
		"param":       {param("disks_uri", "x"), rpc.CodeArgumentUnsupp, []string{`"disks_uri" has no meaning`}},
		"rename":      {param("destination_name", "g2"), rpc.CodeArgumentUnsupp, []string{"another name"}},
		"migrate uri": {param("migrate_uri", "rdma://x"), rpc.CodeInvalidArg, []string{"tcp://HOST[:PORT]"}},
		"other xml":   {param("destination_xml", strings.Replace(g1XML, g1UUID, "00000000-0000-0000-0000-000000000001", 1)), rpc.CodeInvalidArg, []string{"has the UUID"}},
		"broken xml":  {param("destination_xml", "<domain>"), rpc.CodeInvalidArg, []string{"cannot be read"}},
		"unreachable": {func(a, _ *testHost, _ *rpc.MigratePerformArgs) {
			a.d.cfg.Dial = func(context.Context, Target) (io.ReadWriteCloser, error) { return nil, errors.New("no way there") }
		}, rpc.CodeOperationFailed, []string{"standby xen2: no way there"}},
		"same host": {func(_, b *testHost, _ *rpc.MigratePerformArgs) { b.host.Boot = "boot-of-xen1" }, rpc.CodeInvalidArg, []string{"this very host"}},
		"all at once": {func(_, b *testHost, _ *rpc.MigratePerformArgs) {
			b.host.Xen.Release = "4.20"
			b.libvirt.free = 1024
			b.libvirt.names = map[string]Known{"g1": {UUID: rpc.UUID{1}}, "x": {UUID: parseUUID(t, g1UUID), Active: true}}
		}, rpc.CodeConfigUnsupp, []string{"(1) Xen is 4.17.7 here and 4.20.7 on xen2", `another domain "g1", of UUID 01000000-`, `same UUID, "x"`, "active on xen2 too", "(5) xen2 has 1 MiB of memory free, and the guest needs 162"}},
		"no device model there": {func(a, b *testHost, _ *rpc.MigratePerformArgs) {
			a.libvirt.guest.XML = hvmXML
			b.qemuErr = errors.New("stat /usr/libexec/qemu: no such file or directory")
		}, rpc.CodeConfigUnsupp, []string{"xen2 has no device model", "no such file", "install the same version"}},
		"another device model there": {func(a, b *testHost, _ *rpc.MigratePerformArgs) {
			a.libvirt.guest.XML = hvmXML
			b.qemu = "QEMU 7.2.9"
		}, rpc.CodeConfigUnsupp, []string{"device model is QEMU 10.0.2, and on xen2 /usr/libexec/qemu is QEMU 7.2.9", "start the guest again"}},
		"silent device model": {func(a, b *testHost, _ *rpc.MigratePerformArgs) {
			a.libvirt.guest.XML = hvmXML
			a.d.cfg.DeviceModel = func(uint32) *DeviceModel { return &DeviceModel{Program: "/q", Error: "it hangs"} }
		}, rpc.CodeConfigUnsupp, []string{"does not tell its version: it hangs"}},
		"no device model": {func(a, b *testHost, _ *rpc.MigratePerformArgs) {
			a.libvirt.guest.XML = hvmXML
			a.d.cfg.DeviceModel = func(uint32) *DeviceModel { return &DeviceModel{Error: "none runs"} }
		}, rpc.CodeConfigUnsupp, []string{"does not tell its version: none runs"}},
		"no kernel there": {func(a, b *testHost, _ *rpc.MigratePerformArgs) {
			a.libvirt.guest.XML = strings.Replace(hvmXML, "/proc/version", "/nowhere/vmlinuz", 1)
		}, rpc.CodeConfigUnsupp, []string{"xen2 has no /nowhere/vmlinuz", "copy it there"}},
		"standby's xml ineligible": {func(a, b *testHost, args *rpc.MigratePerformArgs) {
			args.Params = append(args.Params, rpc.TypedParam{Field: "destination_xml", Type: rpc.ParamString, String: strings.Replace(g1XML, "<devices>", "<devices><hostdev type='pci'/>", 1)})
		}, rpc.CodeConfigUnsupp, []string{"PCI device"}},
		"standby's xml of another kind": {func(a, b *testHost, args *rpc.MigratePerformArgs) {
			args.Params = append(args.Params, rpc.TypedParam{Field: "destination_xml", Type: rpc.ParamString, String: hvmXML})
		}, rpc.CodeConfigUnsupp, []string{"not of the guest's type"}},
		"shadow": {func(_, b *testHost, _ *rpc.MigratePerformArgs) { protectedGuest(t, b, control.Standby, control.Ready) }, rpc.CodeConfigUnsupp, []string{"a shadow of it, for xen9, stands on xen2 already (ready)"}},
		"protected there": {func(_, b *testHost, _ *rpc.MigratePerformArgs) {
			protectedGuest(t, b, control.Primary, control.Protected)
		}, rpc.CodeConfigUnsupp, []string{"xen2 is protecting a guest of the same UUID"}},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := pair(t)
			args := performArgs(t)
			c.change(a, b, args)
			began := len(b.units.started)
			wantError(t, protectCall(t, a, args), c.code, append(c.say, `cannot protect guest "`)...)
			if len(a.units.started) != 0 || len(b.units.started) != began {
				t.Errorf("started: %v, %v", a.units.started, b.units.started)
			}
			a.clean(t)
		})
	}
}

// TestProtectFails has what goes wrong once something has been begun: whatever
// it is, nothing of it may be left on either host.
func TestProtectFails(t *testing.T) {
	for name, c := range map[string]struct {
		change func(a, b *testHost)
		say    []string
	}{
		"standby does not start": {func(_, b *testHost) {
			b.units.scripts[control.Standby] = func(p *process) error { return errors.New("no port is free") }
		}, []string{"standby: no port is free", "journalctl -u kemari-standby@" + g1UUID}},
		"standby ends": {func(_, b *testHost) {
			b.units.scripts[control.Standby] = func(p *process) error { go p.exit("libvirt refused"); return nil }
		}, []string{"standby: libvirt refused"}},
		"standby's settings cannot be written": {func(_, b *testHost) {
			os.WriteFile(b.units.root, nil, 0o600)
			b.d.cfg.Root = b.units.root
		}, []string{"standby xen2:"}},
		"replicator does not start": {func(a, _ *testHost) {
			a.units.scripts[control.Primary] = func(p *process) error { return errors.New("log-dirty: EOPNOTSUPP") }
		}, []string{"primary: log-dirty: EOPNOTSUPP"}},
		"replicator ends": {func(a, _ *testHost) {
			a.units.scripts[control.Primary] = func(p *process) error {
				p.phase(control.Copying)
				time.AfterFunc(60*time.Millisecond, func() { p.exit("the standby has gone") })
				return nil
			}
		}, []string{"primary: the standby has gone"}},
		"replicator is of another time": {func(a, _ *testHost) {
			a.units.scripts[control.Primary] = func(p *process) error { p.st.Generation = 1; return nil }
		}, []string{"another protection (generation 1)"}},
		"connection breaks in prepare": {func(a, b *testHost) {
			b.units.scripts[control.Standby] = func(p *process) error { return nil } // starting, for ever
			a.d.cfg.Dial = func(context.Context, Target) (io.ReadWriteCloser, error) {
				c, err := net.Dial("unix", b.rw)
				time.AfterFunc(150*time.Millisecond, func() { c.Close() })
				return c, err
			}
		}, []string{"standby xen2: the RPC connection is closed"}},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := pair(t)
			c.change(a, b)
			err := protectCall(t, a, performArgs(t))
			wantError(t, err, rpc.CodeOperationFailed, append(c.say, `cannot protect guest "g1"`)...)
			if strings.Contains(name, "another time") {
				// Not ours to stop.
				for unit := range a.units.running {
					a.units.Stop(context.Background(), unit)
				}
				os.Remove(a.d.paths(control.Primary, parseUUID(t, g1UUID)).Config)
			}
			eventually(t, "the standby cleans up", func() bool {
				b.units.mu.Lock()
				defer b.units.mu.Unlock()
				b.d.mu.Lock()
				defer b.d.mu.Unlock()
				return len(b.units.running) == 0 && len(b.d.standbys) == 0
			})
			a.clean(t)
			b.clean(t)
			// And it can be tried again.
			if strings.Contains(name, "written") || strings.Contains(name, "another time") {
				return
			}
			for _, h := range []*testHost{a, b} {
				h.units.scripts[control.Primary] = func(p *process) error { p.phase(control.Protected); return nil }
				h.units.scripts[control.Standby] = func(p *process) error { p.phase(control.Waiting); return nil }
			}
			a.dialTo(b)
			if err := protectCall(t, a, performArgs(t)); err != nil {
				t.Errorf("second attempt: %v", err)
			}
		})
	}
}

// TestNotInstalled has a stock libvirtd answer in the place of virtkemarid.
func TestNotInstalled(t *testing.T) {
	stock := newLibvirtd(t, func(_ net.Conn, p *rpc.Packet) *rpc.Packet {
		return rpc.ErrorReply(p.Header, &rpc.Error{Code: rpc.CodeRPC, From: rpc.FromRPC, Message: "Cannot find program 1262833985 version 1"})
	})
	a, _ := pair(t)
	a.d.cfg.Dial = func(context.Context, Target) (io.ReadWriteCloser, error) { return net.Dial("unix", stock.path) }
	wantError(t, protectCall(t, a, performArgs(t)), rpc.CodeConfigUnsupp, "Kemari is not installed on xen2", "systemctl enable")
	a.clean(t)
}

// stuck makes the first copy take for ever.
func stuck(h *testHost) <-chan *process {
	ch := make(chan *process, 1)
	h.units.scripts[control.Primary] = func(p *process) error { p.phase(control.Copying); ch <- p; return nil }
	return ch
}

func TestClientLeavesDuringProtect(t *testing.T) {
	a, b := pair(t)
	copying := stuck(a)
	c := dial(t, a.rw)
	rpc.WritePacket(c, &rpc.Packet{
		Header:  rpc.Header{Program: rpc.ProgramRemote, Version: 1, Procedure: rpc.ProcDomainMigratePerform3Params, Serial: 1},
		Payload: performArgs(t).Append(nil),
	})
	<-copying
	// The same connection is of use meanwhile, and others are refused.
	rpc.WritePacket(c, &rpc.Packet{Header: rpc.Header{Program: rpc.ProgramRemote, Version: 1, Procedure: rpc.ProcConnectGetURI, Serial: 2}})
	if p, err := rpc.ReadPacket(c); err != nil || p.Serial != 2 {
		t.Errorf("%+v, %v", p, err)
	}
	wantError(t, protectCall(t, a, performArgs(t)), rpc.CodeOperationInvalid, "being set up already")
	_, err := remote(client(t, a.rw), rpc.ProcDomainSave, (&rpc.AbortJobArgs{Domain: performArgs(t).Domain}).Append(nil))
	wantError(t, err, rpc.CodeOperationInvalid, "while Kemari protects it")
	c.Close()
	eventually(t, "both hosts clean up", func() bool {
		a.d.mu.Lock()
		defer a.d.mu.Unlock()
		return len(a.d.attempts) == 0
	})
	a.clean(t)
	b.clean(t)
}

func TestAbortDuringProtect(t *testing.T) {
	a, b := pair(t)
	copying := stuck(a)
	done := make(chan error, 1)
	go func() { done <- protectCall(t, a, performArgs(t)) }()
	<-copying
	if _, err := remote(client(t, a.rw), rpc.ProcDomainAbortJob, (&rpc.AbortJobArgs{Domain: performArgs(t).Domain}).Append(nil)); err != nil {
		t.Fatal(err)
	}
	a.clean(t) // when the call has returned, not some time after
	b.clean(t)
	wantError(t, <-done, rpc.CodeAborted, "ended on request")
}

// TestAbortDuringPrepare has the standby take its time.
func TestAbortDuringPrepare(t *testing.T) {
	a, b := pair(t)
	starting := make(chan *process, 1)
	b.units.scripts[control.Standby] = func(p *process) error { starting <- p; return nil }
	done := make(chan error, 1)
	go func() { done <- protectCall(t, a, performArgs(t)) }()
	<-starting
	if _, err := remote(client(t, a.rw), rpc.ProcDomainAbortJob, (&rpc.AbortJobArgs{Domain: performArgs(t).Domain}).Append(nil)); err != nil {
		t.Fatal(err)
	}
	wantError(t, <-done, rpc.CodeAborted, "ended on request")
	a.clean(t)
	b.clean(t)
}

// TestAbortRace aborts at any time at all. In the end either the guest was
// protected and then was not, or it never was: nothing may be left.
func TestAbortRace(t *testing.T) {
	a, b := pair(t)
	abort := (&rpc.AbortJobArgs{Domain: performArgs(t).Domain}).Append(nil)
	c := client(t, a.rw)
	for i := range 12 {
		done := make(chan error, 1)
		go func() { done <- protectCall(t, a, performArgs(t)) }()
		time.Sleep(time.Duration(i) * 4 * time.Millisecond)
		b1, err := remote(c, rpc.ProcDomainAbortJob, abort)
		if err != nil {
			t.Fatalf("abort: %v", err)
		}
		before := len(b1) != 0 // passed to libvirtd, which echoes: nothing was here yet
		err = <-done
		if before || err == nil {
			remote(c, rpc.ProcDomainAbortJob, abort)
		} else {
			wantError(t, err, rpc.CodeAborted, "request")
		}
		for _, h := range []*testHost{a, b} {
			// The fake replicator, unlike the real one, does not end its standby.
			for _, role := range []control.Role{control.Primary, control.Standby} {
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				control.Ask(ctx, h.d.paths(role, performArgs(t).Domain.UUID).Socket, control.OpAbort)
				cancel()
			}
			h.units.mu.Lock()
			for unit, p := range h.units.running {
				p.exit("")
				delete(h.units.running, unit)
			}
			h.units.mu.Unlock()
			h.clean(t)
		}
	}
}

// TestStopDuringProtect ends the driver: what it was setting up is taken back
// before Serve returns.
func TestStopDuringProtect(t *testing.T) {
	a, b := pair(t)
	copying := stuck(a)
	ctx, cancel := context.WithCancel(context.Background())
	path := shortDir(t) + "/s"
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- a.d.Serve(ctx, l, false) }()
	c := dial(t, path)
	rpc.WritePacket(c, &rpc.Packet{
		Header:  rpc.Header{Program: rpc.ProgramRemote, Version: 1, Procedure: rpc.ProcDomainMigratePerform3Params},
		Payload: performArgs(t).Append(nil),
	})
	<-copying
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
	a.clean(t)
	b.clean(t)
}

func TestDiscard(t *testing.T) {
	_, b := pair(t)
	id := parseUUID(t, g1UUID)
	ctx := context.Background()
	discard := func(generation uint64) error { return b.d.discard(ctx, id, generation, false) }
	if err := discard(5); err != nil {
		t.Errorf("none there: %v", err)
	}
	p := protectedGuest(t, b, control.Standby, control.Ready)
	if err := discard(4); err != nil || p.status().Phase != control.Ready {
		t.Errorf("of another generation: %v, %v", err, p.status().Phase)
	}
	p.phase(control.TakingOver)
	if err := discard(5); err == nil || p.status().Phase != control.TakingOver {
		t.Errorf("taking over: %v, %v", err, p.status().Phase)
	}
	p.phase(control.Waiting)
	if err := discard(5); err != nil || p.status().Phase != control.Ended {
		t.Errorf("%v, %v", err, p.status().Phase)
	}
	b.clean(t)
}

func TestPrepareValidates(t *testing.T) {
	_, b := pair(t)
	c := rpc.NewClient(dial(t, b.rw))
	defer c.Close()
	good := prepareRequest{
		Name: "g1", UUID: g1UUID, Generation: 1, DomainXML: g1XML, MemoryKiB: 1, PrimaryHost: "xen1",
		Transport: control.TransportTLS, Credential: strings.Repeat("ab", 32), Heartbeat: control.Heartbeat{Interval: 1, Timeout: 1}, Arbiter: control.Arbiter{Type: "none"},
	}
	for name, change := range map[string]func(*prepareRequest){
		"uuid":        func(r *prepareRequest) { r.UUID = "../../../../etc" },
		"upper case":  func(r *prepareRequest) { r.UUID = strings.ToUpper(g1UUID) },
		"name":        func(r *prepareRequest) { r.Name = "" },
		"generation":  func(r *prepareRequest) { r.Generation = 0 },
		"credential":  func(r *prepareRequest) { r.Credential = strings.Repeat("xy", 32) },
		"transport":   func(r *prepareRequest) { r.Transport = "udp" },
		"heartbeat":   func(r *prepareRequest) { r.Heartbeat.Timeout = 0 },
		"arbiter":     func(r *prepareRequest) { r.Arbiter.Type = "etcd" },
		"other guest": func(r *prepareRequest) { r.DomainXML = strings.Replace(g1XML, "g1", "g2", 1) },
	} {
		r := good
		change(&r)
		if err := callPeer(context.Background(), c, procPrepare, r, &prepareReply{}); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if len(b.units.started) != 0 {
		t.Errorf("started %v", b.units.started)
	}
	for _, raw := range []string{"", "{", `{"uuid":5}`, "null"} {
		_, err := c.Call(context.Background(), rpc.ProgramKemari, 1, procPrepare, rpc.Opaque(raw).Append(nil))
		if err == nil {
			t.Errorf("%q: taken", raw)
		}
	}
	var r prepareReply
	if err := callPeer(context.Background(), c, procPrepare, good, &r); err != nil || r.Port != 49300 || !control.ValidCredential(r.Credential) {
		t.Errorf("%+v, %v", r, err)
	}
	// The same generation again is an old request.
	if err := callPeer(context.Background(), c, procPrepare, good, &r); err == nil {
		t.Error("twice")
	}
	// Nobody came for it.
	c.Close()
	eventually(t, "the shadow is dropped", func() bool {
		b.units.mu.Lock()
		defer b.units.mu.Unlock()
		return len(b.units.running) == 0
	})
}
