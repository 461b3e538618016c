package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	golibvirt "github.com/digitalocean/go-libvirt"

	"kemari/driver/rpc"
	"kemari/migrate/control"
	"kemari/xml"
)

// What a protection is to libvirt's clients is read off the run-time folders and
// the processes behind them, every time anew: nothing is kept that could be wrong
// after a restart. A guest that has no folder costs one look at the file system.

// has says whether there is, or was, a process of this side of the guest's
// protection on this host.
func (d *Driver) has(role control.Role, id rpc.UUID) bool {
	_, err := os.Stat(d.paths(role, id).Dir)
	return err == nil
}

// involved says whether the guest takes part, or took part, in a protection here.
func (d *Driver) involved(id rpc.UUID) bool {
	d.mu.Lock()
	_, starting := d.attempts[id]
	d.mu.Unlock()
	return starting || d.has(control.Primary, id) || d.has(control.Standby, id)
}

// guests returns the guests of which this host has, or had, the side role.
func (d *Driver) guests(role control.Role) []rpc.UUID {
	entries, _ := os.ReadDir(filepath.Join(d.cfg.Root, string(role)))
	var ids []rpc.UUID
	for _, e := range entries {
		if id, err := rpc.ParseUUID(e.Name()); err == nil {
			ids = append(ids, id)
		}
	}
	return ids
}

func (d *Driver) anyHere(role control.Role) bool { return len(d.guests(role)) > 0 }

func (d *Driver) anyInvolved() bool { return d.anyHere(control.Primary) || d.anyHere(control.Standby) }

// shadow returns the status of the guest's shadow on this host, and whether one
// stands here. A standby that does not answer is taken to hold it.
func (d *Driver) shadow(ctx context.Context, id rpc.UUID) (control.Status, bool) {
	if !d.has(control.Standby, id) {
		return control.Status{}, false
	}
	st, err := d.look(ctx, control.Standby, id)
	switch {
	case errors.Is(err, control.ErrNotRunning):
		return st, false
	case err != nil:
		return control.Status{Role: control.Standby, UUID: id.String()}, true
	}
	return st, st.Phase != control.Ended && st.Phase != control.Active
}

// shadows returns those that stand on this host.
func (d *Driver) shadows(ctx context.Context) map[rpc.UUID]control.Status {
	m := make(map[rpc.UUID]control.Status)
	for _, id := range d.guests(control.Standby) {
		if st, ok := d.shadow(ctx, id); ok {
			m[id] = st
		}
	}
	return m
}

// protection returns what the guest's protection says of itself on this host, on
// whichever side, and whether it goes on. If none does, and none is about to, it
// returns the last word of the one that ended last; without any, ErrNotRunning.
func (d *Driver) protection(ctx context.Context, id rpc.UUID) (control.Status, bool, error) {
	var last control.Status
	found := control.ErrNotRunning
	for _, role := range []control.Role{control.Primary, control.Standby} {
		if !d.has(role, id) {
			continue
		}
		st, err := d.look(ctx, role, id)
		switch {
		case errors.Is(err, control.ErrNotRunning):
			continue
		case err != nil:
			return st, false, err
		case st.Phase == control.Ended || st.Phase == control.Active:
			if found != nil || st.Since.After(last.Since) {
				last, found = st, nil
			}
		default:
			return st, true, nil
		}
	}
	return last, false, found
}

// identify returns the domain that a definition is of: the one of its UUID, or
// without one of its name.
func (d *Driver) identify(ctx context.Context, doc string) (rpc.Domain, error) {
	name, err := xml.Name(doc)
	if err != nil {
		return rpc.Domain{}, err
	}
	dom := rpc.Domain{Name: name, ID: -1}
	if s, err := xml.UUID(doc); err == nil {
		dom.UUID, err = rpc.ParseUUID(s)
		return dom, err
	}
	l, err := d.cfg.Libvirt(ctx)
	if err != nil {
		return dom, err
	}
	defer l.Close()
	names, err := l.Names()
	if err != nil {
		return dom, err
	}
	known, ok := names[name]
	if !ok {
		return dom, ErrNoGuest
	}
	dom.UUID = known.UUID
	return dom, nil
}

// domainXML returns a domain's definition: that of its next start, or as it is.
func (d *Driver) domainXML(ctx context.Context, id rpc.UUID, next bool) (string, error) {
	l, err := d.cfg.Libvirt(ctx)
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.XML(id, next)
}

func (c *libvirtConn) XML(id rpc.UUID, next bool) (string, error) {
	dom, err := c.l.DomainLookupByUUID(golibvirt.UUID(id))
	if golibvirt.IsNotFound(err) {
		return "", ErrNoGuest
	}
	if err != nil {
		return "", fmt.Errorf("look up the domain: %w", err)
	}
	flags := golibvirt.DomainXMLSecure
	if next {
		flags |= golibvirt.DomainXMLInactive
	}
	doc, err := c.l.DomainGetXMLDesc(dom, flags)
	if err != nil {
		return "", fmt.Errorf("ask for the domain's XML: %w", err)
	}
	return doc, nil
}

func (c *libvirtConn) Domains(flags uint32) ([]rpc.Domain, error) {
	doms, _, err := c.l.ConnectListAllDomains(1, golibvirt.ConnectListAllDomainsFlags(flags))
	if err != nil {
		return nil, fmt.Errorf("list the domains: %w", err)
	}
	out := make([]rpc.Domain, 0, len(doms))
	for _, d := range doms {
		out = append(out, rpc.Domain{Name: d.Name, UUID: rpc.UUID(d.UUID), ID: d.ID})
	}
	return out, nil
}

func (c *libvirtConn) Info(dom rpc.Domain) (rpc.DomainInfo, error) {
	state, maxMem, memory, vcpus, time, err := c.l.DomainGetInfo(golibvirt.Domain{Name: dom.Name, UUID: golibvirt.UUID(dom.UUID), ID: dom.ID})
	if golibvirt.IsNotFound(err) {
		return rpc.DomainInfo{}, ErrNoGuest
	}
	if err != nil {
		return rpc.DomainInfo{}, fmt.Errorf("ask for the domain's state: %w", err)
	}
	return rpc.DomainInfo{State: uint32(state), MaxMem: maxMem, Memory: memory, VCPUs: uint32(vcpus), CPUTime: time}, nil
}
