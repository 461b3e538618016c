#!/usr/bin/python3
"""Protect a guest with libvirt's own Python binding, look at it, end protection.

usage: client.py DOMAIN kemari+ssh://STANDBY/system

Nothing here is Kemari's but the URI's scheme and one flag.
"""
import sys
import threading

import libvirt

VIR_MIGRATE_KEMARI = 1 << 30
STATES = {
    libvirt.VIR_DOMAIN_EVENT_RESUMED: "resumed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED: "stopped",
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: "suspended",
}


def main(name, standby):
    libvirt.virEventRegisterDefaultImpl()

    def events():
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=events, daemon=True).start()
    conn = libvirt.open("kemari:///system")
    domain = conn.lookupByName(name)
    begun, ended = threading.Event(), threading.Event()

    def lifecycle(conn, dom, event, detail, opaque):
        print("event:", dom.name(), STATES.get(event, event), detail)
        if event == libvirt.VIR_DOMAIN_EVENT_RESUMED:
            (begun if detail == libvirt.VIR_DOMAIN_EVENT_RESUMED_MIGRATED else ended).set()

    conn.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle, None)
    flags = libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_LIVE | VIR_MIGRATE_KEMARI
    domain.migrateToURI3(standby, {}, flags)
    print("protected:", domain.name(), "by", standby)
    if not begun.wait(30):
        sys.exit("no event for the beginning of protection")
    job = domain.jobStats()
    print("job:", {k: job[k] for k in sorted(job) if k.startswith("kemari.")})
    if job["type"] != libvirt.VIR_DOMAIN_JOB_UNBOUNDED:
        sys.exit("the protection is not shown as a job without an end")
    try:
        domain.save("/root/should-not-be")
        sys.exit("a protected guest could be saved")
    except libvirt.libvirtError as e:
        print("refused, as it should be:", e)
    domain.abortJob()
    if not ended.wait(60):
        sys.exit("no event for the end of protection")
    print("unprotected, and the guest is", "running" if domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING else domain.state())
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
