package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"kemari/driver/rpc"
	"kemari/migrate/control"
	"kemari/migrate/migratetest"
)

// protectedPair is a pair of hosts with a guest that is protected.
func protectedPair(t *testing.T) (a, b *testHost) {
	t.Helper()
	return protectedPairOn(t, newLibvirtd(t, nil).path)
}

func protectedPairOn(t *testing.T, upstream string) (a, b *testHost) {
	t.Helper()
	a, b = pairOn(t, upstream)
	if err := protectCall(t, a, performArgs(t)); err != nil {
		t.Fatal(err)
	}
	replicatorOf(t, a).handed = func() error {
		standbyOf(t, b).phase(control.Active)
		return nil
	}
	return a, b
}

func replicatorOf(t *testing.T, h *testHost) *process { return processOf(t, h, unitReplicator) }
func standbyOf(t *testing.T, h *testHost) *process    { return processOf(t, h, unitStandby) }

func processOf(t *testing.T, h *testHost, unit string) *process {
	t.Helper()
	h.units.mu.Lock()
	defer h.units.mu.Unlock()
	p := h.units.running[unitName(unit, parseUUID(t, g1UUID))]
	if p == nil {
		t.Fatalf("%s: no %s", h.host.Name, unit)
	}
	return p
}

func plainMigration(t *testing.T, uri string) *rpc.MigratePerformArgs {
	args := performArgs(t)
	args.Flags &^= rpc.MigrateKemari
	args.URI = &uri
	return args
}

// A plain migration of a protected guest to its standby, peer to peer.
func TestSwitchover(t *testing.T) {
	for _, uri := range []string{"kemari+ssh://xen2/system", "kemari+ssh://XEN2/system", "kemari+ssh://10.0.0.2/system", "xenkemari+ssh://root@xen2/system"} {
		a, b := protectedPair(t)
		if err := protectCall(t, a, plainMigration(t, uri)); err != nil {
			t.Errorf("%s: %v", uri, err)
		}
		if st := standbyOf(t, b).status(); st.Phase != control.Active {
			t.Errorf("%s: standby %+v", uri, st)
		}
		st, err := a.d.look(t.Context(), control.Primary, parseUUID(t, g1UUID))
		if err != nil || st.Phase != control.Ended || st.SwitchedOver != "kemari+ssh://xen2/system" || st.Error != "" {
			t.Errorf("%s: %+v, %v", uri, st, err)
		}
	}
}

func TestSwitchoverRefused(t *testing.T) {
	for name, c := range map[string]struct {
		change func(a, b *testHost, args *rpc.MigratePerformArgs)
		code   rpc.Code
		say    []string
	}{
		"elsewhere": {func(a, _ *testHost, args *rpc.MigratePerformArgs) {
			a.dialTo(newHost(t, "xen3", newLibvirtd(t, nil).path))
			args.URI = ptr("kemari+ssh://xen3/system")
		}, rpc.CodeOperationInvalid, []string{"protects it on kemari+ssh://xen2/system", "lose track of the pages", "domjobabort g1"}},
		"not ours":    {func(_, _ *testHost, args *rpc.MigratePerformArgs) { args.URI = ptr("xen+ssh://xen3/system") }, rpc.CodeOperationInvalid, []string{"migrate it to kemari+ssh://xen2/system"}},
		"not managed": {func(_, _ *testHost, args *rpc.MigratePerformArgs) { args.Flags &^= rpc.MigratePeer2Peer }, rpc.CodeArgumentUnsupp, []string{"virsh migrate --p2p"}},
		"flags":       {func(_, _ *testHost, args *rpc.MigratePerformArgs) { args.Flags |= 1<<5 | 1<<15 }, rpc.CodeArgumentUnsupp, []string{"suspend, postcopy"}},
		"no way to define it": {func(a, _ *testHost, args *rpc.MigratePerformArgs) {
			args.Flags |= rpc.MigratePersistDest
			a.d.cfg.Dial = func(context.Context, Target) (io.ReadWriteCloser, error) { return nil, errors.New("no way there") }
		}, rpc.CodeOperationFailed, []string{"cannot hand over guest", "standby xen2: no way there"}},
		"nothing to define": {func(a, _ *testHost, args *rpc.MigratePerformArgs) {
			args.Flags |= rpc.MigratePersistDest
			a.d.cfg.Libvirt = func(context.Context) (Libvirt, error) { return nil, errors.New("libvirtd is gone") }
		}, rpc.CodeOperationFailed, []string{"cannot hand over guest", "libvirtd is gone"}},
		"rename": {func(_, _ *testHost, args *rpc.MigratePerformArgs) {
			args.Params = []rpc.TypedParam{{Field: "destination_name", Type: rpc.ParamString, String: "g2"}}
		}, rpc.CodeArgumentUnsupp, []string{"another name"}},
		"xml": {func(_, _ *testHost, args *rpc.MigratePerformArgs) {
			args.Params = []rpc.TypedParam{{Field: "destination_xml", Type: rpc.ParamString, String: g1XML}}
		}, rpc.CodeArgumentUnsupp, []string{"another definition"}},
		"standby unfit": {func(a, _ *testHost, _ *rpc.MigratePerformArgs) {
			replicatorOf(t, a).handed = func() error { return errors.New("the standby is lost: take over: no memory") }
		}, rpc.CodeOperationFailed, []string{`cannot hand over guest "g1"`, "no memory"}},
		"alone":   {func(a, _ *testHost, _ *rpc.MigratePerformArgs) { replicatorOf(t, a).phase(control.Alone) }, rpc.CodeOperationInvalid, []string{"while Kemari protects it"}},
		"copying": {func(a, _ *testHost, _ *rpc.MigratePerformArgs) { replicatorOf(t, a).phase(control.Copying) }, rpc.CodeOperationInvalid, []string{"while Kemari protects it"}},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := protectedPair(t)
			args := plainMigration(t, "kemari+ssh://xen2/system")
			c.change(a, b, args)
			wantError(t, protectCall(t, a, args), c.code, c.say...)
			if st := standbyOf(t, b).status(); st.Phase != control.Ready {
				t.Errorf("standby %+v", st)
			}
			if st := replicatorOf(t, a).status(); st.Phase == control.Ended {
				t.Errorf("primary %+v", st)
			}
		})
	}
}

// managed makes the calls of libvirt's client that manages a migration, and returns
// the domain that it ends with.
func managed(t *testing.T, a, b *testHost, flags uint32) (*rpc.Domain, error) {
	t.Helper()
	src, dst := client(t, a.rw), client(t, b.rw)
	dom := g1(t)
	reply, err := remote(src, rpc.ProcDomainMigrateBegin3Params, (&rpc.MigrateBeginArgs{Domain: dom, Flags: flags}).Append(nil))
	if err != nil {
		return nil, err
	}
	begun, err := rpc.DecodeMigrateBeginRet(reply)
	if err != nil || !strings.Contains(begun.XML, "<name>g1</name>") {
		t.Fatalf("begun %+v, %v", begun, err)
	}
	params := []rpc.TypedParam{{Field: "destination_xml", Type: rpc.ParamString, String: begun.XML}}
	cancelled, first := int32(1), error(nil)
	var cookie []byte
	if reply, first = remote(dst, rpc.ProcDomainMigratePrepare3Params, (&rpc.MigratePrepareArgs{Params: params, Cookie: begun.Cookie, Flags: flags}).Append(nil)); first != nil {
		return nil, first
	}
	prepared, err := rpc.DecodeMigratePrepareRet(reply)
	if err != nil || prepared.URI == nil {
		t.Fatalf("prepared %+v, %v", prepared, err)
	}
	params = append(params, rpc.TypedParam{Field: "migrate_uri", Type: rpc.ParamString, String: *prepared.URI})
	if reply, first = remote(src, rpc.ProcDomainMigratePerform3Params, (&rpc.MigratePerformArgs{Domain: dom, Params: params, Cookie: prepared.Cookie, Flags: flags}).Append(nil)); first == nil {
		cancelled = 0
		if cookie, err = rpc.DecodeOpaque(reply); err != nil {
			t.Fatal(err)
		}
	}
	params = append(params, rpc.TypedParam{Field: "destination_name", Type: rpc.ParamString, String: "g1"})
	reply, err = remote(dst, rpc.ProcDomainMigrateFinish3Params, (&rpc.MigrateFinishArgs{Params: params, Cookie: cookie, Flags: flags, Cancelled: cancelled}).Append(nil))
	var ret *rpc.MigrateFinishRet
	if err == nil {
		if ret, err = rpc.DecodeMigrateFinishRet(reply); err != nil {
			t.Fatal(err)
		}
	}
	if first == nil {
		first = err
	}
	confirm := append((&rpc.MigrateBeginArgs{Domain: dom, Params: params}).Append(nil), 0, 0, 0, 0, 0, 0, 0, byte(cancelled))
	if _, err := remote(src, rpc.ProcDomainMigrateConfirm3Params, confirm); err != nil {
		t.Errorf("confirm: %v", err)
	}
	if ret == nil {
		return nil, first
	}
	return &ret.Domain, first
}

// The same as virsh migrate --live makes it: the client manages it.
func TestSwitchoverManaged(t *testing.T) {
	a, b := protectedPair(t)
	b.libvirt.guest.ID = 9
	dom, err := managed(t, a, b, rpc.MigrateLive)
	if err != nil || dom.Name != "g1" || dom.UUID != parseUUID(t, g1UUID) || dom.ID != 9 {
		t.Errorf("%+v, %v", dom, err)
	}
	if st := standbyOf(t, b).status(); st.Phase != control.Active {
		t.Errorf("standby %+v", st)
	}
}

func TestSwitchoverManagedRefused(t *testing.T) {
	// Not to that host.
	a, b := protectedPair(t)
	third := newHost(t, "xen3", newLibvirtd(t, nil).path)
	_, err := managed(t, a, third, rpc.MigrateLive)
	wantError(t, err, rpc.CodeOperationInvalid, "this host is not its standby", "domjobabort g1")
	_, err = managed(t, a, b, rpc.MigrateLive|1<<10)
	wantError(t, err, rpc.CodeArgumentUnsupp, "offline")
	// It fails at last: the client finishes it as cancelled, which must not reach the
	// shadow's libvirtd.
	replicatorOf(t, a).handed = func() error { return errors.New("it does not want to") }
	_, err = managed(t, a, b, rpc.MigrateLive)
	wantError(t, err, rpc.CodeOperationFailed, "it does not want to")
	if st := standbyOf(t, b).status(); st.Phase != control.Ready {
		t.Errorf("standby %+v", st)
	}
	// A cookie of another protection.
	args := plainMigration(t, "")
	args.Cookie = switchCookie{Name: "g1", UUID: g1UUID, Generation: 1}.encode()
	wantError(t, protectCall(t, a, args), rpc.CodeOperationInvalid, "protected anew")
	// Finish and confirm of what is not ours pass.
	up := newLibvirtd(t, nil)
	h := newHost(t, "xen4", up.path)
	for _, proc := range []rpc.Procedure{rpc.ProcDomainMigrateFinish3Params, rpc.ProcDomainMigrateConfirm3Params} {
		payload := (&rpc.MigrateFinishArgs{}).Append(nil)
		if proc == rpc.ProcDomainMigrateConfirm3Params {
			payload = (&rpc.AbortJobArgs{Domain: g1(t)}).Append(nil)
		}
		if _, err := remote(client(t, h.rw), proc, payload); err != nil {
			t.Errorf("%d: %v", proc, err)
		}
	}
	for _, p := range up.packets() {
		if p.Procedure == rpc.ProcDomainMigrateFinish3Params || p.Procedure == rpc.ProcDomainMigrateConfirm3Params {
			continue
		}
		t.Errorf("libvirtd saw %d", p.Procedure)
	}
	if n := len(up.packets()); n != 2 {
		t.Errorf("libvirtd saw %d calls", n)
	}
}

func FuzzSwitchCookie(f *testing.F) {
	f.Add(switchCookie{Name: "g1", UUID: g1UUID, Generation: 7}.encode())
	f.Add([]byte(cookiePrefix))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, id := decodeCookie(b)
		if c == nil {
			if id != (rpc.UUID{}) {
				t.Errorf("%q is none, and of %v", b, id)
			}
			return
		}
		if again, _ := decodeCookie(c.encode()); again == nil || *again != *c || c.UUID != id.String() {
			t.Errorf("%q: %+v and then %+v", b, c, again)
		}
	})
}

// After a switchover the guest is protected by the host it has left, with the same
// settings.
func TestSwapRoles(t *testing.T) {
	a, b := protectedPair(t)
	before := replicatorOf(t, a).primary
	var asked Target
	b.d.cfg.Dial = func(_ context.Context, to Target) (io.ReadWriteCloser, error) {
		asked = to
		return net.Dial("unix", a.rw)
	}
	b.units.scripts[control.Primary] = func(p *process) error {
		standbyOf(t, a).phase(control.Ready)
		p.phase(control.Protected)
		return nil
	}
	// The guest's start there has somebody else try, in vain.
	_, leave, err := b.d.begin(t.Context(), g1(t))
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(300*time.Millisecond, leave)
	if err := protectCall(t, a, plainMigration(t, "kemari+ssh://xen2/system")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is protected the other way round", func() bool {
		st, err := b.d.look(t.Context(), control.Primary, parseUUID(t, g1UUID))
		return err == nil && st.Phase == control.Protected
	})
	p, s := replicatorOf(t, b).primary, standbyOf(t, a).standby
	if asked.URI != "kemari+ssh://xen1/system" || p.StandbyURI != asked.URI || s.PrimaryHost != "xen2" || p.Generation <= before.Generation ||
		p.Checkpoint != before.Checkpoint ||
		p.Heartbeat != before.Heartbeat || p.Arbiter != before.Arbiter {
		t.Errorf("%+v\n%+v, %v", p, before, asked)
	}
	st, err := a.d.look(t.Context(), control.Primary, parseUUID(t, g1UUID))
	if err != nil || st.Hint != "" {
		t.Errorf("%+v, %v", st, err)
	}
}

// Without a way back the switchover has been made all the same, and it is said how the
// guest can be protected.
func TestSwapRolesFails(t *testing.T) {
	a, _ := protectedPair(t)
	if err := protectCall(t, a, plainMigration(t, "kemari+ssh://xen2/system")); err != nil {
		t.Fatal(err)
	}
	var st control.Status
	eventually(t, "it is said", func() bool {
		var err error
		st, err = a.d.look(t.Context(), control.Primary, parseUUID(t, g1UUID))
		return err == nil && st.Hint != ""
	})
	for _, say := range []string{"no way there", "virsh -c kemari+ssh://xen2/system migrate --kemari --live g1 kemari+ssh://xen1/system"} {
		if !strings.Contains(st.Hint, say) {
			t.Errorf("%q does not say %q", st.Hint, say)
		}
	}
	if st.Error != "" || st.SwitchedOver == "" {
		t.Errorf("%+v", st)
	}
}

// Nobody is protected by asking but who was just taken over, and by no other host.
func TestReprotectRefused(t *testing.T) {
	_, b := protectedPair(t)
	good := reprotectRequest{
		Name: "g1", UUID: g1UUID, Generation: standbyOf(t, b).standby.Generation,
		Transport:  control.TransportTLS,
		Checkpoint: control.Checkpoint{Trigger: "output", Min: 5 * time.Millisecond, Max: 200 * time.Millisecond, Paused: 30},
		Heartbeat:  control.Heartbeat{Interval: 100 * time.Millisecond, Timeout: 500 * time.Millisecond},
	}
	ask := func(req reprotectRequest) error {
		return callPeer(t.Context(), client(t, b.rw), procReprotect, req, &reprotectReply{})
	}
	wantError(t, ask(good), rpc.CodeOperationInvalid, "was not taken over here")
	standbyOf(t, b).phase(control.Active)
	for name, change := range map[string]func(*reprotectRequest){
		"uuid":       func(r *reprotectRequest) { r.UUID = "../../etc" },
		"generation": func(r *reprotectRequest) { r.Generation++ },
		"name":       func(r *reprotectRequest) { r.Name = "g2" },
		"heartbeat":  func(r *reprotectRequest) { r.Heartbeat.Timeout = -1 },
		"trigger":    func(r *reprotectRequest) { r.Checkpoint.Trigger = "whim" },
		"arbiter":    func(r *reprotectRequest) { r.Arbiter = control.Arbiter{Type: "dice", Automatic: true} },
	} {
		req := good
		change(&req)
		if err := ask(req); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// movingLibvirtd answers as much of what a client asks before it migrates g1 as the
// client wants to know. A call of the migration itself must not come to it.
func movingLibvirtd(t *testing.T) *fakeLibvirtd {
	t.Helper()
	return newLibvirtd(t, func(_ net.Conn, p *rpc.Packet) *rpc.Packet {
		var b []byte
		switch p.Procedure {
		case rpc.ProcConnectSupportsFeature:
			b = rpc.Int(1).Append(nil)
		case 22, 23, 24: // lookups
			dom := g1(t)
			dom.ID = 7
			b = with(dom)
		case rpc.ProcDomainGetState:
			b = (&rpc.DomainState{State: 1}).Append(nil)
		case rpc.ProcDomainGetInfo:
			b = (&rpc.DomainInfo{State: 1}).Append(nil)
		case rpc.ProcConnectOpen, rpc.ProcConnectClose:
		case rpc.ProcDomainMigratePrepare3Params, rpc.ProcDomainMigrateFinish3Params, rpc.ProcDomainMigrateConfirm3Params,
			rpc.ProcDomainMigrateBegin3Params, rpc.ProcDomainMigratePerform3Params:
			t.Errorf("libvirtd saw procedure %d", p.Procedure)
		default:
			return rpc.ErrorReply(p.Header, &rpc.Error{Code: rpc.CodeUnsupported, From: rpc.FromRPC, Message: fmt.Sprintf("procedure %d", p.Procedure)})
		}
		return &rpc.Packet{Header: p.Reply(rpc.OK), Payload: b}
	})
}

// Debian's own virsh makes one, in both ways, and says the reason where it cannot.
func TestSwitchoverVirsh(t *testing.T) {
	migratetest.Need(t, "virsh", func() error { _, err := exec.LookPath("virsh"); return err })
	for name, c := range map[string]struct {
		args    []string
		say     string // else it succeeds
		defined bool   // there, and no more here
	}{
		"managed":                  {args: []string{"--live"}},
		"peer to peer":             {args: []string{"--live", "--p2p"}},
		"not live":                 {},
		"persistent":               {args: []string{"--live", "--persistent", "--undefinesource"}, defined: true},
		"persistent, peer to peer": {args: []string{"--live", "--p2p", "--persistent", "--undefinesource"}, defined: true},
		"offline":                  {args: []string{"--persistent", "--offline"}, say: "a switchover does not go with offline"},
		"fails":                    {args: []string{"--live"}, say: "no memory"},
		"elsewhere":                {args: []string{"--live"}, say: "this host is not its standby"},
	} {
		t.Run(name, func(t *testing.T) {
			up := movingLibvirtd(t)
			a, b := protectedPairOn(t, up.path)
			to := b
			switch name {
			case "fails":
				replicatorOf(t, a).handed = func() error { return errors.New("the standby is lost: no memory") }
			case "elsewhere":
				to = newHost(t, "xen3", up.path)
			}
			dest := uri + "?socket=" + to.rw
			if strings.Contains(name, "peer to peer") {
				dest = "kemari+ssh://xen2/system"
			}
			out, err := virsh(t, a.rw, append(append([]string{"migrate"}, c.args...), "g1", dest)...)
			if c.say == "" && err != nil || c.say != "" && (err == nil || !strings.Contains(out, c.say)) {
				t.Errorf("%v: %s", err, out)
			}
			want := control.Active
			if c.say != "" {
				want = control.Ready
			}
			if st := standbyOf(t, b).status(); st.Phase != want {
				t.Errorf("standby %+v", st)
			}
			if c.defined != (len(b.libvirt.defined) == 1) || c.defined != slices.Equal(a.libvirt.defined, []string{""}) {
				t.Errorf("defined %q here and %q there", a.libvirt.defined, b.libvirt.defined)
			}
		})
	}
}

// What a switchover leaves of the guest's definitions.
func TestSwitchoverDefinitions(t *testing.T) {
	const element = "<metadata><kemari xmlns='urn:kemari:domain:1.0' autostart='yes'><standby uri='kemari+ssh://xen2/system'/><checkpoint max='99'/></kemari></metadata><devices>"
	own := strings.Replace(g1XML, "<devices>", element, 1)
	for name, c := range map[string]struct {
		flags             uint32
		next              string // the XML of the guest's next start here
		hereErr, thereErr error
		here, there       []string // what is defined on the two hosts
		say               []string // else it succeeds
	}{
		"neither":  {},
		"undefine": {flags: rpc.MigrateUndefineSource, here: []string{""}},
		"persist":  {flags: rpc.MigratePersistDest, next: g1XML + "<!--next-->", there: []string{g1XML + "<!--next-->"}},
		"both":     {flags: rpc.MigratePersistDest | rpc.MigrateUndefineSource, there: []string{g1XML}, here: []string{""}},
		// It names the host that protects it now, which is the one it came from.
		"element": {flags: rpc.MigratePersistDest, next: own, there: []string{"<standby uri='kemari+ssh://xen1/system'/>"}},
		"not defined there": {flags: rpc.MigratePersistDest | rpc.MigrateUndefineSource, thereErr: errors.New("no room"),
			say: []string{`guest "g1" was handed over and runs at its standby now`, "it is not defined there, and so still is on this host", "no room", "define it there"}},
		"not undefined": {flags: rpc.MigratePersistDest | rpc.MigrateUndefineSource, there: []string{g1XML}, hereErr: errors.New("stuck"),
			say: []string{`guest "g1" was handed over and runs at its standby now`, "still defined on this host", "stuck"}},
	} {
		for _, way := range []string{"peer to peer", "managed"} {
			if way == "managed" && c.flags != rpc.MigratePersistDest|rpc.MigrateUndefineSource {
				continue
			}
			t.Run(name+" "+way, func(t *testing.T) {
				a, b := protectedPair(t)
				a.libvirt.next, a.libvirt.defineErr, b.libvirt.defineErr = c.next, c.hereErr, c.thereErr
				var err error
				if way == "managed" {
					_, err = managed(t, a, b, rpc.MigrateLive|c.flags)
				} else {
					args := plainMigration(t, "kemari+ssh://xen2/system")
					args.Flags |= c.flags
					err = protectCall(t, a, args)
				}
				if len(c.say) > 0 {
					wantError(t, err, rpc.CodeOperationFailed, c.say...)
				} else if err != nil {
					t.Error(err)
				}
				if st := standbyOf(t, b).status(); st.Phase != control.Active {
					t.Errorf("standby %+v", st)
				}
				same := func(got, want string) bool { return got == want || want != "" && strings.Contains(got, want) }
				if !slices.EqualFunc(a.libvirt.defined, c.here, same) || !slices.EqualFunc(b.libvirt.defined, c.there, same) {
					t.Errorf("defined %q here and %q there", a.libvirt.defined, b.libvirt.defined)
				}
				// The roles swap nevertheless; here that cannot be, and is noted.
				eventually(t, "the roles are to swap", func() bool {
					st, err := a.d.look(t.Context(), control.Primary, parseUUID(t, g1UUID))
					return err == nil && st.Hint != ""
				})
			})
		}
	}
}

// Nobody defines a guest here by asking but who has just handed it over.
func TestKeepRefused(t *testing.T) {
	_, b := protectedPair(t)
	good := keepRequest{Name: "g1", UUID: g1UUID, Generation: standbyOf(t, b).standby.Generation, DomainXML: g1XML}
	ask := func(req keepRequest) error {
		return callPeer(t.Context(), client(t, b.rw), procKeep, req, &keepReply{})
	}
	wantError(t, ask(good), rpc.CodeOperationInvalid, "was not taken over here")
	standbyOf(t, b).phase(control.Active)
	for name, change := range map[string]func(*keepRequest){
		"uuid":       func(r *keepRequest) { r.UUID = "../../etc" },
		"generation": func(r *keepRequest) { r.Generation++ },
		"name":       func(r *keepRequest) { r.Name = "g2" },
		"another":    func(r *keepRequest) { r.DomainXML = strings.Replace(g1XML, "g1", "g2", 1) },
		"not XML":    func(r *keepRequest) { r.DomainXML = "g1" },
		"element": func(r *keepRequest) {
			r.DomainXML = strings.Replace(g1XML, "<devices>", "<metadata><kemari xmlns='urn:kemari:domain:1.0'><moon/></kemari></metadata><devices>", 1)
		},
	} {
		req := good
		change(&req)
		if err := ask(req); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if len(b.libvirt.defined) != 0 {
		t.Errorf("defined %q", b.libvirt.defined)
	}
	if err := ask(good); err != nil || len(b.libvirt.defined) != 1 {
		t.Errorf("%v, defined %q", err, b.libvirt.defined)
	}
}
