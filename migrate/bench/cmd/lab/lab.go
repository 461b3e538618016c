package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"
)

const (
	uuid    = "00000000-0000-4000-8000-0000000000a1" // of g1
	guest   = "10.99.0.100"
	program = "/root/bench-lab" // this one, on the hosts
)

// laboratory is virsh-examples/lab/lab.
type laboratory struct{ command string }

// run runs one of the laboratory's commands and returns what it prints. What it says
// besides, it says to whoever reads us.
func (l *laboratory) run(ctx context.Context, limit time.Duration, args ...string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not done in %v", limit))
	defer cancel()
	cmd := exec.CommandContext(ctx, l.command, args...)
	cmd.Stderr = os.Stderr
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.Output()
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return "", fmt.Errorf("lab %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

func (l *laboratory) on(ctx context.Context, n int, command string) (string, error) {
	return l.run(ctx, 5*time.Minute, "ssh", strconv.Itoa(n), command)
}

// host runs our other half on host n and reads its JSON.
func (l *laboratory) host(ctx context.Context, limit time.Duration, n int, result any, command string) error {
	out, err := l.run(ctx, limit, "ssh", strconv.Itoa(n), program+" host "+command)
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(out), result); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	return nil
}

// measure fills f, as far as it comes.
func (l *laboratory) measure(ctx context.Context, f *figures, asIs bool) (err error) {
	if !asIs {
		defer func() {
			_, derr := l.run(context.WithoutCancel(ctx), 2*time.Minute, "down")
			err = errors.Join(err, derr)
		}()
		for _, verb := range []string{"up", "reset", "deploy"} {
			if _, err := l.run(ctx, 40*time.Minute, verb); err != nil {
				return err
			}
		}
		if _, err := l.on(ctx, 1, "virsh -q -c xen:///system create /var/lib/kemari-lab/g1.xml"); err != nil {
			return err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	for n := 1; n <= 2; n++ {
		if _, err := l.run(ctx, 2*time.Minute, "copy", strconv.Itoa(n), self, program); err != nil {
			return err
		}
	}
	for _, step := range []struct {
		say string
		do  func(context.Context, *laboratory) error
	}{
		{"the guest boots", l.answers},
		{"round trips without protection", f.unprotected},
		{"protecting the guest", protect},
		{"the guest is idle", f.whileIdle},
		{"round trips under protection", f.protected},
		{fmt.Sprintf("%d epochs in a row", f.epochs), f.inARow},
		{"protection ends, bare copies", f.bareCopies},
		{"xl remus to nowhere", f.remusToNowhere},
		{"xl remus", f.remusToHost},
	} {
		fmt.Fprintf(os.Stderr, "bench-lab: %s\n", step.say)
		if err := step.do(ctx, l); err != nil {
			return fmt.Errorf("%s: %w", step.say, err)
		}
	}
	return nil
}

// answers waits until the guest does.
func (*laboratory) answers(ctx context.Context, l *laboratory) error {
	for end := time.Now().Add(5 * time.Minute); ; {
		_, err := l.run(ctx, 10*time.Second, "exec", "sh", "-c", "echo GET | timeout 4 socat -t2 - TCP:"+guest+":7,connect-timeout=2 2>/dev/null | grep -q '^[0-9]'")
		if err == nil {
			time.Sleep(3 * time.Second) // and comes to rest
			return nil
		}
		if time.Now().After(end) || ctx.Err() != nil {
			return err
		}
		time.Sleep(500 * time.Millisecond)
	}
}

// pings from this machine, each some time after the other.
func (l *laboratory) ping(ctx context.Context, n int, apart time.Duration) ([]float64, error) {
	out, err := l.run(ctx, time.Duration(n)*apart+time.Minute, "exec", "busybox", "ping",
		"-c", strconv.Itoa(n), "-i", strconv.FormatFloat(apart.Seconds(), 'f', -1, 64), guest)
	if err != nil {
		return nil, err
	}
	return parsePing(out)
}

var pingTime = regexp.MustCompile(`(?m) time=([0-9.]+) ms$`)

// parsePing returns the round trips that ping, ours or busybox's, tells, in µs. The
// first one, which may wait for ARP, is left out.
func parsePing(out string) ([]float64, error) {
	var all []float64
	for _, m := range pingTime.FindAllStringSubmatch(out, -1) {
		ms, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			return nil, err
		}
		all = append(all, ms*1000)
	}
	if len(all) < 2 {
		return nil, fmt.Errorf("ping had no answers: %s", out)
	}
	return all[1:], nil
}

func (f *figures) unprotected(ctx context.Context, l *laboratory) (err error) {
	if f.plain, err = l.ping(ctx, 20, 300*time.Millisecond); err != nil {
		return err
	}
	out, err := l.on(ctx, 1, "ping -c 20 -i 0.3 xen2")
	if err != nil {
		return err
	}
	f.link, err = parsePing(out)
	return err
}

// protect bears silence for long: this is no test of failovers, and the machine may
// be busy.
func protect(ctx context.Context, l *laboratory) error {
	if _, err := l.on(ctx, 1, "virsh migrate --kemari --live --kemari-arbiter none --kemari-timeout 8000 g1 kemari+ssh://xen2/system"); err != nil {
		return err
	}
	time.Sleep(3 * time.Second)
	return nil
}

// How often the primary is asked for its figures while it takes checkpoints by itself,
// and while each is of a ping: more seldom than epochs come. What it says is of the last
// one; the one that is disturbed by asking is older by the next time.
const (
	seldom     = "1.1s"
	everyPings = "1.7s"
)

// whileIdle: checkpoints are as far apart as xl remus's are where nobody says otherwise.
func (f *figures) whileIdle(ctx context.Context, l *laboratory) error {
	return l.host(ctx, 5*time.Minute, 1, &f.idle,
		"watch --trigger interval --min 5ms --max 200ms --every "+seldom+" --for 70s primary "+uuid)
}

func (f *figures) protected(ctx context.Context, l *laboratory) (err error) {
	const n, apart = 30, 1500 * time.Millisecond
	// First with intervals that do not get in the way: the last checkpoint is long over
	// when a packet comes, and each packet makes its own.
	watched := make(chan error, 1)
	go func() {
		watched <- l.host(ctx, 5*time.Minute, 1, &f.answer,
			"watch --trigger output --min 5ms --max 30s --every "+everyPings+" --for 60s primary "+uuid)
	}()
	time.Sleep(5 * time.Second)
	f.pinged, err = l.ping(ctx, n, apart)
	if err = errors.Join(err, <-watched); err != nil {
		return err
	}
	var usual []seen
	if err := l.host(ctx, time.Minute, 1, &usual, "watch --trigger output --min 5ms --max 200ms --every 1s --epochs 1 primary "+uuid); err != nil {
		return err
	}
	f.usual, err = l.ping(ctx, n, apart/2)
	return err
}

// inARow takes epochs as fast as they come.
func (f *figures) inARow(ctx context.Context, l *laboratory) error {
	limit := 5*time.Minute + time.Duration(f.epochs)*2*time.Second
	// A few dozen looks at least, and not so many that they count.
	every := min(max(time.Duration(f.epochs)*4*time.Millisecond, time.Second), 20*time.Second)
	look := fmt.Sprintf("--usage --every %v --epochs %d ", every, f.epochs)
	watched := make(chan error, 1)
	go func() {
		// The standby is asked for a little less, since it is looked at a little later.
		watched <- l.host(ctx, limit, 2, &f.standby, fmt.Sprintf("watch --usage --every %v --epochs %d standby %s", every, f.epochs-f.epochs/10, uuid))
	}()
	err := l.host(ctx, limit, 1, &f.primary, "watch --trigger interval --min 1ms --max 1ms --paused 100 "+look+"primary "+uuid)
	return errors.Join(err, <-watched)
}

func (f *figures) bareCopies(ctx context.Context, l *laboratory) error {
	if _, err := l.on(ctx, 1, "/usr/bin/virsh -q -c kemari:///system domjobabort g1"); err != nil {
		return err
	}
	time.Sleep(5 * time.Second)
	pages := int(math.Round(medianOf(f.idle, func(s seen) float64 { return float64(s.PagesLast) })))
	f.bare = &copyRun{}
	return l.host(ctx, time.Minute, 1, f.bare, fmt.Sprintf("copy %d", pages))
}

// remusToNowhere: no other host has any part in it, so that it is the shortest pause
// that xl remus can have.
func (f *figures) remusToNowhere(ctx context.Context, l *laboratory) error {
	f.hole = &remusRun{}
	err := l.host(ctx, 4*time.Minute, 1, f.hole, "remus g1 40 -F -b -n -d g1 xen2")
	return errors.Join(err, l.answers(ctx, l))
}

// remusToHost is xl remus as it is meant, but for the network's buffer, which Debian's
// has no script for, and disks, of which the guest has none. It ends with the other
// host's copy taking over, or trying to: nothing can be measured after it.
func (f *figures) remusToHost(ctx context.Context, l *laboratory) error {
	f.remus = &remusRun{}
	return l.host(ctx, 6*time.Minute, 1, f.remus, "remus g1 40 -F -n -d g1 xen2")
}
