package driver

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"kemari/driver/rpc"
	"kemari/migrate/control"
)

func TestAsksKemari(t *testing.T) {
	for _, c := range []struct {
		in, out string
		ask     bool
	}{
		{"kemari+ssh://xen2/system", "kemari+ssh://xen2/system", false},
		{"kemari+ssh://xen2/system?kemari=1", "kemari+ssh://xen2/system", true},
		{"kemari+ssh://root@xen2:22/system?keyfile=%2Fk&kemari=1", "kemari+ssh://root@xen2:22/system?keyfile=%2Fk", true},
		{"xen+ssh://xen2/system?kemari=1", "kemari+ssh://xen2/system", true},
		{"xenkemari+ssh://xen2/system?kemari=1", "kemari+ssh://xen2/system", true},
		{"kemari+ssh://xen2/system?kemari=0", "kemari+ssh://xen2/system", false},
		{"kemari+ssh://kemari=1/system", "kemari+ssh://kemari=1/system", false},
		{"%zz?kemari=1", "%zz?kemari=1", false},
	} {
		if out, ask, err := asksKemari(c.in); out != c.out || ask != c.ask || err != nil {
			t.Errorf("%s: %s, %v, %v", c.in, out, ask, err)
		}
	}
	for _, bad := range []string{"kemari+ssh://xen2/system?kemari=yes", "kemari+ssh://xen2/system?kemari=1&kemari=1", "kemari+ssh://xen2/system?kemari="} {
		_, _, err := asksKemari(bad)
		wantError(t, rpcError(err), rpc.CodeInvalidArg, "say kemari=1")
	}
}

// TestProtectByURI: every way to ask protects, and is the same protection.
func TestProtectByURI(t *testing.T) {
	plain := performArgs(t)
	plain.Flags &^= rpc.MigrateKemari
	plain.URI = ptr("xen+ssh://xen2/system?kemari=1")
	older := &rpc.MigratePerform3Args{Domain: plain.Domain, ConnURI: ptr("kemari+ssh://xen2/system?kemari=1"), URI: ptr("tcp://10.0.0.2"), Flags: rpc.MigratePeer2Peer | rpc.MigrateLive}
	flagged := *older
	flagged.ConnURI, flagged.Flags = ptr("kemari+ssh://xen2/system"), older.Flags|rpc.MigrateKemari
	for name, c := range map[string]struct {
		proc    rpc.Procedure
		payload []byte
		addr    string
	}{
		"params":     {rpc.ProcDomainMigratePerform3Params, plain.Append(nil), "xen2:49300"},
		"older":      {rpc.ProcDomainMigratePerform3, older.Append(nil), "10.0.0.2:49300"},
		"older flag": {rpc.ProcDomainMigratePerform3, flagged.Append(nil), "10.0.0.2:49300"},
	} {
		a, _ := pair(t)
		b, err := remote(client(t, a.rw), c.proc, c.payload)
		if err != nil || string(b) != "\x00\x00\x00\x00" {
			t.Errorf("%s: %q, %v", name, b, err)
			continue
		}
		p := a.units.running[unitName(unitReplicator, parseUUID(t, g1UUID))]
		if p == nil || p.primary.StandbyURI != "kemari+ssh://xen2/system" || p.primary.StandbyAddr != c.addr {
			t.Errorf("%s: %+v", name, p)
		}
	}
	// The element given with it is taken from where people write it.
	a, _ := pair(t)
	older.XML = ptr(element("><checkpoint trigger='interval'/>"))
	if _, err := remote(client(t, a.rw), rpc.ProcDomainMigratePerform3, older.Append(nil)); err != nil {
		t.Fatal(err)
	}
	if p := a.units.running[unitName(unitReplicator, parseUUID(t, g1UUID))]; p.primary.Checkpoint.Trigger != "interval" {
		t.Errorf("%+v", p.primary)
	}
}

// TestMigrateNotOurs: a client that manages the migration itself is told what to
// use, and what does not ask for protection passes.
func TestMigrateNotOurs(t *testing.T) {
	up := newLibvirtd(t, nil)
	h := newHost(t, "xen1", up.path)
	c := client(t, h.rw)
	direct := &rpc.MigratePerform3Args{Domain: g1(t), URI: ptr("xenmigr://xen2"), Flags: rpc.MigrateKemari | rpc.MigrateLive}
	_, err := remote(c, rpc.ProcDomainMigratePerform3, direct.Append(nil))
	wantError(t, err, rpc.CodeArgumentUnsupp, "virDomainMigrateToURI3")
	direct.Flags |= 1 << 40
	_, err = remote(c, rpc.ProcDomainMigratePerform3, direct.Append(nil))
	wantError(t, err, rpc.CodeArgumentUnsupp, "0x10040000001 are not known")
	direct.Flags = rpc.MigrateLive
	if _, err := remote(c, rpc.ProcDomainMigratePerform3, direct.Append(nil)); err != nil {
		t.Error(err)
	}
	for _, proc := range []rpc.Procedure{rpc.ProcDomainMigratePerform3, rpc.ProcDomainMigratePerform3Params} {
		payload := (&rpc.MigratePerform3Args{Domain: g1(t), ConnURI: ptr("kemari+ssh://xen2/system?kemari=x")}).Append(nil)
		if proc == rpc.ProcDomainMigratePerform3Params {
			payload = (&rpc.MigratePerformArgs{Domain: g1(t), URI: ptr("kemari+ssh://xen2/system?kemari=x"), Flags: rpc.MigratePeer2Peer}).Append(nil)
		}
		_, err = remote(c, proc, payload)
		wantError(t, err, rpc.CodeInvalidArg, "say kemari=1")
	}
	// As destination of a migration that a client manages.
	prepare := message(t, lowered[rpc.ProcDomainMigratePrepare3Params], g1XML)
	if _, err := remote(c, rpc.ProcDomainMigratePrepare3Params, prepare); err != nil {
		t.Error(err)
	}
	if _, err := remote(c, rpc.ProcConnectOpen, open(ptr("kemari:///system?kemari=1"), 0)); err != nil {
		t.Fatal(err)
	}
	_, err = remote(c, rpc.ProcDomainMigratePrepare3Params, prepare)
	wantError(t, err, rpc.CodeArgumentUnsupp, "virDomainMigrateToURI3")
	_, err = remote(c, rpc.ProcConnectOpen, open(ptr("kemari:///system?kemari=2"), 0))
	wantError(t, err, rpc.CodeInvalidArg, "say kemari=1")
}

func examined(t *testing.T, h *testHost, domain, standby string) (*Examination, error) {
	t.Helper()
	return Examine(context.Background(), uri+"?socket="+h.rw, domain, standby)
}

func TestExamine(t *testing.T) {
	a, b := pair(t)
	a.libvirt.names["g1"] = Known{UUID: parseUUID(t, g1UUID), Active: true}
	for _, domain := range []string{"g1", g1UUID} {
		for _, standby := range []string{"", "kemari+ssh://xen2/system"} {
			e, err := examined(t, a, domain, standby)
			if err != nil || len(e.Reasons) != 0 || e.Domain != "g1" || e.UUID != g1UUID || e.Standby != standby {
				t.Errorf("%+v, %v", e, err)
			}
		}
	}
	_, err := examined(t, a, "g9", "")
	wantError(t, err, rpc.CodeNoDomain, `no domain "g9"`)
	_, err = Examine(context.Background(), uri+"?socket=/nowhere", "g1", "")
	if err == nil || errors.As(err, new(*rpc.Error)) {
		t.Errorf("no daemon: %v", err)
	}

	// All that is wrong, on either host, at once.
	a.libvirt.guest.XML = lower(t, element("><standby uri='kemari+ssh://xen2/system'/>"))
	a.libvirt.guest.XML = strings.Replace(a.libvirt.guest.XML, "<devices>", "<devices><disk type='file'><target dev='xvda'/></disk>", 1)
	a.libvirt.guest.Running, a.libvirt.guest.State = false, "paused"
	b.host.Xen.Release = "4.20"
	b.libvirt.free = 1024
	b.libvirt.names["g1"] = Known{UUID: rpc.UUID{9}}
	e, err := examined(t, a, "g1", "")
	if err != nil || e.Standby != "kemari+ssh://xen2/system" {
		t.Fatalf("%+v, %v", e, err)
	}
	want := []struct{ host, say string }{
		{"xen1", "disks (xvda) are not supported yet"}, {"xen1", "it is paused"},
		{"xen2", "Xen is 4.17.7 here and 4.20.7 on xen2"}, {"xen2", `another domain "g1"`}, {"xen2", "1 MiB of memory free"},
	}
	if len(e.Reasons) != len(want) {
		t.Fatalf("%+v", e.Reasons)
	}
	for i, w := range want {
		if r := e.Reasons[i]; r.Host != w.host || !strings.Contains(r.Text, w.say) || r.Remedy == "" {
			t.Errorf("%+v, want %+v", r, w)
		}
	}
}

func TestExamineAlone(t *testing.T) {
	for name, c := range map[string]struct {
		change    func(*testHost)
		host, say string
	}{
		"protected": {func(h *testHost) { protectedGuest(t, h, control.Primary, control.Protected) }, "xen1", "has the standby kemari+ssh://xen2/system already"},
		"job":       {func(h *testHost) { h.libvirt.guest.Job = true }, "xen1", "saving, dumping or migrating"},
		"element": {func(h *testHost) {
			h.libvirt.guest.XML = strings.Replace(g1XML, "<memory", "<metadata><kemari xmlns='urn:kemari:domain:1.0'><x/></kemari></metadata><memory", 1)
		}, "xen1", "element is wrong"},
		"no Xen": {func(h *testHost) {
			h.d.cfg.Host = func() (Host, error) { return Host{Name: "xen1"}, refuse(rpc.CodeConfigUnsupp, "no Xen", "boot it") }
		}, "xen1", "no Xen"},
		"unreachable": {func(h *testHost) {
			h.d.cfg.Dial = func(context.Context, Target) (io.ReadWriteCloser, error) { return nil, errors.New("no way there") }
		}, "xen2", "no way there"},
		"itself": {func(h *testHost) { h.dialTo(h) }, "xen1", "this very host"},
	} {
		t.Run(name, func(t *testing.T) {
			a, _ := pair(t)
			a.libvirt.names["g1"] = Known{UUID: parseUUID(t, g1UUID), Active: true}
			c.change(a)
			e, err := examined(t, a, "g1", "kemari+ssh://xen2/system")
			if err != nil || len(e.Reasons) != 1 || e.Reasons[0].Host != c.host || !strings.Contains(e.Reasons[0].Text, c.say) {
				t.Errorf("%+v, %v", e, err)
			}
		})
	}
	a, _ := pair(t)
	a.libvirt.names["g1"] = Known{UUID: parseUUID(t, g1UUID)} // shut off: it may be started
	e, err := examined(t, a, "g1", "kemari+tls://xen2/system")
	if err != nil || len(e.Reasons) != 1 || !strings.Contains(e.Reasons[0].Text, "scheme is not kemari+ssh") {
		t.Errorf("%+v, %v", e, err)
	}
}
