// Command virtkemarid is the libvirt driver of Kemari: it serves libvirt's RPC
// protocol on its two sockets.
package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"os/user"
	"strconv"
	"strings"
	"syscall"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/urfave/cli/v2"
	"golang.org/x/sync/errgroup"

	"kemari/driver"
	"kemari/migrate/control"
	"kemari/systemd"
)

// Where libvirt's client library looks for kemari:///system, and for
// xenkemari:///system: it makes the name of the socket from the scheme.
var (
	defaultSockets   = []string{"/run/libvirt/virtkemarid-sock", "/run/libvirt/virtxenkemarid-sock"}
	defaultSocketsRO = []string{"/run/libvirt/virtkemarid-sock-ro", "/run/libvirt/virtxenkemarid-sock-ro"}
)

// The values of --auth.
const (
	authAuto   = "auto"
	authPolkit = "polkit"
	authGroup  = "group"
)

func main() {
	if err := app().Run(os.Args); err != nil {
		fmt.Fprintln(os.Stderr, "virtkemarid:", err)
		os.Exit(1)
	}
}

func app() *cli.App {
	return &cli.App{
		Name:            "virtkemarid",
		Usage:           "the libvirt driver of Kemari",
		UsageText:       "virtkemarid [options]",
		HideHelpCommand: true,
		Description: "Serves kemari:///system and xenkemari:///system. Under systemd the sockets come\n" +
			"from virtkemarid.socket and virtkemarid-ro.socket; else they are made at --socket\n" +
			"and --socket-ro.",
		DisableSliceFlagSeparator: true,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "upstream-uri", Value: driver.DefaultUpstreamURI, Usage: "what libvirt's daemon is asked to open"},
			&cli.StringFlag{Name: "upstream-socket", Usage: "the daemon's socket (default: that of the URI's own daemon, as virtxend, else libvirtd's)"},
			&cli.StringFlag{Name: "upstream-socket-ro", Usage: "likewise for read-only clients (default: --upstream-socket if given)"},
			&cli.StringSliceFlag{Name: "socket", Value: cli.NewStringSlice(defaultSockets...), Usage: "where to listen, unless systemd does; may be repeated"},
			&cli.StringSliceFlag{Name: "socket-ro", Value: cli.NewStringSlice(defaultSocketsRO...), Usage: "likewise for read-only clients; empty for none"},
			&cli.StringFlag{Name: "auth", Value: authAuto, Usage: "who decides about users other than root: polkit, group (of libvirt), or auto, polkit if there is one"},
			&cli.StringFlag{Name: "root", Value: control.Dir, Usage: "folder of the run-time files"},
			&cli.IntFlag{Name: "max-clients", Value: driver.DefaultMaxClients, Usage: "clients at once"},
			&cli.IntFlag{Name: "timeout", Value: 0, Usage: "accepted as libvirt's daemons do; only 0, to run for ever, is supported"},
			&cli.BoolFlag{Name: "verbose", Usage: "log more"},
		},
		Action: run,
	}
}

func run(c *cli.Context) error {
	if c.Args().Present() {
		return fmt.Errorf("unexpected argument %q; see --help", c.Args().First())
	}
	if c.Int("timeout") != 0 {
		return errors.New("--timeout: only 0 is supported; virtkemarid does not end when it is idle")
	}
	level := slog.LevelInfo
	if c.Bool("verbose") {
		level = slog.LevelDebug
	}
	// The journal has the time.
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{
		Level: level,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	}))
	polkit := new(driver.Polkit)
	defer polkit.Close()
	cfg := driver.Config{
		UpstreamURI:      c.String("upstream-uri"),
		UpstreamSocket:   c.String("upstream-socket"),
		UpstreamSocketRO: c.String("upstream-socket-ro"),
		Authority:        polkit,
		MaxClients:       c.Int("max-clients"),
		Root:             c.String("root"),
		Units:            systemd.Units{},
		Log:              log,
	}
	switch c.String("auth") {
	case authAuto:
	case authPolkit:
		cfg.RequireAuthority = true
	case authGroup:
		cfg.Authority = nil
	default:
		return fmt.Errorf("--auth: %q is none of auto, polkit, group", c.String("auth"))
	}
	ctx, stop := signal.NotifyContext(c.Context, syscall.SIGTERM, syscall.SIGINT)
	defer stop()

	d, err := driver.New(cfg)
	if err != nil {
		return err
	}
	sockets, err := inherited()
	if err != nil {
		return err
	}
	if len(sockets) == 0 {
		if sockets, err = listen(c.StringSlice("socket"), c.StringSlice("socket-ro")); err != nil {
			return err
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, s := range sockets {
		log.Info("listening", "socket", s.l.Addr(), "read_only", s.ro)
		g.Go(func() error { return d.Serve(ctx, s.l, s.ro) })
	}
	g.Go(func() error { return systemd.Watchdog(ctx, nil) })
	if err := systemd.Ready(); err != nil {
		log.Warn("tell systemd that we are ready", "error", err)
	}
	<-ctx.Done()
	log.Info("stopping")
	systemd.Stopping()
	return g.Wait()
}

// socket is one we serve.
type socket struct {
	l  net.Listener
	ro bool
}

// inherited returns the sockets that systemd has opened for us.
func inherited() ([]socket, error) {
	named, err := activation.ListenersWithNames()
	if err != nil {
		return nil, fmt.Errorf("sockets from systemd: %w", err)
	}
	var ss []socket
	for name, ls := range named {
		for _, l := range ls {
			if l.Addr().Network() != "unix" {
				return nil, fmt.Errorf("socket %s from systemd is not a UNIX socket", name)
			}
			ss = append(ss, socket{l, readOnly(name, l.Addr().String())})
		}
	}
	return ss, nil
}

// readOnly says whether a socket is for read-only clients. Either sign suffices,
// since taking a read-only socket for another would give rights away.
func readOnly(name, addr string) bool {
	return strings.HasSuffix(addr, "-ro") || strings.HasSuffix(strings.TrimSuffix(name, ".socket"), "-ro")
}

// listen opens the sockets ourselves. They are not as open as the units', since
// whoever tries the driver out need not mean anybody else to.
func listen(rw, ro []string) ([]socket, error) {
	var ss []socket
	open := func(paths []string, ro bool, mode os.FileMode) error {
		for _, path := range paths {
			if path == "" {
				continue
			}
			l, err := listenUnix(path, mode, !ro)
			if err != nil {
				return err
			}
			ss = append(ss, socket{l, ro})
		}
		return nil
	}
	err := open(rw, false, 0o660)
	if err == nil {
		err = open(ro, true, 0o666)
	}
	if err == nil && len(ss) == 0 {
		err = errors.New("no socket to listen on")
	}
	if err != nil {
		for _, s := range ss {
			s.l.Close()
		}
		return nil, err
	}
	return ss, nil
}

func listenUnix(path string, mode os.FileMode, group bool) (net.Listener, error) {
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return nil, fmt.Errorf("%s: somebody listens there already", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	// Nobody may connect before the mode is right.
	old := syscall.Umask(0o177)
	l, err := net.Listen("unix", path)
	syscall.Umask(old)
	if err != nil {
		return nil, err
	}
	if group && os.Getuid() == 0 && !chownLibvirt(path) {
		mode = 0o600
	}
	if err := os.Chmod(path, mode); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// chownLibvirt gives path to that group, if there is one.
func chownLibvirt(path string) bool {
	g, err := user.LookupGroup(driver.Group)
	if err != nil {
		return false
	}
	gid, err := strconv.Atoi(g.Gid)
	return err == nil && os.Chown(path, 0, gid) == nil
}
