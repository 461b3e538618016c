package driver

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kemari/driver/rpc"
)

func TestParseTarget(t *testing.T) {
	for s, want := range map[string]Target{
		"kemari+ssh://xen2/system":                          {Host: "xen2"},
		"kemari+ssh://root@xen2:2222/system":                {User: "root", Host: "xen2", Port: "2222"},
		"kemari+ssh://[fd00::2]/system":                     {Host: "fd00::2"},
		"kemari+ssh://xen2/system?keyfile=/root/k&no_tty=1": {Host: "xen2", KeyFile: "/root/k"},
	} {
		want.URI = s
		for _, s := range []string{"xen" + s, "XEN" + s} { // means the same
			if got, err := ParseTarget(s); err != nil || got != want {
				t.Errorf("%s: %+v, %v", s, got, err)
			}
		}
		if got, err := ParseTarget(s); err != nil || got != want {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
	}
	for _, s := range []string{
		"", "xen2", "kemari+ssh:///system", "kemari+tls://xen2/system", "xen+ssh://xen2/system", "kemari+ssh://xen2/session",
		"kemari+ssh://xen2", "kemari+ssh://a:b@xen2/system", "kemari+ssh://-oProxyCommand=x/system", "kemari+ssh://-lx@xen2/system",
		"kemari+ssh://xen2:0/system", "kemari+ssh://xen2:99999/system", "kemari+ssh://xen2/system#x",
		"kemari+ssh://xen2/system?command=/bin/sh", "kemari+ssh://a%20b@xen2/system", "kemari+ssh://a%0ab@xen2/system",
	} {
		var r *Refusal
		if _, err := ParseTarget(s); !errors.As(err, &r) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestDataAddr(t *testing.T) {
	t2 := Target{Host: "fd00::2"}
	for _, c := range []struct{ uri, want string }{
		{"", "[fd00::2]:49300"}, {"tcp://10.0.0.2", "10.0.0.2:49300"}, {"tcp://10.0.0.2:7", "10.0.0.2:7"}, {"tcp://[fd01::1]/", "[fd01::1]:49300"},
		{"tcp:10.0.0.2", ""}, {"tls://x", ""}, {"tcp://x:0", ""}, {"tcp://x/y", ""}, {"tcp://u@x", ""}, {"tcp://x?y", ""}, {":", ""},
	} {
		if got, err := dataAddr(t2, c.uri, 49300); got != c.want || (err != nil) != (c.want == "") {
			t.Errorf("%q: %q, %v", c.uri, got, err)
		}
	}
}

func TestReadHost(t *testing.T) {
	root := t.TempDir()
	write := func(path, s string) {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(s+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("proc/sys/kernel/hostname", "xen1")
	write("proc/sys/kernel/random/boot_id", "b")
	if _, err := readHost(root); err == nil || !strings.Contains(err.Error(), "does not run under Xen") {
		t.Errorf("without Xen: %v", err)
	}
	write("sys/hypervisor/version/major", "4")
	write("sys/hypervisor/version/minor", "17")
	write("sys/hypervisor/version/extra", ".7-pre")
	if h, err := readHost(root); err != nil || h != (Host{"xen1", "b", Xen{"4.17", ".7-pre"}}) {
		t.Errorf("%+v, %v", h, err)
	}
}

// sshScript makes a program that stands for ssh.
func sshScript(t *testing.T, body string) string {
	t.Helper()
	path := filepath.Join(shortDir(t), "ssh")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSSHArguments(t *testing.T) {
	c, err := runSSH(sshScript(t, `printf '<%s>' "$@"`), Target{User: "root", Host: "xen2", Port: "22", KeyFile: "/k"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b, err := io.ReadAll(c)
	const want = "<-T><-o><BatchMode=yes><-e><none><-p><22><-l><root><-i></k><--><xen2><virt-ssh-helper><'kemari:///system'>"
	if string(b) != want || err != nil {
		t.Errorf("%s, %v", b, err)
	}
}

// TestSSHErrors has what ssh and the other end's shell say end up with the user.
func TestSSHErrors(t *testing.T) {
	for said, hint := range map[string]string{
		"ssh: Could not resolve hostname xen2: Name or service not known": "/etc/hosts",
		"bash: line 1: virt-ssh-helper: command not found":                "install libvirt-daemon (virt-ssh-helper) and Kemari on xen2",
		"root@xen2: Permission denied (publickey,password).":              "ssh-copy-id xen2",
		"Host key verification failed.":                                   "accept the host's key once",
		"virt-ssh-helper: cannot connect to '/run/libvirt/virtkemarid-sock': Failed to connect socket to '/run/libvirt/virtkemarid-sock'": "virtkemarid.socket",
		"something else\nin two lines": "something else; in two lines",
		"":                             "closed the connection without an answer; see journalctl -u virtkemarid there",
	} {
		a, _ := pair(t)
		ssh := sshScript(t, "cat >&2 <<'E'\n"+said+"\nE\nexit 255\n")
		a.d.cfg.Dial = func(_ context.Context, to Target) (io.ReadWriteCloser, error) { return runSSH(ssh, to) }
		first, _, _ := strings.Cut(said, "\n")
		wantError(t, protectCall(t, a, performArgs(t)), rpc.CodeOperationFailed, "standby xen2", first, hint)
		a.clean(t)
	}
	a, _ := pair(t)
	a.d.cfg.Dial = func(_ context.Context, to Target) (io.ReadWriteCloser, error) { return runSSH("/nowhere/ssh", to) }
	wantError(t, protectCall(t, a, performArgs(t)), rpc.CodeOperationFailed, "ssh cannot be run", "install openssh-client")
}

// TestSSHHangs has an ssh that says nothing, with a child that holds its pipes.
func TestSSHHangs(t *testing.T) {
	a, _ := pair(t)
	ssh := sshScript(t, "sleep 20 & exec sleep 20\n")
	a.d.cfg.Dial = func(_ context.Context, to Target) (io.ReadWriteCloser, error) { return runSSH(ssh, to) }
	done := make(chan error, 1)
	go func() { done <- protectCall(t, a, performArgs(t)) }()
	eventually(t, "the attempt begins", func() bool {
		a.d.mu.Lock()
		defer a.d.mu.Unlock()
		return len(a.d.attempts) == 1
	})
	begun := time.Now()
	if _, err := remote(client(t, a.rw), rpc.ProcDomainAbortJob, (&rpc.AbortJobArgs{Domain: performArgs(t).Domain}).Append(nil)); err != nil {
		t.Error(err)
	}
	wantError(t, <-done, rpc.CodeAborted, "ended on request")
	if d := time.Since(begun); d > 5*time.Second {
		t.Errorf("took %v", d)
	}
}

// TestSSH is the whole way through a process's standard input and output.
func TestSSH(t *testing.T) {
	a, b := pair(t)
	// What virt-ssh-helper does.
	ssh := sshScript(t, "exec python3 -c '\nimport socket,sys,threading,os\n"+
		"s=socket.socket(socket.AF_UNIX); s.connect(\""+b.rw+"\")\n"+
		"def up():\n while True:\n  d=os.read(0,65536)\n  if not d: s.shutdown(1); return\n  s.sendall(d)\n"+
		"threading.Thread(target=up,daemon=True).start()\n"+
		"while True:\n d=s.recv(65536)\n if not d: break\n os.write(1,d)\n'\n")
	a.d.cfg.Dial = func(_ context.Context, to Target) (io.ReadWriteCloser, error) { return runSSH(ssh, to) }
	if err := protectCall(t, a, performArgs(t)); err != nil {
		t.Fatal(err)
	}
}
