// Kemari-hook is libvirt's hook /etc/libvirt/hooks/libxl.d/kemari: it has every
// guest protected that starts and whose <kemari> element asks for that.
package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"log/syslog"
	"os"
	"os/exec"

	"kemari/hooks"
)

func main() {
	h := hooks.Libxl{Start: start, Log: slog.New(slog.NewTextHandler(logger{}, nil))}
	h.Run(context.Background(), os.Args[1:], os.Stdin)
}

// logger writes to the system's log, since libvirt shows what a hook writes only if
// the hook fails, and this one must not fail. Most runs have nothing to say, so it
// connects when there is something.
type logger struct{}

func (logger) Write(b []byte) (int, error) {
	if w, err := syslog.New(syslog.LOG_DAEMON|syslog.LOG_ERR, "kemari-hook"); err == nil {
		defer w.Close()
		w.Write(b)
	}
	return os.Stderr.Write(b)
}

func start(ctx context.Context, unit string) error {
	out, err := exec.CommandContext(ctx, "systemctl", "--no-block", "start", unit).CombinedOutput()
	if err != nil {
		return fmt.Errorf("start %s: %w: %s", unit, err, bytes.TrimSpace(out))
	}
	return nil
}
