package driver

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"kemari/driver/rpc"
	"kemari/migrate/control"
)

// A migration of a protected guest to its standby is a switchover. libvirt's client
// makes it in one call, peer to peer, or manages it: it begins on the primary, prepares
// the standby's host, has the primary perform it, finishes on the standby's host and
// confirms on the primary. What the standby's copy needs was prepared long ago, so
// performing is all there is to do, and the other calls are answered so that the client
// goes on. A cookie tells the standby's host which protection it is.

// switchoverTimeout bounds a switchover as a whole. The replicator bounds what it waits
// for; a standby that shows life may take its time to let the guest run.
const switchoverTimeout = 10 * time.Minute

// switchCookie is what the hosts of a switchover tell each other by way of the client.
type switchCookie struct {
	Name       string `json:"name"`
	UUID       string `json:"uuid"`
	Generation uint64 `json:"generation"`
}

// Of a cookie of ours, which no other driver understands, and of a URI that nobody
// connects to, since the client wants one.
const (
	cookiePrefix  = "kemari-switchover "
	switchoverURI = "kemari:switchover"
	maxCookie     = 1 << 10
)

func (c switchCookie) encode() []byte {
	b, err := json.Marshal(c)
	if err != nil {
		panic(err) // strings and a number
	}
	return append([]byte(cookiePrefix), b...)
}

// decodeCookie returns a cookie of ours, or nil.
func decodeCookie(b []byte) (*switchCookie, rpc.UUID) {
	b, ours := bytes.CutPrefix(b, []byte(cookiePrefix))
	if !ours || len(b) > maxCookie {
		return nil, rpc.UUID{}
	}
	var c switchCookie
	if json.Unmarshal(b, &c) != nil {
		return nil, rpc.UUID{}
	}
	id, err := rpc.ParseUUID(c.UUID)
	if err != nil {
		return nil, id
	}
	return &c, id
}

// switchOthers deals with the calls of a switchover that libvirtd would be given
// whether or not the guest is protected, and says whether it did.
func (s *session) switchOthers(ctx context.Context, p *rpc.Packet) (bool, error) {
	switch p.Procedure {
	case rpc.ProcDomainMigratePrepare3Params:
		a, err := rpc.DecodeMigratePrepareArgs(p.Payload)
		if err != nil {
			return false, nil
		}
		c, id := decodeCookie(a.Cookie)
		if c == nil {
			return false, nil
		}
		s.long(ctx, p, func(ctx context.Context) ([]byte, error) {
			if err := s.d.awaits(ctx, c, id); err != nil {
				return nil, err
			}
			s.mu.Lock()
			if s.expected == nil {
				s.expected = make(map[string]switchCookie)
			}
			s.expected[c.Name] = *c
			s.mu.Unlock()
			to := switchoverURI
			return (&rpc.MigratePrepareRet{Cookie: a.Cookie, URI: &to}).Append(nil), nil
		})
		return true, nil
	case rpc.ProcDomainMigrateFinish3Params:
		a, err := rpc.DecodeMigrateFinishArgs(p.Payload)
		if err != nil || !s.d.anyHere(control.Standby) {
			return false, nil
		}
		s.async(ctx, p, func(ctx context.Context) { s.switchFinish(ctx, p, a) })
		return true, nil
	case rpc.ProcDomainMigrateConfirm3Params:
		dom, err := rpc.DecodeDomainPrefix(p.Payload)
		if err != nil {
			return false, nil
		}
		s.mu.Lock()
		ours := s.switching[dom.UUID]
		delete(s.switching, dom.UUID)
		s.mu.Unlock()
		if ours { // it is not here any more, or it is as before
			return true, s.answer(p, nil)
		}
	}
	return false, nil
}

// switchPrimary begins or performs a switchover if that is what the call is, and says
// whether it has answered. A guest whose standby could not take over is not migrated.
func (s *session) switchPrimary(ctx context.Context, p *rpc.Packet, dom rpc.Domain) bool {
	st, err := s.d.look(ctx, control.Primary, dom.UUID)
	if err != nil || st.Phase != control.Protected {
		return false
	}
	var f func() ([]byte, error)
	switch p.Procedure {
	case rpc.ProcDomainMigrateBegin3Params:
		if a, err := rpc.DecodeMigrateBeginArgs(p.Payload); err == nil {
			f = func() ([]byte, error) { return s.switchBegin(ctx, a, st) }
		}
	case rpc.ProcDomainMigratePerform3Params:
		if a, err := rpc.DecodeMigratePerformArgs(p.Payload); err == nil {
			f = func() ([]byte, error) { return s.switchPerform(ctx, a, st) }
		}
	}
	if f == nil {
		return false
	}
	payload, err := f()
	var left *leftError
	switch {
	case errors.As(err, &left):
		s.fail(p, err)
	case err != nil:
		s.fail(p, fmt.Errorf("cannot hand over guest %q: %w", dom.Name, err))
	default:
		s.answer(p, payload)
	}
	return true
}

// switchBegin begins one that the client manages.
func (s *session) switchBegin(ctx context.Context, a *rpc.MigrateBeginArgs, st control.Status) ([]byte, error) {
	if err := switchable(a.Domain, a.Flags, a.Params, true); err != nil {
		return nil, err
	}
	doc, err := s.d.domainXML(ctx, a.Domain.UUID, false)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	if s.switching == nil {
		s.switching = make(map[rpc.UUID]bool)
	}
	s.switching[a.Domain.UUID] = true
	s.mu.Unlock()
	c := switchCookie{Name: st.Domain, UUID: st.UUID, Generation: st.Generation}
	return (&rpc.MigrateBeginRet{Cookie: c.encode(), XML: doc}).Append(nil), nil
}

// switchPerform does it.
func (s *session) switchPerform(ctx context.Context, a *rpc.MigratePerformArgs, st control.Status) ([]byte, error) {
	c, id := decodeCookie(a.Cookie)
	if err := switchable(a.Domain, a.Flags, a.Params, c != nil); err != nil {
		return nil, err
	}
	switch {
	case c != nil && (id != a.Domain.UUID || c.Generation != st.Generation):
		return nil, refuse(rpc.CodeOperationInvalid, "it is protected anew since this was begun", "try again")
	case c != nil: // the client has asked the standby's host
	case a.Flags&rpc.MigratePeer2Peer == 0 || a.URI == nil || *a.URI == "":
		return nil, refuse(rpc.CodeArgumentUnsupp, "this is not a migration to its standby", useP2P)
	default:
		if err := s.d.isStandby(ctx, a.Domain, st, *a.URI); err != nil {
			return nil, err
		}
	}
	departure, err := s.d.departure(ctx, a.Domain, st.Peer, st.Generation, a.Flags)
	if err != nil {
		return nil, err
	}
	defer departure.close()
	var cfg control.PrimaryConfig // which is gone afterwards
	cfgErr := control.ReadConfig(s.d.paths(control.Primary, a.Domain.UUID), &cfg)
	if err := s.d.switchover(ctx, a.Domain, st); err != nil {
		return nil, err
	}
	if err = departure.left(ctx); err != nil {
		s.log.Warn("definitions of a guest that was handed over are not as asked for", "domain", a.Domain.Name, "error", err)
	}
	if cfgErr == nil {
		s.swapRoles(a.Domain, cfg)
	} else {
		s.log.Warn("guest that was handed over is not protected", "domain", a.Domain.Name, "error", cfgErr)
	}
	if c == nil {
		return rpc.Opaque(nil).Append(nil), err
	}
	return rpc.Opaque(c.encode()).Append(nil), err
}

// switchable says why a migration cannot be a switchover.
func switchable(dom rpc.Domain, flags uint32, params []rpc.TypedParam, managed bool) error {
	if names := flagNamesOf(flags &^ (acceptedFlags | rpc.MigratePersistDest | rpc.MigrateUndefineSource)); len(names) > 0 {
		return refuse(rpc.CodeArgumentUnsupp, "a switchover does not go with "+strings.Join(names, ", "), "leave it out")
	}
	r := request{domain: dom}
	for _, p := range params {
		if managed && p.Field == "migrate_uri" {
			continue // what Prepare has answered
		}
		if err := r.param(p); err != nil {
			return err
		}
	}
	if r.destXML != "" && !managed { // else it is what Begin has answered
		return refuse(rpc.CodeArgumentUnsupp, "the standby's copy is there already, and cannot get another definition", "leave the XML out, or give it when the guest is protected")
	}
	return nil
}

// isStandby says whether the standby of the protection st is where the URI leads to.
func (d *Driver) isStandby(ctx context.Context, dom rpc.Domain, st control.Status, uri string) error {
	elsewhere := refuse(rpc.CodeOperationInvalid,
		fmt.Sprintf("Kemari protects it on %s, and migrating it to another host %s", st.Peer, strings.TrimPrefix(losesPages, "it ")),
		fmt.Sprintf("migrate it to %s, or end protection first with: virsh domjobabort %s", st.Peer, dom.Name))
	t, err := ParseTarget(uri)
	if err != nil {
		return elsewhere
	}
	if its, err := ParseTarget(st.Peer); err == nil && strings.EqualFold(its.Host, t.Host) && its.Port == t.Port {
		return nil
	}
	// It may be another name of the same host.
	client, there, err := d.connectStandby(ctx, &request{domain: dom, target: t}, nil)
	if err != nil {
		return fmt.Errorf("%w (%w)", elsewhere, err)
	}
	client.Close()
	if there.Shadow == "" || there.Generation != st.Generation {
		return elsewhere
	}
	return nil
}

// switchover hands the guest over, and returns once it runs on the standby's host.
func (d *Driver) switchover(ctx context.Context, dom rpc.Domain, st control.Status) error {
	log := d.log.With("domain", dom.Name, "uuid", dom.UUID.String(), "peer", st.Peer)
	log.Info("guest is handed over to its standby", "generation", st.Generation)
	ctx, cancel := context.WithTimeoutCause(ctx, switchoverTimeout, fmt.Errorf("not done within %v; it may be yet: see kemari status %s", switchoverTimeout, dom.Name))
	defer cancel()
	began := time.Now()
	if _, err := control.Ask(ctx, d.paths(control.Primary, dom.UUID).Socket, control.OpSwitchover); err != nil {
		if after, e := d.look(context.WithoutCancel(ctx), control.Primary, dom.UUID); e != nil || after.SwitchedOver == "" || after.Generation != st.Generation {
			log.Warn("guest was not handed over", "error", err)
			return err
		}
	}
	log.Info("guest was handed over to its standby", "took", time.Since(began))
	return nil
}

// awaits says whether this host has the standby that a switchover is to.
func (d *Driver) awaits(ctx context.Context, c *switchCookie, id rpc.UUID) error {
	st, err := d.look(ctx, control.Standby, id)
	switch {
	case err != nil || st.Generation != c.Generation || st.Phase == control.Ended:
		return refuse(rpc.CodeOperationInvalid, fmt.Sprintf("guest %q is protected by Kemari, and this host is not its standby", c.Name),
			"migrate it to its standby (see kemari status), or end protection first with: virsh domjobabort "+c.Name)
	case st.Phase != control.Ready:
		return refuse(rpc.CodeOperationInvalid, fmt.Sprintf("the standby of guest %q cannot take over: it is %s", c.Name, st.Phase), "")
	}
	return nil
}

// switchFinish ends what the client manages on the standby's host. libvirtd must not
// see it of a shadow: it would take it for the end of that one. Nor of a guest that was
// handed over, of which the client was told that something else went wrong: libvirtd
// would take that for a migration that has failed, and destroy the guest.
func (s *session) switchFinish(ctx context.Context, p *rpc.Packet, a *rpc.MigrateFinishArgs) {
	c, id := decodeCookie(a.Cookie)
	for _, v := range a.Params {
		if v.Field != "destination_name" {
			continue
		}
		s.mu.Lock()
		expected, ours := s.expected[v.String]
		delete(s.expected, v.String)
		s.mu.Unlock()
		if ours && c == nil {
			c, a.Cancelled = &expected, 1
		}
	}
	if c == nil {
		for _, v := range a.Params {
			for shadow, st := range s.d.shadows(ctx) {
				if v.Field == "destination_name" && (st.Domain == v.String || st.Domain == "") {
					c, id = &switchCookie{Name: v.String, Generation: st.Generation}, shadow
				}
			}
		}
		if c == nil {
			s.forward(ctx, p)
			return
		}
		a.Cancelled = 1
	}
	dom, err := s.d.finished(ctx, c, id, a.Cancelled != 0)
	if err != nil {
		s.fail(p, err)
		return
	}
	s.answer(p, (&rpc.MigrateFinishRet{Domain: dom}).Append(nil))
}

func (d *Driver) finished(ctx context.Context, c *switchCookie, id rpc.UUID, cancelled bool) (rpc.Domain, error) {
	if cancelled {
		return rpc.Domain{}, refuse(rpc.CodeOperationFailed, fmt.Sprintf("the switchover of guest %q has failed", c.Name), "see kemari status on both hosts")
	}
	st, err := d.look(ctx, control.Standby, id)
	if err != nil || st.Generation != c.Generation || st.Phase != control.Active {
		return rpc.Domain{}, errors.Join(refuse(rpc.CodeOperationFailed, fmt.Sprintf("guest %q has not been taken over here", c.Name), "see kemari status on both hosts"), err)
	}
	l, err := d.cfg.Libvirt(ctx)
	if err != nil {
		return rpc.Domain{}, err
	}
	defer l.Close()
	g, err := l.Guest(id)
	if err != nil {
		return rpc.Domain{}, err
	}
	return rpc.Domain{Name: g.Name, UUID: g.UUID, ID: int32(g.ID)}, nil
}
