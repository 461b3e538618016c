package main

import (
	"context"
	"math"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"kemari/migrate/control"
)

// What a kernel's trace says of three epochs of xl remus, the last one not at its
// end, with the calls of others in between.
const traced = `# tracer: nop
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
              xl-827     [000] DNZff   323.437047: ask: (0x7fd31f905b20) path="/local/domain/1/control/shutdown" data="suspend"
              xl-827     [000] DNZff   323.617844: resumed: (0x7fd31fbadecb <- 0x7fd31f8ce940)
 xen store d-12-99       [000] .....   323.700000: ask: (0x7fd31f905b20) path="/local/domain/1/control/shutdown" data="suspend"
              xl-827     [001] DNZff   323.850000: ask: (0x7fd31f905b20) path="/local/domain/1/control/shutdown" data=""
              xl-827     [001] DNZff   323.860000: ask: (0x7fd31f905b20) path="/local/domain/11/control/shutdown" data="suspend"
              xl-827     [000] DNZff   323.870000: resumed: (0x7fd31fbadecb <- 0x7fd31f8ce940)
              xl-827     [000] DNZff   323.900000: ask: (0x7fd31f905b20) path="/local/domain/1/control/shutdown" data="suspend"
              xl-827     [000] DNZff   324.052640: resumed: (0x7fd31fbadecb <- 0x7fd31f8ce940)
              xl-827     [000] DNZff   324.299635: ask: (0x7fd31f905b20) path="/local/domain/1/control/shutdown" data="suspend"
CPU:0 [LOST 3 EVENTS]
`

func TestPauses(t *testing.T) {
	p := pauses{domid: 1}
	var got []float64
	lines := 0
	for line := range strings.Lines(traced) {
		e, ok := parseEvent(strings.TrimSuffix(line, "\n"))
		if !ok {
			continue
		}
		lines++
		if e.pid != 827 {
			continue
		}
		if us, ok := p.event(e); ok {
			got = append(got, math.Round(us))
		}
	}
	if lines != 9 || !slices.Equal(got, []float64{180797, 152640}) {
		t.Errorf("%d events, pauses of %v µs", lines, got)
	}
}

func TestParsePing(t *testing.T) {
	for name, c := range map[string]struct {
		out  string
		want []float64
	}{
		"busybox": {`PING 10.99.0.100 (10.99.0.100): 56 data bytes
64 bytes from 10.99.0.100: seq=0 ttl=64 time=9.250 ms
64 bytes from 10.99.0.100: seq=1 ttl=64 time=2.500 ms
64 bytes from 10.99.0.100: seq=2 ttl=64 time=211.125 ms

--- 10.99.0.100 ping statistics ---
3 packets transmitted, 3 packets received, 0% packet loss
round-trip min/avg/max = 2.500/74.291/211.125 ms
`, []float64{2500, 211125}},
		"iputils": {`PING xen2 (10.99.0.2) 56(84) bytes of data.
64 bytes from xen2 (10.99.0.2): icmp_seq=1 ttl=64 time=1.23 ms
64 bytes from xen2 (10.99.0.2): icmp_seq=2 ttl=64 time=0.456 ms

--- xen2 ping statistics ---
2 packets transmitted, 2 received, 0% packet loss, time 301ms
rtt min/avg/max/mdev = 0.456/0.843/1.230/0.387 ms
`, []float64{456}},
		"no answer": {"3 packets transmitted, 0 packets received, 100% packet loss", nil},
	} {
		got, err := parsePing(c.out)
		if (err == nil) != (c.want != nil) || !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func TestParseProc(t *testing.T) {
	memory, threads, err := parseStatus("Name:\tx\nVmRSS:\t  900 kB\nRssAnon:\t     724 kB\nThreads:\t7\n")
	if memory != 724 || threads != 7 || err != nil {
		t.Errorf("%d KiB, %d threads, %v", memory, threads, err)
	}
	if _, _, err := parseStatus("Name:\tx\nThreads:\t7\n"); err == nil {
		t.Error("a status without its memory was taken")
	}
	pid, parent, name, ok := parseStat("760 (libxl-save (h) S 757 760 1")
	if pid != 760 || parent != 757 || name != "libxl-save (h" || !ok {
		t.Errorf("%d %d %q %v", pid, parent, name, ok)
	}
	for _, s := range []string{"", "760 libxl S 757", "760 (x) S", "x (y) S 1"} {
		if _, _, _, ok := parseStat(s); ok {
			t.Errorf("%q was taken", s)
		}
	}
	if n, err := parseWritten("rchar: 1\nwchar: 139937940\nsyscr: 2\n"); n != 139937940 || err != nil {
		t.Error(n, err)
	}
	if _, err := parseWritten("rchar: 1\n"); err == nil {
		t.Error("an io without what was written was taken")
	}
	// The real ones are of that form.
	if u, err := usageOf(os.Getpid()); err != nil || u.MemoryKiB < 100 || u.Descriptors < 3 || u.Mappings < 5 || u.Threads < 1 {
		t.Errorf("%+v, %v", u, err)
	}
	if n, err := written(os.Getpid()); err != nil || n < 0 {
		t.Error(n, err)
	}
}

// TestPeer: a process is found by the socket it listens at.
func TestPeer(t *testing.T) {
	path := t.TempDir() + "/s"
	l, err := control.Listen(path, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if pid, err := peer(path); pid != os.Getpid() || err != nil {
		t.Error(pid, err)
	}
}

// TestWatch looks at a protection that takes an epoch for every second question.
func TestWatch(t *testing.T) {
	settle = 0
	root := t.TempDir()
	paths := control.PathsFor(root, control.Primary, uuid)
	if err := os.MkdirAll(paths.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := control.Listen(paths.Socket, 0)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var mu sync.Mutex
	var policy *control.Checkpoint
	asked, phase := 0, control.Protected
	served := make(chan error, 1)
	go func() {
		served <- control.ServeRequests(ctx, l, func(_ context.Context, r control.Request) (control.Status, error) {
			mu.Lock()
			defer mu.Unlock()
			if r.Op == control.OpCheckpoint {
				policy = r.Checkpoint
				return control.Status{}, nil
			}
			asked++
			e := uint64(asked) / 2
			return control.Status{Phase: phase, Epoch: e, Bytes: int64(e) * 100, PauseLast: 50, SuspendLast: 30, CopyLast: 10, ResumeLast: 10, Error: "why"}, nil
		})
	}()
	defer func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	words := func(s string) []string {
		return append(append([]string{"--root", root, "--every", "1ms"}, strings.Fields(s)...), "primary", uuid)
	}
	all, err := watch(t.Context(), words("--trigger interval --min 1ms --max 2ms --paused 100 --usage --epochs 5"))
	if err != nil {
		t.Fatal(err)
	}
	if want := (control.Checkpoint{Trigger: "interval", Min: time.Millisecond, Max: 2 * time.Millisecond, Paused: 100}); policy == nil || *policy != want {
		t.Errorf("the policy was %+v", policy)
	}
	if len(all) != 6 || all[5].Epoch != all[0].Epoch+5 || perEpoch(all) != 100 || restOf(all[0]) != 10 || all[5].Usage == nil || all[5].At <= all[0].At {
		t.Errorf("saw %+v", all)
	}
	if all, err = watch(t.Context(), words("--for 20ms")); err != nil || len(all) < 2 || all[0].Usage != nil {
		t.Errorf("for a time: %+v, %v", all, err)
	}
	mu.Lock()
	phase = control.Alone
	mu.Unlock()
	if _, err := watch(t.Context(), words("--epochs 1")); err == nil || !strings.Contains(err.Error(), "alone: why") {
		t.Errorf("of a guest that is alone: %v", err)
	}
	for _, wrong := range []string{"", "--epochs 1 --for 1s", "--nonsense"} {
		if _, err := watch(t.Context(), words(wrong)); err == nil {
			t.Errorf("%q was taken", wrong)
		}
	}
}

func TestCopyPages(t *testing.T) {
	r, err := copyPages([]string{"10"})
	if err != nil || r.Pages != 10 || !(r.median() > 0) || r.median() > float64(time.Second/time.Microsecond) {
		t.Errorf("%+v, %v", r, err)
	}
	for _, wrong := range [][]string{nil, {"0"}, {"40000"}, {"x"}} {
		if _, err := copyPages(wrong); err == nil {
			t.Errorf("%q was taken", wrong)
		}
	}
}

// steady is a process that holds so much, and more by step from look to look.
func steady(n int, u, step usage) (all []seen) {
	for i := range int64(n) {
		noise := i * 7919 % 300
		all = append(all, seen{At: i * 1e9, Epoch: uint64(i) * 100, Usage: &usage{
			u.MemoryKiB + i*step.MemoryKiB + noise, u.Descriptors + i*step.Descriptors,
			u.Mappings + i*step.Mappings/10, u.Threads + i*step.Threads,
		}})
	}
	return all
}

func TestGrowth(t *testing.T) {
	at := usage{50000, 20, 80, 9}
	for name, c := range map[string]struct {
		of   map[string][]seen
		want float64
	}{
		"none":       {map[string][]seen{"a": steady(40, at, usage{}), "b": steady(40, at, usage{})}, 0},
		"memory":     {map[string][]seen{"a": steady(40, at, usage{MemoryKiB: 200}), "b": steady(40, at, usage{})}, 1},
		"everything": {map[string][]seen{"a": steady(40, at, usage{200, 1, 10, 1}), "b": steady(40, at, usage{200, 1, 10, 1})}, 8},
		"slowly":     {map[string][]seen{"a": steady(40, at, usage{Mappings: 1})}, 1},
		"less":       {map[string][]seen{"a": steady(40, at, usage{-200, -1, -1, -1})}, 0},
		"too few":    {map[string][]seen{"a": steady(40, at, usage{}), "b": steady(7, at, usage{})}, math.NaN()},
	} {
		if got, _ := growth(c.of); got != c.want && !(math.IsNaN(got) && math.IsNaN(c.want)) {
			t.Errorf("%s: %v grew, want %v", name, got, c.want)
		}
	}
	// What grows only in the beginning is a cache.
	first := append(steady(10, at, usage{900, 1, 10, 1}), steady(40, usage{60000, 40, 99, 20}, usage{})...)
	if got, _ := growth(map[string][]seen{"a": first}); got != 0 {
		t.Errorf("a cache that fills: %v grew", got)
	}
}

func TestRemusBytes(t *testing.T) {
	for _, c := range []struct {
		wrote []int64
		want  float64
	}{
		{[]int64{100, 200, 300}, 100},
		{[]int64{-1, 200, -1, 400, -1}, 100}, // looked at too late now and then
		{[]int64{0, 50}, 50},
		{[]int64{-1, 200, -1}, math.NaN()},
		{nil, math.NaN()},
	} {
		if got := (&remusRun{Wrote: c.wrote}).bytes(); got != c.want && !(math.IsNaN(got) && math.IsNaN(c.want)) {
			t.Errorf("%v: %v, want %v", c.wrote, got, c.want)
		}
	}
	if got := (*remusRun)(nil).bytes(); !math.IsNaN(got) {
		t.Errorf("of nothing: %v", got)
	}
}

// made is a run in which everything is as promised, but only just.
func made() *figures {
	epoch := func(i int) seen {
		return seen{Epoch: uint64(i), Bytes: int64(i) * 1000, PagesLast: 400, PauseLast: 50000, SuspendLast: 30000, CopyLast: 10000, ResumeLast: 10000, Lag: 5000}
	}
	var idle []seen
	for i := range 10 {
		idle = append(idle, epoch(i))
	}
	remus := &remusRun{Pause: []float64{100000, 100000, 90000, 300000}, Wrote: []int64{0, 10000, 20000, 30000, 40000}}
	return &figures{
		epochs: 3900, idle: idle, answer: idle, remus: remus, hole: remus, bare: &copyRun{400, []float64{5000, 5000, 9000}},
		link: []float64{1000}, plain: []float64{2000}, pinged: []float64{53300}, usual: []float64{60000},
		primary: steady(40, usage{50000, 20, 80, 9}, usage{}), standby: steady(40, usage{50000, 20, 80, 9}, usage{}),
	}
}

func TestResults(t *testing.T) {
	var out strings.Builder
	if !report(&out, made()) {
		t.Errorf("not all is kept:\n%s", &out)
	}
	for _, line := range []string{
		"BENCH name=pause-to-remus value=0.5 bound=<=0.5 ok=true\n",
		"BENCH name=pause-to-copy value=2 bound=<=2 ok=true\n",
		"BENCH name=bytes-to-remus value=0.1 bound=<=0.1 ok=true\n",
		"BENCH name=ping-to-parts value=1.3 bound=<=1.3 ok=true\n",
		"BENCH name=endurance value=0 bound=<=0 ok=true\n",
		"INFO name=remus/bytes-per-epoch value=1e+04\n",
		"INFO name=endurance/epochs value=3900\n",
		"INFO name=ping/link value=1ms\n",
	} {
		if !strings.Contains(out.String(), line) {
			t.Errorf("no %q", line)
		}
	}
	// Each of them is missed by itself.
	for name, spoil := range map[string]func(*figures){
		"pause-to-remus": func(f *figures) { f.remus = &remusRun{Pause: []float64{99000}, Wrote: f.remus.Wrote} },
		"pause-to-copy":  func(f *figures) { f.bare.Took = []float64{4900} },
		"bytes-to-remus": func(f *figures) { f.remus = &remusRun{Pause: f.remus.Pause, Wrote: []int64{0, 9000}} },
		"ping-to-parts":  func(f *figures) { f.pinged = []float64{54000} },
		"endurance":      func(f *figures) { f.epochs = 3901 }, // fewer were taken
	} {
		f := made()
		spoil(f)
		out.Reset()
		if report(&out, f) || strings.Count(out.String(), "ok=false") != 1 || !strings.Contains(out.String(), "BENCH name="+name+" ") {
			t.Errorf("%s:\n%s", name, &out)
		}
	}
}

// What was not measured is not kept, and said by name: each promise of SPEC.md, with
// its bound.
func TestSpec(t *testing.T) {
	spec, err := os.ReadFile("../../SPEC.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(spec), "## In the laboratory")
	var want []string
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)`.*\\| (?:at most ([0-9.]+)|(none)) \\|$").FindAllStringSubmatch(section, -1) {
		want = append(want, m[1]+" "+strings.Replace(m[2]+m[3], "none", "0", 1))
	}
	var out strings.Builder
	if report(&out, &figures{epochs: 1000}) {
		t.Error("kept, without having been measured")
	}
	var got []string
	for _, m := range regexp.MustCompile(`(?m)^BENCH name=(\S+) value=NaN bound=<=([0-9.]+) ok=false$`).FindAllStringSubmatch(out.String(), -1) {
		got = append(got, m[1]+" "+m[2])
	}
	if len(want) != 5 || !slices.Equal(got, want) {
		t.Errorf("measured %q, promised %q", got, want)
	}
	if strings.Count(out.String(), "\n") != len(got) {
		t.Errorf("figures of nothing:\n%s", &out)
	}
}

// The guest's memory is no growth, however much of it is mapped.
func TestMappings(t *testing.T) {
	maps := "00fd1000-03014000 rw-p 00000000 00:00 0 \n" +
		"7fd173800000-7fd173840000 rw-s 00000000 00:06 445                        /dev/xen/privcmd\n" +
		"7fd173840000-7fd173880000 rw-s 00000000 00:06 445                        /dev/xen/privcmd\n" +
		"7fd4ba40a000-7fd4ba40b000 rw-s 00000000 00:06 446                        /dev/xen/hypercall\n"
	if n := mappings([]byte(maps)); n != 2 {
		t.Errorf("%d, want 2", n)
	}
}
