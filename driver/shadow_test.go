package driver

import (
	"reflect"
	"slices"
	"testing"

	"kemari/driver/rpc"
	"kemari/migrate/control"
)

func TestShadowState(t *testing.T) {
	h := newHost(t, "xen2", answering(t, map[rpc.Procedure]any{
		rpc.ProcDomainGetState: (&rpc.DomainState{State: 5, Reason: 1}).Append(nil),
		rpc.ProcDomainGetInfo:  (&rpc.DomainInfo{State: 5, MaxMem: 10, Memory: 20, VCPUs: 3, CPUTime: 4}).Append(nil),
		rpc.ProcDomainIsActive: rpc.Int(0).Append(nil),
	}).path)
	check := func(c *rpc.Client, want bool) {
		t.Helper()
		b, err := remote(c, rpc.ProcDomainGetState, with(g1(t), 0, 0, 0, 0))
		st, e := rpc.DecodeDomainState(b)
		if err != nil || e != nil || (*st == rpc.DomainState{State: statePaused, Reason: pausedMigration}) != want {
			t.Errorf("state %v, %v", st, err)
		}
		b, err = remote(c, rpc.ProcDomainGetInfo, with(g1(t)))
		info, e := rpc.DecodeDomainInfo(b)
		if err != nil || e != nil || (info.State == statePaused) != want || info.Memory != 20 || info.CPUTime != 4 {
			t.Errorf("info %v, %v", info, err)
		}
		b, err = remote(c, rpc.ProcDomainIsActive, with(g1(t)))
		n, e := rpc.DecodeInt(b)
		if err != nil || e != nil || (*n == 1) != want {
			t.Errorf("active %v, %v", n, err)
		}
	}
	rw, ro := client(t, h.rw), client(t, h.ro)
	check(rw, false)
	p := protectedGuest(t, h, control.Standby, control.Ready)
	check(rw, true)
	check(ro, true)
	p.phase(control.Active) // it runs here, and libvirtd knows best
	check(rw, false)
	p.exit("")
	check(rw, false)
	// Without a reply there is nothing to correct.
	h = newHost(t, "xen2", answering(t, map[rpc.Procedure]any{rpc.ProcDomainGetState: noDomain}).path)
	protectedGuest(t, h, control.Standby, control.Ready)
	_, err := remote(client(t, h.rw), rpc.ProcDomainGetState, with(g1(t), 0, 0, 0, 0))
	wantError(t, err, rpc.CodeNoDomain)
}

func TestShadowListed(t *testing.T) {
	shadow, other := rpc.Domain{Name: "g1", UUID: parseUUID(t, g1UUID), ID: -1}, rpc.Domain{Name: "other", UUID: rpc.UUID{1}, ID: 3}
	for _, tt := range []struct {
		flags    uint32
		upstream []rpc.Domain // what libvirtd has for them
		fits     bool         // libvirtd's other filters do
		want     []rpc.Domain
	}{
		{0, []rpc.Domain{other, shadow}, true, []rpc.Domain{other, shadow}},
		{listActive | listInactive, []rpc.Domain{other, shadow}, true, []rpc.Domain{other, shadow}},
		{listActive, []rpc.Domain{other}, true, []rpc.Domain{other, shadow}},
		{listInactive, []rpc.Domain{shadow}, true, []rpc.Domain{}},
		{listPaused, []rpc.Domain{}, true, []rpc.Domain{shadow}},
		{1 << 6, []rpc.Domain{shadow}, true, []rpc.Domain{}},
		{1 << 4, []rpc.Domain{other}, true, []rpc.Domain{other}},
		{listActive | 1<<2, []rpc.Domain{other}, false, []rpc.Domain{other}},
	} {
		ret := &rpc.ListAllDomainsRet{Domains: tt.upstream, Count: uint32(len(tt.upstream))}
		h := newHost(t, "xen2", answering(t, map[rpc.Procedure]any{rpc.ProcConnectListAllDomains: ret.Append(nil)}).path)
		h.libvirt.names["other"] = Known{UUID: other.UUID}
		if tt.fits {
			h.libvirt.names["g1"] = Known{UUID: shadow.UUID}
		}
		list := func(need int32) *rpc.ListAllDomainsRet {
			t.Helper()
			b, err := remote(client(t, h.ro), rpc.ProcConnectListAllDomains, (&rpc.ListAllDomainsArgs{NeedResults: need, Flags: tt.flags}).Append(nil))
			got, e := rpc.DecodeListAllDomainsRet(b)
			if err != nil || e != nil {
				t.Fatal(err, e)
			}
			return got
		}
		if got := list(1); !reflect.DeepEqual(got, ret) {
			t.Errorf("flags %#x, no shadow: %v", tt.flags, got)
		}
		p := protectedGuest(t, h, control.Standby, control.Copying)
		if got := list(1); !slices.Equal(got.Domains, tt.want) || int(got.Count) != len(tt.want) {
			t.Errorf("flags %#x: %v, want %v", tt.flags, got, tt.want)
		}
		if got := list(0); tt.flags != 0 && (len(got.Domains) != 0 || int(got.Count) != len(tt.want)) {
			t.Errorf("flags %#x, only the number: %v", tt.flags, got)
		}
		for _, f := range h.libvirt.listed {
			if f&(listActive|listInactive|listStates) != 0 {
				t.Errorf("libvirtd was asked for a state in flags %#x", f)
			}
		}
		p.exit("")
	}
}

// TestShadowGuarded: nothing that changes a shadow reaches libvirtd, where it would
// wait half a minute for the shadow's job.
func TestShadowGuarded(t *testing.T) {
	up := newLibvirtd(t, nil)
	h := newHost(t, "xen2", up.path)
	h.libvirt.names["g1"] = Known{UUID: parseUUID(t, g1UUID)}
	c := client(t, h.rw)
	p := protectedGuest(t, h, control.Standby, control.Ready)
	calls := map[rpc.Procedure][]byte{
		rpc.ProcDomainCreateXML:      message(t, "xu", g1XML),
		rpc.ProcDomainDefineXML:      message(t, "x", g1XML),
		rpc.ProcDomainDefineXMLFlags: message(t, "xu", g1XML),
		rpc.ProcDomainSetMetadata:    metadata(t, "urn:other", "<x/>", 0),
		rpc.ProcDomainSave:           append(with(g1(t)), xdrString(nil, "/f")...),
		rpc.ProcDomainAttachDevice:   append(with(g1(t)), xdrString(nil, "<disk/>")...),
	}
	for proc := range shadowRefused {
		calls[proc] = with(g1(t))
	}
	for proc, payload := range calls {
		_, err := remote(c, proc, payload)
		wantError(t, err, rpc.CodeOperationInvalid, `standby's copy of guest "g1", which runs on xen9`, "domjobabort g1", "kemari failover g1")
	}
	_, err := remote(c, rpc.ProcDomainSetMetadata, metadata(t, "urn:kemari:domain:1.0", "<kemari/>", 0))
	wantError(t, err, rpc.CodeOperationInvalid, "changing its metadata")
	if n := len(up.packets()); n != 0 {
		t.Errorf("libvirtd saw %d of them", n)
	}
	// After a failover it is a guest like any other.
	p.phase(control.Active)
	for proc, payload := range calls {
		if _, err := remote(c, proc, payload); err != nil {
			t.Errorf("procedure %d after the failover: %v", proc, err)
		}
	}
}

func TestShadowRemoved(t *testing.T) {
	for _, proc := range []rpc.Procedure{rpc.ProcDomainDestroy, rpc.ProcDomainDestroyFlags, rpc.ProcDomainUndefine, rpc.ProcDomainUndefineFlags} {
		undefine := proc == rpc.ProcDomainUndefine || proc == rpc.ProcDomainUndefineFlags
		answers := map[rpc.Procedure]any{proc: noDomain}
		up := answering(t, answers)
		h := newHost(t, "xen2", up.path)
		c := client(t, h.rw)
		p := protectedGuest(t, h, control.Standby, control.Ready)
		b, err := remote(c, proc, with(g1(t), 0, 0, 0, 0))
		if err != nil || len(b) != 0 || p.status().Phase != control.Ended {
			t.Errorf("procedure %d: %q, %v, %s", proc, b, err, p.status().Phase)
		}
		<-p.served
		if n := len(up.packets()); (n == 1) != undefine {
			t.Errorf("procedure %d: libvirtd saw %d calls", proc, n)
		}
		// Now that it is gone libvirtd says so itself.
		_, err = remote(c, proc, with(g1(t), 0, 0, 0, 0))
		wantError(t, err, rpc.CodeNoDomain)
	}
	// What else may be wrong with undefining it is told.
	h := newHost(t, "xen2", answering(t, map[rpc.Procedure]any{rpc.ProcDomainUndefine: &rpc.Error{Code: rpc.CodeOperationInvalid, Message: "has a managed save image"}}).path)
	protectedGuest(t, h, control.Standby, control.Ready)
	_, err := remote(client(t, h.rw), rpc.ProcDomainUndefine, with(g1(t)))
	wantError(t, err, rpc.CodeOperationInvalid, "managed save")
	// A protected guest on its primary is destroyed as ever: the replicator sees it.
	h = newHost(t, "xen1", newLibvirtd(t, nil).path)
	p := protectedGuest(t, h, control.Primary, control.Protected)
	if _, err := remote(client(t, h.rw), rpc.ProcDomainDestroy, with(g1(t))); err != nil || p.status().Phase != control.Protected {
		t.Errorf("%v, %s", err, p.status().Phase)
	}
}

// TestGuardNextStart: what is for the next start alone passes.
func TestGuardNextStart(t *testing.T) {
	h := newHost(t, "xen1", newLibvirtd(t, nil).path)
	c := client(t, h.rw)
	protectedGuest(t, h, control.Primary, control.Protected)
	for proc, g := range guarded {
		if !g.impact {
			continue
		}
		if _, err := remote(c, proc, with(g1(t), 0, 0, 0, affectConfig)); err != nil {
			t.Errorf("procedure %d: %v", proc, err)
		}
		for _, flags := range []byte{0, affectLive, affectLive | affectConfig} {
			_, err := remote(c, proc, with(g1(t), 0, 0, 0, flags))
			wantError(t, err, rpc.CodeOperationInvalid, "while Kemari protects it")
		}
	}
}
