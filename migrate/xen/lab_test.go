package xen

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"kemari/migrate"
	"kemari/migrate/migratetest"
	"kemari/migrate/page"
	"kemari/migrate/xen/internal/sys"
)

// The tests of this file need a running guest of the laboratory's and whoever may
// touch it: they run on one of its hosts, with the guest's id in KEMARI_DOMID.

func labDomain(t *testing.T) uint32 {
	t.Helper()
	var id uint64
	migratetest.Need(t, "xen-guest", func() (err error) {
		if id, err = strconv.ParseUint(os.Getenv("KEMARI_DOMID"), 10, 15); err != nil {
			return fmt.Errorf("KEMARI_DOMID: %w", err)
		}
		c, err := sys.Open()
		if err != nil {
			return err
		}
		return c.Close()
	})
	return uint32(id)
}

// rounds is how many checkpoints to take.
func rounds(n int) int {
	if s, err := strconv.Atoi(os.Getenv("KEMARI_CHECKPOINTS")); err == nil {
		return s
	}
	return n
}

func labOpen(t *testing.T, domid uint32) *Domain {
	t.Helper()
	d, err := OpenDomain(t.Context(), domid, filepath.Join(t.TempDir(), "mark"), nil, slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// flat is a guest's memory in one piece.
type flat struct {
	at   map[page.PFN]int
	data []byte
}

func (f *flat) take(p *Pages) error {
	if f.at == nil {
		f.at = map[page.PFN]int{}
	}
	for i, pfn := range p.PFNs {
		o, ok := f.at[pfn]
		if !ok {
			o = len(f.data)
			f.at[pfn] = o
			f.data = append(f.data, make([]byte, page.Size)...)
		}
		copy(f.data[o:o+page.Size], p.Data[i*page.Size:])
	}
	return nil
}

type series []time.Duration

func (s series) String() string {
	if len(s) == 0 {
		return "none"
	}
	s = slices.Sorted(slices.Values(s))
	us := func(i int) string { return fmt.Sprintf("%.3f", float64(s[i].Microseconds())/1000) }
	return fmt.Sprintf("min %s median %s p90 %s max %s ms", us(0), us(len(s)/2), us(len(s)*9/10), us(len(s)-1))
}

func TestLabCheckpoints(t *testing.T) {
	d := labOpen(t, labDomain(t))
	major, minor := d.version()
	t.Logf("Xen %d.%d", major, minor)
	if _, err := d.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	n, err := d.Round(t.Context(), func(*Pages) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("first round: %d pages below %#x in %v, %d mapped", n, d.xen.Limit(), time.Since(start), d.mem.count)
	start = time.Now()
	if n, err = d.Round(t.Context(), func(*Pages) error { return nil }); err != nil {
		t.Fatal(err)
	}
	t.Logf("second round: %d pages in %v", n, time.Since(start))
	// What single hypercalls cost.
	var info, clean series
	for range 100 {
		start := time.Now()
		if _, err := d.xen.Info(); err != nil {
			t.Fatal(err)
		}
		info = append(info, time.Since(start))
		start = time.Now()
		if _, err := d.xen.Clean(d.canary); err != nil {
			t.Fatal(err)
		}
		clean = append(clean, time.Since(start))
	}
	t.Logf("information: %v; the bitmap of a running guest: %v", info, clean)
	var c Capture
	var suspend, copied, resume, bare series
	var pages int
	var before string
	for i := range rounds(50) {
		if err := d.Checkpoint(t.Context(), func() error { return nil }, &c); err != nil {
			t.Fatalf("checkpoint %d: %v", i, err)
		}
		suspend, copied, resume = append(suspend, c.Suspend), append(copied, c.Copy), append(resume, c.Resume)
		pages += len(c.PFNs)
		// What the bare copy of these pages costs, for comparison.
		d.mem.gen++
		for _, p := range c.PFNs {
			if ok, err := d.mem.have(p); err != nil || !ok {
				t.Fatal(ok, err)
			}
		}
		start := time.Now()
		d.mem.copySome(c.PFNs, c.Data)
		bare = append(bare, time.Since(start))
		switch i {
		case 20:
			before = footprint(t)
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Logf("%d checkpoints of %d pages: suspend %v", len(suspend), pages/len(suspend), suspend)
	t.Logf("copy %v", copied)
	t.Logf("bare copy of the same pages %v", bare)
	t.Logf("resume %v", resume)
	t.Logf("%+v", d.Stats())
	t.Logf("footprint after 20: %s", before)
	t.Logf("footprint at the end: %s", footprint(t))
}

// TestLabParts says what of a checkpoint's copy costs what.
func TestLabParts(t *testing.T) {
	d := labOpen(t, labDomain(t))
	if _, err := d.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Round(t.Context(), func(*Pages) error { return nil }); err != nil {
		t.Fatal(err)
	}
	var c Capture
	reserve(&c, 4096)
	var stand, dirty, state, first, second series
	var st sys.State
	var odd []string
	for range rounds(50) {
		info, err := d.susp.suspend(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		lap := func(s *series) {
			*s = append(*s, time.Since(start))
			start = time.Now()
		}
		d.ballooned(info)
		err = d.xen.Stand(d.canary, &st)
		lap(&stand)
		c.State = appendState(c.State[:0], &st)
		lap(&state)
		c.PFNs, _ = d.dirty(c.PFNs[:0], st.Dirty, false)
		lap(&dirty)
		if found := len(c.PFNs); found != int(st.Dirty.Pages) {
			odd = append(odd, fmt.Sprintf("%d of %d", found, st.Dirty.Pages))
		}
		_, cerr := d.mem.copyOut(t.Context(), c.PFNs, c.Data[:cap(c.Data)])
		lap(&first)
		d.mem.copySome(c.PFNs, c.Data)
		lap(&second)
		if rerr := d.susp.resume(true); err != nil || cerr != nil || rerr != nil {
			t.Fatal(err, cerr, rerr)
		}
		if d.pop.stale {
			d.pop.rescan()
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Logf("hypercalls %v", stand)
	t.Logf("state records of %d bytes %v", len(c.State), state)
	t.Logf("scan %v", dirty)
	t.Logf("copy %v", first)
	t.Logf("copy again %v", second)
	t.Logf("%+v; where pages found are not those counted: %v", d.Stats(), odd)
}

func footprint(t *testing.T) string {
	t.Helper()
	runtime.GC()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	maps, _ := os.ReadFile("/proc/self/maps")
	status, _ := os.ReadFile("/proc/self/status")
	rss := ""
	for l := range strings.Lines(string(status)) {
		if strings.HasPrefix(l, "VmRSS") {
			rss = strings.Join(strings.Fields(l), " ")
		}
	}
	return fmt.Sprintf("%d descriptors, %d mappings, %s, %d goroutines", len(fds), bytes.Count(maps, []byte("\n")), rss, runtime.NumGoroutine())
}

// TestLabExact compares the whole guest with what was captured of it, while it
// stands.
func TestLabExact(t *testing.T) {
	domid := labDomain(t)
	d := labOpen(t, domid)
	if _, err := d.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	var f flat
	if _, err := d.Round(t.Context(), f.take); err != nil {
		t.Fatal(err)
	}
	all := d.pop.pages
	var c Capture
	for i := range rounds(10) {
		reserve(&c, reservePages)
		c.PFNs, c.State = c.PFNs[:0], c.State[:0]
		info, err := d.susp.suspend(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		fresh, err := d.capture(t.Context(), info, func() error { return nil }, &c)
		var wrong []page.PFN
		compared := 0
		if err == nil {
			f.take(&c.Pages)
			wrong, compared, err = differing(t.Context(), d, &f)
		}
		if rerr := d.susp.resume(fresh); rerr != nil {
			t.Fatal(rerr)
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(wrong) > 0 {
			t.Fatalf("checkpoint %d: %d pages of %d differ: %v", i, len(wrong), all, wrong[:min(20, len(wrong))])
		}
		if i == 0 {
			t.Logf("%d pages compared, %d captured", compared, len(c.PFNs))
		}
	}
}

// differing compares through fresh mappings, and looks for pages anew.
func differing(ctx context.Context, d *Domain, f *flat) (wrong []page.PFN, compared int, err error) {
	d.mem.dropAll()
	buf := make([]byte, sys.TypesBatch*page.Size)
	ok := make([]bool, sys.TypesBatch)
	for first := uint64(0); first < d.xen.Limit(); first += sys.TypesBatch {
		var pfns []uint64
		for i := range uint64(sys.TypesBatch) {
			pfns = append(pfns, first+i)
		}
		if err := d.xen.Populated(pfns, ok); err != nil {
			return nil, 0, err
		}
		var there []page.PFN
		for i, p := range pfns {
			if ok[i] {
				there = append(there, page.PFN(p))
			}
		}
		n, err := d.mem.copyOut(ctx, there, buf)
		if err != nil {
			return nil, 0, err
		}
		wrong = append(wrong, d.mem.vanished...) // there, and not known to be
		for i, p := range there[:n] {
			o, have := f.at[p]
			if !have || !bytes.Equal(f.data[o:o+page.Size], buf[i*page.Size:(i+1)*page.Size]) {
				wrong = append(wrong, p)
			}
			compared++
		}
	}
	return wrong, compared, nil
}

// TestLabMeddled: what others do to the log is noticed at the next checkpoint.
func TestLabMeddled(t *testing.T) {
	domid := labDomain(t)
	d := labOpen(t, domid)
	if _, err := d.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	conn, err := sys.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	other, err := conn.Domain(uint16(domid))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := other.Prepare(); err != nil {
		t.Fatal(err)
	}
	var c Capture
	seal := func() error { return nil }
	for name, meddle := range map[string]func() error{
		"nothing": func() error { return nil },
		"read and cleared": func() error {
			_, err := other.Clean(^uint64(0) >> 12) // no canary
			if errors.Is(err, os.ErrInvalid) || err != nil && strings.Contains(err.Error(), "invalid") {
				err = nil // the canary only
			}
			return err
		},
		"ended": other.DisableLogDirty,
		"ended and begun again": func() error {
			return errors.Join(other.DisableLogDirty(), other.EnableLogDirty())
		},
	} {
		if _, err := d.Round(t.Context(), func(*Pages) error { return nil }); err != nil {
			t.Fatal(err)
		}
		if err := d.Checkpoint(t.Context(), seal, &c); err != nil {
			t.Fatal(err)
		}
		if err := meddle(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		err := d.Checkpoint(t.Context(), seal, &c)
		if name == "nothing" && err != nil || name != "nothing" && !errors.Is(err, ErrLogDirtyLost) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestLabCancel ends the context at any moment; the guest runs on.
func TestLabCancel(t *testing.T) {
	d := labOpen(t, labDomain(t))
	if _, err := d.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	var c Capture
	done, cancelled := 0, 0
	for range rounds(50) {
		if !d.known {
			if _, err := d.Round(t.Context(), func(*Pages) error { return nil }); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rand.IntN(80_000))*time.Microsecond)
		err := d.Checkpoint(ctx, func() error { return nil }, &c)
		cancel()
		switch {
		case err == nil:
			done++
		case errors.Is(err, context.DeadlineExceeded):
			cancelled++
		default:
			t.Fatal(err)
		}
		if info, err := d.xen.Info(); err != nil || info.Down || info.Dying || info.Paused {
			t.Fatalf("the guest does not run: %+v, %v", info, err)
		}
	}
	t.Logf("%d checkpoints, %d cancelled", done, cancelled)
	if err := d.Checkpoint(t.Context(), func() error { return nil }, &c); err != nil && !errors.Is(err, ErrIncomplete) {
		t.Fatal(err)
	}
}

// helper is kemari-xcsave, the oracle.
func helper(t *testing.T) string {
	t.Helper()
	path := "kemari-xcsave"
	migratetest.Need(t, "kemari-xcsave", func() (err error) {
		path, err = exec.LookPath(cmp(os.Getenv("KEMARI_XCSAVE"), "/usr/libexec/kemari/kemari-xcsave"))
		return err
	})
	return path
}

func cmp(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// TestLabOracle takes checkpoints with libxenguest, and compares its stream's head
// and the shape of its state with ours.
func TestLabOracle(t *testing.T) {
	domid := labDomain(t)
	path := helper(t)
	d := labOpen(t, domid)
	head, err := d.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Round(t.Context(), func(*Pages) error { return nil }); err != nil {
		t.Fatal(err)
	}
	var c Capture
	if err := d.Checkpoint(t.Context(), func() error { return nil }, &c); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}

	g, err := StartGuest(path, domid, filepath.Join(t.TempDir(), "mark"), nil, slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	var theirs, state []byte
	s := Splitter{
		Headers: func(b []byte) error { theirs = append(theirs, b...); return nil },
		Record: func(r Record) error {
			switch r.Type {
			case RecordCPUIDPolicy, RecordMSRPolicy, RecordStaticDataEnd:
				theirs = append(theirs, r.Raw...)
			case RecordTSCInfo:
				state = append(state[:0], r.Raw...)
			case RecordHVMContext, RecordHVMParams:
				state = append(state, r.Raw...)
			}
			return nil
		},
	}
	var suspend, copied, resume series
	var pages int64
	for i := range rounds(50) {
		cp, err := g.Checkpoint(t.Context(), func() error { return nil }, s.Push)
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 { // the first one has a live part
			suspend, copied, resume = append(suspend, cp.Suspend), append(copied, cp.Copy), append(resume, cp.Resume)
			pages += cp.Pages
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Logf("kemari-xcsave: %d checkpoints of %d pages: suspend %v", len(suspend), int(pages)/len(suspend), suspend)
	t.Logf("copy %v", copied)
	t.Logf("resume %v", resume)
	if !bytes.Equal(head, theirs) {
		t.Errorf("heads differ: ours %d bytes, theirs %d", len(head), len(theirs))
		os.WriteFile("/tmp/head.ours", head, 0o600)
		os.WriteFile("/tmp/head.theirs", theirs, 0o600)
	}
	if err := CheckState(state, d.susp.dm != nil); err != nil {
		t.Error(err)
	}
	if len(c.State) != len(state) {
		t.Errorf("state of %d bytes, theirs %d", len(c.State), len(state))
	}
	// The parameters, at the end, are the same at every checkpoint.
	params := func(b []byte) []byte {
		h := binary.LittleEndian.AppendUint32(nil, uint32(RecordHVMParams))
		return b[max(0, bytes.LastIndex(b, h)):]
	}
	if !bytes.Equal(params(c.State), params(state)) {
		t.Errorf("parameters differ:\n%x\n%x", params(c.State), params(state))
	}
}

// TestLabRestore puts what was captured into the file KEMARI_SAVED, made by `xl
// save`, in place of its stream, so that `xl restore` can tell whether it is one.
func TestLabRestore(t *testing.T) {
	domid := labDomain(t)
	file := os.Getenv("KEMARI_SAVED")
	migratetest.Need(t, "a saved guest's file", func() error {
		_, err := os.Stat(file)
		return err
	})
	saved, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	i := bytes.Index(saved, []byte("LibxlFmt"))
	if i < 0 {
		t.Fatal("no libxl stream in the file")
	}
	d := labOpen(t, domid)
	head, err := d.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	out := append(bytes.Clone(saved[:i]), LibxlHeader()...)
	out = append(out, head...)
	add := func(p *Pages) error {
		out = AppendPageData(out, p.PFNs, p.Data)
		return nil
	}
	if _, err := d.Round(t.Context(), add); err != nil {
		t.Fatal(err)
	}
	var c Capture
	for range 3 {
		if err := d.Checkpoint(t.Context(), func() error { return nil }, &c); err != nil {
			t.Fatal(err)
		}
		add(&c.Pages)
	}
	out = AppendTail(out, c.State, d.susp.dm != nil)
	if err := os.WriteFile(file, out, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d bytes", len(out))
}

// TestLabCleanup takes back what a killed process left, twice.
func TestLabCleanup(t *testing.T) {
	domid := labDomain(t)
	mark := filepath.Join(t.TempDir(), "mark")
	for range 2 {
		if err := CleanupDomain(t.Context(), domid, mark); err != nil {
			t.Fatal(err)
		}
	}
	d := labOpen(t, domid)
	if info, err := d.xen.Info(); err != nil || standingOf(info) != running {
		t.Errorf("%+v, %v", info, err)
	}
}

// TestLabMemory writes into a guest that is paused, reads back through other
// mappings, and puts back what was there.
func TestLabMemory(t *testing.T) {
	domid := labDomain(t)
	d := labOpen(t, domid)
	migratetest.Need(t, "xen-paused-guest", func() error {
		info, err := d.xen.Info()
		if err == nil && !info.Paused {
			err = errors.New("the guest runs; pause it first: xl pause")
		}
		return err
	})
	open := func() *Memory {
		m, err := OpenMemory(domid)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	var pfns []page.PFN
	for p := page.PFN(0x1000); len(pfns) < 2048; p++ {
		pfns = append(pfns, p)
	}
	before, pattern := make([]byte, len(pfns)*page.Size), make([]byte, len(pfns)*page.Size)
	for i := range pattern {
		pattern[i] = byte(i*7 + i>>12)
	}
	read := func(m *Memory, to []byte) {
		for i, p := range pfns {
			if err := m.ReadPage(p, to[i*page.Size:]); err != nil {
				t.Fatal(err)
			}
		}
	}
	m := open()
	defer m.Close()
	start := time.Now()
	read(m, before)
	t.Logf("mapped and read %d pages in %v", len(pfns), time.Since(start))
	for _, what := range [][]byte{pattern, before} {
		start := time.Now()
		if missing, err := m.WritePages(pfns, what); err != nil || len(missing) > 0 {
			t.Fatal(missing, err)
		}
		t.Logf("wrote them in %v", time.Since(start))
		other, got := open(), make([]byte, len(before))
		read(other, got)
		if err := other.Close(); err != nil {
			t.Error(err)
		}
		if !bytes.Equal(got, what) {
			t.Error("what was written is not what is read")
		}
	}
	if err := m.ReadPage(0xe0000, before); !errors.Is(err, ErrNotPopulated) {
		t.Errorf("a hole: %v", err)
	}
	if err := m.ReadPage(1<<40, before); !errors.Is(err, ErrNotPopulated) {
		t.Errorf("outside: %v", err)
	}
}

// TestLabSums compares what sums say of the whole guest with what was captured of it.
func TestLabSums(t *testing.T) {
	d := labOpen(t, labDomain(t))
	if _, err := d.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	var f flat
	if _, err := d.Round(t.Context(), f.take); err != nil {
		t.Fatal(err)
	}
	c := Capture{Sums: new(migrate.Sums)}
	for range rounds(5) {
		if err := d.Checkpoint(t.Context(), func() error { return nil }, &c); err != nil {
			t.Fatal(err)
		}
		f.take(&c.Pages)
		s := c.Sums
		if s.Err != nil || s.Note != "" || s.Unread > 0 || len(s.Shared) < 3 {
			t.Fatalf("%v; %d unread; %d shared %s", s.Err, s.Unread, len(s.Shared), s.Note)
		}
		var got migrate.Sums
		missing := 0
		for _, p := range s.PFNs {
			if o, ok := f.at[p]; ok {
				got.Add(p, f.data[o:o+page.Size])
			} else {
				missing++
			}
		}
		var differ, shared int
		for i, p := range got.PFNs {
			if j, _ := slices.BinarySearch(s.PFNs, p); s.Sums[j] != got.Sums[i] {
				if s.Shared[p] == "" && !slices.Contains(c.PFNs, p) {
					t.Errorf("page %v differs", p)
					differ++
				} else {
					t.Logf("page %v differs, captured or %q", p, s.Shared[p])
					shared++
				}
			}
		}
		if missing > 0 || differ > 0 {
			t.Errorf("%d of %d pages differ, %d are missing", differ, len(s.PFNs), missing)
		}
		t.Logf("%d pages, %d of them shared, in %v; %d differ that may", len(s.PFNs), len(s.Shared), c.SumsTook, shared)
	}
}
