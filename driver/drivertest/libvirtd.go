package drivertest

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kemari/migrate/migratetest"
)

// nobody is who libvirtd runs as if the test is root: as root it would be the
// system's daemon, with the system's folders.
const nobody = 65534

// Libvirtd is a daemon that serves test:///default.
type Libvirtd struct {
	Dir    string // which it may write into
	Socket string

	t   testing.TB
	cmd *exec.Cmd
	log lockedBuffer
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// StartLibvirtd starts one that ends with the test, with these lines in its
// libvirtd.conf. The capability it needs is called libvirtd and includes virsh.
func StartLibvirtd(t testing.TB, conf ...string) *Libvirtd {
	t.Helper()
	migratetest.Need(t, "libvirtd", func() error {
		if _, err := exec.LookPath("virsh"); err != nil {
			return err
		}
		_, err := exec.LookPath("libvirtd")
		return err
	})
	// Not t.TempDir: its name leaves no room for that of a socket.
	dir, err := os.MkdirTemp("", "k")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	sub := filepath.Join(dir, "libvirt")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	if len(conf) > 0 {
		if err := os.WriteFile(filepath.Join(sub, "libvirtd.conf"), []byte(strings.Join(conf, "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if os.Getuid() == 0 {
		for _, d := range []string{dir, sub} {
			if err := os.Chown(d, nobody, nobody); err != nil {
				t.Fatal(err)
			}
		}
	}
	l := &Libvirtd{Dir: dir, Socket: filepath.Join(sub, "libvirt-sock"), t: t}
	t.Cleanup(l.Stop)
	l.Start()
	return l
}

// Start starts the daemon after a Stop and returns when it listens.
func (l *Libvirtd) Start() {
	l.t.Helper()
	l.cmd = exec.Command("libvirtd")
	l.cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + l.Dir}
	if bus := os.Getenv("DBUS_SYSTEM_BUS_ADDRESS"); bus != "" { // one of the test's own
		l.cmd.Env = append(l.cmd.Env, "DBUS_SYSTEM_BUS_ADDRESS="+bus)
	}
	for _, v := range []string{"XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"} {
		l.cmd.Env = append(l.cmd.Env, v+"="+l.Dir)
	}
	if os.Getuid() == 0 {
		l.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	l.cmd.Stderr = &l.log
	if err := l.cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		c, err := net.Dial("unix", l.Socket)
		if err == nil {
			c.Close()
			return
		}
		if time.Now().After(end) {
			l.t.Fatalf("libvirtd does not listen: %v\n%s", err, l.log.String())
		}
	}
}

// Stop ends the daemon. It may be called of one that does not run.
func (l *Libvirtd) Stop() {
	if l.cmd == nil {
		return
	}
	l.cmd.Process.Signal(syscall.SIGTERM)
	kill := time.AfterFunc(10*time.Second, func() { l.cmd.Process.Kill() })
	l.cmd.Wait()
	kill.Stop()
	l.cmd = nil
}

// WaitIdle waits until the daemon has no client any more. The state of
// test:///default, which all clients share, is then forgotten.
func (l *Libvirtd) WaitIdle() {
	l.t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		b, err := os.ReadFile("/proc/net/unix")
		if err != nil {
			l.t.Fatal(err)
		}
		clients := 0
		for line := range strings.Lines(string(b)) {
			// Num RefCount Protocol Flags Type St Inode Path; St 03 is connected.
			if f := strings.Fields(line); len(f) == 8 && f[7] == l.Socket && f[5] == "03" {
				clients++
			}
		}
		if clients == 0 {
			// It forgets just after it has closed the connection.
			time.Sleep(20 * time.Millisecond)
			return
		}
		if time.Now().After(end) {
			l.t.Fatalf("libvirtd still has %d clients", clients)
		}
	}
}
