package driver

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"kemari/driver/rpc"
	"kemari/migrate/control"
)

// values are typed parameters by name.
func values(t testing.TB, ps []rpc.TypedParam) map[string]any {
	t.Helper()
	m := map[string]any{}
	for _, p := range ps {
		if _, twice := m[p.Field]; twice {
			t.Errorf("%s stands there twice", p.Field)
		}
		if p.Type == rpc.ParamString {
			m[p.Field] = p.String
		} else {
			m[p.Field] = p.Number
		}
	}
	return m
}

func wantValues(t testing.TB, got, want map[string]any) {
	t.Helper()
	for k, v := range want {
		if n, ok := v.(int); ok {
			v = uint64(n)
		}
		if got[k] != v {
			t.Errorf("%s is %v, want %v", k, got[k], v)
		}
	}
}

func jobStats(t testing.TB, c *rpc.Client, flags byte) (*rpc.JobStatsRet, error) {
	t.Helper()
	b, err := remote(c, rpc.ProcDomainGetJobStats, with(g1(t), 0, 0, 0, flags))
	if err != nil {
		return nil, err
	}
	r, err := rpc.DecodeJobStatsRet(b)
	if err != nil {
		t.Fatal(err)
	}
	return r, nil
}

func TestJob(t *testing.T) {
	none := &rpc.Error{Code: rpc.CodeOperationInvalid, From: rpc.FromDomain, Message: "libvirtd was asked"}
	h := newHost(t, "xen1", answering(t, map[rpc.Procedure]any{rpc.ProcDomainGetJobStats: none, rpc.ProcDomainGetJobInfo: none}).path)
	c := client(t, h.ro)
	_, err := jobStats(t, c, 0)
	wantError(t, err, none.Code, none.Message)

	p := protectedGuest(t, h, control.Primary, control.Protected)
	p.tell(func(st *control.Status) {
		*st = control.Status{
			Role: control.Primary, Domain: "g1", UUID: g1UUID, Phase: control.Protected, Peer: "kemari+ssh://xen2/system",
			Generation: uint64(time.Now().Add(-10 * time.Second).UnixMilli()), Arbiter: "none", Automatic: true, Risk: "two may run",
			CopyBytes: 4096, CopyTotal: 8192, Epoch: 77, PagesLast: 5, BytesLast: 6, Bytes: 1 << 20,
			PauseLast: 2500, PauseMax: 9000, PauseSum: 70000, SuspendLast: 2000, CopyLast: 300, ResumeLast: 200, CommitLag: 1234,
		}
	})
	r, err := jobStats(t, c, 0)
	if err != nil || r.Type != jobUnbounded {
		t.Fatalf("%+v, %v", r, err)
	}
	got := values(t, r.Params)
	wantValues(t, got, map[string]any{
		"operation": operationMigrationOut, "data_total": 8192, "memory_processed": 1 << 20, "memory_remaining": 4096,
		"memory_iteration": 77, "memory_page_size": 4096, "downtime": 3,
		"kemari.phase": "protected", "kemari.role": "primary", "kemari.peer": "kemari+ssh://xen2/system", "kemari.epoch": 77,
		"kemari.pause.last": 2500, "kemari.pause.max": 9000, "kemari.pause.sum": 70000, "kemari.suspend.last": 2000, "kemari.copy.last": 300,
		"kemari.resume.last": 200, "kemari.lag.last": 1234, "kemari.pages.last": 5, "kemari.bytes.last": 6, "kemari.bytes.total": 1 << 20,
		"kemari.automatic": 1, "kemari.arbiter": "none", "kemari.risk": "two may run", "success": nil, "kemari.error": nil,
	})
	if ms := got["time_elapsed"].(uint64); ms < 10_000 || ms > 30_000 {
		t.Errorf("elapsed %d ms", ms)
	}
	if len(r.Params) > 64 {
		t.Errorf("%d parameters, and a message holds 64", len(r.Params))
	}
	b, err := remote(c, rpc.ProcDomainGetJobInfo, with(g1(t)))
	info, e := rpc.DecodeJobInfo(b)
	if err != nil || e != nil || info.Type != jobUnbounded || info.MemTotal != 8192 || info.MemRemaining != 4096 || info.DataProcessed != 1<<20 {
		t.Errorf("%+v, %v, %v", info, err, e)
	}
	// The guest goes on without its standby, and the job goes on with it.
	p.tell(func(st *control.Status) {
		st.Phase, st.Error, st.Hint = control.Alone, "the standby is silent", "look after its host"
	})
	if r, err = jobStats(t, c, 0); err != nil || r.Type != jobUnbounded {
		t.Fatalf("%+v, %v", r, err)
	}
	wantValues(t, values(t, r.Params), map[string]any{
		"memory_iteration": 77, "downtime": 3, "success": nil, "errmsg": nil,
		"kemari.phase": "alone", "kemari.error": "the standby is silent", "kemari.hint": "look after its host",
	})
	// Nothing has completed yet.
	_, err = jobStats(t, c, jobStatsCompleted)
	wantError(t, err, none.Code, none.Message)

	p.exit("the standby is full")
	_, err = jobStats(t, c, 0)
	wantError(t, err, none.Code, none.Message)
	for _, flags := range []byte{jobStatsCompleted | jobStatsKeepCompleted, jobStatsCompleted} {
		r, err := jobStats(t, c, flags)
		if err != nil || r.Type != jobFailed {
			t.Fatalf("%+v, %v", r, err)
		}
		wantValues(t, values(t, r.Params), map[string]any{"errmsg": "the standby is full", "success": 0, "downtime": 70, "kemari.phase": "ended", "kemari.error": "the standby is full", "kemari.risk": nil})
	}
	// Told once, as libvirt does.
	_, err = jobStats(t, c, jobStatsCompleted)
	wantError(t, err, none.Code, none.Message)
}

func TestJobOfStandby(t *testing.T) {
	h := newHost(t, "xen2", newLibvirtd(t, nil).path)
	c := client(t, h.rw)
	p := protectedGuest(t, h, control.Standby, control.Ready)
	r, err := jobStats(t, c, 0)
	if err != nil || r.Type != jobUnbounded {
		t.Fatalf("%+v, %v", r, err)
	}
	wantValues(t, values(t, r.Params), map[string]any{"operation": operationMigrationIn, "kemari.role": "standby", "kemari.peer": "xen9"})
	p.tell(func(st *control.Status) {
		st.Phase = control.Active
		st.Failover = &control.Failover{Reason: "silence", Detect: 500, Takeover: 700}
	})
	if r, err = jobStats(t, c, jobStatsCompleted); err != nil || r.Type != jobCompleted {
		t.Fatalf("%+v, %v", r, err)
	}
	wantValues(t, values(t, r.Params), map[string]any{"success": 1, "kemari.failover.reason": "silence", "kemari.failover.detect": 500, "kemari.failover.takeover": 700})
	// A process that does not answer is no reason to say that there is no job.
	p.exit("")
	silent(t, h, control.Primary)
	_, err = jobStats(t, c, 0)
	wantError(t, err, rpc.CodeOperationFailed, "does not say how it is")
}

func TestElapsed(t *testing.T) {
	now := time.UnixMilli(10_000)
	for _, c := range []struct {
		st   control.Status
		want uint64
	}{
		{control.Status{Generation: 4000}, 6000},
		{control.Status{Generation: 4000, Phase: control.Ended, Since: time.UnixMilli(5000)}, 1000},
		{control.Status{Generation: 20_000}, 0},
		{control.Status{Generation: 1<<64 - 1}, 0},
	} {
		if got := elapsed(c.st, now); got != c.want {
			t.Errorf("%+v: %d, want %d", c.st, got, c.want)
		}
	}
}

func domStats(t testing.TB, c *rpc.Client, a rpc.DomainStatsArgs) (map[string]map[string]any, error) {
	t.Helper()
	b, err := remote(c, rpc.ProcConnectGetAllDomainStats, a.Append(nil))
	if err != nil {
		return nil, err
	}
	ret, err := rpc.DecodeDomainStatsRet(b)
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]map[string]any{}
	for _, s := range *ret {
		m[s.Domain.Name] = values(t, s.Params)
	}
	return m, nil
}

func TestDomainStats(t *testing.T) {
	other := rpc.Domain{Name: "other", UUID: rpc.UUID{1}, ID: 1}
	state := []rpc.TypedParam{{Field: "state.state", Type: rpc.ParamInt, Number: 5}, {Field: "state.reason", Type: rpc.ParamInt, Number: 1}}
	upstream := rpc.DomainStatsRet{{Domain: g1(t), Params: state}, {Domain: other, Params: state}}
	up := answering(t, map[rpc.Procedure]any{rpc.ProcConnectGetAllDomainStats: upstream.Append(nil)})
	h := newHost(t, "xen1", up.path)
	c := client(t, h.ro)
	if b, err := remote(c, rpc.ProcConnectGetAllDomainStats, (&rpc.DomainStatsArgs{}).Append(nil)); err != nil || !bytes.Equal(b, upstream.Append(nil)) {
		t.Errorf("nobody is protected: %q, %v", b, err)
	}
	p := protectedGuest(t, h, control.Primary, control.Protected)
	for stats, want := range map[uint32]bool{0: true, statsKemari: true, statsKemari | 2: true, 1: false} {
		got, err := domStats(t, c, rpc.DomainStatsArgs{Stats: stats})
		if err != nil || len(got) != 2 || (got["g1"]["kemari.phase"] == "protected") != want || got["g1"]["state.state"] != uint64(5) || len(got["other"]) != 2 {
			t.Errorf("groups %#x: %v, %v", stats, got, err)
		}
	}
	for _, p := range up.packets() {
		a, err := rpc.DecodeDomainStatsArgs(p.Payload)
		if err == nil && a.Stats&statsKemari != 0 {
			t.Error("libvirtd was asked for a group that it does not know")
		}
	}
	p.exit("")
	if got, err := domStats(t, c, rpc.DomainStatsArgs{}); err != nil || len(got["g1"]) != 2 {
		t.Errorf("not protected any more: %v, %v", got, err)
	}
	// A shadow is paused.
	protectedGuest(t, h, control.Standby, control.Ready)
	got, err := domStats(t, c, rpc.DomainStatsArgs{})
	if err != nil {
		t.Fatal(err)
	}
	wantValues(t, got["g1"], map[string]any{"state.state": statePaused, "state.reason": pausedMigration, "kemari.role": "standby"})
	wantValues(t, got["other"], map[string]any{"state.state": 5, "kemari.role": nil})
}

// TestDomainStatsOfXen: libvirt's driver for Xen has no such call.
func TestDomainStatsOfXen(t *testing.T) {
	no := &rpc.Error{Code: rpc.CodeNoSupport, Message: "this function is not supported by the connection driver"}
	h := newHost(t, "xen2", answering(t, map[rpc.Procedure]any{rpc.ProcConnectGetAllDomainStats: no}).path)
	h.libvirt.names["g1"], h.libvirt.names["other"] = Known{UUID: parseUUID(t, g1UUID)}, Known{UUID: rpc.UUID{1}}
	protectedGuest(t, h, control.Standby, control.Ready)
	c := client(t, h.rw)
	got, err := domStats(t, c, rpc.DomainStatsArgs{})
	if err != nil || len(got) != 2 {
		t.Fatal(got, err)
	}
	wantValues(t, got["other"], map[string]any{"state.state": 5, "cpu.time": 9, "balloon.current": 1024, "balloon.maximum": 2048, "vcpu.current": 2})
	wantValues(t, got["g1"], map[string]any{"state.state": statePaused, "kemari.role": "standby"})
	got, err = domStats(t, c, rpc.DomainStatsArgs{Domains: []rpc.Domain{{Name: "other", UUID: rpc.UUID{1}}, {Name: "gone"}}, Stats: statsCPU})
	if err != nil || len(got) != 1 || len(got["other"]) != 1 {
		t.Errorf("%v, %v", got, err)
	}
	_, err = domStats(t, c, rpc.DomainStatsArgs{Stats: 1 << 5, Flags: statsEnforce})
	wantError(t, err, rpc.CodeArgumentUnsupp, "--enforce")
	// Every other error is libvirtd's own.
	h = newHost(t, "xen2", answering(t, map[rpc.Procedure]any{rpc.ProcConnectGetAllDomainStats: noDomain}).path)
	_, err = domStats(t, client(t, h.rw), rpc.DomainStatsArgs{})
	wantError(t, err, rpc.CodeNoDomain)
}

func TestCapabilities(t *testing.T) {
	const caps = "<capabilities>\n  <host/>\n  <guest>\n    <os_type>xenpvh</os_type>\n    <arch name='x86_64'>\n      <machine>xenpvh</machine>\n      <domain type='xen'/>\n    </arch>\n  </guest>\n</capabilities>\n"
	h := newHost(t, "xen1", answering(t, map[rpc.Procedure]any{
		rpc.ProcConnectGetCapabilities:       xdrString(nil, caps),
		rpc.ProcConnectGetDomainCapabilities: xdrString(nil, "<domainCapabilities>\n  <domain>xen</domain>\n  <machine>xenpv</machine>\n</domainCapabilities>\n"),
	}).path)
	b, err := remote(client(t, h.ro), rpc.ProcConnectGetCapabilities, nil)
	if err != nil || !strings.Contains(string(b), "flag='1073741824'") || !strings.Contains(string(b), "<guest type='xenpvh' arch='x86_64' machine='xenpvh' supported='yes'/>") {
		t.Errorf("%v\n%s", err, b)
	}
	b, err = remote(client(t, h.rw), rpc.ProcConnectGetDomainCapabilities, nil)
	if err != nil || !strings.Contains(string(b), "supported='no'>") || !strings.Contains(string(b), "a PV guest cannot be checkpointed") {
		t.Errorf("%v\n%s", err, b)
	}
}
