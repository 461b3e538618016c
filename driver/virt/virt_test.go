package virt

import (
	"errors"
	"strings"
	"testing"

	"kemari/migrate/migratetest"
	"libvirt.org/go/libvirt"
)

// libvirt's test driver lives in the client library and needs no daemon.
const testURI = "test:///default"

func open(t *testing.T) *Conn {
	t.Helper()
	migratetest.Need(t, "libvirt", func() error {
		c, err := Open(testURI, false)
		if err == nil {
			err = c.Close()
		}
		return err
	})
	c, err := Open(testURI, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func TestLookup(t *testing.T) {
	c := open(t)
	ds, err := c.List()
	if err != nil || len(ds) != 1 || ds[0].Name != "test" || len(ds[0].UUID) != 36 {
		t.Fatalf("listed %v, %v", ds, err)
	}
	for _, s := range []string{"1", ds[0].UUID, "test"} {
		if d, err := c.Lookup(s); err != nil || d != ds[0] {
			t.Errorf("%s: %v, %v", s, d, err)
		}
	}
	for _, s := range []string{"no such domain", "7", strings.Repeat("x", 36), ""} {
		_, err := c.Lookup(s)
		var e *Error
		if !errors.As(err, &e) || errors.Is(err, ErrTemporary) {
			t.Errorf("%q: %v", s, err)
		}
	}
	x, err := c.XML(ds[0].UUID, true)
	if err != nil || !strings.Contains(x, "<name>test</name>") {
		t.Errorf("XML %q, %v", x, err)
	}
}

// The test driver can neither protect nor abort; its words must reach us whole.
func TestRefused(t *testing.T) {
	c := open(t)
	d, err := c.Lookup("test")
	if err != nil {
		t.Fatal(err)
	}
	for err, want := range map[error]string{
		c.Abort(d.UUID): "not supported by the connection driver: virDomainAbortJob",
		c.Protect(d.UUID, Protection{URI: "kemari+ssh://xen2/system"}): "p2p migration is not supported",
	} {
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "virError") || errors.Is(err, ErrTemporary) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
	if _, err := c.XML("00000000-0000-0000-0000-000000000000", false); err == nil {
		t.Error("XML of no domain")
	}
}

func TestTemporary(t *testing.T) {
	open(t)
	if _, err := Open("kemari+ssh://127.0.0.1:1/system", true); !errors.Is(err, ErrTemporary) {
		t.Errorf("a host that refuses the connection: %v", err)
	}
	for code, want := range map[libvirt.ErrorNumber]bool{
		libvirt.ERR_NO_CONNECT: true, libvirt.ERR_CONFIG_UNSUPPORTED: false, libvirt.ERR_OPERATION_INVALID: false,
	} {
		if got := errors.Is(&Error{Code: int(code)}, ErrTemporary); got != want {
			t.Errorf("code %d: %v", code, got)
		}
	}
}
