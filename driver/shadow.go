package driver

import (
	"context"
	"fmt"
	"slices"

	"kemari/driver/rpc"
	"kemari/migrate/control"
)

// libvirtd takes a shadow, which is an incoming migration that does not end, for a
// domain that is shut off. Clients are told what it is: a guest that is there whole
// and paused, because of a migration.

// virDomainState, and the reason of virDomainPausedReason.
const (
	statePaused     = 3
	pausedMigration = 2
)

// errShadow is why something cannot be done to a shadow.
func errShadow(st control.Status, what string) error {
	return refuse(rpc.CodeOperationInvalid,
		fmt.Sprintf("%s is refused: this is the standby's copy of guest %q, which runs on %s", what, st.Domain, orUnknown(st.Peer)),
		fmt.Sprintf("do it there; or end protection with: virsh domjobabort %s; or, if that host is lost, take over with: kemari failover %s", st.Domain, st.Domain))
}

func orUnknown(s string) string {
	if s == "" {
		return "another host"
	}
	return s
}

// shadowRefused are the calls that would start a shadow, or change what the primary
// alone may change, and what they do. guarded comes on top.
var shadowRefused = map[rpc.Procedure]string{
	rpc.ProcDomainCreate:          "starting it",
	rpc.ProcDomainCreateWithFlags: "starting it",
	rpc.ProcDomainResume:          "resuming it",
	rpc.ProcDomainSuspend:         "suspending it",
	rpc.ProcDomainReboot:          "rebooting it",
	rpc.ProcDomainReset:           "resetting it",
	rpc.ProcDomainShutdown:        "shutting it down",
	rpc.ProcDomainShutdownFlags:   "shutting it down",
}

// guardShadow passes a call on unless it is about a shadow.
func (s *session) guardShadow(ctx context.Context, p *rpc.Packet, what string) (bool, error) {
	dom, err := rpc.DecodeDomainPrefix(p.Payload)
	if err != nil || !s.d.has(control.Standby, dom.UUID) {
		return false, nil
	}
	s.query(ctx, func(ctx context.Context) {
		if st, ok := s.d.shadow(ctx, dom.UUID); ok {
			s.fail(p, errShadow(named(st, dom.Name), what))
			return
		}
		s.forward(ctx, p)
	})
	return true, nil
}

// named is st with a name, if the standby did not answer.
func named(st control.Status, name string) control.Status {
	if st.Domain == "" {
		st.Domain = name
	}
	return st
}

// create passes on the start of a domain that is given whole, unless its shadow
// stands here.
func (s *session) create(ctx context.Context, p *rpc.Packet) (bool, error) {
	if !s.d.anyHere(control.Standby) {
		return false, nil
	}
	var doc string
	if _, err := lowered[p.Procedure].MapXML(p.Payload, func(x string) (string, error) { doc = x; return x, nil }); err != nil {
		return false, nil
	}
	s.query(ctx, func(ctx context.Context) {
		if dom, err := s.d.identify(ctx, doc); err == nil {
			if st, ok := s.d.shadow(ctx, dom.UUID); ok {
				s.fail(p, errShadow(named(st, dom.Name), "starting it"))
				return
			}
		}
		s.forward(ctx, p)
	})
	return true, nil
}

// endShadow ends the protection whose shadow a client destroys or undefines. What
// libvirt has of that guest beside the shadow, it undefines too.
func (s *session) endShadow(ctx context.Context, p *rpc.Packet) (bool, error) {
	dom, err := rpc.DecodeDomainPrefix(p.Payload)
	if err != nil || !s.d.has(control.Standby, dom.UUID) {
		return false, nil
	}
	s.async(ctx, p, func(ctx context.Context) {
		if _, ok := s.d.shadow(ctx, dom.UUID); !ok {
			s.forward(ctx, p)
			return
		}
		s.log.Info("protection is ended, since its shadow is being removed", "domain", dom.Name)
		if err := s.d.abort(ctx, *dom); err != nil {
			s.fail(p, err)
			return
		}
		if p.Procedure == rpc.ProcDomainUndefine || p.Procedure == rpc.ProcDomainUndefineFlags {
			s.onReply(p, func(r *rpc.Packet) *rpc.Packet {
				if r.Status == rpc.OK {
					return r
				}
				if e, err := rpc.DecodeError(r.Payload); err == nil && e.Code != rpc.CodeNoDomain {
					return r
				}
				return &rpc.Packet{Header: p.Reply(rpc.OK)} // it went with its shadow
			})
			s.forward(ctx, p)
			return
		}
		s.answer(p, nil)
	})
	return true, nil
}

// shadowState corrects what libvirtd says of a shadow's state.
func (s *session) shadowState(ctx context.Context, p *rpc.Packet) (bool, error) {
	dom, err := rpc.DecodeDomainPrefix(p.Payload)
	if err != nil || !s.d.has(control.Standby, dom.UUID) {
		return false, nil
	}
	s.onReply(p, func(r *rpc.Packet) *rpc.Packet {
		if r.Status != rpc.OK {
			return r
		}
		s.query(ctx, func(ctx context.Context) {
			if _, ok := s.d.shadow(ctx, dom.UUID); ok {
				r.Payload = paused(r.Procedure, r.Payload)
			}
			s.reply(r)
		})
		return nil
	})
	return false, nil
}

// paused is the answer of a procedure, with what it says of the state corrected.
func paused(proc rpc.Procedure, payload []byte) []byte {
	switch proc {
	case rpc.ProcDomainGetState:
		return (&rpc.DomainState{State: statePaused, Reason: pausedMigration}).Append(nil)
	case rpc.ProcDomainIsActive:
		return rpc.Int(1).Append(nil)
	case rpc.ProcDomainGetInfo:
		if v, err := rpc.DecodeDomainInfo(payload); err == nil {
			v.State = statePaused
			return v.Append(nil)
		}
	}
	return payload
}

// The filters of virConnectListAllDomains, in groups of which at least one flag must
// fit if any is given.
const (
	listActive   = 1 << 0
	listInactive = 1 << 1
	listPaused   = 1 << 5
	listStates   = 1<<4 | listPaused | 1<<6 | 1<<7
)

// listDomains corrects libvirtd's list of domains, which has the shadows among
// those that are shut off.
func (s *session) listDomains(ctx context.Context, p *rpc.Packet) (bool, error) {
	a, err := rpc.DecodeListAllDomainsArgs(p.Payload)
	if err != nil || !s.d.anyHere(control.Standby) || a.Flags&(listActive|listInactive|listStates) == 0 {
		return false, nil
	}
	// The names are needed to tell the shadows, even if the client wants a number.
	full := rpc.ListAllDomainsArgs{NeedResults: 1, Flags: a.Flags}
	p.Payload = full.Append(nil)
	s.onReply(p, func(r *rpc.Packet) *rpc.Packet {
		if r.Status != rpc.OK {
			return r
		}
		ret, err := rpc.DecodeListAllDomainsRet(r.Payload)
		if err != nil {
			return r
		}
		s.query(ctx, func(ctx context.Context) {
			doms, err := s.d.listed(ctx, ret.Domains, a.Flags)
			if err != nil {
				s.log.Warn("shadows are not listed", "error", err)
			}
			out := rpc.ListAllDomainsRet{Domains: doms, Count: uint32(len(doms))}
			if a.NeedResults == 0 {
				out.Domains = nil
			}
			r.Payload = out.Append(nil)
			s.reply(r)
		})
		return nil
	})
	return false, nil
}

// listed is libvirtd's list with every shadow in it that flags select, and no other.
func (d *Driver) listed(ctx context.Context, doms []rpc.Domain, flags uint32) ([]rpc.Domain, error) {
	shadows := d.shadows(ctx)
	if len(shadows) == 0 {
		return doms, nil
	}
	isShadow := func(dom rpc.Domain) bool { _, ok := shadows[dom.UUID]; return ok }
	others := slices.DeleteFunc(slices.Clone(doms), isShadow)
	active, state := flags&(listActive|listInactive), flags&listStates
	if active != 0 && active&listActive == 0 || state != 0 && state&listPaused == 0 {
		return others, nil
	}
	// Whatever else is asked for, libvirtd knows.
	l, err := d.cfg.Libvirt(ctx)
	if err != nil {
		return doms, err
	}
	defer l.Close()
	all, err := l.Domains(flags &^ (listActive | listInactive | listStates))
	if err != nil {
		return doms, err
	}
	all = slices.DeleteFunc(all, func(dom rpc.Domain) bool { return !isShadow(dom) })
	return append(others, all...), nil
}
