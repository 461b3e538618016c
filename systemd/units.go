package systemd

import (
	"context"
	"errors"
	"fmt"

	"github.com/coreos/go-systemd/v22/dbus"
)

// ErrJob is wrapped by the error about a unit that did not start or stop.
var ErrJob = errors.New("systemd job did not succeed")

// Units starts and stops units over the system's D-Bus. The zero value is ready
// and safe for concurrent use: each call has its own connection, since calls are
// rare and a connection kept would have to be watched.
type Units struct{}

// Start starts the unit and waits until it is ready, as its Type defines. If ctx
// ends first the unit may still come up: the caller stops it.
func (Units) Start(ctx context.Context, name string) error {
	return withConn(ctx, "start "+name, func(c *dbus.Conn, ch chan<- string) error {
		// Whoever starts a unit anew has dealt with its last failure, and must
		// not run into its start limit.
		_ = c.ResetFailedUnitContext(ctx, name) // not loaded: as well
		_, err := c.StartUnitContext(ctx, name, "replace", ch)
		return err
	})
}

// Stop stops the unit and waits until it is gone. Stopping one that does not run
// succeeds.
func (Units) Stop(ctx context.Context, name string) error {
	return withConn(ctx, "stop "+name, func(c *dbus.Conn, ch chan<- string) error {
		_, err := c.StopUnitContext(ctx, name, "replace", ch)
		return err
	})
}

// withConn runs begin, which starts a job, and waits for the job's end.
func withConn(ctx context.Context, what string, begin func(*dbus.Conn, chan<- string) error) error {
	c, err := dbus.NewSystemConnectionContext(ctx)
	if err != nil {
		return fmt.Errorf("%s: connect to systemd: %w", what, err)
	}
	defer c.Close()
	// The library listens on another connection than it starts jobs on, and
	// systemd tells only subscribers and the starter of a job's end.
	if err := c.Subscribe(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	ch := make(chan string, 1)
	if err := begin(c, ch); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	select {
	case result := <-ch:
		if result != "done" {
			return fmt.Errorf("%s: %w: %s", what, ErrJob, result)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", what, context.Cause(ctx))
	}
}
