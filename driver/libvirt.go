package driver

import (
	"context"
	"errors"
	"fmt"
	"net"

	golibvirt "github.com/digitalocean/go-libvirt"

	"kemari/driver/rpc"
	"kemari/migrate/daemon"
)

// Libvirt is what the driver itself asks of libvirtd. The methods block until
// libvirtd answers or Close is called.
type Libvirt interface {
	// Guest returns the active guest with this UUID, or ErrNoGuest.
	Guest(id rpc.UUID) (Guest, error)
	// Names returns the UUIDs of all domains, active or only defined, by name.
	Names() (map[string]Known, error)
	// XML returns a domain's definition, with its secrets: that of its next start,
	// or as it is. It returns ErrNoGuest if there is none.
	XML(id rpc.UUID, next bool) (string, error)
	// Domains returns those that virConnectListAllDomains's flags select.
	Domains(flags uint32) ([]rpc.Domain, error)
	// Info returns a domain's, or ErrNoGuest.
	Info(dom rpc.Domain) (rpc.DomainInfo, error)
	// Define makes doc the definition of a domain's next start. If it is empty, the
	// domain has none any more, which is no error of one that had none.
	Define(id rpc.UUID, doc string) error
	// Node tells about libvirt's host.
	Node() (Node, error)
	Close() error
}

// Node is a host as its libvirt knows it.
type Node struct {
	FreeMemoryKiB uint64
	Version       uint64 // of libvirt: 1000000 * major + 1000 * minor + release
}

// Known is a domain that libvirtd knows.
type Known struct {
	UUID   rpc.UUID
	Active bool
}

// Guest is a domain as it stands.
type Guest struct {
	Name      string
	UUID      rpc.UUID
	ID        uint32
	XML       string
	Running   bool // and not paused, shutting down, crashed, …
	State     string
	MemoryKiB uint64
	Job       bool // libvirt is saving, migrating or dumping it

	DeviceModel *DeviceModel // what runs for it, if it is an HVM guest
}

// ErrNoGuest is returned where no such domain is active.
var ErrNoGuest = errors.New("no such domain is running")

// OpenLibvirt connects to libvirtd at its socket. The connection, and every call
// on it, ends when ctx does.
func OpenLibvirt(ctx context.Context, socket, uri string) (Libvirt, error) {
	return openLibvirt(ctx, []string{socket}, uri)
}

func openLibvirt(ctx context.Context, sockets []string, uri string) (Libvirt, error) {
	l := new(libvirtConn)
	c, err := daemon.Enter(ctx, sockets, func(c net.Conn) error {
		l.stop = context.AfterFunc(ctx, func() { c.Close() })
		l.l = golibvirt.NewWithDialer(given{c})
		err := l.l.ConnectToURI(golibvirt.ConnectURI(uri))
		if err != nil {
			l.stop()
		}
		return err
	})
	var nobody *daemon.DialError
	switch {
	case errors.As(err, &nobody):
		return nil, fmt.Errorf("connect to libvirtd: %w", err)
	case err != nil:
		return nil, fmt.Errorf("open %s: %w", uri, err)
	}
	l.conn = c
	return l, nil
}

// given is a dialer of a connection that is there.
type given struct{ net.Conn }

func (g given) Dial() (net.Conn, error) { return g.Conn, nil }

type libvirtConn struct {
	l    *golibvirt.Libvirt
	conn net.Conn
	stop func() bool
}

func (c *libvirtConn) Close() error {
	c.stop()
	err := c.l.Disconnect()
	c.conn.Close()
	return err
}

var stateNames = map[golibvirt.DomainState]string{
	golibvirt.DomainNostate: "in no state", golibvirt.DomainRunning: "running",
	golibvirt.DomainBlocked: "running", golibvirt.DomainPaused: "paused",
	golibvirt.DomainShutdown: "shutting down", golibvirt.DomainShutoff: "shut off",
	golibvirt.DomainCrashed: "crashed", golibvirt.DomainPmsuspended: "suspended",
}

func (c *libvirtConn) Guest(id rpc.UUID) (Guest, error) {
	dom, err := c.l.DomainLookupByUUID(golibvirt.UUID(id))
	if golibvirt.IsNotFound(err) {
		return Guest{}, ErrNoGuest
	}
	if err != nil {
		return Guest{}, fmt.Errorf("look up the guest: %w", err)
	}
	if dom.ID < 0 {
		return Guest{}, ErrNoGuest
	}
	state, _, err := c.l.DomainGetState(dom, 0)
	if err != nil {
		return Guest{}, fmt.Errorf("ask for the guest's state: %w", err)
	}
	_, _, mem, _, _, err := c.l.DomainGetInfo(dom)
	if err != nil {
		return Guest{}, fmt.Errorf("ask for the guest's memory: %w", err)
	}
	// As root sees it: a password left out here would be missing over there.
	doc, err := c.l.DomainGetXMLDesc(dom, golibvirt.DomainXMLSecure)
	if err != nil {
		return Guest{}, fmt.Errorf("ask for the guest's XML: %w", err)
	}
	g := Guest{
		Name: dom.Name, UUID: id, ID: uint32(dom.ID), XML: doc,
		Running:   golibvirt.DomainState(state) == golibvirt.DomainRunning || golibvirt.DomainState(state) == golibvirt.DomainBlocked,
		State:     stateNames[golibvirt.DomainState(state)],
		MemoryKiB: mem,
	}
	// Drivers without jobs do not know the call.
	if typ, _, _, _, _, _, _, _, _, _, _, _, err := c.l.DomainGetJobInfo(dom); err == nil {
		g.Job = golibvirt.DomainJobType(typ) != golibvirt.DomainJobNone
	}
	return g, nil
}

func (c *libvirtConn) Names() (map[string]Known, error) {
	doms, _, err := c.l.ConnectListAllDomains(1, 0)
	if err != nil {
		return nil, fmt.Errorf("list the domains: %w", err)
	}
	m := make(map[string]Known, len(doms))
	for _, d := range doms {
		m[d.Name] = Known{UUID: rpc.UUID(d.UUID), Active: d.ID >= 0}
	}
	return m, nil
}

func (c *libvirtConn) Node() (Node, error) {
	b, err := c.l.NodeGetFreeMemory()
	if err != nil {
		return Node{}, fmt.Errorf("ask for the free memory: %w", err)
	}
	v, err := c.l.ConnectGetLibVersion()
	if err != nil {
		return Node{}, fmt.Errorf("ask for libvirt's version: %w", err)
	}
	return Node{FreeMemoryKiB: b / 1024, Version: v}, nil
}

func (c *libvirtConn) Define(id rpc.UUID, doc string) error {
	if doc != "" {
		if _, err := c.l.DomainDefineXML(doc); err != nil {
			return fmt.Errorf("define the domain: %w", err)
		}
		return nil
	}
	dom, err := c.l.DomainLookupByUUID(golibvirt.UUID(id))
	var persistent int32
	if err == nil {
		persistent, err = c.l.DomainIsPersistent(dom)
	}
	if err == nil && persistent != 0 {
		err = c.l.DomainUndefine(dom)
	}
	if err != nil && !golibvirt.IsNotFound(err) {
		return fmt.Errorf("undefine the domain: %w", err)
	}
	return nil
}
