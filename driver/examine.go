package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"

	"kemari/driver/rpc"
	"kemari/xml"
)

// DefaultSocket is where virtkemarid listens.
const DefaultSocket = "/run/libvirt/virtkemarid-sock"

// examineRequest asks for all that stands in the way of protecting a domain.
type examineRequest struct {
	Domain  string `json:"domain"`            // a name or a UUID
	Standby string `json:"standby,omitempty"` // a URI; that of the domain's element if empty
}

// Examination is whether a guest can be protected, as both hosts see it.
type Examination struct {
	Domain  string        `json:"domain"`
	UUID    string        `json:"uuid"`
	Standby string        `json:"standby,omitempty"` // the URI that was asked, if any
	Reasons []HostsReason `json:"reasons"`           // why not
}

// HostsReason is a reason, and which host it is found on.
type HostsReason struct {
	Host   string `json:"host"`
	Text   string `json:"text"`
	Remedy string `json:"remedy"`
}

// Examine has the virtkemarid that the URI connect leads to examine a domain.
func Examine(ctx context.Context, connect, domain, standby string) (*Examination, error) {
	conn, err := dialDaemon(ctx, connect)
	if err != nil {
		return nil, err
	}
	c := rpc.NewClient(conn)
	defer c.Close()
	var e Examination
	if err := callPeer(ctx, c, procExamine, examineRequest{Domain: domain, Standby: standby}, &e); err != nil {
		return nil, err
	}
	return &e, nil
}

func dialDaemon(ctx context.Context, connect string) (io.ReadWriteCloser, error) {
	u, err := url.Parse(connect)
	if err != nil {
		return nil, err
	}
	if u.Host != "" {
		t, err := ParseTarget(connect)
		if err != nil {
			return nil, err
		}
		return DialSSH(ctx, t)
	}
	path := DefaultSocket
	if s := u.Query().Get("socket"); s != "" {
		path = s
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("virtkemarid cannot be reached: %w; see systemctl status virtkemarid.socket", err)
	}
	return c, nil
}

// examine finds all reasons why the domain cannot be protected: of the guest, of
// this host, and of the standby if it is known. That the guest does not run is
// none, since it may be started.
func (d *Driver) examine(ctx context.Context, req examineRequest) (*Examination, error) {
	l, err := d.cfg.Libvirt(ctx)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	dom, active, err := find(l, req.Domain)
	if err != nil {
		return nil, err
	}
	doc, err := l.XML(dom.UUID, false)
	if err != nil {
		return nil, err
	}
	e := &Examination{Domain: dom.Name, UUID: dom.UUID.String(), Standby: req.Standby, Reasons: []HostsReason{}}
	host, hostErr := d.cfg.Host()
	add := func(where string, rs ...xml.Reason) {
		for _, r := range rs {
			e.Reasons = append(e.Reasons, HostsReason{where, r.Text, r.Remedy})
		}
	}
	if hostErr != nil {
		add(host.Name, reasonOf(hostErr))
	}
	add(host.Name, xml.Ineligible(doc)...)
	element, err := xml.FromDomain(doc)
	if err != nil {
		add(host.Name, xml.Reason{Text: "its element is wrong: " + err.Error(), Remedy: "correct it with virsh edit or virsh metadata"})
	}
	if e.Standby == "" && element != nil && element.Standby != nil {
		e.Standby = element.Standby.URI
	}
	g := Guest{Name: dom.Name, UUID: dom.UUID, XML: doc}
	if g.MemoryKiB, err = xml.MemoryKiB(doc); err != nil {
		g.MemoryKiB = 0 // Ineligible has said so
	}
	if active {
		now, err := l.Guest(dom.UUID)
		g.ID = now.ID
		switch {
		case errors.Is(err, ErrNoGuest):
			active = false
		case err != nil:
			return nil, err
		case !now.Running:
			add(host.Name, xml.Reason{Text: "it is " + now.State, Remedy: "a guest must run to be protected; resume or start it"})
		case now.Job:
			add(host.Name, xml.Reason{Text: "libvirt is saving, dumping or migrating it", Remedy: "wait for that"})
		}
	}
	if _, err := d.lastGeneration(ctx, dom); err != nil {
		add(host.Name, reasonOf(err))
	} else if active && xml.HasDeviceModel(doc) {
		g.DeviceModel = d.cfg.DeviceModel(g.ID)
	}
	if e.Standby == "" {
		return e, nil
	}
	t, err := ParseTarget(e.Standby)
	if err != nil {
		add(host.Name, reasonOf(err))
		return e, nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, 2*connectTimeout, fmt.Errorf("no answer within %v", 2*connectTimeout))
	defer cancel()
	client, there, err := d.connectStandby(ctx, &request{domain: dom, target: t}, hvmRequestOf(g, doc))
	if err != nil {
		add(t.Host, reasonOf(err))
		return e, nil
	}
	client.Close()
	if hostErr == nil {
		for _, r := range verdictReasons(g, host, there) {
			add(there.Host.Name, r)
		}
	}
	return e, nil
}

// find looks a domain up by its UUID or name.
func find(l Libvirt, s string) (rpc.Domain, bool, error) {
	names, err := l.Names()
	if err != nil {
		return rpc.Domain{}, false, err
	}
	for name, k := range names {
		if name == s || k.UUID.String() == s {
			return rpc.Domain{Name: name, UUID: k.UUID, ID: -1}, k.Active, nil
		}
	}
	return rpc.Domain{}, false, refuse(rpc.CodeNoDomain, fmt.Sprintf("there is no domain %q", s), "")
}

// reasonOf is an error as a reason.
func reasonOf(err error) xml.Reason {
	var r *Refusal
	if errors.As(err, &r) {
		return xml.Reason{Text: r.Text, Remedy: r.Remedy}
	}
	return xml.Reason{Text: oneLine(err.Error())}
}
