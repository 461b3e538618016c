//go:build libvirt_dlopen

package driver

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"kemari/driver/rpc"
	"kemari/driver/virt"
	"kemari/migrate/control"
	"kemari/migrate/migratetest"
)

// TestFlag has the flag, and what stands for it in the destination's URI, go through
// libvirt's own library, from each language.
func TestFlag(t *testing.T) {
	const (
		to     = "kemari+ssh://xen2/system"
		byName = "xen+ssh://xen2/system?kemari=1"
		p2p    = rpc.MigratePeer2Peer | rpc.MigrateLive
	)
	run := func(name string, args ...string) error {
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	need := func(t *testing.T, what, name string, args ...string) {
		t.Helper()
		migratetest.Need(t, what, func() error { return run(name, args...) })
	}
	program := filepath.Join(t.TempDir(), "flag")
	inC := func(t *testing.T, from, dest string, flags uint32) error {
		need(t, "cc", "cc", "-o", program, "testdata/flag.c", "-l:libvirt.so.0")
		return run(program, from, "g1", dest, fmt.Sprint(flags))
	}
	inPython := func(t *testing.T, from, dest string, flags uint32) error {
		need(t, "python3-libvirt", python, "-c", "import libvirt")
		return run(python, "-c", "import sys, libvirt; libvirt.open(sys.argv[1]).lookupByName('g1').migrateToURI3(sys.argv[2], {}, int(sys.argv[3]))",
			from, dest, fmt.Sprint(flags))
	}
	inGo := func(t *testing.T, from, dest string, _ uint32) error {
		c, err := virt.Open(from, false)
		if err != nil {
			return err
		}
		defer c.Close()
		return c.Protect(g1UUID, virt.Protection{URI: dest, XML: g1XML})
	}
	byVirsh := func(t *testing.T, from, dest string, _ uint32) error {
		need(t, "virsh", "virsh", "--version")
		return run("virsh", "-c", from, "migrate", "--p2p", "--live", "g1", dest)
	}
	inShell := func(t *testing.T, from, dest string, _ uint32) error {
		need(t, "virsh", "virsh", "--version")
		shell := exec.Command("virsh", "-c", from)
		shell.Stdin = strings.NewReader("migrate --p2p --live g1 " + dest + "\nquit\n")
		out, err := shell.CombinedOutput() // which says of no command whether it failed
		t.Logf("%s", out)
		return err
	}
	for name, c := range map[string]struct {
		protect func(t *testing.T, from, dest string, flags uint32) error
		dest    string
		flags   uint32
	}{
		"C":              {inC, to, p2p | rpc.MigrateKemari},
		"C, by URI":      {inC, byName, p2p},
		"Python":         {inPython, to, p2p | rpc.MigrateKemari},
		"Python, by URI": {inPython, byName, p2p},
		"Go":             {inGo, to, 0},
		"virsh, by URI":  {byVirsh, byName, 0},
		"virsh's shell":  {inShell, byName, 0},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := pairOn(t, movingLibvirtd(t).path)
			if err := c.protect(t, uri+"?socket="+a.rw, c.dest, c.flags); err != nil {
				t.Fatal(err)
			}
			if p, s := replicatorOf(t, a), standbyOf(t, b); p.status().Phase != control.Protected || s.status().Phase != control.Ready || p.primary.StandbyURI != to {
				t.Errorf("%+v, %+v, %+v", p.status(), s.status(), p.primary)
			}
		})
	}
}
