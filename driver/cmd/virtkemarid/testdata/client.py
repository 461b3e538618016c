# Drives kemari:///system with python3-libvirt: client.py SOCKET READ-ONLY-SOCKET
import sys
import threading

import libvirt

KEMARI = 1 << 30

libvirt.registerErrorHandler(lambda _, e: None, None)
libvirt.virEventRegisterDefaultImpl()


def loop():
    while True:
        libvirt.virEventRunDefaultImpl()


threading.Thread(target=loop, daemon=True).start()


def refused(what, f, *args):
    try:
        f(*args)
    except libvirt.libvirtError as e:
        print(what, "refused:", e)
    else:
        sys.exit(what + " was not refused")


for scheme in "kemari", "xenkemari":
    conn = libvirt.open(scheme + ":///system?socket=" + sys.argv[1])
    print(scheme, [d.name() for d in conn.listAllDomains()], conn.isAlive())

seen = []
arrived = threading.Condition()


def lifecycle(conn, dom, event, detail, opaque):
    with arrived:
        seen.append((dom.name(), event, detail))
        arrived.notify()


dom = conn.lookupByName("test")
conn.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle, None)
for event in libvirt.VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION, libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED:
    conn.domainEventRegisterAny(dom, event, lambda *a: None, None)
conn.setKeepAlive(1, 5)
dom.suspend()
print("state", dom.state())
dom.resume()
with arrived:
    arrived.wait_for(lambda: len(seen) == 2, 20)
print("events", seen)
print("xml", "<name>test</name>" in dom.XMLDesc())
p2p = KEMARI | libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_LIVE
refused("protection", dom.migrateToURI3, "kemari+ssh://xen2/system", {libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: 10}, p2p)
stream = conn.newStream()
print("screenshot", dom.screenshot(stream, 0), len(stream.recv(8)))
stream.abort()

conn = libvirt.openReadOnly("kemari:///system?socket=" + sys.argv[2])
dom = conn.lookupByName("test")
print("reader", dom.state())
refused("suspend", dom.suspend)
# One that does not say that it is a reader is one.
dom = libvirt.open("kemari:///system?socket=" + sys.argv[2]).lookupByName("test")
refused("suspend", dom.suspend)
refused("secrets", dom.XMLDesc, libvirt.VIR_DOMAIN_XML_SECURE)
