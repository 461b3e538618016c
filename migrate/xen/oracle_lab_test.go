package xen

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cespare/xxhash/v2"

	"kemari/migrate"
	"kemari/migrate/page"
)

// TestLabSameAsLibxenguest: of one guest, at one moment, what we have captured, the
// pages checkpoint after checkpoint, is what libxenguest's xc_domain_save makes of
// it: each page, the processors' state, the parameters, the policies. The guest
// stands for both of them.
func TestLabSameAsLibxenguest(t *testing.T) {
	domid := labDomain(t)
	path := helper(t)
	d := labOpen(t, domid)
	head, err := d.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ours := sums{}
	if _, err := d.Round(t.Context(), ours.take); err != nil {
		t.Fatal(err)
	}
	c := Capture{}
	seal := func() error { return nil }
	const epochs = 10
	for i := range epochs {
		if i == epochs-1 { // the one that is compared; what the guest shares is told by Sums
			c.Hold, c.Sums = true, new(migrate.Sums)
		}
		if err := d.Checkpoint(t.Context(), seal, &c); err != nil {
			t.Fatal(err)
		}
		ours.take(&c.Pages)
		time.Sleep(20 * time.Millisecond)
	}
	captured := time.Now()
	theirs, theirHead, theirState, err := saved(t, path, domid)
	took := time.Since(captured)
	var after migrate.Sums // of the guest that stands still
	m := d.summer(&after)
	m.sum(t.Context())
	m.close()
	if rerr := d.Resume(); rerr != nil {
		t.Error(rerr)
	}
	if err != nil {
		t.Fatal(err)
	}

	if !bytes.Equal(head, theirHead) {
		t.Errorf("heads differ:\n%x\n%x", head, theirHead)
	}
	if err := errors.Join(c.Sums.Err, after.Err); err != nil {
		t.Fatal(err)
	}
	before, now := sumsOf(c.Sums), sumsOf(&after)
	shared, moved := 0, 0
	for p, sum := range theirs {
		have, ok := ours[p]
		switch {
		case ok && have == sum:
		case c.Sums.Shared[p] != "": // others write to it while the guest stands
			shared++
		case ok && have == before[p] && now[p] == sum:
			// What was captured was so when all was summed up, and what libxenguest
			// read later is so since: it has changed while the guest stood. Who did
			// that is not known; Xen's event channels could have.
			moved++
		default:
			t.Errorf("page %v: ours %v (%016x, and %016x when all was summed up), theirs %016x, and %016x after that", p, ok, have, before[p], sum, now[p])
		}
	}
	if moved > 4 {
		t.Errorf("%d pages have changed while the guest stood", moved)
	}
	for p := range ours {
		if _, ok := theirs[p]; !ok {
			t.Errorf("page %v is not in theirs", p)
		}
	}
	if len(theirs) < 30000 { // of 128 MiB
		t.Errorf("only %d pages were compared", len(theirs))
	}
	state, masked, err := sameState(c.State, theirState, uint64(took.Nanoseconds()))
	if err != nil {
		t.Error(err)
	}
	t.Logf("%d pages are the same, but for %d of %d that are shared, and %d that have changed meanwhile", len(theirs), shared, len(c.Sums.Shared), moved)
	t.Logf("%d bytes of head and %d of state are the same, but for %d of its clocks", len(head), state, masked)
}

// sums are checksums of pages: two copies of the guest's memory are much in a host.
type sums map[page.PFN]uint64

func (s sums) take(p *Pages) error {
	for i, pfn := range p.PFNs {
		s[pfn] = xxhash.Sum64(p.Data[i*page.Size : (i+1)*page.Size])
	}
	return nil
}

func sumsOf(s *migrate.Sums) sums {
	m := sums{}
	for i, p := range s.PFNs {
		m[p] = s.Sums[i]
	}
	return m
}

// saved is what libxenguest saves of a guest that stands.
func saved(t *testing.T, helper string, domid uint32) (pages sums, head, state []byte, err error) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd := exec.Command(helper, "--standing", strconv.FormatUint(uint64(domid), 10))
	cmd.ExtraFiles = []*os.File{w}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err = cmd.Start()
	w.Close()
	if err != nil {
		return nil, nil, nil, err
	}
	pages = sums{}
	ended := false
	split := Splitter{
		Headers: func(b []byte) error { head = append(head, b...); return nil },
		Record: func(r Record) error {
			switch r.Type {
			case RecordPageData:
				return appendPages(r.Body, func(p page.PFN, data []byte) { pages[p] = xxhash.Sum64(data) })
			case RecordCPUIDPolicy, RecordMSRPolicy, RecordStaticDataEnd:
				head = append(head, r.Raw...)
			case RecordTSCInfo, RecordHVMContext, RecordHVMParams:
				state = append(state, r.Raw...)
			case RecordEnd:
				ended = true
			default:
				return fmt.Errorf("record %#x, of which we know nothing", uint32(r.Type))
			}
			return nil
		},
	}
	in := bufio.NewReaderSize(r, 1<<20)
	b := make([]byte, 1<<20)
	for {
		n, rerr := in.Read(b)
		if err = split.Push(b[:n]); err != nil {
			break
		}
		if rerr == io.EOF {
			break
		} else if rerr != nil {
			err = rerr
			break
		}
	}
	r.Close()
	if werr := cmd.Wait(); err == nil && werr != nil {
		err = fmt.Errorf("kemari-xcsave: %w: %s", werr, strings.TrimSpace(stderr.String()))
	}
	if err == nil && !ended {
		err = errors.New("kemari-xcsave's stream has no end")
	}
	return pages, head, state, err
}

// Entries of an HVM context, and of them what goes on while a guest stands.
const (
	contextCPU = 2
	contextEnd = 0
)

// cpuTSC is where in a processor's entry its time stamp counter is.
const cpuTSC = 1008

// sameState compares the state of one guest, taken twice without its running in
// between, elapsed apart: all must be equal, but for clocks, which only must not go
// back, nor too far. It returns how many bytes were compared, and how many of them
// are a clock's.
func sameState(a, b []byte, elapsed uint64) (compared, clocks int, err error) {
	ra, err := recordsOf(a)
	if err != nil {
		return 0, 0, err
	}
	rb, err := recordsOf(b)
	if err != nil {
		return 0, 0, err
	}
	if len(ra) != len(rb) {
		return 0, 0, fmt.Errorf("%d records, and %d", len(ra), len(rb))
	}
	for i, x := range ra {
		y := rb[i]
		if x.Type != y.Type || len(x.Body) != len(y.Body) {
			return 0, 0, fmt.Errorf("record %#x of %d bytes, and %#x of %d", uint32(x.Type), len(x.Body), uint32(y.Type), len(y.Body))
		}
		p, q := bytes.Clone(x.Body), bytes.Clone(y.Body)
		switch x.Type {
		case RecordTSCInfo:
			from, to := binary.LittleEndian.Uint64(p[8:]), binary.LittleEndian.Uint64(q[8:])
			// The kHz that a counter is said to have may be a little off.
			if to < from || to-from > 2*elapsed+uint64(time.Second) {
				return 0, 0, fmt.Errorf("the guest's clock went from %d to %d ns in %d", from, to, elapsed)
			}
			clear(p[8:16])
			clear(q[8:16])
			clocks += 8
		case RecordHVMContext:
			n, err := clearTSC(p, q)
			if err != nil {
				return 0, 0, err
			}
			clocks += n
		}
		if !bytes.Equal(p, q) {
			return 0, 0, fmt.Errorf("record %#x differs: %s", uint32(x.Type), differences(p, q))
		}
		compared += len(p)
	}
	return compared, clocks, nil
}

func recordsOf(b []byte) (all []Record, err error) {
	err = Records(b, func(r Record) error { all = append(all, r); return nil })
	return all, err
}

// clearTSC clears the counters of all processors in both contexts.
func clearTSC(p, q []byte) (n int, err error) {
	for at := 0; ; {
		if len(p) < at+8 {
			return n, fmt.Errorf("an HVM context of %d bytes without an end", len(p))
		}
		typ, size := binary.LittleEndian.Uint16(p[at:]), int(binary.LittleEndian.Uint32(p[at+4:]))
		at += 8
		switch {
		case typ == contextEnd:
			return n, nil
		case len(p)-at < size:
			return n, fmt.Errorf("an HVM context whose entry %d has %d bytes", typ, size)
		case typ == contextCPU && size >= cpuTSC+8:
			from, to := binary.LittleEndian.Uint64(p[at+cpuTSC:]), binary.LittleEndian.Uint64(q[at+cpuTSC:])
			if to < from {
				return n, fmt.Errorf("a processor's counter went from %d back to %d", from, to)
			}
			clear(p[at+cpuTSC:][:8])
			clear(q[at+cpuTSC:][:8])
			n += 8
		}
		at += size
	}
}

func differences(p, q []byte) string {
	var at []string
	for i := range p {
		if p[i] != q[i] {
			at = append(at, fmt.Sprintf("%d: %02x %02x", i, p[i], q[i]))
		}
	}
	return fmt.Sprintf("%d bytes, %s", len(at), strings.Join(at[:min(len(at), 40)], ", "))
}

// TestSameState: what may differ and what may not.
func TestSameState(t *testing.T) {
	context := func(tsc uint64, last byte) []byte {
		entry := func(typ uint16, body []byte) []byte {
			b := binary.LittleEndian.AppendUint16(nil, typ)
			b = binary.LittleEndian.AppendUint16(b, 0)
			return append(binary.LittleEndian.AppendUint32(b, uint32(len(body))), body...)
		}
		cpu := make([]byte, 1032)
		binary.LittleEndian.PutUint64(cpu[cpuTSC:], tsc)
		return slices.Concat(entry(1, []byte("header")), entry(contextCPU, cpu), entry(5, []byte{7, last}), entry(contextEnd, nil))
	}
	state := func(nsec, tsc uint64, last byte, params ...HVMParam) []byte {
		b := AppendTSCInfo(nil, TSCInfo{Mode: 2, KHz: 1000, Nsec: nsec})
		b = AppendRecord(b, RecordHVMContext, context(tsc, last))
		return AppendHVMParams(b, params)
	}
	p := HVMParam{1, 2}
	a := state(100, 200, 3, p)
	for _, c := range []struct {
		name string
		b    []byte
		same bool
	}{
		{"equal", a, true},
		{"later", state(150, 300, 3, p), true},
		{"earlier", state(99, 300, 3, p), false},
		{"a counter that went back", state(150, 199, 3, p), false},
		{"much later", state(1<<40, 300, 3, p), false},
		{"another context", state(100, 200, 4, p), false},
		{"another parameter", state(100, 200, 3, HVMParam{1, 3}), false},
		{"one parameter more", state(100, 200, 3, p, HVMParam{2, 3}), false},
		{"cut short", a[:len(a)-8], false},
	} {
		if _, _, err := sameState(a, c.b, 1000); (err == nil) != c.same {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}
