package main

import (
	"errors"

	"kemari/migrate"
	"kemari/migrate/xen"
)

// hint is what the operator can do about the end of a protection.
func hint(err error) string {
	switch {
	case errors.Is(err, migrate.ErrTakenOver):
		return "the guest runs on the standby's host; this host's copy was destroyed"
	case errors.Is(err, migrate.ErrGuestGone):
		return ""
	case errors.Is(err, xen.ErrStands): // whatever it was that ended protection
		return "the guest does not run: see the journal (kemari-replicator@); if it does not come back, virsh destroy and virsh start it"
	case errors.Is(err, migrate.ErrMayRun):
		return "see whether the guest runs on this host, and on the primary's; if on both, virsh destroy it here"
	case errors.Is(err, migrate.ErrStandbyLost), errors.Is(err, migrate.ErrRefused):
		return "the guest runs on, unprotected; see the standby's journal (kemari-standby@), then protect it again with virsh migrate --kemari"
	case errors.Is(err, migrate.ErrPrimaryLost):
		return "see the primary's journal (kemari-replicator@)"
	case errors.Is(err, xen.ErrNoSuspend):
		return "check inside the guest that it answers, and that its kernel was built with Xen's save and restore"
	case errors.Is(err, xen.ErrNoPVDrivers):
		return "wait until the guest has booted; if its <features> turn the Xen platform device off, or its system has no PV drivers, change that"
	case errors.Is(err, xen.ErrDeviceModel):
		return "see the guest's log in /var/log/xen (qemu-dm-*), and whether another client is connected with its QEMU's monitor"
	case errors.Is(err, xen.ErrNoLogDirty):
		return "make it a PVH guest: <type machine='xenpvh'>xenpvh</type>"
	}
	return "see the journal: journalctl -u 'kemari-*'"
}
