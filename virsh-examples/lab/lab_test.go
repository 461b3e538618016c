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
	"slices"
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
	// A host that stands still for longer is taken for dead, and without an arbiter both
	// then run the guest; emulated ones on a busy machine stand still for more than a
	// second at times.
	t.Setenv("TIMEOUT_MS", "3000")
	lab(t, 40*time.Minute, "up")
	t.Cleanup(func() { lab(t, time.Minute, "down") })
	lab(t, 10*time.Minute, "reset")
	lab(t, 10*time.Minute, "deploy")
	lab(t, time.Minute, "debug", "on") // for what tell shows
	lab(t, 5*time.Minute, "save", "ready")
	build(t, "bin/count", "./virsh-examples/lab/count")
	well, made = true, false
}

// TestLab is every story, one after the other, on Debian 13: Xen 4.20, libvirt
// 11.3, Linux 6.12. KEMARI_LAB_SUITE=bookworm tells them on Debian 12.
func TestLab(t *testing.T) {
	begin(t, cmp.Or(os.Getenv("KEMARI_LAB_SUITE"), "trixie"))

	// Those that need no running guest first: they share the fresh hosts.
	for _, c := range []struct {
		name string
		f    func(*testing.T)
	}{
		{"plug", testPlug},
		{"stock virsh", testStockVirsh},
		{"refusals", testRefusals},
		{"hvm", testHVM},
	} {
		story(t, c.name, func(t *testing.T) {
			fresh(t)
			c.f(t)
		})
	}
	story(t, "failover", testFailover)
	story(t, "oracle", testOracle)
	// The examples use the guest as the one before has left it, where that went well.
	for _, c := range []struct {
		name  string
		begin func(*testing.T)
	}{
		{"protect", running},
		{"python", running},
		{"events", running},
		{"refuse", running},
		{"status", protected},
	} {
		story(t, "example "+c.name, func(t *testing.T) {
			c.begin(t)
			testExample(t, c.name)
		})
	}
	// So do these with a guest that is protected.
	for _, c := range []struct {
		name string
		f    func(*testing.T)
	}{
		{"verify", testVerify},
		{"balloon", testBalloon},
		{"abort", testAbort},
		{"transports", testTransports},
		{"replicator killed", testReplicatorKilled},
		{"freeze and thaw", testFreezeThaw},
		{"power off inside", testPowerOffInside},
		{"standby dies", testStandbyDies},
	} {
		story(t, c.name, func(t *testing.T) {
			protected(t)
			c.f(t)
		})
	}
	story(t, "example autostart", func(t *testing.T) {
		lab(t, 10*time.Minute, "reset", "ready")
		testExample(t, "autostart")
	})
	story(t, "attachments", testAttachments)
	story(t, "switchover", testSwitchover)
}

var (
	well bool // both hosts are as a story leaves them that goes well
	made bool // there is a snapshot "guest"
)

// story runs one, and shows what the hosts have to say if it fails.
func story(t *testing.T, name string, f func(*testing.T)) {
	t.Run(name, func(t *testing.T) {
		defer func() {
			if well = !t.Failed(); !well {
				tell(t)
			}
		}()
		f(t)
	})
}

// tell shows the ends of what both hosts have logged, and what came out of their
// consoles, those of a host that has lost its power included.
func tell(t *testing.T) {
	for _, n := range []string{"1", "2"} {
		out, _ := try(time.Minute, "./lab", "console", n)
		lines := slices.DeleteFunc(strings.Split(out, "\n"), func(l string) bool { return strings.Contains(l, " save: ") })
		t.Logf("xen%s's console:\n%s", n, strings.Join(lines[max(0, len(lines)-40):], "\n"))
		out, _ = try(time.Minute, "./lab", "ssh", n, `journalctl -q --no-pager -o short-precise -n 60 -u 'kemari*' -u 'virtkemarid*' -u libvirtd
dmesg | tail -n 10; xl list; kemari status`)
		t.Logf("xen%s's journal:\n%s", n, out)
	}
}

// fresh puts both hosts back to where no guest is, unless the story before has left
// them so.
func fresh(t *testing.T) {
	if !well {
		lab(t, 10*time.Minute, "reset", "ready")
	}
}

// boot makes the snapshot in which the guest runs and nothing protects it.
func boot(t *testing.T) {
	t.Helper()
	lab(t, 10*time.Minute, "reset", "ready")
	on(t, 1, "virsh -q -c xen:///system create /var/lib/kemari-lab/g1.xml")
	eventually(t, 5*time.Minute, "the guest answers", answers)
	lab(t, 5*time.Minute, "save", "guest")
	made = true
}

// running puts both hosts back to where the guest runs and nothing protects it, unless
// they are there already.
func running(t *testing.T) {
	if well {
		if s, err := try(time.Minute, "./lab", "ssh", "1", "virsh -q -c xen:///system domstate g1"); err == nil && strings.TrimSpace(s) == "running" {
			if phase := status(t, 1).Phase; phase == control.Ended || phase == "" {
				return
			}
		}
	}
	if made {
		lab(t, 10*time.Minute, "reset", "guest")
	} else {
		boot(t)
	}
}

// protected is running with a guest that is protected.
func protected(t *testing.T) {
	if well && statusAs(t, 1, control.Primary).Phase == control.Protected {
		return
	}
	running(t)
	protect(t)
}

// TestLabBookworm is the main story on Debian 12: Xen 4.17, libvirt 9.0, Linux 6.1.
func TestLabBookworm(t *testing.T) {
	begin(t, "bookworm")
	story(t, "failover", func(t *testing.T) { failover(t) })
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

const protectCommand = "virsh migrate --kemari --live --kemari-arbiter none --kemari-timeout 3000 g1 kemari+ssh://xen2/system"

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
	return statusAs(t, n, "")
}

// statusAs is status of one role, if it is not empty.
func statusAs(t testing.TB, n int, role control.Role) control.Status {
	t.Helper()
	return statusOf(t, n, g1UUID, role)
}

// statusOf is statusAs of any guest.
func statusOf(t testing.TB, n int, uuid string, role control.Role) control.Status {
	t.Helper()
	var all []control.Status
	out := on(t, n, "kemari status --json")
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		t.Fatalf("kemari status --json: %v\n%s", err, out)
	}
	for _, s := range all {
		if s.UUID == uuid && (role == "" || s.Role == role) {
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

// testFailover is the story of the README, with its figures.
func testFailover(t *testing.T) {
	lab(t, 10*time.Minute, "reset", "ready")
	out, err := try(6*time.Minute, "./stock-migrate")
	if err != nil {
		t.Fatalf("stock migration: %v\n%s", err, out)
	}
	stock := figure(t, out, `STOCK gap_s=([0-9.]+)`)
	gap, takeover := failover(t)
	t.Logf("FIGURES failover_gap_s=%.3f stock_migrate_gap_s=%.3f ratio=%.2f (bound 0.5) takeover_s=%.3f (bound 1.2)", gap, stock, gap/stock, takeover)
}

func failover(t *testing.T) (gap, takeover float64) {
	t.Helper()
	boot(t)
	out, err := try(10*time.Minute, "../failover")
	t.Logf("%s", out)
	if err != nil {
		t.Fatalf("failover: %v", err)
	}
	return figure(t, out, `RESULT .*\bgap_s=([0-9.]+)`), figure(t, out, `RESULT .*\btakeover_s=([0-9.]+)`)
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

// testPlug runs migrate/output's tests where the kernel has what they need.
func testPlug(t *testing.T) {
	bin := t.TempDir() + "/output.test"
	cmd := exec.Command("go", "test", "-c", "-o", bin, "kemari/migrate/output")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, b)
	}
	lab(t, 2*time.Minute, "copy", "2", bin, "/root/output.test")
	out := lab(t, 12*time.Minute, "ssh", "2", `modprobe -a veth sch_plug ifb openvswitch; cd /root
KEMARI_REQUIRE=all ./output.test -test.v -test.short -test.bench SealRelease -test.benchtime 200x -test.timeout 600s > plug.log 2>&1 && exit=0 || exit=1
[ $exit = 0 ] || cat plug.log
grep -E '^ *---|[0-9] frames|^Benchmark' plug.log; rm -f output.test plug.log; exit $exit`)
	t.Log(strings.TrimSpace(out))
	if strings.Contains(out, "--- SKIP") {
		t.Error("tests of the plug were skipped where they can run")
	}
	for _, at := range []string{"bridge", "routed", "openvswitch"} {
		if !strings.Contains(out, "--- PASS: TestTraffic/"+at) {
			t.Errorf("the traffic test on %s did not run", at)
		}
	}
	t.Logf("FIGURES plug frames=%.0f out_of_order_at_removal=%.0f seal_us=%.0f release_us=%.0f",
		figure(t, out, `(\d+) frames, \d+ epochs`), figure(t, out, `epochs, (\d+) out of order`),
		figure(t, out, `([0-9.]+) seal-µs`), figure(t, out, `([0-9.]+) release-µs`))
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

// testRefusals: each is refused before anything starts, with the reason. More of
// them are in the example refuse.
func testRefusals(t *testing.T) {
	const migrate = "virsh migrate --kemari --live --kemari-arbiter none "
	refused(t, 1, migrate+"nosuch kemari+ssh://xen2/system", "omain not found")
	on(t, 1, "virsh -q -c xen:///system define /var/lib/kemari-lab/g1.xml")
	refused(t, 1, migrate+"g1 kemari+ssh://xen2/system", "running")
	on(t, 1, "virsh -q -c xen:///system undefine g1")
	on(t, 1, "virsh -q -c xen:///system create /var/lib/kemari-lab/g1.xml")
	// A guest that has room to balloon cannot be protected. A slow host may run into
	// libxl's time-outs when it makes a second guest while the first one boots.
	on(t, 1, `sed -e 's/<memory unit=.MiB.>128</<memory unit="MiB">160</' -e 's|</memory>|&<currentMemory unit="MiB">128</currentMemory>|' -e s/0000a1/0000b1/ -e s/g1/g2/ -e s/3e:00:00:01/3e:00:00:02/ /var/lib/kemari-lab/g1.xml > /root/g2.xml; for i in 1 2 3; do virsh -q -c xen:///system create /root/g2.xml && exit; sleep 5; done; exit 1`)
	refused(t, 1, migrate+"g2 kemari+ssh://xen2/system", "currentMemory")
	on(t, 1, "virsh -q -c xen:///system destroy g2")
	// Xen does not log the pages that a PV guest changes. It is not let run: on an
	// emulated host it crashes at times.
	on(t, 1, `sed -e "s#<type.*#<type arch='x86_64' machine='xenpv'>linux</type>#" -e '/<clock/,/<.clock>/d' -e s/0000a1/0000d1/ -e s/g1/p1/ -e s/3e:00:00:01/3e:00:00:04/ /var/lib/kemari-lab/g1.xml > /root/p1.xml; for i in 1 2 3; do virsh -q -c xen:///system create --paused /root/p1.xml && exit; sleep 5; done; exit 1`)
	refused(t, 1, migrate+"p1 kemari+ssh://xen2/system", "PV guest", "xenpvh")
	refused(t, 1, "kemari check p1", "PV guest")
	on(t, 1, "sed 's/netfront/e1000/' /var/lib/kemari-lab/h1.xml > /root/h1.xml && virsh -q -c xen:///system define /root/h1.xml")
	refused(t, 1, "kemari check h1", "emulated network card", "netfront")
	on(t, 1, "virsh -q -c xen:///system undefine h1")
	on(t, 1, "virsh -q -c xen:///system destroy p1")
	// The other host has no Kemari.
	on(t, 2, "systemctl stop virtkemarid.socket virtkemarid-ro.socket virtkemarid.service")
	refused(t, 1, migrate+"g1 kemari+ssh://xen2/system", "virtkemarid.socket")
	on(t, 2, "systemctl start virtkemarid.socket virtkemarid-ro.socket")
	if out := on(t, 1, "virsh -q -c xen:///system domstate g1"); strings.TrimSpace(out) != "running" {
		t.Errorf("the guest is %s", out)
	}
	on(t, 1, "virsh -q -c xen:///system destroy g1")
}

// testHVM: an HVM guest, whose device model's state follows it, goes on when its
// replicator is killed, is handed over, and comes back by a power cut.
func testHVM(t *testing.T) {
	const h1, uuid = "10.99.0.102", "00000000-0000-4000-8000-0000000000c1"
	protect := strings.Replace(protectCommand, " g1 ", " h1 ", 1)
	on(t, 1, "virsh -q -c xen:///system create /var/lib/kemari-lab/h1.xml")
	if out := on(t, 1, "virsh -q -c xen:///system dumpxml h1"); !strings.Contains(out, ">hvm<") {
		t.Errorf("h1 is no HVM guest:\n%s", out)
	}
	// What the device model would open is looked for on the standby.
	on(t, 2, "mv /var/lib/kemari-lab/vmlinuz /root/")
	refused(t, 1, protect, "xen2 has no /var/lib/kemari-lab/vmlinuz")
	on(t, 2, "mv /root/vmlinuz /var/lib/kemari-lab/")
	on(t, 1, protect) // it may still boot
	eventually(t, 2*time.Minute, "the HVM guest answers", func() bool { return answersAt(h1) })
	counted := countAt(t, h1)

	on(t, 1, "systemctl kill -s KILL kemari-replicator@"+uuid)
	eventually(t, 90*time.Second, "the replicator's end is known", func() bool { return statusOf(t, 1, uuid, control.Primary).Phase == control.Ended })
	eventually(t, 60*time.Second, "the HVM guest answers", func() bool { return answersAt(h1) })
	eventually(t, 60*time.Second, "no shadow on xen2", func() bool { return !strings.Contains(on(t, 2, "virsh -q list --all"), "h1") })
	on(t, 1, protect)
	t.Log(verify(t, "h1"))

	t.Log(strings.TrimSpace(on(t, 1, "kemari switchover h1 --json")))
	eventually(t, 3*time.Minute, "the roles are swapped", func() bool {
		return statusOf(t, 2, uuid, control.Primary).Phase == control.Protected && statusOf(t, 1, uuid, control.Standby).Phase == control.Ready
	})
	time.Sleep(5 * time.Second)
	lab(t, time.Minute, "power-off", "2")
	eventually(t, 90*time.Second, "the HVM guest answers", func() bool { return answersAt(h1) })
	counted()
	if out := on(t, 1, "virsh -q -c xen:///system domstate h1; pgrep -fc 'qemu-system.* h1'"); out != "running\n1\n" {
		t.Errorf("on xen1: %q", out)
	}
}

// testExample tells one of the stories in virsh-examples.
func testExample(t *testing.T, story string) {
	out, err := try(10*time.Minute, "../"+story)
	t.Logf("%s", out)
	if err != nil || !strings.HasSuffix(out, "\nOK\n") {
		t.Fatalf("%s: %v", story, err)
	}
}

// verify has the standby's memory compared with that of a guest on host 1.
func verify(t *testing.T, guest string) string {
	t.Helper()
	out, err := try(6*time.Minute, "./lab", "ssh", "1", "kemari verify "+guest+" || exit=$?; kemari status; exit ${exit:-0}")
	if out = strings.TrimSpace(out); err != nil || !strings.Contains(out, " pages compared, all equal") {
		t.Errorf("kemari verify: %v: %s", err, out)
	}
	return out
}

// testVerify: at two epochs of a guest at work the standby's memory is the guest's,
// page by page, and what the guest's clients see is right. Between the two virtkemarid is
// killed on both hosts, which nobody but its clients notices.
func testVerify(t *testing.T) {
	counted := count(t)
	for range 2 {
		time.Sleep(5 * time.Second)
		t.Log(verify(t, "g1"))
		for _, n := range []int{1, 2} {
			on(t, n, "systemctl kill -s KILL virtkemarid.service || true") // if it runs
		}
	}
	if out := on(t, 1, "virsh -c kemari:///system domjobinfo g1 --rawstats"); !strings.Contains(out, "kemari.phase: protected") {
		t.Errorf("virtkemarid does not know of the protection any more:\n%s", out)
	}
	if s := status(t, 1); s.Phase != control.Protected || s.Verified == nil || s.Verified.Pages < 30000 {
		t.Errorf("after it: %+v, %+v", s, s.Verified)
	}
	refused(t, 2, "kemari verify g1", "this host is the standby of domain 'g1'")
	counted()
}

// testAttachments: a guest with an interface on Open vSwitch, over which a client
// counts, and a routed one, which is idle, survives with both.
func testAttachments(t *testing.T) {
	lab(t, 10*time.Minute, "reset", "ready")
	const second = "10.99.1.100"
	for n := 1; n <= 2; n++ {
		on(t, n, fmt.Sprintf(`set -e
systemctl start openvswitch-switch
ovs-vsctl add-br ovs0
ip link add v0 type veth peer name v1
ip link set v0 up master br0
ip link set v1 up
ovs-vsctl add-port ovs0 v1
ip addr add 10.99.1.%d/24 dev br0
sysctl -q -w net.ipv4.ip_forward=1 net.ipv4.conf.br0.proxy_arp=1`, n))
	}
	// Xen's own vif-route would do, too, but needs ifconfig, which is not in the image.
	on(t, 1, `sed -e "s#<source bridge='br0'/>#<source bridge='ovs0'/><virtualport type='openvswitch'/>#" \
	-e "s#</interface>#&<interface type='ethernet'><mac address='00:16:3e:00:00:05'/><ip address='`+second+`'/><script path='/usr/libexec/kemari/vif-kemari-route'/></interface>#" \
	/var/lib/kemari-lab/g1.xml > /root/g1.xml && virsh -q -c xen:///system create /root/g1.xml`)
	eventually(t, 5*time.Minute, "the guest answers", answers)
	protect(t)
	counted := count(t)
	time.Sleep(5 * time.Second)
	lab(t, time.Minute, "power-off", "1")
	eventually(t, 90*time.Second, "the guest answers", answers)
	counted()
	if out := on(t, 2, "ovs-vsctl list-ports ovs0; ip route show "+second); !strings.Contains(out, "vif1.0\n") || !strings.Contains(out, second+" dev vif1.1") {
		t.Errorf("on xen2: %s", out)
	}
}

// count is countAt for g1.
func count(t *testing.T) (counted func() string) {
	t.Helper()
	return countAt(t, guest)
}

// countAt begins to count against a guest, and returns what ends that, checks that
// nothing was lost nor doubled, and returns what was seen.
func countAt(t *testing.T, guest string) (counted func() string) {
	t.Helper()
	eventually(t, 60*time.Second, "the guest answers", func() bool { return answersAt(guest) })
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Minute)
	t.Cleanup(cancel)
	count := exec.CommandContext(ctx, "./lab", "exec", "../../bin/count", "--every", "100ms", guest+":7")
	var seen strings.Builder
	count.Stdout, count.Stderr = &seen, &seen
	in, err := count.StdinPipe()
	if err == nil {
		err = count.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() string {
		t.Helper()
		fmt.Fprintln(in, "end")
		in.Close()
		if err := count.Wait(); err != nil || !strings.Contains(seen.String(), " lost=0 doubled=0 ") {
			t.Errorf("the guest's client: %v, %s", err, seen.String())
		}
		t.Log(strings.TrimSpace(seen.String()))
		return seen.String()
	}
}

// testSwitchover tells the example switchover, and then brings the guest back to xen1,
// with a client counting on that way, too. What each host says after it is looked at in
// full.
func testSwitchover(t *testing.T) {
	running(t)
	testExample(t, "switchover")
	swapped(t, 1, 2)
	counted := count(t)
	time.Sleep(5 * time.Second)
	began := time.Now()
	t.Log(strings.TrimSpace(on(t, 2, "kemari switchover g1 --json")))
	took := time.Since(began)
	eventually(t, 60*time.Second, "the guest answers", answers)
	t.Logf("FIGURES switchover_back_gap_s=%.3f switchover_back_s=%.3f", figure(t, counted(), `gap_s=([0-9.]+)`), took.Seconds())
	swapped(t, 2, 1)
	on(t, 1, "virsh -c kemari:///system domjobabort g1")
	unhindered(t)
}

// swapped checks that the guest was handed over and is protected the other way round.
func swapped(t *testing.T, from, to int) {
	t.Helper()
	if out := on(t, to, "virsh -q -c xen:///system domstate g1"); strings.TrimSpace(out) != "running" {
		t.Errorf("on xen%d the guest is %s", to, out)
	}
	if out := on(t, from, "virsh -q -c xen:///system list --state-running --name"); strings.Contains(out, "g1") {
		t.Errorf("it runs on xen%d, too:\n%s", from, out)
	}
	if s := statusAs(t, from, control.Primary); s.Phase != control.Ended || s.SwitchedOver == "" || s.Error != "" {
		t.Errorf("xen%d says %+v", from, s)
	}
	if s := statusAs(t, to, control.Standby); s.Phase != control.Active || s.Failover == nil {
		t.Errorf("xen%d says %+v", to, s)
	}
	eventually(t, 3*time.Minute, "the roles are swapped", func() bool {
		return statusAs(t, to, control.Primary).Phase == control.Protected && statusAs(t, from, control.Standby).Phase == control.Ready
	})
	t.Log(on(t, from, "kemari status"))
	t.Log(on(t, to, "kemari status"))
}

// testBalloon: a protected guest gives memory back and gets some, and the standby's
// memory is the guest's. What it gives back the host has again.
func testBalloon(t *testing.T) {
	for _, mib := range []int{110, 128} {
		on(t, 1, fmt.Sprintf("xl mem-set g1 %d", mib))
		eventually(t, 2*time.Minute, fmt.Sprintf("the guest has %d MiB", mib), func() bool {
			has, err := strconv.Atoi(strings.TrimSpace(on(t, 1, "xl list g1 | awk 'NR == 2 { print $3 }'")))
			return err == nil && has >= mib-2 && has <= mib+2
		})
		t.Logf("%d MiB: %s", mib, verify(t, "g1"))
	}
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

// testTransports: protection over what is not the default.
func testTransports(t *testing.T) {
	ca := migratetest.NewAuthority(t)
	for n := 1; n <= 2; n++ {
		pki := t.TempDir() + "/pki.tar"
		if out, err := try(time.Minute, "tar", "-C", ca.Host(t, fmt.Sprintf("xen%d", n)), "-cf", pki, "."); err != nil {
			t.Fatalf("tar: %v\n%s", err, out)
		}
		lab(t, time.Minute, "copy", strconv.Itoa(n), pki, "/root/pki.tar")
		on(t, n, "mkdir -p /etc/pki && tar -C /etc/pki --no-same-owner -xf /root/pki.tar")
	}
	for _, transport := range []string{"pki", "tcp"} {
		on(t, 1, "virsh -c kemari:///system domjobabort g1")
		on(t, 1, protectCommand+" --kemari-transport "+transport)
		for n, role := range []control.Role{1: control.Primary, 2: control.Standby} {
			if n > 0 && !strings.Contains(on(t, n, "cat /run/kemari/"+string(role)+"/*/config.json"), `"transport": "`+transport+`"`) {
				t.Errorf("xen%d does not use %s", n, transport)
			}
		}
		epoch := status(t, 1).Epoch
		eventually(t, 20*time.Second, "epochs are committed", func() bool { return status(t, 1).Epoch > epoch+2 })
	}
	on(t, 1, "virsh -c kemari:///system domjobabort g1")
	unhindered(t)
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
	// It may take seconds to reach it: each of its answers waits for an epoch.
	eventually(t, 2*time.Minute, "the guest has ended on xen1", func() bool {
		try(20*time.Second, "./lab", "exec", "sh", "-c", "echo | timeout 12 socat - TCP:"+guest+":9,connect-timeout=10")
		return !strings.Contains(on(t, 1, "virsh -q list --all"), "g1")
	})
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
