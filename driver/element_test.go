package driver

import (
	"bytes"
	"encoding/binary"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"kemari/driver/rpc"
	"kemari/migrate/control"
	"kemari/xml"
)

// element puts an element, without its namespace, at the top level of g1.
func element(inner string) string {
	return strings.Replace(g1XML, "<devices>", "<kemari"+inner+"</kemari><devices>", 1)
}

func xdrString(b []byte, s string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
	b = append(b, s...)
	return append(b, make([]byte, -len(s)&3)...)
}

// message is one of this layout with doc for all XML.
func message(t testing.TB, l rpc.Layout, doc string) []byte {
	var b []byte
	one := []byte{0, 0, 0, 1}
	for _, c := range l {
		switch c {
		case 'd':
			b = append(b, with(g1(t))...)
		case 's', 'o':
			b = xdrString(b, "/file")
		case 'S':
			b = append(b, 0, 0, 0, 0)
		case 'u':
			b = append(b, 0, 0, 0, 2)
		case 'U':
			b = append(b, 0, 0, 0, 0, 0, 0, 0, 2)
		case 'x':
			b = xdrString(b, doc)
		case 'X':
			b = xdrString(append(b, one...), doc)
		case 'p':
			b = xdrString(append(b, one...), "xml")
			b = xdrString(append(b, 0, 0, 0, byte(rpc.ParamString)), doc)
		}
	}
	return b
}

func lower(t testing.TB, doc string) string {
	t.Helper()
	s, err := xml.Lower(doc)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestElementGoesDown: in every call that brings XML libvirtd finds the element in
// <metadata>, and a wrong one never gets there.
func TestElementGoesDown(t *testing.T) {
	up := newLibvirtd(t, nil)
	h := newHost(t, "xen1", up.path)
	c := client(t, h.rw)
	good := element(" autostart='yes'><standby uri='kemari+ssh://xen2/system'/>")
	for proc, l := range lowered {
		got, err := remote(c, proc, message(t, l, good))
		if err != nil || !bytes.Equal(got, message(t, l, lower(t, good))) {
			t.Errorf("procedure %d: %v, libvirtd got\n%q", proc, err, got)
		}
		if got, err := remote(c, proc, message(t, l, g1XML)); err != nil || !bytes.Equal(got, message(t, l, g1XML)) {
			t.Errorf("procedure %d, no element: %v, libvirtd got\n%q", proc, err, got)
		}
		before := len(up.packets())
		_, err = remote(c, proc, message(t, l, element("><moon/>")))
		wantError(t, err, rpc.CodeXMLError, "kemari/moon: unknown element")
		if len(up.packets()) != before {
			t.Errorf("procedure %d: libvirtd saw a wrong element", proc)
		}
		// What is no message of this kind is libvirtd's to refuse.
		if got, err := remote(c, proc, []byte{0, 0, 0, 9}); err != nil && proc != rpc.ProcDomainMigrateBegin3 && guarded[proc].what == "" {
			t.Errorf("procedure %d, malformed: %q, %v", proc, got, err)
		}
	}
}

func TestElementComesUp(t *testing.T) {
	good := element(" autostart='yes'><standby uri='kemari+ssh://xen2/system'/>")
	kept := lower(t, good)
	answers := map[rpc.Procedure]any{rpc.ProcDomainMigrateBegin3: xdrString(nil, kept)}
	for proc := range raised {
		answers[proc] = xdrString(nil, kept)
	}
	h := newHost(t, "xen1", answering(t, answers).path)
	got, err := remote(client(t, h.ro), rpc.ProcDomainGetXMLDesc, with(g1(t), 0, 0, 0, 0))
	if err != nil || !bytes.Equal(got, xdrString(nil, xml.Raise(kept))) {
		t.Errorf("read-only: %v\n%q", err, got)
	}
	c := client(t, h.rw)
	for proc := range raised {
		got, err := remote(c, proc, with(g1(t), 0, 0, 0, 2))
		if want := xml.Raise(kept); err != nil || !bytes.Equal(got, xdrString(nil, want)) || !strings.Contains(want, "<kemari autostart='yes'>") {
			t.Errorf("procedure %d: %v\n%q", proc, err, got)
		}
		got, err = remote(c, proc, with(g1(t), 0, 0, 0, 8))
		if err != nil || !bytes.Equal(got, xdrString(nil, kept)) {
			t.Errorf("procedure %d, migratable: %v\n%q", proc, err, got)
		}
	}
	// What libvirtd answers otherwise goes through.
	for _, a := range []any{noDomain, []byte("no string")} {
		h := newHost(t, "xen1", answering(t, map[rpc.Procedure]any{rpc.ProcDomainGetXMLDesc: a}).path)
		got, err := remote(client(t, h.rw), rpc.ProcDomainGetXMLDesc, with(g1(t), 0, 0, 0, 0))
		if e, ok := a.(*rpc.Error); ok {
			wantError(t, err, e.Code, e.Message)
		} else if err != nil || !bytes.Equal(got, a.([]byte)) {
			t.Errorf("%q, %v", got, err)
		}
	}
}

func metadata(t testing.TB, ns, doc string, flags uint32) []byte {
	a := rpc.SetMetadataArgs{Domain: g1(t), Type: rpc.MetadataElement, Metadata: &doc, Key: ptr("kemari"), URI: &ns, Flags: flags}
	if doc == "" {
		a.Metadata = nil
	}
	return a.Append(nil)
}

func TestSetMetadata(t *testing.T) {
	h := newHost(t, "xen1", newLibvirtd(t, nil).path)
	c := client(t, h.rw)
	for _, doc := range []string{"<kemari/>", "<kemari autostart='no'><checkpoint max='9'/></kemari>", ""} {
		if _, err := remote(c, rpc.ProcDomainSetMetadata, metadata(t, xml.Namespace, doc, 0)); err != nil {
			t.Errorf("%q: %v", doc, err)
		}
	}
	for doc, want := range map[string]string{
		"<kemari autostart='yes'/>": "needs a <standby", "<kemari><x/></kemari>": "kemari/x: unknown", "<k/>": "element <k>", "<": "kemari: ",
	} {
		_, err := remote(c, rpc.ProcDomainSetMetadata, metadata(t, xml.Namespace, doc, 0))
		wantError(t, err, rpc.CodeXMLError, want)
		if _, err := remote(c, rpc.ProcDomainSetMetadata, metadata(t, "urn:other", doc, 0)); err != nil {
			t.Errorf("metadata of others: %v", err)
		}
	}
}

// TestChangeProtected has what virsh edit and virsh metadata may do to a protected
// guest.
func TestChangeProtected(t *testing.T) {
	const stored = "><checkpoint max='100'/>"
	for name, c := range map[string]struct {
		doc    string
		refuse []string             // why, if so
		set    []control.Checkpoint // what the replicator is told
	}{
		"nothing":                   {doc: element(stored)},
		"a title":                   {doc: strings.Replace(element(stored), "<memory", "<title>t</title><memory", 1)},
		"autostart":                 {doc: element(" autostart='yes'><standby uri='kemari+ssh://xen2/system'/><checkpoint max='100'/>")},
		"the standby it has":        {doc: element("><standby uri='kemari+ssh://xen2/system'/><checkpoint max='100'/>")},
		"another standby":           {doc: element("><standby uri='kemari+ssh://xen3/system'/><checkpoint max='100'/>"), refuse: []string{"standby (kemari+ssh://xen2/system) cannot be changed", "domjobabort"}},
		"checkpoints":               {doc: element("><checkpoint trigger='interval' min='10' max='20'/>"), set: []control.Checkpoint{{Trigger: "interval", Min: 10 * time.Millisecond, Max: 20 * time.Millisecond, Paused: 30}}},
		"how long it is paused":     {doc: element("><checkpoint max='100' paused='10%'/>"), set: []control.Checkpoint{{Trigger: "output", Min: 5 * time.Millisecond, Max: 100 * time.Millisecond, Paused: 10}}},
		"back to what holds":        {doc: element("><checkpoint max='50'/>")},
		"checkpoints by default":    {doc: g1XML, set: []control.Checkpoint{{Trigger: "output", Min: 5 * time.Millisecond, Max: 200 * time.Millisecond, Paused: 30}}},
		"heartbeat":                 {doc: element("><checkpoint max='100'/><heartbeat interval='50'/>"), refuse: []string{"heartbeat cannot be changed"}},
		"the heartbeat it has":      {doc: element("><checkpoint max='100'/><heartbeat interval='70' timeout='700'/>")},
		"arbiter":                   {doc: element("><checkpoint max='100'/><arbiter type='none'/>")},
		"another arbiter":           {doc: element("><checkpoint max='100'/><arbiter type='none' automatic='yes'/>"), refuse: []string{"arbiter cannot be changed"}},
		"a disk":                    {doc: strings.Replace(element(stored), "<devices>", "<devices><disk type='file'><target dev='xvda'/></disk>", 1), refuse: []string{"started next: disks (xvda)"}},
		"all of it":                 {doc: element("><standby uri='kemari+ssh://xen3/system'/><checkpoint max='7'/><heartbeat interval='50'/><arbiter type='none' automatic='yes'/>"), refuse: []string{"(1) the standby", "(2) the heartbeat", "(3) the arbiter"}},
		"by its name":               {doc: strings.Replace(element("><checkpoint max='7'/>"), "<uuid>"+g1UUID+"</uuid>", "", 1), set: []control.Checkpoint{{Trigger: "output", Min: 5 * time.Millisecond, Max: 7 * time.Millisecond, Paused: 30}}},
		"of another domain":         {doc: strings.ReplaceAll(element("><standby uri='kemari+ssh://xen3/system'/>"), g1UUID, "00000000-0000-0000-0000-000000000009")},
		"of a new one, by its name": {doc: strings.NewReplacer("<uuid>"+g1UUID+"</uuid>", "", ">g1<", ">g9<").Replace(element("><checkpoint max='7'/>"))},
	} {
		t.Run(name, func(t *testing.T) {
			up := newLibvirtd(t, nil)
			h := newHost(t, "xen1", up.path)
			h.libvirt.names["g1"] = Known{UUID: parseUUID(t, g1UUID), Active: true}
			h.libvirt.guest.XML = lower(t, element(stored))
			p := protectedGuest(t, h, control.Primary, control.Protected)
			cfg := control.PrimaryConfig{
				Domain: "g1", UUID: g1UUID, Generation: 5, StandbyURI: "kemari+ssh://xen2/system",
				Checkpoint: control.Checkpoint{Trigger: "output", Min: 5 * time.Millisecond, Max: 50 * time.Millisecond, Paused: 30},
				Heartbeat:  control.Heartbeat{Interval: 70 * time.Millisecond, Timeout: 700 * time.Millisecond},
				Arbiter:    control.Arbiter{Type: "none"},
			}
			if err := control.WriteConfig(p.paths, cfg); err != nil {
				t.Fatal(err)
			}
			got, err := remote(client(t, h.rw), rpc.ProcDomainDefineXMLFlags, message(t, "xu", c.doc))
			if c.refuse != nil {
				code := rpc.CodeConfigUnsupp
				wantError(t, err, code, append(c.refuse, `guest "g1" is protected`)...)
				if len(up.packets()) != 0 {
					t.Error("libvirtd was asked to define it")
				}
			} else if err != nil || !bytes.Equal(got, message(t, "xu", lower(t, c.doc))) {
				t.Errorf("%v\n%q", err, got)
			}
			if !reflect.DeepEqual(p.set, c.set) {
				t.Errorf("the replicator was told %v, want %v", p.set, c.set)
			}
		})
	}
}

// TestChangeProtectedMetadata is the same by virsh metadata, and what happens if one
// of the two does not follow.
func TestChangeProtectedMetadata(t *testing.T) {
	answers := map[rpc.Procedure]any{}
	up := answering(t, answers)
	h := newHost(t, "xen1", up.path)
	c := client(t, h.rw)
	p := protectedGuest(t, h, control.Primary, control.Protected)
	before := control.Checkpoint{Trigger: "output", Min: 5 * time.Millisecond, Max: 50 * time.Millisecond, Paused: 30}
	cfg := control.PrimaryConfig{Generation: 5, StandbyURI: "kemari+ssh://xen2/system", Checkpoint: before}
	if err := control.WriteConfig(p.paths, cfg); err != nil {
		t.Fatal(err)
	}
	set := func(doc string) error {
		_, err := remote(c, rpc.ProcDomainSetMetadata, metadata(t, xml.Namespace, doc, affectLive))
		return err
	}
	after := control.Checkpoint{Trigger: "output", Min: 5 * time.Millisecond, Max: 9 * time.Millisecond, Paused: 30}
	if err := set("<kemari><checkpoint max='9'/></kemari>"); err != nil || !reflect.DeepEqual(p.set, []control.Checkpoint{after}) {
		t.Errorf("%v, %v", err, p.set)
	}
	wantError(t, set("<kemari><standby uri='kemari+ssh://xen7/system'/></kemari>"), rpc.CodeConfigUnsupp, "standby")
	// libvirtd does not store it: as it was.
	answers[rpc.ProcDomainSetMetadata] = noDomain
	p.set = nil
	wantError(t, set("<kemari><checkpoint max='9'/></kemari>"), rpc.CodeNoDomain)
	if !reflect.DeepEqual(p.set, []control.Checkpoint{after, before}) {
		t.Errorf("%v", p.set)
	}
	// The replicator cannot: nothing is stored.
	n := len(up.packets())
	p.tell(func(*control.Status) { p.setErr = errors.New("not now") })
	wantError(t, set("<kemari><checkpoint max='9'/></kemari>"), rpc.CodeOperationFailed, "cannot be set anew: not now")
	if len(up.packets()) != n {
		t.Error("libvirtd was asked all the same")
	}
	// Only being set up, or on its way out.
	if err := (control.WriteLast(p.paths, control.Status{Generation: 5, Phase: control.Protected})); err != nil {
		t.Fatal(err)
	}
	wantError(t, set("<kemari><checkpoint max='9'/></kemari>"), rpc.CodeOperationInvalid, "beginning or ending")
	// And when it is over, everything goes.
	p.exit("")
	delete(answers, rpc.ProcDomainSetMetadata)
	if err := set("<kemari><standby uri='kemari+ssh://xen7/system'/></kemari>"); err != nil {
		t.Error(err)
	}
}
