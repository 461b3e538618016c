package lab

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// testOracle: what migrate/xen captures of a real guest is what Xen's own
// libxenguest saves of it; see there.
func testOracle(t *testing.T) {
	running(t)
	bin := t.TempDir() + "/xen.test"
	cmd := exec.Command("go", "test", "-c", "-ldflags", "-s -w", "-o", bin, "kemari/migrate/xen")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, b)
	}
	if out, err := try(5*time.Minute, "make", "-s", "-C", "../..", "bin/kemari-xcsave"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	lab(t, 2*time.Minute, "copy", "1", bin, "/root/xen.test")
	lab(t, 2*time.Minute, "copy", "1", "../../bin/kemari-xcsave", "/root/kemari-xcsave")
	const test = "TestLabSameAsLibxenguest"
	out := on(t, 1, `cd /root; export KEMARI_REQUIRE=all KEMARI_XCSAVE=/root/kemari-xcsave KEMARI_DOMID=$(xl domid g1)
./xen.test -test.v -test.run '^`+test+`$' -test.timeout 280s 2>&1; exit=$?; rm -f xen.test kemari-xcsave; exit $exit`)
	t.Log(strings.TrimSpace(out))
	if !strings.Contains(out, "--- PASS: "+test) {
		t.Error("the test did not run")
	}
	unhindered(t)
}
