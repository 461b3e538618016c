// Kemari-xcsave takes checkpoints of a guest with libxenguest's own
// xc_domain_save(XC_STREAM_REMUS), in a process of its own: libxenguest leaks and
// aborts as it likes, and the replicator stays pure Go.
//
//	kemari-xcsave DOMID MARK            file 3 is the stream, stdout events, stdin commands
//	kemari-xcsave --cleanup DOMID MARK  resume the guest, log-dirty off; for what a dead one left
//	kemari-xcsave --standing DOMID      file 3 is the whole of a guest that stands suspended, as a
//	                                    plain save writes it; log-dirty is off afterwards
//
// In the file MARK it keeps whether a suspend is under way, for --cleanup to know.
//
// Events, a line each: "suspended REQUEST_US" (the guest stands; answered by a
// command), "resumed COPY_US RESUME_US" (the epoch is in the stream and the guest
// runs; the next command asks for the next checkpoint). A command is one byte: 'g'
// to go on; anything else, or stdin closed, ends it with the guest running and
// log-dirty off. The exit status says why it ended: 0 told to, 1 failure, 3 the
// guest is gone, 4 it did not suspend, 5 log-dirty was refused.
package main

// #cgo LDFLAGS: -lxenevtchn -lxenstore -ldl
// #cgo CFLAGS: -O2 -Wall
// #include "save.h"
import "C"

import (
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"syscall"
)

func main() {
	args := os.Args[1:]
	cleanup := len(args) > 0 && args[0] == "--cleanup"
	standing := len(args) > 0 && args[0] == "--standing"
	if cleanup || standing {
		args = args[1:]
	}
	if len(args) != 2 && !(standing && len(args) == 1) {
		fmt.Fprintln(os.Stderr, "usage: kemari-xcsave [--cleanup] DOMID MARK, or kemari-xcsave --standing DOMID")
		os.Exit(2)
	}
	domid, err := strconv.ParseUint(args[0], 10, 15)
	if err != nil || domid == 0 {
		fmt.Fprintf(os.Stderr, "kemari-xcsave: %q is not the id of a guest\n", args[0])
		os.Exit(2)
	}
	if standing {
		os.Exit(int(C.kemari_save_standing(C.uint32_t(domid), 3)))
	}
	mark, err := os.OpenFile(args[1], os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		fmt.Fprintf(os.Stderr, "kemari-xcsave: %v\n", err)
		os.Exit(1)
	}
	if cleanup {
		os.Exit(int(C.kemari_cleanup(C.uint32_t(domid), C.int(mark.Fd()))))
	}
	// Our end is the end of stdin and nothing else: whoever stops the replicator's
	// unit signals us too, and must not stop us with the guest suspended.
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
	runtime.LockOSThread()
	os.Exit(int(C.kemari_save(C.uint32_t(domid), C.int(mark.Fd()), 3, 1, 0)))
}
