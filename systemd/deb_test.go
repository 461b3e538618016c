package systemd

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"kemari/migrate/migratetest"
)

// TestPackageDivertsVirsh installs and removes a package with our maintainer scripts,
// beside one that has virsh, in a root of its own.
func TestPackageDivertsVirsh(t *testing.T) {
	migratetest.Need(t, "dpkg", func() error {
		for _, p := range []string{"dpkg-deb", "dpkg-divert"} {
			if _, err := exec.LookPath(p); err != nil {
				return err
			}
		}
		return nil
	})
	root := t.TempDir()
	dpkg := func(args ...string) {
		t.Helper()
		b, err := exec.Command("dpkg", append([]string{"--root=" + root, "--force-script-chrootless,not-root,depends", "--log=/dev/null"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("dpkg %v: %v\n%s", args, err, b)
		}
	}
	write := func(path, content string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	build := func(tree string) string {
		t.Helper()
		if b, err := exec.Command("dpkg-deb", "--root-owner-group", "--build", tree, tree+".deb").CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, b)
		}
		return tree + ".deb"
	}
	for _, d := range []string{"info", "updates"} {
		if err := os.MkdirAll(filepath.Join(root, "var/lib/dpkg", d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(root, "var/lib/dpkg/status"), "")
	clients, ours := filepath.Join(t.TempDir(), "clients"), filepath.Join(t.TempDir(), "ours")
	write(filepath.Join(clients, "usr/bin/virsh"), "the real one")
	write(filepath.Join(clients, "DEBIAN/control"), "Package: libvirt-clients\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n")
	write(filepath.Join(ours, "usr/bin/virsh"), "ours")
	for _, f := range []string{"control", "preinst", "postinst", "prerm", "postrm"} {
		b, err := os.ReadFile(filepath.Join("deb", f))
		if err != nil {
			t.Fatal(err)
		}
		write(filepath.Join(ours, "DEBIAN", f), string(b))
	}
	has := func(name, want string) {
		t.Helper()
		if b, err := os.ReadFile(filepath.Join(root, "usr/bin", name)); err != nil && want != "" || string(b) != want {
			t.Errorf("%s is %q, %v; want %q", name, b, err, want)
		}
	}
	other, us := build(clients), build(ours)
	dpkg("-i", other)
	dpkg("-i", us)
	has("virsh", "ours")
	has("virsh.distrib", "the real one")
	dpkg("-i", us) // an update
	has("virsh", "ours")
	has("virsh.distrib", "the real one")
	write(filepath.Join(clients, "usr/bin/virsh"), "a newer real one")
	dpkg("-i", build(clients))
	has("virsh", "ours")
	has("virsh.distrib", "a newer real one")
	dpkg("-r", "kemari")
	has("virsh", "a newer real one")
	has("virsh.distrib", "")
}
