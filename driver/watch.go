package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"kemari/driver/rpc"
	"kemari/migrate/control"
)

const (
	pollEvery = 200 * time.Millisecond
	// silentAfter is how long a process may not answer: the first copy keeps a small
	// host busy.
	silentAfter = time.Minute
	// goneAfter is how long a started unit may be without its control socket.
	goneAfter = 10 * time.Second
	// askTimeout bounds the orderly end of a process that is to be stopped.
	askTimeout = 20 * time.Second
)

// startAndWatch starts the unit of one side of a protection and returns its
// status once done says so. An error means that it ended or did not start, with
// its own reason if it left one, or that ctx has ended. The caller cleans up.
func (d *Driver) startAndWatch(ctx context.Context, role control.Role, id rpc.UUID, generation uint64, unit string, done func(control.Status) bool) (control.Status, error) {
	if err := d.cfg.Units.Start(ctx, unit); err != nil {
		if ctx.Err() != nil {
			return control.Status{}, context.Cause(ctx)
		}
		// The reason it left behind is better than systemd's.
		if st, e := d.look(ctx, role, id); e == nil && st.Generation == generation && st.Error != "" {
			return st, ended(role, st, unit)
		}
		return control.Status{}, fmt.Errorf("%w; see journalctl -u %s", err, unit)
	}
	t := time.NewTicker(pollEvery)
	defer t.Stop()
	seen := time.Now()
	for {
		st, err := d.look(ctx, role, id)
		switch {
		case ctx.Err() != nil:
			return st, context.Cause(ctx)
		case errors.Is(err, control.ErrNotRunning):
			if time.Since(seen) > goneAfter {
				return st, refuse(rpc.CodeOperationFailed, fmt.Sprintf("the %s process has ended and left no reason", role), "see journalctl -u "+unit)
			}
		case err != nil:
			// It may be on its way out, and leave its reason.
			if time.Since(seen) > silentAfter {
				return st, fmt.Errorf("ask the %s process: %w; see journalctl -u %s", role, err, unit)
			}
		case st.Generation != generation:
			return st, refuse(rpc.CodeOperationFailed, fmt.Sprintf("a %s process of another protection (generation %d) is running", role, st.Generation), "stop "+unit)
		case done(st):
			return st, nil
		case st.Phase == control.Ended:
			return st, ended(role, st, unit)
		default:
			seen = time.Now()
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return st, context.Cause(ctx)
		}
	}
}

// ended is why a process ended that should not have.
func ended(role control.Role, st control.Status, unit string) error {
	switch {
	case st.Error == "":
		return refuse(rpc.CodeAborted, "protection was ended before it was complete", "see journalctl -u "+unit)
	case st.Hint == "":
		return refuse(rpc.CodeOperationFailed, fmt.Sprintf("%s: %s", role, st.Error), "see journalctl -u "+unit)
	}
	return refuse(rpc.CodeOperationFailed, fmt.Sprintf("%s: %s", role, st.Error), st.Hint)
}

// endProcess ends the process of one side of a protection and leaves nothing of it
// but its last status. The caller knows that it may be done.
func (d *Driver) endProcess(ctx context.Context, role control.Role, id rpc.UUID, unit string) error {
	paths := d.paths(role, id)
	// Asked, it tells the other side; stopped, it does not get round to it. One
	// that is on its way out has done so, and may not answer any more.
	var askErr error
	if st, err := d.look(ctx, role, id); err != nil || st.Phase != control.Ended {
		actx, cancel := context.WithTimeout(ctx, askTimeout)
		_, askErr = control.Ask(actx, paths.Socket, control.OpAbort)
		cancel()
		if errors.Is(askErr, control.ErrNotRunning) {
			askErr = nil
		}
	}
	if err := d.cfg.Units.Stop(ctx, unit); err != nil {
		return errors.Join(err, askErr)
	}
	// A process that was killed leaves its settings, and there is a key in them.
	if err := os.Remove(paths.Config); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
