package rpc

import (
	_ "embed"
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
)

// procedures.txt has a line for every procedure of ProgramRemote up to libvirt
// 11.3: its number, what it does, and the name of the call, without "vir".
//
//	r  changes nothing; libvirt lets any user make it on its read-only socket
//	f  the same, unless its flags ask for more: flagged
//	w  anything else
//	e  an event, which only a server sends
//	a  a part of authentication
//
// A call counts as one that changes nothing only if both libvirt's access
// control and the library's own check of read-only connections say so.
//
//go:embed procedures.txt
var procedureLines string

type procedure struct {
	kind byte
	name string
}

var procedures = parseProcedures(procedureLines)

func parseProcedures(s string) []procedure {
	all := make([]procedure, 1, 512) // there is no procedure 0
	for line := range strings.Lines(s) {
		number, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		kind, name, _ := strings.Cut(rest, " ")
		if n, err := strconv.Atoi(number); err != nil || n != len(all) || len(kind) != 1 || name == "" {
			panic("rpc: procedures.txt: " + line)
		}
		all = append(all, procedure{kind[0], name})
	}
	return all
}

func (p Procedure) lookup() procedure {
	if p < 1 || int(p) >= len(procedures) {
		return procedure{}
	}
	return procedures[p]
}

// flagged are the procedures that give a secret, or go into the guest, if a word
// of their arguments has one of these bits. The word is counted from the end.
var flagged = map[Procedure]struct {
	word int
	bits uint32
}{
	14:  {1, 1<<0 | 1<<3}, // VIR_DOMAIN_XML_SECURE, _MIGRATABLE
	186: {1, 1 << 0},      // VIR_DOMAIN_SNAPSHOT_XML_SECURE
	200: {1, 1 << 3},      // VIR_DOMAIN_VCPU_GUEST
	353: {2, 1 << 0},      // VIR_DOMAIN_INTERFACE_ADDRESSES_SRC_AGENT
	388: {1, 1 << 0},      // VIR_DOMAIN_SAVE_IMAGE_XML_SECURE
	412: {1, 1 << 0},      // VIR_DOMAIN_CHECKPOINT_XML_SECURE
}

// ReadOnly says whether a message of a client is known to change nothing, so
// that whoever may only look may send it. What is not known is not.
func ReadOnly(p *Packet) bool {
	if p.Program != ProgramRemote || p.Version != 1 {
		return false
	}
	switch p.Procedure.lookup().kind {
	case 'r':
		return true
	case 'f':
		f := flagged[p.Procedure]
		at := len(p.Payload) - 4*f.word
		return at >= 0 && binary.BigEndian.Uint32(p.Payload[at:])&f.bits == 0
	}
	return false
}

// CallName is what the call p is called in libvirt's library, or its number.
func CallName(p *Packet) string {
	if p.Program == ProgramRemote {
		if known := p.Procedure.lookup(); known.name != "" {
			return "vir" + known.name
		}
	}
	return fmt.Sprintf("procedure %d of %v", p.Procedure, p.Program)
}
