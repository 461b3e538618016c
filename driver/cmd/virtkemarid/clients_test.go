//go:build libvirt_dlopen

package main

import (
	"os/exec"
	"strings"
	"testing"

	"kemari/driver/drivertest"
	"kemari/driver/virt"
	"kemari/migrate/migratetest"
)

// TestGoBinding has libvirt.org/go/libvirt as the client. The library itself knows
// that the test driver cannot migrate, which is what protection is to it.
func TestGoBinding(t *testing.T) {
	migratetest.Need(t, "libvirt", func() error {
		c, err := virt.Open("test:///default", true)
		if err == nil {
			err = c.Close()
		}
		return err
	})
	d := startDaemon(t, drivertest.StartLibvirtd(t).Socket)
	for _, uri := range []string{"kemari:///system?socket=" + d.rw, "xenkemari:///system?socket=" + d.rw} {
		c, err := virt.Open(uri, false)
		if err != nil {
			t.Fatal(err)
		}
		ds, err := c.List()
		if err != nil || len(ds) != 1 || ds[0].Name != "test" {
			t.Fatalf("%v, %v", ds, err)
		}
		if x, err := c.XML(ds[0].UUID, true); err != nil || !strings.Contains(x, "<name>test</name>") {
			t.Errorf("%q, %v", x, err)
		}
		err = c.Protect(ds[0].UUID, virt.Protection{URI: "kemari+ssh://xen2/system", XML: "<domain type='test'><name>test</name><uuid>" + ds[0].UUID + "</uuid></domain>"})
		if err == nil || !strings.Contains(err.Error(), "p2p migration is not supported") {
			t.Errorf("protect: %v", err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	c, err := virt.Open("kemari:///system?socket="+d.ro, true)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ds, err := c.List()
	if err != nil || len(ds) != 1 {
		t.Fatalf("%v, %v", ds, err)
	}
	if _, err := c.XML(ds[0].UUID, true); err == nil {
		t.Error("a reader is given secrets")
	}
}

// TestPython has python3-libvirt.
func TestPython(t *testing.T) {
	const python = "/usr/bin/python3" // the one that Debian's package is for
	migratetest.Need(t, "python3-libvirt", func() error { return exec.Command(python, "-c", "import libvirt").Run() })
	d := startDaemon(t, drivertest.StartLibvirtd(t).Socket)
	out, err := exec.Command(python, "testdata/client.py", d.rw, d.ro).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{
		"kemari ['test'] 1\n", "xenkemari ['test'] 1\n", "state [3, 1]\n",
		"events [('test', 3, 0), ('test', 4, 0)]\n", "xml True\n", "screenshot image/png 8\n", "reader [1, ",
		"protection refused: argument unsupported: p2p migration is not supported",
		"suspend refused: operation forbidden: read only access prevents virDomainSuspend\n",
		"secrets refused: operation forbidden: read only access prevents virDomainGetXMLDesc\n",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("missing: %s", want)
		}
	}
	if t.Failed() {
		t.Logf("%s", out)
	}
}
