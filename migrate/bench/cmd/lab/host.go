package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kemari/migrate/control"
)

// host is the half that runs on a host of the laboratory.
func host(ctx context.Context, w io.Writer, args []string) error {
	if len(args) == 0 {
		return errors.New("watch, remus or copy?")
	}
	var result any
	var err error
	switch verb, args := args[0], args[1:]; verb {
	case "watch":
		result, err = watch(ctx, args)
	case "remus":
		result, err = remus(ctx, args)
	case "copy":
		result, err = copyPages(args)
	default:
		err = fmt.Errorf("what is %q?", verb)
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(w).Encode(result)
}

// watch looks at one side of a protection again and again, and returns what it said
// of each epoch that was seen. The policy it begins with, it leaves.
//
//	watch [--trigger T --min D --max D [--paused PERCENT]] [--usage] --every D [--epochs N | --for D] ROLE UUID
func watch(ctx context.Context, args []string) ([]seen, error) {
	fs := flag.NewFlagSet("watch", flag.ContinueOnError)
	fs.SetOutput(io.Discard)                   // the error says it
	root := fs.String("root", control.Dir, "") // for tests
	trigger := fs.String("trigger", "", "")
	least := fs.Duration("min", 0, "")
	most := fs.Duration("max", 0, "")
	paused := fs.Int("paused", 30, "")
	held := fs.Bool("usage", false, "")
	every := fs.Duration("every", time.Second, "")
	epochs := fs.Uint64("epochs", 0, "")
	long := fs.Duration("for", 0, "")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	if fs.NArg() != 2 || (*epochs == 0) == (*long == 0) {
		return nil, fmt.Errorf("watch: wrong arguments %q", args)
	}
	socket := control.PathsFor(*root, control.Role(fs.Arg(0)), fs.Arg(1)).Socket
	if *trigger != "" {
		c := control.Checkpoint{Trigger: *trigger, Min: *least, Max: *most, Paused: *paused}
		if _, err := control.SetCheckpoint(ctx, socket, c); err != nil {
			return nil, err
		}
		// What was under way, and what the change itself has cost, is not looked at.
		time.Sleep(settle)
	}
	pid := 0
	if *held {
		var err error
		if pid, err = peer(socket); err != nil {
			return nil, err
		}
	}
	var all []seen
	began := time.Now()
	tick := time.NewTicker(*every)
	defer tick.Stop()
	for {
		st, err := control.Ask(ctx, socket, control.OpStatus)
		if err != nil {
			return all, err
		}
		if st.Phase != control.Protected && st.Phase != control.Ready {
			return all, fmt.Errorf("the %s is %s: %s", st.Role, st.Phase, st.Error)
		}
		if n := len(all); n == 0 || st.Epoch != all[n-1].Epoch {
			s := seen{
				At: time.Since(began).Nanoseconds(), Epoch: st.Epoch, PagesLast: st.PagesLast, Bytes: st.Bytes,
				PauseLast: st.PauseLast, SuspendLast: st.SuspendLast, CopyLast: st.CopyLast, ResumeLast: st.ResumeLast, Lag: st.CommitLag,
			}
			if pid != 0 {
				if s.Usage, err = usageOf(pid); err != nil {
					return all, err
				}
			}
			all = append(all, s)
		}
		if *epochs > 0 && st.Epoch >= all[0].Epoch+*epochs || *long > 0 && time.Since(began) >= *long {
			return all, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return all, context.Cause(ctx)
		}
	}
}

// settle is a time in which several checkpoints are taken.
var settle = 2 * time.Second

// peer is the process that listens there.
func peer(socket string) (int, error) {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(cerr, err); err != nil {
		return 0, err
	}
	return int(cred.Pid), nil
}

func usageOf(pid int) (*usage, error) {
	dir := fmt.Sprintf("/proc/%d/", pid)
	status, err := os.ReadFile(dir + "status")
	if err != nil {
		return nil, err
	}
	fds, err := os.ReadDir(dir + "fd")
	if err != nil {
		return nil, err
	}
	maps, err := os.ReadFile(dir + "maps")
	if err != nil {
		return nil, err
	}
	u := &usage{Descriptors: int64(len(fds)), Mappings: mappings(maps)}
	u.MemoryKiB, u.Threads, err = parseStatus(string(status))
	return u, err
}

// mappings counts those that /proc/PID/maps has, but for a guest's memory: of that there
// are no more than the guest has parts, which the standby maps when they are first
// written to.
func mappings(maps []byte) (n int64) {
	for line := range bytes.Lines(maps) {
		if !bytes.HasSuffix(line, []byte(" /dev/xen/privcmd\n")) {
			n++
		}
	}
	return n
}

// parseStatus reads of /proc/PID/status what memory the process has of its own, and
// its threads.
func parseStatus(status string) (memory, threads int64, err error) {
	value := func(name string) int64 {
		_, after, ok := strings.Cut(status, "\n"+name+":")
		f := strings.Fields(after)
		if !ok || len(f) == 0 {
			err = fmt.Errorf("no %s in a process's status", name)
			return 0
		}
		n, perr := strconv.ParseInt(f[0], 10, 64)
		if perr != nil {
			err = perr
		}
		return n
	}
	return value("RssAnon"), value("Threads"), err
}

// remus protects a guest with xl remus for some epochs, and looks on.
//
//	remus DOMAIN EPOCHS ARGUMENT…
//
// The arguments are all of xl remus's. The first epochs, which come with the first
// copy, do not count. xl is ended while the guest runs, so that it goes on.
func remus(ctx context.Context, args []string) (r *remusRun, err error) {
	const warmUp = 3
	if len(args) < 3 {
		return nil, fmt.Errorf("remus: wrong arguments %q", args)
	}
	epochs, err := strconv.Atoi(args[1])
	if err != nil {
		return nil, err
	}
	out, err := exec.CommandContext(ctx, "xl", "domid", args[0]).Output()
	if err != nil {
		return nil, fmt.Errorf("xl domid %s: %w", args[0], err)
	}
	domid, err := strconv.ParseUint(strings.TrimSpace(string(out)), 10, 15)
	if err != nil {
		return nil, err
	}
	p, err := setProbes()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, p.remove()) }()
	log, err := os.CreateTemp("", "xl-remus")
	if err != nil {
		return nil, err
	}
	defer os.Remove(log.Name())
	defer log.Close()
	xl := exec.Command("xl", append([]string{"remus"}, args[2:]...)...)
	xl.Stdout, xl.Stderr = log, log
	if err := xl.Start(); err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- xl.Wait() }()
	// At an end before the time xl is told to end, and the guest may be left suspended.
	defer func() {
		if xl.ProcessState == nil {
			xl.Process.Signal(syscall.SIGTERM)
			<-ended
		}
	}()
	r = &remusRun{}
	pair := pauses{domid: uint32(domid)}
	helper, count := 0, 0
	for len(r.Pause) < epochs {
		select {
		case err := <-ended:
			ended <- err
			said, _ := os.ReadFile(log.Name())
			return nil, fmt.Errorf("xl remus ended: %v: %s", err, said[max(0, len(said)-2000):])
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(lookEvery):
		}
		events, err := p.events()
		if err != nil {
			return nil, err
		}
		for _, e := range events {
			us, ok := pair.event(e)
			if !ok || e.pid != xl.Process.Pid {
				continue
			}
			if helper == 0 {
				if helper, err = saveHelper(xl.Process.Pid); err != nil {
					return nil, err
				}
			}
			// It writes all of an epoch while the guest stands, and then lets it run for
			// 200 ms: looked at soon after, what it has written is that of whole epochs.
			wrote := int64(-1)
			if since(e) < 150*time.Millisecond {
				if wrote, err = written(helper); err != nil {
					return nil, err
				}
			}
			if count++; count == warmUp {
				r.Wrote = append(r.Wrote, wrote)
			} else if count > warmUp {
				r.Pause, r.Wrote = append(r.Pause, us), append(r.Wrote, wrote)
			}
		}
	}
	return r, nil
}

// lookEvery is short against the time that xl remus lets the guest run.
const lookEvery = 30 * time.Millisecond

// since is how long ago an event was.
func since(e event) time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		panic(err) // every Linux has it
	}
	return time.Duration(ts.Nano()) - time.Duration(e.at*1e9)
}

// saveHelper is the process that writes xl's stream.
func saveHelper(xl int) (int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0, err
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended
		}
		if pid, parent, name, ok := parseStat(string(b)); ok && parent == xl && strings.HasPrefix(name, "libxl-save") {
			return pid, nil
		}
	}
	return 0, errors.New("no process writes xl's stream")
}

// parseStat reads what /proc/PID/stat begins with.
func parseStat(s string) (pid, parent int, name string, ok bool) {
	open, end := strings.IndexByte(s, '('), strings.LastIndexByte(s, ')')
	if open < 1 || end < open {
		return 0, 0, "", false
	}
	var state string
	if n, _ := fmt.Sscanf(s[end+1:], " %s %d", &state, &parent); n != 2 {
		return 0, 0, "", false
	}
	pid, err := strconv.Atoi(strings.TrimSpace(s[:open]))
	return pid, parent, s[open+1 : end], err == nil
}

func written(pid int) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		return 0, err
	}
	return parseWritten(string(b))
}

func parseWritten(io string) (int64, error) {
	_, after, ok := strings.Cut(io, "wchar: ")
	line, _, _ := strings.Cut(after, "\n")
	if !ok {
		return 0, errors.New("a process's io does not say what it wrote")
	}
	return strconv.ParseInt(line, 10, 64)
}

// copyPages copies so many pages, scattered in as much memory as the laboratory's guest
// has, one after the other into one buffer, and says how long each time took.
//
//	copy PAGES
func copyPages(args []string) (*copyRun, error) {
	const size, memory, rounds = 4096, 128 << 20, 101
	if len(args) != 1 {
		return nil, fmt.Errorf("copy: wrong arguments %q", args)
	}
	pages, err := strconv.Atoi(args[0])
	if err != nil || pages < 1 || pages > memory/size {
		return nil, fmt.Errorf("copy %q pages", args[0])
	}
	from, to := make([]byte, memory), make([]byte, pages*size)
	for i := 0; i < len(from); i += size {
		from[i] = 1
	}
	for i := 0; i < len(to); i += size {
		to[i] = 1
	}
	r := &copyRun{Pages: pages}
	for range rounds {
		at := rand.Perm(memory / size)[:pages]
		start := time.Now()
		for i, p := range at {
			copy(to[i*size:(i+1)*size], from[p*size:(p+1)*size])
		}
		r.Took = append(r.Took, float64(time.Since(start).Nanoseconds())/1e3)
	}
	return r, nil
}
