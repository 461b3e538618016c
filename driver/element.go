package driver

import (
	"context"
	"fmt"
	"reflect"

	"kemari/driver/rpc"
	"kemari/migrate/control"
	"kemari/xml"
)

// lowered are the calls that bring a domain's XML. libvirt drops top-level elements
// that it does not know, so the element is moved to where it keeps one.
var lowered = map[rpc.Procedure]rpc.Layout{
	rpc.ProcDomainCreateXML:                   "xu",
	rpc.ProcDomainDefineXML:                   "x",
	rpc.ProcDomainDefineXMLFlags:              "xu",
	rpc.ProcConnectDomainXMLToNative:          "sxu",
	rpc.ProcDomainRestoreFlags:                "sXu",
	rpc.ProcDomainRestoreParams:               "pu",
	rpc.ProcDomainSaveFlags:                   "dsXu",
	rpc.ProcDomainSaveParams:                  "dpu",
	rpc.ProcDomainSaveImageDefineXML:          "sxu",
	rpc.ProcDomainManagedSaveDefineXML:        "dXu",
	rpc.ProcDomainMigratePrepare2:             "SUSUx",
	rpc.ProcDomainMigrateBegin3:               "dXUSU",
	rpc.ProcDomainMigratePrepare3:             "oSUSUx",
	rpc.ProcDomainMigratePerform3:             "dXoSSUSU",
	rpc.ProcDomainMigrateBegin3Params:         "dpu",
	rpc.ProcDomainMigratePrepare3Params:       "pou",
	rpc.ProcDomainMigratePrepareTunnel3Params: "pou",
	rpc.ProcDomainMigratePerform3Params:       "dSpou",
}

// raised are the calls that return a domain's XML, all of it and nothing else. What
// Begin3 returns is for another libvirt, and stays as libvirt has it.
var raised = map[rpc.Procedure]rpc.Layout{
	rpc.ProcDomainGetXMLDesc:            "x",
	rpc.ProcDomainSaveImageGetXMLDesc:   "x",
	rpc.ProcDomainManagedSaveGetXMLDesc: "x",
}

// xmlMigratable is VIR_DOMAIN_XML_MIGRATABLE: the XML is for another libvirt.
const xmlMigratable = 1 << 3

// moveElement has the element where the receiver of a call, or of its answer,
// looks for it. It says whether it has answered the call itself.
func (s *session) moveElement(p *rpc.Packet) (bool, error) {
	if l, ok := lowered[p.Procedure]; ok {
		var wrong error
		b, err := l.MapXML(p.Payload, func(doc string) (string, error) {
			var out string
			if out, wrong = xml.Lower(doc); wrong != nil {
				wrong = refuse(rpc.CodeXMLError, wrong.Error(), "")
			}
			return out, wrong
		})
		switch {
		case wrong != nil:
			return true, s.fail(p, wrong)
		case err != nil:
			return false, nil // libvirtd says what is wrong with it
		}
		p.Payload = b
	}
	if l, ok := raised[p.Procedure]; ok && rpc.LastFlags(p.Payload)&xmlMigratable == 0 {
		s.onSuccess(p, func(b []byte) ([]byte, error) {
			return l.MapXML(b, func(doc string) (string, error) { return xml.Raise(doc), nil })
		})
	}
	return false, nil
}

// define passes a new definition on. That of a protected guest must fit the
// protection that is under way.
func (s *session) define(ctx context.Context, p *rpc.Packet) (bool, error) {
	if !s.d.anyInvolved() {
		return false, nil
	}
	var doc string
	layout := lowered[p.Procedure]
	if _, err := layout.MapXML(p.Payload, func(x string) (string, error) { doc = x; return x, nil }); err != nil {
		return false, nil
	}
	s.query(ctx, func(ctx context.Context) {
		dom, err := s.d.identify(ctx, doc)
		if err != nil {
			s.forward(ctx, p) // libvirtd says what is wrong with it
			return
		}
		if st, ok := s.d.shadow(ctx, dom.UUID); ok {
			s.fail(p, errShadow(st, "defining it"))
			return
		}
		s.change(ctx, p, dom, doc, affectConfig)
	})
	return true, nil
}

// setMetadata checks what is to become of the element, and passes it on.
func (s *session) setMetadata(ctx context.Context, p *rpc.Packet) (bool, error) {
	a, err := rpc.DecodeSetMetadataArgs(p.Payload)
	if err != nil || a.Type != rpc.MetadataElement || a.URI == nil || *a.URI != xml.Namespace {
		return s.guardShadow(ctx, p, "changing its metadata")
	}
	var e *xml.Element
	if a.Metadata != nil {
		if e, err = xml.Parse([]byte(*a.Metadata)); err != nil {
			return true, s.fail(p, refuse(rpc.CodeXMLError, err.Error(), ""))
		}
	}
	if !s.d.has(control.Primary, a.Domain.UUID) {
		return s.guardShadow(ctx, p, "changing its metadata")
	}
	s.query(ctx, func(ctx context.Context) {
		if st, ok := s.d.shadow(ctx, a.Domain.UUID); ok {
			s.fail(p, errShadow(st, "changing its metadata"))
			return
		}
		old, err := s.d.domainXML(ctx, a.Domain.UUID, a.Flags&(affectLive|affectConfig) == affectConfig)
		if err != nil {
			s.forward(ctx, p) // libvirtd says so too
			return
		}
		doc, err := xml.SetInDomain(old, e)
		if err != nil {
			s.fail(p, err)
			return
		}
		s.change(ctx, p, a.Domain, doc, a.Flags)
	})
	return true, nil
}

// Which of its two definitions a call changes: virDomainModificationImpact.
const (
	affectLive   = 1 << 0
	affectConfig = 1 << 1
)

// change passes on the call p, which makes doc the definition of the guest. If
// that is protected, the checkpoint settings that doc changes hold from now on, and
// what cannot be changed meanwhile is refused, all of it.
func (s *session) change(ctx context.Context, p *rpc.Packet, dom rpc.Domain, doc string, flags uint32) {
	if !s.d.protected(ctx, dom.UUID) {
		s.forward(ctx, p)
		return
	}
	var cfg control.PrimaryConfig
	if err := control.ReadConfig(s.d.paths(control.Primary, dom.UUID), &cfg); err != nil {
		s.fail(p, refuse(rpc.CodeOperationInvalid, fmt.Sprintf("the protection of guest %q is beginning or ending", dom.Name), "try again in a moment"))
		return
	}
	old, err := s.d.domainXML(ctx, dom.UUID, flags&(affectLive|affectConfig) == affectConfig)
	if err != nil {
		s.fail(p, err)
		return
	}
	next, err := settled(old, doc, &cfg)
	if err != nil {
		s.fail(p, fmt.Errorf("guest %q is protected: %w", dom.Name, err))
		return
	}
	if next == nil {
		s.forward(ctx, p)
		return
	}
	before := cfg.Checkpoint
	socket := s.d.paths(control.Primary, dom.UUID).Socket
	if _, err := control.SetCheckpoint(ctx, socket, *next); err != nil {
		s.fail(p, fmt.Errorf("guest %q is protected, and its checkpoints cannot be set anew: %w", dom.Name, err))
		return
	}
	s.log.Info("checkpoints set anew", "domain", dom.Name, "trigger", next.Trigger, "min", next.Min, "max", next.Max, "paused", next.Paused)
	s.onReply(p, func(r *rpc.Packet) *rpc.Packet {
		if r.Status == rpc.OK {
			return r
		}
		// Nothing was stored, so nothing shall have changed.
		s.query(ctx, func(ctx context.Context) {
			if _, err := control.SetCheckpoint(ctx, socket, before); err != nil {
				s.log.Warn("checkpoints stay as they were set", "domain", dom.Name, "error", err)
			}
			s.reply(r)
		})
		return nil
	})
	s.forward(ctx, p)
}

// settled says what a new definition means for the protection that is under way
// with cfg: the checkpoint settings to take up, nil for none, or what cannot be
// changed.
func settled(oldXML, newXML string, cfg *control.PrimaryConfig) (*control.Checkpoint, error) {
	was, err := elementOrDefault(oldXML)
	if err != nil {
		was = xml.Default() // it could not be read; now it can
	}
	is, err := elementOrDefault(newXML)
	if err != nil {
		return nil, refuse(rpc.CodeXMLError, err.Error(), "")
	}
	var rs []xml.Reason
	const remedy = "end protection first with virsh domjobabort, or leave it as it is"
	// What is told anew but holds already is no change.
	if !reflect.DeepEqual(is.Standby, was.Standby) && (is.Standby == nil || is.Standby.URI != cfg.StandbyURI) {
		rs = append(rs, xml.Reason{Text: "the standby (" + cfg.StandbyURI + ") cannot be changed meanwhile", Remedy: remedy})
	}
	hb := control.Heartbeat{Interval: is.Heartbeat.Interval, Timeout: is.Heartbeat.Timeout}
	if is.Heartbeat != was.Heartbeat && hb != cfg.Heartbeat {
		rs = append(rs, xml.Reason{Text: "the heartbeat cannot be changed meanwhile, since both hosts must agree on it", Remedy: remedy})
	}
	if !reflect.DeepEqual(is.Arbiter, was.Arbiter) {
		if a, err := arbiter(is); err != nil || !reflect.DeepEqual(a, cfg.Arbiter) {
			rs = append(rs, xml.Reason{Text: "the arbiter cannot be changed meanwhile, since both hosts must ask the same one", Remedy: remedy})
		}
	}
	rest := *is
	rest.Standby, rest.Heartbeat, rest.Arbiter = was.Standby, was.Heartbeat, was.Arbiter
	rest.Checkpoint, rest.Autostart = was.Checkpoint, was.Autostart
	if !reflect.DeepEqual(&rest, was) {
		rs = append(rs, xml.Reason{Text: "what else <kemari> says cannot be changed meanwhile", Remedy: remedy})
	}
	// The rest of the domain is for its next start, and must not bar protection then.
	known := make(map[xml.Reason]bool)
	for _, r := range xml.Ineligible(oldXML) {
		known[r] = true
	}
	for _, r := range xml.Ineligible(newXML) {
		if !known[r] {
			rs = append(rs, xml.Reason{Text: "it could not be protected any more when it is started next: " + r.Text, Remedy: r.Remedy})
		}
	}
	if err := refuseAll(rs); err != nil {
		return nil, err
	}
	next := control.Checkpoint(is.Checkpoint)
	if is.Checkpoint == was.Checkpoint || next == cfg.Checkpoint {
		return nil, nil
	}
	return &next, nil
}

func elementOrDefault(doc string) (*xml.Element, error) {
	e, err := xml.FromDomain(doc)
	if e == nil && err == nil {
		e = xml.Default()
	}
	return e, err
}
