// Vif-kemari is the hotplug script of a protected guest's network interfaces:
// what Xen's vif-bridge does, in milliseconds. libxl runs it as it runs that
// one; <script path='…/vif-kemari'/> in the interface's XML names it. Called
// vif-kemari-openvswitch or vif-kemari-route it stands for Xen's scripts of these
// names.
//
// "vif-kemari rehearse" changes nothing; a standby's unit runs it when it starts.
package main

import (
	"fmt"
	"os"
	"syscall"

	"kemari/hooks"
	"kemari/migrate/xen/xenstore"
)

func main() {
	v := hooks.VIF{
		Name:    os.Args[0],
		Args:    os.Args[1:],
		Environ: os.Environ(),
		Dial:    xenstore.Dial,
		Exec:    syscall.Exec,
	}
	run := v.Run
	if len(v.Args) == 1 && v.Args[0] == "rehearse" {
		run = v.Rehearse
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "vif-kemari:", err)
		os.Exit(1)
	}
}
