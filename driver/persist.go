package driver

import (
	"context"
	"fmt"

	"kemari/driver/rpc"
	"kemari/xml"
)

// A switchover may be asked, as any migration, to define the guest on the host that it
// goes to and to undefine it on the one that it leaves. Both are done once it runs there
// and before the roles swap: libvirtd would take a definition that goes or comes for one
// of the shadow that then stands here. What can be found out before the guest is handed
// over is found out then, while it can still be refused.

// keepRequest asks the host that a guest was handed over to for a definition of it.
type keepRequest struct {
	Name       string `json:"name"`
	UUID       string `json:"uuid"`
	Generation uint64 `json:"generation"` // of the protection that ended by the switchover
	DomainXML  string `json:"domain_xml"` // as it would have been started here next
}

type keepReply struct{}

// departure is what becomes of a guest's definitions when it is handed over.
type departure struct {
	d        *Driver
	dom      rpc.Domain
	to       Target
	there    *rpc.Client // nil if it is not to be defined there
	keep     keepRequest
	undefine bool
}

// departure prepares what flags ask for. The caller closes it.
func (d *Driver) departure(ctx context.Context, dom rpc.Domain, peer string, generation uint64, flags uint32) (*departure, error) {
	v := &departure{d: d, dom: dom, undefine: flags&rpc.MigrateUndefineSource != 0}
	if flags&rpc.MigratePersistDest == 0 {
		return v, nil
	}
	doc, err := d.domainXML(ctx, dom.UUID, true)
	if err != nil {
		return nil, err
	}
	v.keep = keepRequest{Name: dom.Name, UUID: dom.UUID.String(), Generation: generation, DomainXML: doc}
	if v.to, err = ParseTarget(peer); err != nil {
		return nil, err
	}
	v.there, _, err = d.connectStandby(ctx, &request{domain: dom, target: v.to}, nil)
	return v, err
}

func (v *departure) close() {
	if v.there != nil {
		v.there.Close()
	}
}

// left does it, of a guest that runs at its standby now. An error says so: whoever is
// told that a migration has failed may start the guest again where it was.
func (v *departure) left(ctx context.Context) error {
	// The guest has gone, whether or not the client still waits to hear of it.
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), connectTimeout, fmt.Errorf("it was not done within %v", connectTimeout))
	defer cancel()
	said := func(what, remedy string, err error) error {
		text := fmt.Sprintf("guest %q was handed over and runs at its standby now, but %s: %v", v.dom.Name, what, err)
		return &leftError{refuse(rpc.CodeOperationFailed, text, remedy)}
	}
	if v.there != nil {
		if err := v.d.ask(ctx, v.there, v.to, connectTimeout, procKeep, v.keep, &keepReply{}); err != nil {
			what := "it is not defined there"
			if v.undefine {
				what += ", and so still is on this host"
			}
			return said(what, "define it there, or it is gone when it is shut off", err)
		}
	}
	if v.undefine {
		if err := v.d.setDefinition(ctx, v.dom.UUID, ""); err != nil {
			return said("it is still defined on this host", "undefine it when this host does not protect it any more", err)
		}
	}
	return nil
}

// leftError is what went wrong with a switchover that has been made.
type leftError struct{ error }

func (e *leftError) Unwrap() error { return e.error }

func (d *Driver) setDefinition(ctx context.Context, id rpc.UUID, doc string) error {
	l, err := d.cfg.Libvirt(ctx)
	if err != nil {
		return err
	}
	defer l.Close()
	return l.Define(id, doc)
}

// keep defines a guest that was handed over to this host. Its standby is to be the host
// that it came from, which protects it from now on.
func (d *Driver) keep(ctx context.Context, req keepRequest) (*keepReply, error) {
	id, st, err := d.takenOver(ctx, req.Name, req.UUID, req.Generation)
	if err != nil {
		return nil, err
	}
	if err := checkIdentity(req.DomainXML, req.Name, id); err != nil {
		return nil, err
	}
	doc := req.DomainXML
	e, err := xml.FromDomain(doc)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errBadRequest, err)
	}
	if e != nil && e.Standby != nil {
		e.Standby = protector(st)
		if doc, err = xml.SetInDomain(doc, e); err != nil {
			return nil, err
		}
	}
	return &keepReply{}, d.setDefinition(ctx, id, doc)
}
