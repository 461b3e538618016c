package main

import (
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"kemari/driver/rpc"
)

// beDaemon makes the test's program virtkemarid itself, so that it can be tried as
// a process of its own.
const beDaemon = "VIRTKEMARID_TEST_BE_DAEMON"

func TestMain(m *testing.M) {
	if os.Getenv(beDaemon) != "" {
		main()
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// daemon is virtkemarid as a process of its own, in front of a libvirtd.
type daemon struct {
	rw, ro string
	root   string // of the run-time folders

	t   testing.TB
	cmd *exec.Cmd
	log *os.File
	up  string
}

// startDaemon starts one in front of upstream, a socket of a daemon with
// test:///default.
func startDaemon(t testing.TB, upstream string) *daemon {
	t.Helper()
	dir, err := os.MkdirTemp("", "k")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	d := &daemon{rw: filepath.Join(dir, "s"), ro: filepath.Join(dir, "s-ro"), root: dir, t: t, up: upstream}
	if d.log, err = os.Create(filepath.Join(dir, "log")); err != nil {
		t.Fatal(err)
	}
	d.start()
	t.Cleanup(func() {
		d.cmd.Process.Signal(syscall.SIGTERM)
		if err := d.cmd.Wait(); err != nil {
			t.Errorf("virtkemarid: %v", err)
		}
		if b, err := os.ReadFile(d.log.Name()); t.Failed() && err == nil {
			t.Logf("log of virtkemarid:\n%.4000s", b)
		}
		d.log.Close()
	})
	return d
}

// start starts the process and returns when it listens.
func (d *daemon) start() {
	d.t.Helper()
	d.cmd = exec.Command(os.Args[0], "--upstream-uri", "test:///default", "--upstream-socket", d.up,
		"--socket", d.rw, "--socket-ro", d.ro, "--root", d.root)
	d.cmd.Env, d.cmd.Stderr = append(os.Environ(), beDaemon+"=1"), d.log
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		c, err := net.Dial("unix", d.ro)
		if err == nil {
			c.Close()
			return
		}
		if time.Now().After(end) {
			d.t.Fatal(err)
		}
	}
}

// kill ends it as a fault would, so that it can be started again.
func (d *daemon) kill() {
	d.cmd.Process.Kill()
	d.cmd.Wait()
}

func TestReadOnly(t *testing.T) {
	for _, c := range []struct {
		name, addr string
		want       bool
	}{
		{"virtkemarid.socket", "/run/libvirt/virtkemarid-sock", false},
		{"virtkemarid-ro.socket", "/run/libvirt/virtkemarid-sock-ro", true},
		{"virtkemarid-ro.socket", "/run/elsewhere", true},
		{"virtkemarid.socket", "/run/libvirt/virtkemarid-sock-ro", true},
		{"LISTEN_FD_3", "/run/libvirt/virtkemarid-sock", false},
	} {
		if got := readOnly(c.name, c.addr); got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
}

func TestArguments(t *testing.T) {
	for _, args := range [][]string{{"virtkemarid", "x"}, {"virtkemarid", "--timeout", "120"}, {"virtkemarid", "--nonsense"}, {"virtkemarid", "--auth", "none"}, {"virtkemarid", "--socket", "", "--socket-ro", ""}} {
		a := app()
		a.Writer, a.ErrWriter = io.Discard, io.Discard
		if err := a.Run(args); err == nil {
			t.Errorf("%v: accepted", args)
		}
	}
}

// TestServe starts the daemon, tells by the sockets' answers which is which, and
// ends it.
func TestServe(t *testing.T) {
	dir, err := os.MkdirTemp("", "k")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: filepath.Join(dir, "notify")})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	t.Setenv("NOTIFY_SOCKET", filepath.Join(dir, "notify"))
	rw, ro := filepath.Join(dir, "s"), filepath.Join(dir, "s-ro")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	args := []string{"virtkemarid", "--socket", rw, "--socket-ro", ro, "--root", dir,
		"--upstream-socket", filepath.Join(dir, "none"), "--upstream-socket-ro", filepath.Join(dir, "none")}
	go func() { done <- app().RunContext(ctx, args) }()

	said := make([]byte, 64)
	notify.SetReadDeadline(time.Now().Add(20 * time.Second))
	if n, err := notify.Read(said); err != nil || string(said[:n]) != "READY=1" {
		t.Fatalf("systemd was told %q, %v", said[:n], err)
	}
	for path, want := range map[string]string{rw: "unknown procedure: 99", ro: "Cannot find program"} {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		client := rpc.NewClient(c)
		_, err = client.Call(ctx, rpc.ProgramKemari, 1, 99, nil)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
		client.Close()
	}
	if st, err := os.Stat(ro); err != nil || st.Mode().Perm() != 0o666 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if st, err := os.Stat(rw); err != nil || st.Mode().Perm()&0o007 != 0 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	// A second one does not take the sockets away.
	if err := app().RunContext(ctx, args); err == nil || !strings.Contains(err.Error(), "listens there already") {
		t.Errorf("second: %v", err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n, err := notify.Read(said); err != nil || string(said[:n]) != "STOPPING=1" {
		t.Errorf("systemd was told %q, %v", said[:n], err)
	}
}
