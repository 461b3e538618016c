// Kemari-replicator is the process behind one protection of one guest, one on
// each of its two hosts. virtkemarid writes its settings and starts its unit; it
// may also be run by hand for a look at what it says.
//
// The command only wires: what it does is in package migrate.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"os/user"
	"regexp"
	"strconv"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"kemari/migrate/control"
	"kemari/systemd"
)

// env is what all commands share.
type env struct {
	root   string // of the run-time folders
	socket string // libvirtd's
	sys    string // where sysfs is
	log    *slog.Logger
}

func main() {
	e := &env{sys: "/sys", log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{ReplaceAttr: dropTime}))}
	// SIGTERM is how systemd asks; SIGINT is Ctrl-C. Both end protection in order.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := app(e).RunContext(ctx, os.Args); err != nil {
		e.log.Error("protection ended", "err", err)
		stop()
		os.Exit(1)
	}
}

func app(e *env) *cli.App {
	return &cli.App{
		Name:  "kemari-replicator",
		Usage: "one side of one guest's protection",
		Description: "Started by kemari-replicator@UUID.service and kemari-standby@UUID.service, with the\n" +
			"settings that virtkemarid left in /run/kemari. To protect a guest use\n" +
			"virsh migrate --kemari, to look at protections kemari status.",
		HideHelpCommand: true,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "root", Value: control.Dir, Usage: "folder of the run-time state", Destination: &e.root},
			&cli.StringFlag{Name: "libvirt-socket", Usage: "socket of libvirt's local daemon (default: virtxend's, else libvirtd's)", Destination: &e.socket},
		},
		Commands: []*cli.Command{
			{Name: "primary", Usage: "checkpoint a running guest and send it to its standby", ArgsUsage: "UUID",
				Action: action(e.primary)},
			{Name: "standby", Usage: "receive a guest's checkpoints and take over from the last", ArgsUsage: "UUID",
				Action: action(e.standby)},
			{Name: "cleanup-primary", Usage: "put back what a killed primary left: guest, plug, log-dirty mode", ArgsUsage: "UUID",
				Action: action(e.cleanupPrimary)},
			{Name: "cleanup-standby", Usage: "remove the shadow a killed standby left", ArgsUsage: "UUID",
				Action: action(e.cleanupStandby)},
		},
	}
}

// The instance name of a unit becomes part of a path.
var uuidPattern = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

func action(run func(ctx context.Context, uuid string) error) cli.ActionFunc {
	return func(c *cli.Context) error {
		if c.NArg() != 1 || !uuidPattern.MatchString(c.Args().First()) {
			return fmt.Errorf("usage: kemari-replicator %s UUID, the guest's, in lower case", c.Command.Name)
		}
		return run(c.Context, c.Args().First())
	}
}

// dropTime leaves the time to the journal.
func dropTime(groups []string, a slog.Attr) slog.Attr {
	if a.Key == slog.TimeKey && len(groups) == 0 {
		return slog.Attr{}
	}
	return a
}

func parseUUID(s string) (u [16]byte, err error) {
	if !uuidPattern.MatchString(s) {
		return u, fmt.Errorf("%q is not a UUID", s)
	}
	for i, j := 0, 0; i < len(u); j += 2 {
		if s[j] == '-' {
			j++
		}
		b, err := strconv.ParseUint(s[j:j+2], 16, 8)
		if err != nil {
			return u, err
		}
		u[i] = byte(b)
		i++
	}
	return u, nil
}

// serve runs one side: its control socket, its readiness and watchdog, then work.
// Whatever work returns is left behind as the last status.
func (e *env) serve(ctx context.Context, p control.Paths, status func() control.Status,
	ask func(context.Context, control.Request) error, work func(context.Context) error) (err error) {
	l, err := control.Listen(p.Socket, libvirtGroup())
	if err != nil {
		return fmt.Errorf("control socket: %w", err)
	}
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	served := make(chan error, 2)
	go func() {
		served <- control.ServeRequests(serving, l, func(ctx context.Context, req control.Request) (control.Status, error) {
			if req.Op != control.OpStatus {
				if err := ask(ctx, req); err != nil {
					return control.Status{}, err
				}
			}
			return status(), nil
		})
	}()
	go func() { served <- systemd.Watchdog(serving, nil) }()
	defer func() {
		last := status()
		if last.Phase != control.Active {
			last.Phase, last.Since = control.Ended, time.Now()
		}
		if err != nil {
			last.Error, last.Hint = err.Error(), hint(err)
		}
		// Before the socket goes: whoever looks finds one or the other.
		err = errors.Join(err, control.WriteLast(p, last))
		systemd.Stopping()
		stop()
		<-served
		<-served
		os.Remove(p.Socket)
	}()
	return work(ctx)
}

// libvirtGroup may use the control sockets, as it may use libvirt's.
func libvirtGroup() int {
	g, err := user.LookupGroup("libvirt")
	if err != nil {
		return 0
	}
	gid, err := strconv.Atoi(g.Gid)
	if err != nil {
		return 0
	}
	return gid
}
