// Kemari protects guests and tells how they are. It is one program with two
// faces: called virsh it adds --kemari to virsh's migrate and hands every other
// call to the real virsh; called by any other name it is the command kemari.
//
//	vsh.go        what virsh would make of a command line, and whether it is ours
//	options.go    the options of migrate, and which go with --kemari
//	virsh.go      the face of virsh
//	app.go        the face of kemari: its commands
//	protect.go    protection begun, with progress and interruption, for both
//	autostart.go  protection begun because the domain's element asks for it
//	check.go      why a guest cannot be protected
//	complete.go   what the shell offers for --kemari… of the face of virsh
//	status.go     what the protections on this host say of themselves
package main
