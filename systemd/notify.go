package systemd

import (
	"context"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// Ready tells systemd that the process is ready. It does nothing where nobody
// wants to know.
func Ready() error {
	_, err := daemon.SdNotify(false, daemon.SdNotifyReady)
	return err
}

// Stopping tells systemd that the process has begun to end.
func Stopping() error {
	_, err := daemon.SdNotify(false, daemon.SdNotifyStopping)
	return err
}

// Watchdog tells systemd that the process lives, three times in each period that
// the unit's WatchdogSec allows, until ctx ends. Before each sign of life it
// calls alive, which may be nil; an error withholds the sign. It returns at once
// where no watchdog is set.
func Watchdog(ctx context.Context, alive func() error) error {
	period, err := daemon.SdWatchdogEnabled(false)
	if err != nil || period <= 0 {
		return err
	}
	t := time.NewTicker(period / 3)
	defer t.Stop()
	for {
		if alive == nil || alive() == nil {
			if _, err := daemon.SdNotify(false, daemon.SdNotifyWatchdog); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}
