package driver

import (
	stdxml "encoding/xml"
	"fmt"
	"strings"

	"kemari/driver/rpc"
	"kemari/migrate/control"
	"kemari/xml"
)

// request is what a client wants protected, and how.
type request struct {
	domain     rpc.Domain
	target     Target
	migrateURI string
	destXML    string
}

// acceptedFlags are the flags of a migration that go with protection: those that
// say how a client reaches it, and those that ask for what is always done.
const acceptedFlags = rpc.MigrateKemari | rpc.MigratePeer2Peer | rpc.MigrateLive |
	rpc.MigrateChangeProtection | rpc.MigrateUnsafe | rpc.MigrateAbortOnError | rpc.MigrateTLS

// flagNames are the flags that would change what protection means.
var flagNames = map[uint]string{
	2: "tunnelled", 3: "persistent", 4: "undefinesource", 5: "suspend",
	6: "copy-storage-all", 7: "copy-storage-inc", 10: "offline", 11: "compressed",
	13: "auto-converge", 14: "rdma-pin-all", 15: "postcopy", 17: "parallel",
	18: "copy-storage-synchronous-writes", 19: "postcopy-resume", 20: "zerocopy",
}

func flagNamesOf(flags uint32) (names []string) {
	for bit := range uint(32) {
		if flags&(1<<bit) == 0 {
			continue
		}
		name := flagNames[bit]
		if name == "" {
			name = fmt.Sprintf("bit %d", bit)
		}
		names = append(names, name)
	}
	return names
}

// tuning are the parameters of a migration that speak of how fast it goes, which
// a guest that is protected for days does not need: they are ignored.
var tuning = []string{"bandwidth", "auto_converge.", "compression", "parallel.", "tls.destination"}

func parseRequest(a *rpc.MigratePerformArgs) (*request, error) {
	if a.Flags&rpc.MigratePeer2Peer == 0 || a.URI == nil || *a.URI == "" {
		return nil, errManaged
	}
	if refused := flagNamesOf(a.Flags &^ acceptedFlags); len(refused) > 0 {
		return nil, refuse(rpc.CodeArgumentUnsupp, "protection does not go with "+strings.Join(refused, ", "), "leave it out")
	}
	t, err := ParseTarget(*a.URI)
	if err != nil {
		return nil, err
	}
	r := &request{domain: a.Domain, target: t}
	for _, p := range a.Params {
		if err := r.param(p); err != nil {
			return nil, err
		}
	}
	return r, nil
}

func (r *request) param(p rpc.TypedParam) error {
	for _, t := range tuning {
		if strings.HasPrefix(p.Field, t) {
			return nil
		}
	}
	text := func(v *string) error {
		if p.Type != rpc.ParamString {
			return refuse(rpc.CodeInvalidArg, fmt.Sprintf("parameter %q is not a string", p.Field), "")
		}
		*v = p.String
		return nil
	}
	switch p.Field {
	case "destination_xml":
		if err := text(&r.destXML); err != nil {
			return err
		}
		return checkIdentity(r.destXML, r.domain.Name, r.domain.UUID)
	case "migrate_uri":
		if err := text(&r.migrateURI); err != nil {
			return err
		}
		_, err := parseMigrateURI(r.migrateURI)
		return err
	case "destination_name":
		var name string
		if err := text(&name); err != nil {
			return err
		}
		if name != r.domain.Name {
			return refuse(rpc.CodeArgumentUnsupp, "the standby's copy cannot have another name, since it is the same guest", "leave the new name out")
		}
		return nil
	}
	return refuse(rpc.CodeArgumentUnsupp, fmt.Sprintf("parameter %q has no meaning for protection", p.Field), "leave it out")
}

// checkIdentity says whether the XML is of that very domain.
func checkIdentity(doc, name string, id rpc.UUID) error {
	var d struct {
		XMLName stdxml.Name `xml:"domain"`
		Name    string      `xml:"name"`
		UUID    string      `xml:"uuid"`
	}
	if err := stdxml.Unmarshal([]byte(doc), &d); err != nil {
		return refuse(rpc.CodeInvalidArg, fmt.Sprintf("the XML for the standby cannot be read: %v", err), "")
	}
	if got := strings.TrimSpace(d.Name); got != name {
		return refuse(rpc.CodeInvalidArg, fmt.Sprintf("the XML for the standby is of guest %q", got), fmt.Sprintf("give that of %q", name))
	}
	if got := strings.TrimSpace(d.UUID); got != id.String() {
		return refuse(rpc.CodeInvalidArg, fmt.Sprintf("the XML for the standby has the UUID %q", got), "give that of "+id.String())
	}
	return nil
}

// settings returns what holds for the protection: of the XML given with the
// request, else of the guest's own, else the defaults.
func (r *request) settings(guestXML string) (*xml.Element, error) {
	for _, doc := range []string{r.destXML, guestXML} {
		if doc == "" {
			continue
		}
		e, err := xml.FromDomain(doc)
		if err != nil {
			return nil, refuse(rpc.CodeConfigUnsupp, err.Error(), "correct it with virsh edit, or virsh metadata")
		}
		if e != nil {
			return e, nil
		}
	}
	return xml.Default(), nil
}

// arbiter returns who decides a failover. Without the element nobody does, and
// the standby waits to be told.
func arbiter(e *xml.Element) (control.Arbiter, error) {
	if e.Arbiter == nil {
		return control.Arbiter{Type: arbiterNone}, nil
	}
	if e.Arbiter.Type != arbiterNone {
		return control.Arbiter{}, refuse(rpc.CodeConfigUnsupp, fmt.Sprintf("the arbiter %q is not supported yet", e.Arbiter.Type), "use <arbiter type='none'/>")
	}
	return control.Arbiter{Type: arbiterNone, Automatic: e.Arbiter.Automatic}, nil
}
