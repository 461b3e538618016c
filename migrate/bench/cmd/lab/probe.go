package main

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The kernel's user-space probes tell when xl asks the guest to suspend and when it
// has resumed it, to the microsecond and without slowing it: its own log says only
// some of it, and with its debugging output on it is slower.

const tracefs = "/sys/kernel/tracing"

// group names our probes and our instance of the trace.
const group = "kemari_bench"

// event is one line of the kernel's trace.
type event struct {
	at   float64 // s
	pid  int
	name string
	args string
}

var traceLine = regexp.MustCompile(`^ *\S.*-(\d+) +\[\d+\] +\S+ +(\d+\.\d+): (\w+): \(.*?\)(.*)$`)

// parseEvent reads a line of a trace; false if it is none, as comments are.
func parseEvent(line string) (event, bool) {
	m := traceLine.FindStringSubmatch(line)
	if m == nil {
		return event{}, false
	}
	pid, err1 := strconv.Atoi(m[1])
	at, err2 := strconv.ParseFloat(m[2], 64)
	if err1 != nil || err2 != nil {
		return event{}, false
	}
	return event{at, pid, m[3], strings.TrimSpace(m[4])}, true
}

// pauses makes pauses of one process's events: from the request to suspend the domain
// to the end of the call that resumed it.
type pauses struct {
	domid uint32
	asked float64 // 0: not
}

// event returns the pause that has ended with it, in µs.
func (p *pauses) event(e event) (us float64, ended bool) {
	switch e.name {
	case "ask":
		if e.args == fmt.Sprintf(`path="/local/domain/%d/control/shutdown" data="suspend"`, p.domid) {
			p.asked = e.at
		}
	case "resumed":
		if p.asked != 0 {
			us, ended, p.asked = (e.at-p.asked)*1e6, true, 0
		}
	}
	return us, ended
}

// probes are ours, while they are set.
type probes struct {
	pipe int // 0: not open
	rest []byte
}

// setProbes sets them in the libraries of the Xen that runs.
func setProbes() (*probes, error) {
	release, err := xenRelease()
	if err != nil {
		return nil, err
	}
	store, write, err := symbol("xs_write", "libxenstore.so.*")
	if err != nil {
		return nil, err
	}
	guest, resume, err := symbol("xc_domain_resume", "libxenguest.so."+release, "libxenctrl.so."+release)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(tracefs + "/uprobe_events"); err != nil {
		if err := unix.Mount("none", tracefs, "tracefs", 0, ""); err != nil {
			return nil, fmt.Errorf("mount tracefs: %w", err)
		}
	}
	p := &probes{}
	if err := p.remove(); err != nil { // what another one has left
		return nil, err
	}
	for _, def := range []string{
		// xs_write(h, transaction, path, data, length)
		fmt.Sprintf("p:%s/ask %s:%#x path=+0(%%dx):string data=+0(%%cx):string", group, store, write),
		fmt.Sprintf("r:%s/resumed %s:%#x", group, guest, resume),
	} {
		if err := appendTo(tracefs+"/uprobe_events", def); err != nil {
			p.remove()
			return nil, fmt.Errorf("probe %q: %w", def, err)
		}
	}
	dir := tracefs + "/instances/" + group
	err = os.Mkdir(dir, 0o700)
	if err == nil {
		err = errors.Join(os.WriteFile(dir+"/trace_clock", []byte("mono"), 0o600), os.WriteFile(dir+"/events/"+group+"/enable", []byte("1"), 0o600))
	}
	if err == nil {
		p.pipe, err = unix.Open(dir+"/trace_pipe", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		p.remove()
		return nil, err
	}
	return p, nil
}

// events are those that have come since it was last asked for them.
func (p *probes) events() (all []event, err error) {
	b := make([]byte, 64<<10)
	for {
		n, err := unix.Read(p.pipe, b)
		if err == unix.EAGAIN || err == nil && n == 0 {
			break
		} else if err != nil {
			return nil, fmt.Errorf("the kernel's trace: %w", err)
		}
		p.rest = append(p.rest, b[:n]...)
	}
	for {
		line, rest, ok := bytes.Cut(p.rest, []byte("\n"))
		if !ok {
			return all, nil
		}
		if e, ok := parseEvent(string(line)); ok {
			all = append(all, e)
		}
		p.rest = rest
	}
}

// remove takes the probes away.
func (p *probes) remove() error {
	if p.pipe > 0 {
		unix.Close(p.pipe)
		p.pipe = 0
	}
	dir := tracefs + "/instances/" + group
	if _, err := os.Stat(dir); err == nil {
		if err := errors.Join(os.WriteFile(dir+"/events/"+group+"/enable", []byte("0"), 0o600), os.Remove(dir)); err != nil {
			return fmt.Errorf("take the probes away: %w", err)
		}
	}
	set, err := os.ReadFile(tracefs + "/uprobe_events")
	for _, name := range []string{"ask", "resumed"} {
		if bytes.Contains(set, []byte(":"+group+"/"+name+" ")) {
			err = errors.Join(err, appendTo(tracefs+"/uprobe_events", "-:"+group+"/"+name))
		}
	}
	return err
}

func appendTo(file, line string) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(line + "\n")
	return errors.Join(err, f.Close())
}

func xenRelease() (string, error) {
	major, err := os.ReadFile("/sys/hypervisor/version/major")
	if err != nil {
		return "", fmt.Errorf("this is no Xen host: %w", err)
	}
	minor, err := os.ReadFile("/sys/hypervisor/version/minor")
	return strings.TrimSpace(string(major)) + "." + strings.TrimSpace(string(minor)), err
}

// symbol finds a function in the first of the libraries that has it, and where it is
// in that file.
func symbol(name string, libraries ...string) (file string, offset uint64, err error) {
	for _, lib := range libraries {
		files, err := filepath.Glob("/usr/lib/*/" + lib)
		if err != nil {
			return "", 0, err
		}
		for _, file := range files {
			if offset, err := symbolIn(file, name); err == nil {
				return file, offset, nil
			}
		}
	}
	return "", 0, fmt.Errorf("no library %s has %s", strings.Join(libraries, ", "), name)
}

func symbolIn(file, name string) (uint64, error) {
	f, err := elf.Open(file)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	symbols, err := f.DynamicSymbols()
	if err != nil {
		return 0, err
	}
	for _, s := range symbols {
		if s.Name != name || s.Section == elf.SHN_UNDEF {
			continue
		}
		for _, p := range f.Progs {
			if p.Type == elf.PT_LOAD && s.Value >= p.Vaddr && s.Value < p.Vaddr+p.Filesz {
				return s.Value - p.Vaddr + p.Off, nil
			}
		}
	}
	return 0, fmt.Errorf("%s has no %s", file, name)
}
