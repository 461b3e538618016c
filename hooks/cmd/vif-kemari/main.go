// Vif-kemari is the hotplug script of a protected guest's network interfaces:
// what Xen's vif-bridge does, in milliseconds. libxl runs it as it runs that
// one; <script path='…/vif-kemari'/> in the interface's XML names it.
package main

import (
	"fmt"
	"os"
	"syscall"

	"kemari/hooks"
	"kemari/migrate/xen/xenstore"
)

func main() {
	err := hooks.VIF{
		Args:    os.Args[1:],
		Environ: os.Environ(),
		Dial:    xenstore.Dial,
		Exec:    syscall.Exec,
	}.Run()
	if err != nil {
		fmt.Fprintln(os.Stderr, "vif-kemari:", err)
		os.Exit(1)
	}
}
