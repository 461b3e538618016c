package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"kemari/driver/drivertest"
)

// The commands of the differential run; each line is for one virsh, and {} is a
// folder that libvirtd may write into.
const (
	reading = `
list
list --all
list --uuid
list --name
list --table --title --managed-save
list --all --with-snapshot
domstate test
domstate test --reason
domstate nosuch
dominfo test
domid test
domname 1
domname 6695eb01-f6a4-8304-79aa-97f2502e193f
domuuid test
dumpxml test
dumpxml test --inactive --security-info
domblklist test
domblklist test --details
domblkinfo test vda
domblkstat test vda
domblkerror test
domiflist test
domifstat test vnet0
domif-getlink test vnet0
domifaddr test
dommemstat test
domstats
domstats test --state --balloon --vcpu
domcontrol test
domtime test
domhostname test
domdisplay test
vncdisplay test
ttyconsole test
domjobinfo test
domjobinfo test --completed
domfsinfo test
domlaunchsecinfo test
guestinfo test
guestvcpus test
vcpucount test
vcpuinfo test
vcpupin test
emulatorpin test
iothreadinfo test
cpu-stats test
schedinfo test
memtune test
blkiotune test
numatune test
perf test
desc test
metadata test http://example.org/x
domxml-to-native test-argv --domain test
screenshot test {}/shot
migrate-getspeed test
migrate-getmaxdowntime test
snapshot-list test
snapshot-current test
checkpoint-list test
managedsave-dumpxml test
version
version --daemon
hostname
uri
sysinfo
nodeinfo
nodecpumap
nodememstats
node-memory-tune
freecell
freecell --all
freepages --all
maxvcpus
capabilities
domcapabilities
cpu-models x86_64
cpu-baseline /dev/null
pool-capabilities
net-list --all
net-info default
net-dumpxml default
net-uuid default
net-name 004b96e1-2d78-c30f-5aa5-f03c87d21e69
net-dhcp-leases default
net-port-list default
iface-list --all
iface-mac eth1
iface-name aa:bb:cc:dd:ee:ff
iface-dumpxml eth1
pool-list --all --details
pool-info default-pool
pool-dumpxml default-pool
pool-uuid default-pool
vol-list default-pool
vol-info nosuch --pool default-pool
nodedev-list
nodedev-list --tree
nodedev-dumpxml computer
nodedev-info computer
nwfilter-list
nwfilter-binding-list
secret-list
event --list
event --all --timeout 1
net-event --event lifecycle --timeout 1
domstate test; dominfo test; dumpxml test; list
`
	changing = `
suspend test; domstate test --reason; resume test; domstate test
shutdown test; list --all; dominfo test
destroy test; domstate test; start test; list
destroy test; destroy test
reboot test; domstate test
reset test
inject-nmi test
setmem test 1048576; dommemstat test
setmem test 99999999
setmaxmem test 4194304 --config; dumpxml test --inactive
setvcpus test 1; vcpucount test
vcpupin test 0 0; vcpupin test
save test {}/saved; list --all; restore {}/saved; list
managedsave test; list --all --managed-save; managedsave-remove test; start test
dump test {}/core --crash; domstate test
autostart test; dominfo test; autostart --disable test
desc test --new-desc words; desc test; desc test --title --new-desc a title; desc test --title
metadata test urn:x --key k --set '<a b="c"/>'; metadata test urn:x; dumpxml test; metadata test urn:x --remove
destroy test; domrename test other; list --all
undefine test; list --all; destroy test; list --all
define {}/dom.xml; list --all; start second; dumpxml second; destroy second; undefine second
create {}/dom.xml; list; domstate second; destroy second; list --all
create {}/bad.xml
define /nonexistent
snapshot-create-as test one words; snapshot-list test --name; snapshot-current test --name; suspend test; snapshot-revert test one; domstate test; snapshot-delete test one; snapshot-list test --name
snapshot-create-as test one; snapshot-create-as test two; snapshot-list test --tree; snapshot-parent test two; snapshot-delete test one --children; snapshot-list test
checkpoint-create-as test one; checkpoint-list test --name; checkpoint-delete test one
attach-disk test /dev/null vdb --config; domblklist test --inactive; detach-disk test vdb --config; domblklist test --inactive
attach-interface test network default --mac 52:54:00:00:00:01 --config; domiflist test --inactive
detach-device test {}/bad.xml
change-media test hdc --eject
schedinfo test --set weight=17; schedinfo test
memtune test --hard-limit 4194304 --config; memtune test --config
blkiotune test --weight 500 --config; blkiotune test --config
numatune test --nodeset 0 --config; numatune test --config
iothreadadd test 3; iothreadinfo test; iothreadset test 3; iothreaddel test 3
set-lifecycle-action test poweroff restart; dumpxml test
set-user-password test root secret
domfsfreeze test; domfsthaw test
send-key test KEY_ENTER
perf test --enable cmt
domtime test --time 5
dompmsuspend test mem
blockcopy test vda /tmp/x --wait
domif-setlink test vnet0 down
migrate test kemari+ssh://nosuch/system --offline
net-define {}/net.xml; net-list --all; net-start n2; net-info n2; net-autostart n2; net-dumpxml n2; net-destroy n2; net-undefine n2; net-list --all
net-create {}/net.xml; net-list; net-destroy n2
net-update default add ip-dhcp-host '<host mac="52:54:00:00:00:02" ip="192.168.122.5"/>' --live; net-dumpxml default
pool-define-as p2 dir --target {}/p2; pool-build p2; pool-start p2; pool-autostart p2; pool-list --all; pool-refresh p2; pool-destroy p2; pool-undefine p2
vol-create-as default-pool v1 1G; vol-list default-pool; vol-info v1 default-pool; vol-dumpxml v1 default-pool; vol-clone v1 v2 default-pool; vol-resize v1 2G default-pool; vol-delete v1 default-pool; vol-list default-pool
vol-upload nosuch /dev/null default-pool
iface-define {}/iface.xml; iface-list --all; iface-start eth9; iface-destroy eth9; iface-undefine eth9; iface-list --all
iface-begin; iface-destroy eth1; iface-list --all; iface-rollback; iface-list --all
iface-begin; iface-commit
nodedev-create {}/bad.xml
nodedev-detach computer
secret-define {}/bad.xml
nwfilter-define {}/bad.xml
nodesuspend mem 1
allocpages 4K 1
qemu-monitor-command test x
qemu-agent-command test x
lxc-enter-namespace test /bin/true
`
)

var files = map[string]string{
	"dom.xml": `<domain type='test'><name>second</name><uuid>6695eb01-f6a4-8304-79aa-97f2502e1940</uuid><memory>65536</memory>
<os><type>hvm</type></os><devices><interface type='network'><mac address='52:54:00:00:00:09'/><source network='default'/></interface></devices></domain>`,
	"net.xml":   `<network><name>n2</name><uuid>004b96e1-2d78-c30f-5aa5-f03c87d21e70</uuid><bridge name='virbr9'/><mac address='52:54:00:00:00:0a'/><ip address='10.9.9.1' netmask='255.255.255.0'/></network>`,
	"iface.xml": `<interface type='ethernet' name='eth9'><start mode='none'/><mac address='aa:bb:cc:dd:ee:00'/></interface>`,
	"bad.xml":   `<domain type='test'><name>bad`,
}

// passing is what two runs of the same command print differently: the time.
var passing = []*regexp.Regexp{
	regexp.MustCompile(`(?m)^CPU time: .*$`),
	regexp.MustCompile(`(?m)^.*(cpu\.time|cpu_time|\.time)=.*$`),
	regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}`),
	regexp.MustCompile(`(?m)^vda (rd|wr|errs).*$`), // the test driver makes them of the time of day
}

// announced is what virtkemarid says of itself in the host's capabilities.
var announced = regexp.MustCompile(`(?s) *<kemari xmlns='urn:kemari:capabilities:1\.0'.*?</kemari>\n`)

// result is all that a user sees of a command.
type result struct {
	out  string
	code int
}

func runVirsh(t *testing.T, uri, script string, options ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "virsh", append(options, "-c", uri, script)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TZ=UTC")
	b, err := cmd.CombinedOutput()
	r := result{out: strings.ReplaceAll(string(b), uri, "URI")}
	for _, p := range passing {
		r.out = p.ReplaceAllString(r.out, "PASSING")
	}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		r.code = exit.ExitCode()
	case err != nil:
		t.Fatal(err)
	}
	return r
}

// TestDifferential gives virsh the same commands with a connection to libvirtd
// and with one through virtkemarid, each time with test:///default as it is at
// first, and wants the same output and the same exit status.
func TestDifferential(t *testing.T) {
	t.Run("reading", func(t *testing.T) { t.Parallel(); differential(t, reading, 60) })
	t.Run("reader", func(t *testing.T) { t.Parallel(); differential(t, reading, 60, "--readonly") })
	t.Run("changing", func(t *testing.T) { t.Parallel(); differential(t, changing, 20) })
	t.Run("finds a difference", func(t *testing.T) {
		t.Parallel()
		uri := "test+unix:///default?socket=" + drivertest.StartLibvirtd(t).Socket
		if a, b := runVirsh(t, uri, "domstate test"), runVirsh(t, uri, "destroy test; domstate test"); a == b {
			t.Errorf("%v and %v are the same", a, b)
		}
	})
}

// differential runs each line of scripts both ways. So many have to succeed, since
// a command that fails shows less. Readers use the socket that is for them.
func differential(t *testing.T, scripts string, succeed int, options ...string) {
	l := drivertest.StartLibvirtd(t)
	d := startDaemon(t, l.Socket)
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(l.Dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	through := "kemari:///system?socket=" + d.rw
	if len(options) > 0 {
		through = "kemari:///system?socket=" + d.ro
	}
	all, succeeded := 0, 0
	for script := range strings.Lines(strings.TrimSpace(scripts)) {
		script = strings.ReplaceAll(strings.TrimSpace(script), "{}", l.Dir)
		want := runVirsh(t, "test+unix:///default?socket="+l.Socket, script, options...)
		l.WaitIdle()
		got := runVirsh(t, through, script, options...)
		l.WaitIdle()
		got.out = announced.ReplaceAllString(got.out, "")
		if got != want {
			t.Errorf("virsh %s\ndirectly: status %d\n%s\nthrough virtkemarid: status %d\n%s", script, want.code, want.out, got.code, got.out)
		}
		all++
		if want.code == 0 {
			succeeded++
		}
	}
	t.Logf("%d commands, of which %d succeed", all, succeeded)
	if succeeded < succeed {
		t.Errorf("%d commands succeed, want %d", succeeded, succeed)
	}
}
