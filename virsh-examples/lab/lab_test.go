// Package lab tests the product where it lives: on two real Xen hosts, emulated,
// with stock libvirt. See `lab help`.
package lab

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"kemari/migrate/control"
	"kemari/migrate/migratetest"
)

const (
	g1UUID = "00000000-0000-4000-8000-0000000000a1"
	guest  = "10.99.0.100"
)

// possible says whether this machine can run the laboratory.
func possible() error {
	if runtime.GOOS != "linux" || runtime.GOARCH != "amd64" {
		return errors.New("it needs Linux on amd64")
	}
	if os.Getuid() != 0 {
		return errors.New("it needs root")
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return errors.New("it is built from Debian's packages")
	}
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// begin brings one suite's laboratory up with this checkout on its hosts, and
// saves that as the snapshot ready. It is down again when the test ends.
func begin(t *testing.T, suite string) {
	migratetest.Need(t, "lab", possible)
	t.Setenv("KEMARI_LAB_SUITE", suite)
	lab(t, 40*time.Minute, "up")
	t.Cleanup(func() { lab(t, time.Minute, "down") })
	lab(t, 10*time.Minute, "reset")
	lab(t, 10*time.Minute, "deploy")
	lab(t, 5*time.Minute, "save", "ready")
	lab(t, time.Minute, "exec", "true")
	build(t, "bin/count", "./virsh-examples/lab/count")
}

// TestLab is every story, one after the other, on Debian 13: Xen 4.20, libvirt
// 11.3, Linux 6.12. KEMARI_LAB_SUITE=bookworm tells them on Debian 12.
func TestLab(t *testing.T) {
	begin(t, cmp.Or(os.Getenv("KEMARI_LAB_SUITE"), "trixie"))

	// Those that need no running guest first: they share the fresh hosts.
	t.Run("plug", testPlug)
	t.Run("stock virsh", testStockVirsh)
	t.Run("refusals", testRefusals)
	t.Run("hvm", testHVM)
	t.Run("failover", testFailover)
	for _, c := range []struct {
		name string
		f    func(*testing.T)
	}{
		{"abort", testAbort},
		{"replicator killed", testReplicatorKilled},
		{"power off inside", testPowerOffInside},
		{"standby dies", testStandbyDies},
		{"freeze and thaw", testFreezeThaw},
	} {
		t.Run(c.name, func(t *testing.T) {
			lab(t, 10*time.Minute, "reset", "guest")
			protect(t)
			c.f(t)
		})
	}
}

// TestLabBookworm is the main story on Debian 12: Xen 4.17, libvirt 9.0, Linux 6.1.
func TestLabBookworm(t *testing.T) {
	begin(t, "bookworm")
	t.Run("failover", testFailover)
}

// lab runs the laboratory's command and returns what it printed.
func lab(t testing.TB, timeout time.Duration, args ...string) string {
	t.Helper()
	out, err := try(timeout, "./lab", args...)
	if err != nil {
		t.Fatalf("lab %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func try(timeout time.Duration, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		err = fmt.Errorf("still running after %v", timeout)
	}
	return string(out), err
}

// on runs a command on host n, which must succeed.
func on(t testing.TB, n int, command string) string {
	t.Helper()
	return lab(t, 5*time.Minute, "ssh", strconv.Itoa(n), command)
}

// refused runs one that must fail, and say each of want.
func refused(t testing.TB, n int, command string, want ...string) {
	t.Helper()
	out, err := try(2*time.Minute, "./lab", "ssh", strconv.Itoa(n), command)
	if err == nil {
		t.Errorf("%s: succeeded, want a refusal\n%s", command, out)
	}
	for _, w := range want {
		if !strings.Contains(out, w) {
			t.Errorf("%s: said\n%s\nwant it to contain %q", command, out, w)
		}
	}
}

func build(t testing.TB, out, pkg string) {
	t.Helper()
	cmd := exec.Command("go", "build", "-trimpath", "-o", out, pkg)
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build %s: %v\n%s", pkg, err, b)
	}
}

const protectCommand = "virsh migrate --kemari --live --kemari-arbiter none --kemari-timeout 1500 g1 kemari+ssh://xen2/system"

func protect(t testing.TB) {
	t.Helper()
	on(t, 1, protectCommand)
	s := status(t, 1)
	if s.Phase != control.Protected || s.Risk == "" {
		t.Fatalf("after protection: %+v", s)
	}
	if s := status(t, 2); s.Phase != control.Ready {
		t.Fatalf("standby after protection: %+v", s)
	}
}

// status is what host n says of g1, the zero Status if it knows nothing of it.
func status(t testing.TB, n int) control.Status {
	t.Helper()
	var all []control.Status
	out := on(t, n, "kemari status --json")
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		t.Fatalf("kemari status --json: %v\n%s", err, out)
	}
	for _, s := range all {
		if s.UUID == g1UUID {
			return s
		}
	}
	return control.Status{}
}

// eventually waits until f is true.
func eventually(t testing.TB, timeout time.Duration, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(timeout); !f(); time.Sleep(500 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", timeout, what)
		}
	}
}

// answers tells whether the guest's counter answers within two seconds.
func answers() bool { return answersAt(guest) }

func answersAt(guest string) bool {
	_, err := try(10*time.Second, "./lab", "exec", "sh", "-c",
		"echo GET | timeout 4 socat -t2 - TCP:"+net.JoinHostPort(guest, "7")+",connect-timeout=2 | grep -q '^[0-9]'")
	return err == nil
}

// unhindered checks that the guest on host 1 runs as if it had never been
// protected.
func unhindered(t testing.TB) {
	t.Helper()
	eventually(t, 20*time.Second, "the guest answers", answers)
	if out := on(t, 1, "tc qdisc show; ip -br link"); strings.Contains(out, "plug") || strings.Contains(out, "kemari") {
		t.Errorf("a plug was left behind:\n%s", out)
	}
	if out := on(t, 1, "virsh -q -c xen:///system domstate g1"); strings.TrimSpace(out) != "running" {
		t.Errorf("the guest is %s", out)
	}
	// The state letters of xl list have an s for a guest that stands suspended.
	if out := on(t, 1, "xl list g1"); regexp.MustCompile(`g1 +\d+ +\d+ +\d+ +[^ ]*s`).MatchString(out) {
		t.Errorf("the guest was left suspended:\n%s", out)
	}
	// Xen's own dump of its domains names the mode.
	if out := on(t, 1, "xl debug-keys q; sleep 1; xl dmesg | tail -n 60"); !strings.Contains(out, "paging assistance") || strings.Contains(out, "log_dirty") {
		t.Errorf("log-dirty was left on, or Xen does not say:\n%s", out)
	}
}

func testFailover(t *testing.T) {
	lab(t, 10*time.Minute, "reset", "ready")
	out, err := try(6*time.Minute, "./stock-migrate")
	if err != nil {
		t.Fatalf("stock migration: %v\n%s", err, out)
	}
	stock := figure(t, out, `STOCK gap_s=([0-9.]+)`)
	lab(t, 10*time.Minute, "reset", "ready")
	on(t, 1, "virsh -q -c xen:///system create /var/lib/kemari-lab/g1.xml")
	eventually(t, 5*time.Minute, "the guest answers", answers)
	lab(t, 5*time.Minute, "save", "guest") // what the other stories begin with
	on(t, 1, "virsh -q -c xen:///system destroy g1")

	out, err = try(10*time.Minute, "../failover")
	t.Logf("%s", out)
	if err != nil {
		t.Fatalf("failover: %v", err)
	}
	gap := figure(t, out, `RESULT .*\bgap_s=([0-9.]+)`)
	takeover := figure(t, out, `RESULT .*\btakeover_s=([0-9.]+)`)
	t.Logf("FIGURES failover_gap_s=%.3f stock_migrate_gap_s=%.3f ratio=%.2f (bound 0.5) takeover_s=%.3f (bound 1.2)", gap, stock, gap/stock, takeover)
}

func figure(t testing.TB, out, pattern string) float64 {
	t.Helper()
	m := regexp.MustCompile(pattern).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("no %s in\n%s", pattern, out)
	}
	f, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// testPlug runs migrate/output's tests where the kernel has what they need. All
// but TestTraffic: on an emulated host it still sees a few frames of one released
// epoch overtake those of the one before; none is lost. NEWS names it.
func testPlug(t *testing.T) {
	bin := t.TempDir() + "/output.test"
	cmd := exec.Command("go", "test", "-c", "-o", bin, "kemari/migrate/output")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, b)
	}
	lab(t, 2*time.Minute, "copy", "2", bin, "/root/output.test")
	out := on(t, 2, "modprobe -a veth sch_plug ifb; cd /root && KEMARI_REQUIRE=all ./output.test -test.skip '^TestTraffic$' -test.timeout 200s && rm output.test")
	t.Log(strings.TrimSpace(out))
}

// testStockVirsh drives kemari:///system with Debian's own virsh.
func testStockVirsh(t *testing.T) {
	const virsh = "/usr/bin/virsh -c kemari:///system "
	for _, c := range []struct{ command, want string }{
		{"uri", "kemari:///system"},
		{"list --all", "Domain-0"},
		{"define /var/lib/kemari-lab/g1.xml", "g1"},
		{"list --all", "shut off"},
		{"start g1", "started"},
		{"dumpxml g1", "<uuid>" + g1UUID + "</uuid>"},
		{"domstate g1", "running"},
		{"destroy g1", "destroyed"},
		{"undefine g1", "undefined"},
	} {
		if c.command == "start g1" {
			on(t, 1, "(timeout 120 "+virsh+"event --event lifecycle --domain g1 --loop > /root/events 2>&1 &) ; sleep 3")
		}
		if out := on(t, 1, virsh+c.command); !strings.Contains(out, c.want) {
			t.Errorf("virsh %s: %q, want %q in it", c.command, out, c.want)
		}
	}
	eventually(t, 10*time.Second, "events through the driver", func() bool {
		out := on(t, 1, "cat /root/events")
		return strings.Contains(out, "Started Booted") && strings.Contains(out, "Stopped Destroyed")
	})
	// Read-only stays read-only.
	on(t, 1, "/usr/bin/virsh -q -r -c kemari:///system list --all")
	refused(t, 1, "/usr/bin/virsh -q -r -c kemari:///system define /var/lib/kemari-lab/g1.xml", "read only")
}

// testRefusals: each is refused before anything starts, with the reason.
func testRefusals(t *testing.T) {
	const migrate = "virsh migrate --kemari --live --kemari-arbiter none "
	refused(t, 1, migrate+"nosuch kemari+ssh://xen2/system", "omain not found")
	on(t, 1, "virsh -q -c xen:///system define /var/lib/kemari-lab/g1.xml")
	refused(t, 1, migrate+"g1 kemari+ssh://xen2/system", "running")
	on(t, 1, "virsh -q -c xen:///system undefine g1")
	on(t, 1, "virsh -q -c xen:///system create /var/lib/kemari-lab/g1.xml")
	refused(t, 1, migrate+"g1 kemari+ssh://xen9/system", "xen9")
	refused(t, 1, migrate+"g1 kemari+ssh://xen1/system", "this")
	refused(t, 1, migrate+"--kemari-min 5000 --kemari-max 10 g1 kemari+ssh://xen2/system", "min")
	// A guest that has room to balloon cannot be protected. A slow host may run into
	// libxl's time-outs when it makes a second guest while the first one boots.
	on(t, 1, `sed -e 's/<memory unit=.MiB.>128</<memory unit="MiB">160</' -e 's|</memory>|&<currentMemory unit="MiB">128</currentMemory>|' -e s/0000a1/0000b1/ -e s/g1/g2/ -e s/3e:00:00:01/3e:00:00:02/ /var/lib/kemari-lab/g1.xml > /root/g2.xml; for i in 1 2 3; do virsh -q -c xen:///system create /root/g2.xml && exit; sleep 5; done; exit 1`)
	refused(t, 1, migrate+"g2 kemari+ssh://xen2/system", "currentMemory")
	on(t, 1, "virsh -q -c xen:///system destroy g2")
	// The other host has no Kemari.
	on(t, 2, "systemctl stop virtkemarid.socket virtkemarid-ro.socket virtkemarid.service")
	refused(t, 1, migrate+"g1 kemari+ssh://xen2/system", "virtkemarid.socket")
	on(t, 2, "systemctl start virtkemarid.socket virtkemarid-ro.socket")
	if out := on(t, 1, "virsh -q -c xen:///system domstate g1"); strings.TrimSpace(out) != "running" {
		t.Errorf("the guest is %s", out)
	}
	on(t, 1, "virsh -q -c xen:///system destroy g1")
}

// testHVM: the hosts have what an HVM guest needs, a device model included.
func testHVM(t *testing.T) {
	on(t, 1, "virsh -q -c xen:///system create /var/lib/kemari-lab/h1.xml")
	eventually(t, 5*time.Minute, "the HVM guest answers", func() bool { return answersAt("10.99.0.102") })
	if out := on(t, 1, "virsh -q -c xen:///system dumpxml h1"); !strings.Contains(out, ">hvm<") {
		t.Errorf("h1 is no HVM guest:\n%s", out)
	}
	on(t, 1, "virsh -q -c xen:///system destroy h1")
}

func testAbort(t *testing.T) {
	refused(t, 1, protectCommand, "protected")
	refused(t, 1, "virsh -c kemari:///system save g1 /root/g1.save", "protect")
	on(t, 1, "virsh -c kemari:///system domjobabort g1")
	if s := status(t, 1); s.Phase != control.Ended || s.Error != "" {
		t.Errorf("primary after domjobabort: %+v", s)
	}
	unhindered(t)
	eventually(t, 30*time.Second, "no shadow on xen2", func() bool { return !strings.Contains(on(t, 2, "virsh -q list --all"), "g1") })
	// And once more, since what ended in order can begin again.
	protect(t)
}

func testReplicatorKilled(t *testing.T) {
	on(t, 1, "systemctl kill -s KILL --kill-who=main kemari-replicator@"+g1UUID)
	eventually(t, 90*time.Second, "the replicator's end is known", func() bool { return status(t, 1).Phase == control.Ended })
	if s := status(t, 1); s.Error == "" || s.Hint == "" {
		t.Errorf("a killed replicator is not told of: %+v", s)
	}
	unhindered(t)
	eventually(t, 60*time.Second, "no shadow on xen2", func() bool { return !strings.Contains(on(t, 2, "virsh -q list --all"), "g1") })

	protect(t)
	on(t, 1, "systemctl kill -s KILL kemari-replicator@"+g1UUID) // its helper too
	eventually(t, 90*time.Second, "the replicator's end is known", func() bool { return status(t, 1).Phase == control.Ended })
	unhindered(t)
}

func testPowerOffInside(t *testing.T) {
	try(10*time.Second, "./lab", "exec", "sh", "-c", "echo | timeout 3 socat - TCP:"+guest+":9,connect-timeout=2")
	eventually(t, 60*time.Second, "the guest has ended on xen1", func() bool { return !strings.Contains(on(t, 1, "virsh -q list --all"), "g1") })
	eventually(t, 60*time.Second, "the shadow has ended on xen2", func() bool { return !strings.Contains(on(t, 2, "virsh -q list --all; xl list"), "g1") })
	eventually(t, 30*time.Second, "protection has ended", func() bool { return status(t, 1).Phase == control.Ended })
	if s := status(t, 1); !strings.Contains(s.Error, "guest has ended") {
		t.Errorf("primary says %q", s.Error)
	}
	if out := on(t, 1, "ip -br link"); strings.Contains(out, "kemari") {
		t.Errorf("a plug was left behind:\n%s", out)
	}
}

func testStandbyDies(t *testing.T) {
	lab(t, time.Minute, "power-off", "2")
	eventually(t, 60*time.Second, "the primary says that it is unprotected", func() bool { return status(t, 1).Phase == control.Ended })
	if s := status(t, 1); !strings.Contains(s.Error, "standby") || s.Hint == "" {
		t.Errorf("primary says %+v", s)
	}
	unhindered(t)
}

// testFreezeThaw: a primary that was only frozen finds out that it is not the
// guest any more, and ends its copy.
func testFreezeThaw(t *testing.T) {
	lab(t, time.Minute, "freeze", "1")
	eventually(t, 60*time.Second, "xen2 takes over", func() bool { return status(t, 2).Phase == control.Active })
	lab(t, time.Minute, "thaw", "1")
	eventually(t, 60*time.Second, "xen1 ends its copy", func() bool { return !strings.Contains(on(t, 1, "xl list"), "g1") })
	eventually(t, 30*time.Second, "the guest answers", answers)
	if s := status(t, 1); !strings.Contains(s.Error, "taken over") {
		t.Errorf("xen1 says %+v", s)
	}
}
