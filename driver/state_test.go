package driver

import (
	"net"
	"os"
	"slices"
	"strings"
	"testing"

	"kemari/driver/rpc"
	"kemari/migrate/control"
)

func (f *fakeLibvirt) XML(id rpc.UUID, next bool) (string, error) {
	if id != f.guest.UUID {
		return "", ErrNoGuest
	}
	if next && f.next != "" {
		return f.next, nil
	}
	return f.guest.XML, nil
}

// Domains knows no filters; whoever needs them looks at listed.
func (f *fakeLibvirt) Domains(flags uint32) ([]rpc.Domain, error) {
	f.listed = append(f.listed, flags)
	var doms []rpc.Domain
	for name, k := range f.names {
		doms = append(doms, rpc.Domain{Name: name, UUID: k.UUID, ID: -1})
	}
	slices.SortFunc(doms, func(a, b rpc.Domain) int { return strings.Compare(a.Name, b.Name) })
	return doms, nil
}

func (f *fakeLibvirt) Info(dom rpc.Domain) (rpc.DomainInfo, error) {
	if _, ok := f.names[dom.Name]; !ok {
		return rpc.DomainInfo{}, ErrNoGuest
	}
	return rpc.DomainInfo{State: 5, MaxMem: 2048, Memory: 1024, VCPUs: 2, CPUTime: 9}, nil
}

// tell changes what a process says of itself.
func (p *process) tell(f func(*control.Status)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f(&p.st)
}

func g1(t testing.TB) rpc.Domain { return rpc.Domain{Name: "g1", UUID: parseUUID(t, g1UUID), ID: 7} }

// with is a message of a domain and what follows it.
func with(dom rpc.Domain, rest ...byte) []byte {
	return append((&rpc.AbortJobArgs{Domain: dom}).Append(nil), rest...)
}

// answering is a libvirtd that answers each procedure with what is here for it, an
// error of libvirt's or a payload, and echoes otherwise.
func answering(t *testing.T, answers map[rpc.Procedure]any) *fakeLibvirtd {
	return newLibvirtd(t, func(_ net.Conn, p *rpc.Packet) *rpc.Packet {
		switch a := answers[p.Procedure].(type) {
		case error:
			return rpc.ErrorReply(p.Header, a)
		case []byte:
			return &rpc.Packet{Header: p.Reply(rpc.OK), Payload: a}
		}
		return &rpc.Packet{Header: p.Reply(rpc.OK), Payload: p.Payload}
	})
}

var noDomain = &rpc.Error{Code: rpc.CodeNoDomain, From: rpc.FromDomain, Message: "Domain not found"}

// silent makes h have a process of g1 that does not answer.
func silent(t testing.TB, h *testHost, role control.Role) {
	t.Helper()
	paths := control.PathsFor(h.units.root, role, g1UUID)
	if err := os.MkdirAll(paths.Dir, 0o750); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", paths.Socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
}
