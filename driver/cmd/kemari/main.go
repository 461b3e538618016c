package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/term"

	"kemari/driver"
	"kemari/driver/virt"
	"kemari/migrate/control"
)

// version is set when a release is built.
var version = "0.1-dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second Ctrl-C ends the process at once.
	context.AfterFunc(ctx, stop)
	name, _ := os.Hostname()
	h := &host{
		in: os.Stdin, out: os.Stdout, err: os.Stderr,
		inTTY:  term.IsTerminal(int(os.Stdin.Fd())),
		errTTY: term.IsTerminal(int(os.Stderr.Fd())),
		getenv: os.Getenv,
		root:   control.Dir,
		name:   name,
		open: func(uri string, readonly bool) (hypervisor, error) {
			c, err := virt.Open(uri, readonly)
			if err != nil {
				return nil, err // not c, which would be a nil that is not nil
			}
			return c, nil
		},
		examine: driver.Examine,
		now:     time.Now,
		poll:    250 * time.Millisecond,
		retry:   2 * time.Second,
		limit:   time.Minute,
	}
	if filepath.Base(os.Args[0]) == "virsh" {
		os.Exit(virsh(ctx, h, os.Args[1:]))
	}
	os.Exit(kemari(ctx, h, os.Args[1:]))
}

// exit is an error with an exit status of its own. The message may be empty.
type exit struct {
	code int
	text string
}

func (e *exit) Error() string { return e.text }

// report prints an error as virsh does and returns the exit status.
func report(h *host, err error) int {
	if err == nil {
		return 0
	}
	code := 1
	var e *exit
	if errors.As(err, &e) {
		code = e.code
	}
	if err.Error() != "" {
		fmt.Fprintf(h.err, "error: %v\n", err)
	}
	return code
}
