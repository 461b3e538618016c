package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// virsh is the face of virsh. It returns the exit status, unless the real virsh
// takes the process over.
func virsh(ctx context.Context, h *host, args []string) int {
	what, c := inspect(args)
	switch what {
	case help:
		return virshHelp(h, args)
	case complete:
		return virshComplete(h, args, c.words)
	case ours:
		start := h.now()
		err := c.err
		if err == nil {
			err = h.protect(ctx, protection{
				connect:  c.connect,
				readonly: c.readonly,
				domain:   c.options.domain,
				uri:      c.options.uri,
				dataURI:  c.options.dataURI,
				settings: c.options.settings,
				progress: c.options.verbose || h.errTTY && !c.quiet,
				quiet:    c.quiet,
				prefix:   "--kemari-",
			})
		}
		if c.timing {
			fmt.Fprintf(h.out, "\n(Time: %.3f ms)\n\n", float64(h.now().Sub(start))/float64(time.Millisecond))
		}
		return report(h, err)
	}
	path, err := realVirsh(h.getenv("PATH"), self)
	if err == nil {
		err = syscall.Exec(path, append([]string{"virsh"}, args...), os.Environ())
	}
	fmt.Fprintf(h.err, "error: %v\n", err)
	return 127
}

// virshHelp shows the real virsh's help for migrate, and ours below it.
func virshHelp(h *host, args []string) int {
	path, err := realVirsh(h.getenv("PATH"), self)
	if err != nil {
		fmt.Fprintf(h.err, "error: %v\n", err)
		return 127
	}
	cmd := exec.Command(path, args...)
	cmd.Args[0] = "virsh"
	cmd.Stdin, cmd.Stdout, cmd.Stderr = h.in, h.out, h.err
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return max(exit.ExitCode(), 1) // -1 after a signal
		}
		return report(h, err)
	}
	fmt.Fprintln(h.out, "  PROTECTION (migrate --kemari <domain> kemari+ssh://HOST/system; not in the interactive mode)")
	for _, o := range options {
		if o.help == "" {
			continue
		}
		name := "--" + o.name
		if o.arg != "" {
			name += " <" + o.arg + ">"
		}
		fmt.Fprintf(h.out, "    %-27s  %s\n", name, o.help)
	}
	fmt.Fprintln(h.out)
	return 0
}

// self is this program.
func self() (os.FileInfo, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return os.Stat(exe)
}

// diverted is what dpkg-divert adds to a file's name.
const diverted = ".distrib"

// realVirsh is the virsh that stands behind this program in the path list, else
// /usr/bin/virsh. Where this program has its place, dpkg-divert may have put it aside.
// Only looking onwards, two copies of this program cannot start each other for ever.
func realVirsh(list string, self func() (os.FileInfo, error)) (string, error) {
	me, err := self()
	if err != nil {
		return "", fmt.Errorf("find the real virsh: %w", err)
	}
	found := ""
	for _, dir := range append(filepath.SplitList(list), "/usr/bin") {
		if !filepath.IsAbs(dir) {
			continue // the current folder is nobody's place for programs
		}
		path := filepath.Join(dir, "virsh")
		fi, err := os.Stat(path)
		if err == nil && os.SameFile(fi, me) {
			found = ""
			path += diverted
			fi, err = os.Stat(path)
		}
		if err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 && !os.SameFile(fi, me) && found == "" {
			found = path
		}
	}
	if found == "" {
		return "", errors.New("the real virsh was not found; install libvirt-clients")
	}
	return found, nil
}
