package driver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"kemari/migrate/xen"
	"kemari/xml"
)

// The standby's libvirt runs a device model for an HVM guest only in a take-over, when
// it is too late to find out that it cannot, or that it does not read the state of the
// primary's. So both are compared before a guest is protected.

// DeviceModel is the program that runs for an HVM guest, or could.
type DeviceModel struct {
	Program string `json:"program"`
	// Version is what it says of itself, Error why that is not known.
	Version string `json:"version,omitempty"`
	Error   string `json:"error,omitempty"`
}

const (
	// versionTimeout is for a host that reads the program from a slow disk.
	versionTimeout = 20 * time.Second
	// maxFiles bounds what a peer may ask for.
	maxFiles = 16
)

// runningDeviceModel asks the one that runs.
func runningDeviceModel(domid uint32) *DeviceModel {
	e, err := xen.FindEmulator(uint16(domid))
	m := &DeviceModel{Program: e.Program, Version: e.Version}
	if err != nil {
		m.Error = oneLine(err.Error())
	}
	return m
}

// hvmRequestOf is what to ask of the standby that will run a guest by that definition.
func hvmRequestOf(g Guest, standbyXML string) *hvmRequest {
	if !xml.HasDeviceModel(standbyXML) {
		return nil
	}
	r := &hvmRequest{Program: xml.Emulator(standbyXML), Files: xml.BootFiles(standbyXML)}
	if r.Program == "" && g.DeviceModel != nil {
		r.Program = g.DeviceModel.Program
	}
	return r
}

// hvm answers that request.
func (d *Driver) hvm(ctx context.Context, r *hvmRequest) (*DeviceModel, []string) {
	var missing []string
	for _, f := range r.Files[:min(len(r.Files), maxFiles)] {
		if info, err := os.Stat(f); err != nil || !info.Mode().IsRegular() {
			missing = append(missing, f)
		}
	}
	if r.Program == "" {
		return nil, missing
	}
	m := &DeviceModel{Program: r.Program}
	version, err := d.cfg.Version(ctx, r.Program)
	if err != nil {
		m.Error = oneLine(err.Error())
	}
	m.Version = version
	return m, missing
}

// programVersion is the first line that a program prints when it is asked for its
// version. It must be one that only root can have put there, as libvirt's will run it.
func programVersion(ctx context.Context, program string) (string, error) {
	info, err := os.Stat(program)
	if err != nil {
		return "", err
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !filepath.IsAbs(program) || owner.Uid != 0 || !info.Mode().IsRegular() || info.Mode().Perm()&0o022 != 0 {
		return "", fmt.Errorf("%s is no program that only root can change", program)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, versionTimeout, fmt.Errorf("no answer within %v", versionTimeout))
	defer cancel()
	out, err := exec.CommandContext(ctx, program, "-version").Output()
	line, _, _ := bytes.Cut(out, []byte("\n"))
	var exit *exec.ExitError
	switch {
	case err == nil && len(line) > 0 && len(line) <= 200:
		return string(line), nil
	case err == nil:
		err = fmt.Errorf("an answer of %d bytes", len(line))
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case errors.As(err, &exit) && len(exit.Stderr) > 0:
		err = fmt.Errorf("%w, %s", err, bytes.TrimSpace(exit.Stderr))
	}
	return "", fmt.Errorf("%s -version: %w", program, err)
}

// deviceModelReasons are why an HVM guest would not go on there.
func deviceModelReasons(g Guest, there *checkReply) []xml.Reason {
	var rs []xml.Reason
	add := func(remedy, format string, a ...any) {
		rs = append(rs, xml.Reason{Text: fmt.Sprintf(format, a...), Remedy: remedy})
	}
	host := there.Host.Name
	for _, f := range there.Missing {
		add("copy it there", "%s has no %s, which the guest's device model opens", host, f)
	}
	here, that := g.DeviceModel, there.DeviceModel
	switch {
	case here != nil && here.Error != "": // perhaps it could not be said what to ask for
		add("see whether the guest's QEMU runs, and whether another client is connected with its monitor", "the guest's device model does not tell its version: %s", here.Error)
	case here == nil && (that == nil || that.Error == ""):
	case that == nil:
		add("run the same version of Kemari on both hosts", "%s does not tell which device model it has for HVM guests", host)
	case that.Error != "":
		add("install the same version of it there", "%s has no device model that can be run for the guest: %s", host, that.Error)
	case here != nil && here.Version != that.Version:
		add("install the same version on both hosts, and start the guest again", "the guest's device model is %s, and on %s %s is %s", here.Version, host, that.Program, that.Version)
	}
	return rs
}
