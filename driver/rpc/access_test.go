package rpc

import (
	"math"
	"strings"
	"testing"
)

// highest is the last procedure that libvirt 11.3 knows.
const highest = 453

func call(proc Procedure, words ...uint32) *Packet {
	p := &Packet{Header: Header{Program: ProgramRemote, Version: 1, Procedure: proc}}
	for _, w := range words {
		p.Payload = appendUint32(p.Payload, w)
	}
	return p
}

// TestReadOnly looks at every procedure, and at the neighbours of the table.
func TestReadOnly(t *testing.T) {
	if len(procedures) != highest+1 {
		t.Fatalf("%d procedures", len(procedures)-1)
	}
	count := map[byte]int{}
	for n := Procedure(1); n <= highest; n++ {
		kind := n.lookup().kind
		count[kind]++
		switch kind {
		case 'r', 'w', 'e', 'a':
			for _, p := range []*Packet{call(n), call(n, 0xffffffff, 0xffffffff)} {
				if got := ReadOnly(p); got != (kind == 'r') {
					t.Errorf("%s (%d) of kind %c: %v", CallName(p), n, kind, got)
				}
			}
		case 'f':
			f, ok := flagged[n]
			if !ok {
				t.Errorf("%d has no flags", n)
			}
			words := make([]uint32, f.word)
			if ReadOnly(call(n)) || !ReadOnly(call(n, words...)) || !ReadOnly(call(n, append([]uint32{0xffffffff}, words...)...)) {
				t.Errorf("%d without flags", n)
			}
			for bit := range 32 {
				words[0] = 1 << bit
				if got := ReadOnly(call(n, words...)); got != (f.bits&(1<<bit) == 0) {
					t.Errorf("%d with bit %d: %v", n, bit, got)
				}
			}
		default:
			t.Errorf("%d is of kind %q", n, kind)
		}
		// A reader has nothing to say by any other way.
		for _, p := range []Program{ProgramQEMU, ProgramLXC, ProgramKemari, ProgramKeepalive, 0} {
			if ReadOnly(&Packet{Header: Header{Program: p, Version: 1, Procedure: n}}) {
				t.Errorf("%v %d passes", p, n)
			}
		}
		if ReadOnly(&Packet{Header: Header{Program: ProgramRemote, Version: 2, Procedure: n}}) {
			t.Errorf("version 2 of %d passes", n)
		}
	}
	for _, n := range []Procedure{math.MinInt32, -1, 0, highest + 1, highest + 2, 1000, math.MaxInt32} {
		if ReadOnly(call(n)) || !strings.Contains(CallName(call(n)), "procedure") {
			t.Errorf("procedure %d is known", n)
		}
	}
	if len(flagged) != count['f'] {
		t.Errorf("%d of %d procedures have flags", count['f'], len(flagged))
	}
	// Whoever changes the table shall see by how much.
	for kind, want := range map[byte]int{'r': 187, 'f': 6, 'w': 202, 'e': 53, 'a': 5} {
		if count[kind] != want {
			t.Errorf("%d procedures of kind %c, want %d", count[kind], kind, want)
		}
	}
}

// TestNames holds the table against what is known from elsewhere. What begins
// with a verb that changes something must be of that kind, whoever says what.
func TestNames(t *testing.T) {
	for proc, want := range map[Procedure]string{
		ProcConnectOpen: "virConnectOpen", ProcDomainSave: "virDomainSave", ProcConnectGetURI: "virConnectGetURI",
		ProcDomainGetJobStats: "virDomainGetJobStats", ProcDomainMigratePerform3Params: "virDomainMigratePerform3Params",
		ProcDomainEventCallbackJobCompleted: "virDomainEventCallbackJobCompleted", ProcDomainAbortJobFlags: "virDomainAbortJobFlags",
		453: "virDomainEventNICMACChange",
	} {
		if got := CallName(call(proc)); got != want {
			t.Errorf("%d: %s, want %s", proc, got, want)
		}
	}
	verbs := []string{
		"Set", "Create", "Define", "Undefine", "Destroy", "Attach", "Detach", "Update", "Delete", "Suspend", "Resume",
		"Reboot", "Reset", "Shutdown", "Save", "Restore", "Dump", "Send", "Inject", "Resize", "Upload", "Wipe", "Build",
		"Refresh", "Start", "Stop", "Abort", "Begin", "Perform", "Prepare", "Finish", "Confirm", "Revert", "Rename",
		"Pin", "Add", "Del", "Rebase", "Commit", "Pull", "Copy", "Freeze", "Thaw", "Trim", "Change", "Rollback",
	}
	for n, p := range procedures {
		if p.kind == 'e' && !strings.Contains(p.name, "Event") {
			t.Errorf("%d is no event: %s", n, p.name)
		}
		if p.kind != 'r' && p.kind != 'f' {
			continue
		}
		name := p.name
		for _, what := range []string{"Domain", "Connect", "Network", "StoragePool", "StorageVol", "NodeDevice", "Node", "Interface", "Secret", "NWFilter"} {
			name = strings.TrimPrefix(name, what)
		}
		for _, v := range verbs {
			rest, ok := strings.CutPrefix(name, v)
			if ok && strings.ToLower(rest[:min(1, len(rest))]) != rest[:min(1, len(rest))] || name == v {
				t.Errorf("%d reads only? %s", n, p.name)
			}
		}
	}
}
