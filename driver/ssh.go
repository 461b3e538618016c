package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"kemari/driver/rpc"
)

// DialSSH connects to the virtkemarid of t as libvirt's own client would: ssh
// runs virt-ssh-helper there, which connects to the socket of the URI's driver.
// What ssh complains about is in the error of the Read that finds the end.
func DialSSH(ctx context.Context, t Target) (io.ReadWriteCloser, error) {
	return runSSH("ssh", t)
}

func sshArgs(t Target) []string {
	args := []string{"-T", "-o", "BatchMode=yes", "-e", "none"}
	add := func(flag, v string) {
		if v != "" {
			args = append(args, flag, v)
		}
	}
	add("-p", t.Port)
	add("-l", t.User)
	add("-i", t.KeyFile)
	// The quotes are for the shell at the other end.
	return append(args, "--", t.Host, "virt-ssh-helper", "'"+uri+"'")
}

func runSSH(binary string, t Target) (io.ReadWriteCloser, error) {
	cmd := exec.Command(binary, sshArgs(t)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C") // we look into what it says
	c := &sshConn{host: t.Host, cmd: cmd, waited: make(chan struct{})}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	// Not StdoutPipe: Wait would close it before its last bytes are read.
	out, outW, err := os.Pipe()
	if err != nil {
		in.Close()
		return nil, err
	}
	cmd.Stdout = outW
	cmd.Stderr = &c.stderr
	cmd.WaitDelay = time.Second // a child of ssh may hold stderr open
	err = cmd.Start()
	outW.Close()
	if err != nil {
		in.Close()
		out.Close()
		return nil, refuse(rpc.CodeOperationFailed, fmt.Sprintf("ssh cannot be run: %v", err), "install openssh-client")
	}
	c.in, c.out = in, out
	go func() {
		defer close(c.waited)
		cmd.Wait()
	}()
	return c, nil
}

// sshConn is a running ssh.
type sshConn struct {
	host   string
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *os.File
	stderr tail
	waited chan struct{}
	once   sync.Once
}

func (c *sshConn) Write(b []byte) (int, error) {
	n, err := c.in.Write(b)
	if err != nil {
		// Whoever is told of it closes us, and that must not cut ssh short.
		err = c.reason()
	}
	return n, err
}

func (c *sshConn) Read(b []byte) (int, error) {
	n, err := c.out.Read(b)
	if err != nil {
		err = c.reason()
	}
	return n, err
}

// reason is why a pipe to ssh has ended: io.EOF unless ssh has said something. If
// it failed it ends, and has said why.
func (c *sshConn) reason() error {
	select {
	case <-c.waited:
	case <-time.After(2 * time.Second):
	}
	return sshError(c.host, c.stderr.String())
}

// Close ends ssh and waits for it. It is idempotent.
func (c *sshConn) Close() error {
	c.once.Do(func() {
		c.in.Close()
		c.cmd.Process.Kill()
		<-c.waited
		c.out.Close()
	})
	return nil
}

// errSSH is wrapped by what ssh, or the shell at the other end, said.
var errSSH = errors.New("ssh")

func sshError(host, said string) error {
	said = strings.TrimSpace(said)
	if said == "" {
		return io.EOF
	}
	hint := ""
	switch low := strings.ToLower(said); {
	case strings.Contains(low, "virt-ssh-helper") && strings.Contains(low, "not found"):
		hint = "install libvirt-daemon (virt-ssh-helper) and Kemari on " + host
	case strings.Contains(low, "permission denied (") || strings.Contains(low, "too many authentication failures"):
		hint = "let root of this host log in there with a key: ssh-copy-id " + host
	case strings.Contains(low, "host key verification failed"):
		hint = "accept the host's key once, as root: ssh " + host
	case strings.Contains(low, "could not resolve"):
		hint = "correct the name, or enter it in /etc/hosts"
	case strings.Contains(low, "failed to connect socket"):
		hint = "is virtkemarid.socket active on " + host + "?"
	}
	err := fmt.Errorf("%w: %s", errSSH, oneLine(said))
	if hint != "" {
		err = fmt.Errorf("%w; %s", err, hint)
	}
	return err
}

// tail keeps the end of what is written to it. It is safe for concurrent use.
type tail struct {
	mu sync.Mutex
	b  []byte
}

const tailSize = 2048

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, b...)
	if over := len(t.b) - tailSize; over > 0 {
		t.b = append(t.b[:0], t.b[over:]...)
	}
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.b)
}
