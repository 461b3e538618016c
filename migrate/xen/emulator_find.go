package xen

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
)

// Emulator is the device model that runs for a domain.
type Emulator struct {
	Program string // its path
	// Version is what the program's -version prints in its first line. The program may
	// be another one by now, after an upgrade.
	Version string
}

// FindEmulator finds the device model of a running domain on this host. It blocks for
// ten seconds at most, as it does when somebody else, who checkpoints the domain, is
// connected with it.
func FindEmulator(domid uint16) (Emulator, error) {
	program, err := findProgram("/proc", domid)
	if err != nil {
		return Emulator{}, err
	}
	q, err := dialQMP(monitorPath(domid))
	if err != nil {
		return Emulator{Program: program}, fmt.Errorf("ask the device model for its version: %w", err)
	}
	defer q.Close()
	version, err := qemuVersion(q.greeting)
	return Emulator{program, version}, err
}

// findProgram looks for the QEMU that was started by libxl for the domain.
func findProgram(proc string, domid uint16) (string, error) {
	files, err := filepath.Glob(filepath.Join(proc, "[0-9]*", "cmdline"))
	if err != nil {
		return "", err
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended
		}
		args := bytes.Split(b, []byte{0})
		for i := 1; i+1 < len(args); i++ {
			if string(args[i]) == "-xen-domid" && string(args[i+1]) == strconv.Itoa(int(domid)) && filepath.IsAbs(string(args[0])) {
				return string(args[0]), nil
			}
		}
	}
	return "", errors.New("no device model runs for the guest on this host")
}

// qemuVersion is a greeting's version as -version has it.
func qemuVersion(greeting json.RawMessage) (string, error) {
	var g struct {
		Version struct {
			QEMU    struct{ Major, Minor, Micro int }
			Package string
		}
	}
	if err := json.Unmarshal(greeting, &g); err != nil {
		return "", fmt.Errorf("the device model's greeting: %w", err)
	}
	v := fmt.Sprintf("QEMU emulator version %d.%d.%d", g.Version.QEMU.Major, g.Version.QEMU.Minor, g.Version.QEMU.Micro)
	if g.Version.Package != "" {
		v += " (" + g.Version.Package + ")"
	}
	return v, nil
}
