package main

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"kemari/migrate"
	"kemari/migrate/xen"
)

// What became of the guest matters more than what ended protection.
func TestHint(t *testing.T) {
	for _, c := range []struct {
		err  error
		want string
	}{
		{migrate.ErrStandbyLost, "runs on"},
		{fmt.Errorf("epoch 7: %w", migrate.ErrRefused), "runs on"},
		{errors.Join(migrate.ErrStandbyLost, fmt.Errorf("epoch 7: %w: it is busy", xen.ErrStands)), "does not run"},
		{errors.Join(migrate.ErrTakenOver, xen.ErrStands), "runs on the standby's host"},
		{fmt.Errorf("take over: %w", migrate.ErrMayRun), "if on both"},
		{migrate.ErrGuestGone, ""},
		{xen.ErrNoPVDrivers, "until the guest has booted"},
		{fmt.Errorf("checkpoint: %w", xen.ErrDeviceModel), "qemu-dm-"},
	} {
		if got := hint(c.err); !strings.Contains(got, c.want) || (got == "") != (c.want == "") {
			t.Errorf("%v: %q, want %q", c.err, got, c.want)
		}
	}
}
