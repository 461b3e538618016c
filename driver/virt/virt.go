package virt

import (
	"errors"
	"strconv"

	"libvirt.org/go/libvirt"
)

// MigrateKemari is VIR_MIGRATE_KEMARI: the migration flag that makes a migration
// an endless one, which is protection. libvirt's own flags are far below it, and
// its client library passes on what it does not know.
const MigrateKemari = 1 << 30

// ErrTemporary is what an Error matches if the same call may succeed later: some
// host or service did not answer, or not yet. What was refused for what it is does
// not match.
var ErrTemporary = errors.New("may succeed later")

// Error is libvirt's.
type Error struct {
	Code    int // a VIR_ERR_ number
	Message string
}

func (e *Error) Error() string { return e.Message }

// Is implements errors.Is for ErrTemporary.
func (e *Error) Is(target error) bool {
	if target != ErrTemporary {
		return false
	}
	switch libvirt.ErrorNumber(e.Code) {
	case libvirt.ERR_NO_CONNECT, libvirt.ERR_SYSTEM_ERROR, libvirt.ERR_RPC, libvirt.ERR_INTERNAL_ERROR,
		libvirt.ERR_OPERATION_FAILED, libvirt.ERR_OPERATION_TIMEOUT:
		return true
	}
	return false
}

// wrap turns the binding's error into one that reads as libvirt's message alone.
func wrap(err error) error {
	var e libvirt.Error
	if !errors.As(err, &e) {
		return err
	}
	return &Error{Code: int(e.Code), Message: e.Message}
}

// Conn is a connection. Its methods block for as long as libvirt takes and are
// safe for concurrent use, but a call does not wait for another: to abort what
// one connection is doing, open a second.
type Conn struct{ c *libvirt.Connect }

// Open connects to a libvirt URI.
func Open(uri string, readonly bool) (*Conn, error) {
	open := libvirt.NewConnect
	if readonly {
		open = libvirt.NewConnectReadOnly
	}
	c, err := open(uri)
	if err != nil {
		return nil, wrap(err)
	}
	return &Conn{c}, nil
}

// Close ends the connection. Domains of it must not be used any more.
func (c *Conn) Close() error {
	_, err := c.c.Close()
	return wrap(err)
}

// Domain is one that libvirt knows.
type Domain struct{ Name, UUID string }

// Lookup finds a domain as virsh does: by its number, UUID or name, in that order.
func (c *Conn) Lookup(s string) (Domain, error) {
	var d *libvirt.Domain
	err := error(libvirt.ERR_NO_DOMAIN)
	if id, e := strconv.ParseUint(s, 10, 31); e == nil {
		d, err = c.c.LookupDomainById(uint32(id))
	}
	if err != nil && len(s) == 36 {
		d, err = c.c.LookupDomainByUUIDString(s)
	}
	if err != nil {
		d, err = c.c.LookupDomainByName(s)
	}
	if err != nil {
		return Domain{}, wrap(err)
	}
	defer d.Free() //nolint:errcheck // only memory of ours
	return describe(d)
}

// List returns all domains, running or not.
func (c *Conn) List() ([]Domain, error) {
	ds, err := c.c.ListAllDomains(0)
	if err != nil {
		return nil, wrap(err)
	}
	var r []Domain
	for i := range ds {
		d, e := describe(&ds[i])
		if e != nil {
			err = e
		} else {
			r = append(r, d)
		}
		ds[i].Free() //nolint:errcheck // only memory of ours
	}
	return r, err
}

func describe(d *libvirt.Domain) (Domain, error) {
	name, err := d.GetName()
	if err != nil {
		return Domain{}, wrap(err)
	}
	uuid, err := d.GetUUIDString()
	if err != nil {
		return Domain{}, wrap(err)
	}
	return Domain{Name: name, UUID: uuid}, nil
}

// with calls f with the binding's domain.
func (c *Conn) with(uuid string, f func(*libvirt.Domain) error) error {
	d, err := c.c.LookupDomainByUUIDString(uuid)
	if err != nil {
		return wrap(err)
	}
	defer d.Free() //nolint:errcheck // only memory of ours
	return wrap(f(d))
}

// XML returns the domain as it is now. Secrets, such as a console's password, are
// in it only if asked for, which a read-only connection may not.
func (c *Conn) XML(uuid string, secrets bool) (xml string, err error) {
	var flags libvirt.DomainXMLFlags
	if secrets {
		flags = libvirt.DOMAIN_XML_SECURE
	}
	err = c.with(uuid, func(d *libvirt.Domain) error {
		xml, err = d.GetXMLDesc(flags)
		return err
	})
	return xml, err
}

// Protection is what Protect asks for.
type Protection struct {
	URI     string // of the standby's virtkemarid
	XML     string // the domain with the element that says how
	DataURI string // where the standby shall take the stream; "" leaves it to choose
}

// Protect begins protection and returns once the standby has the first epoch, or
// with the reason why not.
func (c *Conn) Protect(uuid string, p Protection) error {
	return c.with(uuid, func(d *libvirt.Domain) error {
		return d.MigrateToURI3(p.URI, &libvirt.DomainMigrateParameters{
			DestXMLSet: true,
			DestXML:    p.XML,
			URISet:     p.DataURI != "",
			URI:        p.DataURI,
		}, libvirt.MIGRATE_PEER2PEER|libvirt.MIGRATE_LIVE|MigrateKemari)
	})
}

// Switchover migrates a protected domain to its standby, of that URI, and returns once
// it runs there.
func (c *Conn) Switchover(uuid, uri string) error {
	return c.with(uuid, func(d *libvirt.Domain) error {
		return d.MigrateToURI3(uri, &libvirt.DomainMigrateParameters{}, libvirt.MIGRATE_PEER2PEER|libvirt.MIGRATE_LIVE)
	})
}

// Abort ends the domain's job, which its protection is.
func (c *Conn) Abort(uuid string) error {
	return c.with(uuid, (*libvirt.Domain).AbortJob)
}
