package driver

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"time"

	"kemari/xml"
)

// DeviceModel is the program that libvirt runs for the HVM guests of a host.
type DeviceModel struct {
	Path string `json:"path"`
	// Version is what it says of itself, or why it says nothing.
	Version string `json:"version,omitempty"`
	Error   string `json:"error,omitempty"`
}

// deviceModelTimeout is for a host that reads the program from a slow disk.
const deviceModelTimeout = 20 * time.Second

// deviceModel finds this host's, if it is for an HVM guest.
func (d *Driver) deviceModel(ctx context.Context, l Libvirt, hvm bool) (*DeviceModel, error) {
	if !hvm {
		return nil, nil
	}
	path, err := l.DeviceModel()
	if err != nil {
		return nil, err
	}
	m := &DeviceModel{Path: path}
	if m.Version, err = d.cfg.Version(ctx, path); err != nil {
		m.Error = oneLine(err.Error())
	}
	return m, nil
}

// programVersion is the first line that a program of QEMU's prints when it is asked.
func programVersion(ctx context.Context, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, deviceModelTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "-version").Output()
	if err != nil {
		return "", err
	}
	line, _, _ := bytes.Cut(out, []byte("\n"))
	if len(line) == 0 || len(line) > 200 {
		return "", fmt.Errorf("%s -version: an answer of %d bytes", path, len(line))
	}
	return string(line), nil
}

// deviceModelReasons are why the device model there would not go on where a guest's
// here stops. The domain's XML names the program, and the standby's libvirt runs that.
// It does so only in a take-over, when it is too late to find out.
func deviceModelReasons(g Guest, there *DeviceModel, host string) []xml.Reason {
	const sameVersion = "install the same version of qemu-system-xen on both hosts, and start the guest again"
	here, path := g.DeviceModel, xml.Emulator(g.XML)
	switch {
	case here == nil:
		return nil
	case there == nil:
		return []xml.Reason{{Text: host + " does not tell which device model it has for HVM guests", Remedy: "run the same version of Kemari on both hosts"}}
	case path != "" && path != here.Path:
		return []xml.Reason{{Text: "the guest has a device model of its own, " + path, Remedy: "remove <emulator> from its XML, so that it gets the host's"}}
	case here.Error != "":
		return []xml.Reason{{Text: "this host's device model does not tell its version: " + here.Error, Remedy: "look whether it can be run: " + here.Path + " -version"}}
	case there.Error != "":
		return []xml.Reason{{Text: host + " has no device model that can be run for HVM guests: " + there.Error, Remedy: "install qemu-system-xen there"}}
	case here.Path != there.Path:
		return []xml.Reason{{Text: fmt.Sprintf("the device model is %s here and %s on %s", here.Path, there.Path, host), Remedy: sameVersion}}
	case here.Version != there.Version:
		return []xml.Reason{{Text: fmt.Sprintf("the device model here is %s, and on %s it is %s", here.Version, host, there.Version), Remedy: sameVersion}}
	}
	return nil
}
