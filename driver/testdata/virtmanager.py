# Drives virt-manager as people do who cannot see the screen, by what it tells of its
# windows: virtmanager.py URI URI-OF-ANOTHER-HOST
#
# It needs a D-Bus session of its own, and prints what virt-manager shows. The guest
# "test" of the first host is protected by the other one, "mover" is not.
import signal
import subprocess
import sys
import time

import gi

gi.require_version("Atspi", "2.0")
from gi.repository import Atspi, GLib

LIMIT = 60  # seconds that virt-manager may take for anything

here, there = sys.argv[1:]


def start(*args):
    return subprocess.Popen(["virt-manager", "--no-fork", "--debug", *args], stdout=sys.stderr)


def tell(*args):
    """Starts another one, which hands its wish over to the one that runs."""
    if start(*args).wait(LIMIT):
        sys.exit("virt-manager " + " ".join(args) + " failed")


def walk(node):
    yield node
    for i in range(node.get_child_count()):
        child = node.get_child_at_index(i)
        if child is not None:
            yield from walk(child)


def showing(node):
    return node.get_state_set().contains(Atspi.StateType.SHOWING)


def sensitive(node):
    return node.get_state_set().contains(Atspi.StateType.SENSITIVE)


def windows():
    desktop = Atspi.get_desktop(0)
    for i in range(desktop.get_child_count()):
        app = desktop.get_child_at_index(i)
        if app is not None and app.get_name().startswith("virt-manager"):
            yield from (app.get_child_at_index(j) for j in range(app.get_child_count()))


def give_up(what):
    """Says what virt-manager shows and, by its fault handler, where it stands."""
    Atspi.set_timeout(1000, 1000)
    try:
        for w in windows():
            for n in walk(w):
                if n.get_name() and showing(n):
                    print(n.get_role_name(), repr(n.get_name()), file=sys.stderr)
    except (GLib.Error, AttributeError) as e:
        print(e, file=sys.stderr)
    app.send_signal(signal.SIGABRT)
    app.wait()
    sys.exit("waited in vain: " + what)


def wait(what, f):
    """Waits until f gives something. What goes while it is looked at was not there."""
    end = time.monotonic() + LIMIT
    while True:
        while GLib.MainContext.default().iteration(False):
            pass
        try:
            found = f()
        except (GLib.Error, AttributeError):
            found = None
        if found:
            return found
        if time.monotonic() > end or app.poll() is not None:
            give_up(what)
        time.sleep(0.02)


def window(role, name):
    return wait(f"the window {name!r}", lambda: next(
        (w for w in windows() if w.get_role_name() == role and name in w.get_name() and showing(w)), None))


def named(root, role):
    """The names of all of this role that can be seen."""
    return [n.get_name() for n in walk(root) if n.get_role_name() == role and n.get_name() and showing(n)]


def the(root, role, name, is_so=showing):
    return wait(f"{role} {name!r}", lambda: next(
        (n for n in walk(root) if n.get_role_name() == role and n.get_name() == name and is_so(n)), None))


def press(root, role, name):
    the(root, role, name, sensitive).do_action(0)


def listed():
    return [" ".join(name.split()) for name in named(manager, "table cell")]


def lists(*guests):
    wait("the list " + repr(guests), lambda: listed() == list(guests))
    print("lists", ", ".join(guests))


def details(name):
    tell("--connect", here, "--show-domain-editor", name)
    return window("frame", name + " on " + scheme)


def migrate(name, change=lambda dialog: None):
    press(details(name), "menu item", "Migrate...")
    dialog = window("frame", "Migrate the virtual machine")
    the(dialog, "label", f"Migrate '{name}'")
    change(dialog)
    press(dialog, "push button", "Migrate")
    return dialog


def gone(dialog):
    wait("the dialog goes", lambda: not showing(dialog))


def refused(dialog):
    alert = window("alert", "vmm dialog")
    text = wait("a reason", lambda: named(alert, "label"))
    print("refused", " ".join(" ".join(text).split()))
    press(alert, "push button", "Close")
    press(dialog, "push button", "Cancel")
    gone(dialog)


def tunnelled(dialog):
    press(the(dialog, "combo box", "Direct"), "menu item", "Tunnelled")
    # It has no name, and no other text that shows lacks one.
    wait("where to write a URI", lambda: next(
        (n for n in walk(dialog) if n.get_role_name() == "text" and showing(n) and n.get_name() == ""), None)
    ).set_text_contents("kemari+ssh://xen2/system?kemari=1")


Atspi.set_timeout(LIMIT * 1000, LIMIT * 1000)  # which is no more than a second else
scheme = here.split(":")[0]  # which is all that virt-manager shows of either
app = start("--connect", here)
try:
    manager = window("frame", "Virtual Machine Manager")
    lists(scheme, "mover Running", "test Running")
    tell("--connect", there)
    lists(scheme, "mover Running", "test Running", scheme, "test Paused")

    w = details("test")
    parts = wait("the devices", lambda: named(the(w, "table", "hw-list"), "table cell"))
    print("details", ", ".join(named(w, "label") + parts))
    w = details("mover")
    press(w, "toggle button", "Pause")
    lists(scheme, "mover Paused", "test Running", scheme, "test Paused")
    press(w, "toggle button", "Pause")
    lists(scheme, "mover Running", "test Running", scheme, "test Paused")

    refused(migrate("mover", tunnelled))
    gone(migrate("test"))
    lists(scheme, "mover Running", scheme, "test Running")
    gone(migrate("mover"))
    lists(scheme, scheme, "mover Running", "test Running")
finally:
    app.terminate()
    app.wait()
