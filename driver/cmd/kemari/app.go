package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"kemari/migrate/control"
)

// failoverTimeout bounds the wait for a take-over that was asked for.
const failoverTimeout = 2 * time.Minute

// kemari is the face of kemari. It returns the exit status.
func kemari(ctx context.Context, h *host, args []string) int {
	app := newApp(h)
	return report(h, app.RunContext(ctx, append([]string{"kemari"}, intersperse(app, args)...)))
}

func newApp(h *host) *cli.App {
	connect := &cli.StringFlag{Name: "connect", Aliases: []string{"c"}, Usage: "connect to `URI` (default: " + defaultURI + ")"}
	root := &cli.StringFlag{Name: "root", Value: h.root, Hidden: true, Destination: &h.root}
	asJSON := &cli.BoolFlag{Name: "json", DisableDefaultText: true, Usage: "print JSON, for scripts"}
	var setting []cli.Flag
	for _, o := range options {
		// What is --kemari-min to virsh is --min here.
		if name, ok := strings.CutPrefix(o.name, "kemari-"); ok {
			setting = append(setting, &cli.StringFlag{Name: name, Usage: o.help})
		}
	}
	return &cli.App{
		Name:                 "kemari",
		Usage:                "protect Xen guests against the loss of their host",
		Version:              version,
		HideHelpCommand:      true,
		EnableBashCompletion: true,
		Suggest:              true,
		Reader:               h.in,
		Writer:               h.out,
		ErrWriter:            h.err,
		ExitErrHandler:       func(*cli.Context, error) {}, // report does it
		OnUsageError:         usageError,
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return fmt.Errorf("unknown command '%s'; see kemari --help", c.Args().First())
			}
			return cli.ShowAppHelp(c)
		},
		Commands: []*cli.Command{
			{
				Name:      "status",
				Usage:     "tell how the protections on this host are",
				ArgsUsage: "[DOMAIN...]",
				Description: "Shows the guests that run here and are protected, and those of other hosts\n" +
					"that this host would take over. A DOMAIN is a name or a UUID.\n\n" +
					"Exit status: 0 if every DOMAIN given is protected, or ready to be taken over;\n" +
					"3 if one of them is not; 1 if this could not be found out.\n\n" +
					"Examples:\n   kemari status\n   kemari status g1 --json",
				Flags:        []cli.Flag{asJSON, root},
				BashComplete: h.completeDomains,
				Action:       func(c *cli.Context) error { return h.status(c.Context, c.Args().Slice(), c.Bool("json")) },
			},
			{
				Name:      "protect",
				Usage:     "protect a guest, as virsh migrate --kemari does",
				ArgsUsage: "DOMAIN [URI]",
				Description: "Returns once the standby has the guest's first checkpoint. Without URI the one\n" +
					"in the domain's <kemari> element is taken, and so is what no option says.\n\n" +
					"Examples:\n   kemari protect g1 kemari+ssh://xen2/system\n" +
					"   kemari protect g1 kemari+ssh://xen2/system --arbiter none --timeout 2000",
				Flags: append([]cli.Flag{
					connect, root,
					&cli.StringFlag{Name: "migrateuri", Usage: "send checkpoints to `URI` (default: the standby chooses)"},
					&cli.BoolFlag{Name: "verbose", DisableDefaultText: true, Usage: "show the progress of the first copy, even if not on a terminal"},
					&cli.BoolFlag{Name: "autostart", DisableDefaultText: true, Usage: "only if the domain's element asks for it; try for a minute"},
				}, setting...),
				BashComplete: h.completeDomains,
				Action:       h.protectCommand,
			},
			{
				Name:         "unprotect",
				Usage:        "end the protection of a guest, which goes on running",
				ArgsUsage:    "DOMAIN",
				Description:  "The same as virsh -c " + defaultURI + " domjobabort DOMAIN.",
				Flags:        []cli.Flag{connect},
				BashComplete: h.completeDomains,
				Action:       h.unprotectCommand,
			},
			{
				Name:      "failover",
				Usage:     "on the standby: take a guest over now",
				ArgsUsage: "DOMAIN",
				Description: "To be said when the primary host is dead and no arbiter decides so by itself.\n" +
					"If the primary still runs, two copies of the guest will run afterwards: make\n" +
					"sure of its death first, by its power switch if need be.\n\n" +
					"Example:\n   kemari failover g1 --yes",
				Flags:        []cli.Flag{&cli.BoolFlag{Name: "yes", DisableDefaultText: true, Usage: "the primary is dead; do not ask"}, root},
				BashComplete: h.completeDomains,
				Action:       h.failoverCommand,
			},
			{
				Name:      "switchover",
				Usage:     "on the primary: hand a guest over to its standby",
				ArgsUsage: "DOMAIN",
				Description: "For planned work on this host. The guest goes on at its standby, with all that it\n" +
					"has ever sent out on its way, and stands still meanwhile as in a migration. Then\n" +
					"that host protects it by this one, with the same settings. The same as\n" +
					"virsh migrate --live DOMAIN URI-OF-ITS-STANDBY.\n\n" +
					"Exit status: 0 if it runs there and is being protected by this host, 3 if it runs\n" +
					"there and is not, 1 if it was not handed over: it goes on here then.\n\n" +
					"Examples:\n   kemari switchover g1\n   kemari switchover g1 --json",
				Flags:        []cli.Flag{connect, asJSON, root},
				BashComplete: h.completeDomains,
				Action:       h.switchoverCommand,
			},
			{
				Name:      "verify",
				Usage:     "on the primary: compare the standby's memory with the guest's",
				ArgsUsage: "DOMAIN",
				Description: "Compares every page of the guest with the standby's copy, at one checkpoint. For\n" +
					"that checkpoint the guest stands while all of its memory is read, longer than for\n" +
					"others: some tenths of a second for each GiB, many times that on an emulated\n" +
					"host. What it sends is held until the standby has read its copy, too. It stays\n" +
					"protected.\n\n" +
					"Pages that others write to at any time, such as the rings of its devices, are\n" +
					"named apart and are no fault.\n\n" +
					"Exit status: 0 if all pages are equal, 1 if some differ, 2 if this could not be\nfound out.\n\n" +
					"Examples:\n   kemari verify g1\n   kemari verify g1 --json",
				Flags:        []cli.Flag{asJSON, root},
				BashComplete: h.completeDomains,
				OnUsageError: func(_ *cli.Context, err error, _ bool) error { return unverified(err) },
				Action:       func(c *cli.Context) error { return unverified(h.verifyCommand(c)) },
			},
			{
				Name:      "check",
				Usage:     "tell whether a guest can be protected, and if not, why",
				ArgsUsage: "[DOMAIN...] | DOMAIN URI",
				Description: "Checks all domains of the host if none is given, as far as this host can tell.\n" +
					"The standby named by URI, or by the element of a DOMAIN given, is asked too.\n\n" +
					"Exit status: 0 if all of them can be protected, 3 if one cannot, 1 if this\ncould not be found out.\n\n" +
					"Examples:\n   kemari check\n   kemari check g1 kemari+ssh://xen2/system --json",
				Flags:        []cli.Flag{connect, asJSON},
				BashComplete: h.completeDomains,
				Action:       h.checkCommand,
			},
		},
	}
}

func usageError(_ *cli.Context, err error, _ bool) error { return err }

// intersperse moves a command's options before its words, since the flag package
// stops at the first word and people write kemari status g1 --json.
func intersperse(app *cli.App, args []string) []string {
	if len(args) == 0 || slices.Contains(args, "--generate-bash-completion") {
		return args
	}
	var cmd *cli.Command
	for _, c := range app.Commands {
		if c.HasName(args[0]) {
			cmd = c
		}
	}
	if cmd == nil {
		return args
	}
	var flags, words []string
	for rest := args[1:]; len(rest) > 0; {
		a := rest[0]
		rest = rest[1:]
		if a == "--" {
			words = append(append([]string{"--"}, words...), rest...)
			break
		}
		if len(a) < 2 || a[0] != '-' {
			words = append(words, a)
			continue
		}
		flags = append(flags, a)
		name := strings.TrimLeft(a, "-")
		for _, f := range cmd.Flags {
			if _, ok := f.(*cli.StringFlag); !ok || !slices.Contains(f.Names(), name) {
				continue
			}
			if len(rest) == 0 {
				return []string{args[0], a} // and let the flag package say so
			}
			flags, rest = append(flags, rest[0]), rest[1:]
		}
	}
	return slices.Concat(args[:1], flags, words)
}

// oneDomain returns the command's DOMAIN, of at most n words.
func oneDomain(c *cli.Context, n int) (string, error) {
	switch {
	case !c.Args().Present():
		return "", fmt.Errorf("no DOMAIN given; see kemari %s --help", c.Command.Name)
	case c.NArg() > n:
		return "", fmt.Errorf("unexpected '%s'; see kemari %s --help", c.Args().Get(n), c.Command.Name)
	}
	return c.Args().First(), nil
}

func (h *host) protectCommand(c *cli.Context) error {
	domain, err := oneDomain(c, 2)
	if err != nil {
		return err
	}
	if c.Bool("autostart") {
		return h.autostart(c.Context, c.String("connect"), domain)
	}
	values := map[string]string{}
	for _, name := range c.LocalFlagNames() {
		values[name] = c.String(name)
	}
	p := protection{
		connect:  c.String("connect"),
		domain:   domain,
		uri:      c.Args().Get(1),
		dataURI:  c.String("migrateuri"),
		progress: c.Bool("verbose") || h.errTTY,
		prefix:   "--",
	}
	if err := p.settings.parse(p.prefix, values); err != nil {
		return err
	}
	return h.protect(c.Context, p)
}

func (h *host) unprotectCommand(c *cli.Context) error {
	name, err := oneDomain(c, 1)
	if err != nil {
		return err
	}
	connect, err := h.kemariURI(c.String("connect"))
	if err != nil {
		return err
	}
	hv, err := h.open(connect, false)
	if err != nil {
		return err
	}
	defer hv.Close()
	dom, err := hv.Lookup(name)
	if err != nil {
		return err
	}
	if err := hv.Abort(dom.UUID); err != nil {
		return err
	}
	fmt.Fprintf(h.out, "Domain '%s' is not protected any more\n", dom.Name)
	return nil
}

func (h *host) failoverCommand(c *cli.Context) error {
	name, err := oneDomain(c, 1)
	if err != nil {
		return err
	}
	all, err := h.statuses(c.Context, []string{name})
	if err != nil {
		return err
	}
	i := slices.IndexFunc(all, func(s control.Status) bool { return s.Role == control.Standby && s.Phase != control.Ended })
	if i < 0 {
		return fmt.Errorf("this host is not the standby of domain '%s'", name)
	}
	s := all[i]
	if !c.Bool("yes") {
		if !h.inTTY {
			return errors.New("taking over while the primary still runs makes two running copies of the guest; be sure it is dead and say --yes")
		}
		fmt.Fprintf(h.err, "If %s still runs '%s', two copies of it will run after this.\nIs that host dead, its power off? [yes/no] ", orDash(s.Peer), s.Domain)
		answer, _ := bufio.NewReader(h.in).ReadString('\n')
		if strings.TrimSpace(answer) != "yes" {
			return errors.New("nothing was done")
		}
	}
	ctx, cancel := context.WithTimeout(c.Context, failoverTimeout)
	defer cancel()
	after, err := control.Ask(ctx, control.PathsFor(h.root, control.Standby, s.UUID).Socket, control.OpFailover)
	if err != nil {
		return fmt.Errorf("failover of domain '%s': %w", s.Domain, err)
	}
	if after.Phase != control.Active {
		return fmt.Errorf("failover of domain '%s': it is %s", s.Domain, after.Phase)
	}
	fmt.Fprintf(h.out, "Domain '%s' runs on this host now\n", s.Domain)
	return nil
}

// completeDomains offers the domains that are known here without asking libvirt,
// which could take long.
func (h *host) completeDomains(c *cli.Context) {
	cli.DefaultCompleteWithFlags(c.Command)(c)
	all, _ := h.statuses(c.Context, nil)
	for _, s := range all {
		fmt.Fprintln(h.out, s.Domain)
	}
}
