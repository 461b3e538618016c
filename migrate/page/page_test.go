package page

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

const guestPages PFN = 64

// standby is what the other side has, as its owner keeps it.
type standby map[PFN][Size]byte

func (s standby) base(pfn PFN, dst []byte) error {
	p, ok := s[pfn]
	if !ok {
		return errors.New("never received")
	}
	copy(dst, p[:])
	return nil
}

// receive decodes b as one epoch: whole, and only then applied.
func (s standby) receive(b []byte) error {
	staged := make(standby)
	err := NewDecoder(guestPages, s.base).Decode(b, func(pfn PFN, data []byte) error {
		staged[pfn] = [Size]byte(data)
		return nil
	})
	if err != nil {
		return err
	}
	for pfn, p := range staged {
		s[pfn] = p
	}
	return nil
}

// scribble changes a page as guests do.
func scribble(r *rand.Rand, p *[Size]byte) {
	switch r.IntN(7) {
	case 0:
		*p = zero
	case 1: // nothing, but dirty
	case 2, 3: // a few words
		for range 1 + r.IntN(8) {
			p[r.IntN(Size)] = byte(r.Uint32())
		}
	case 4: // a run
		i := r.IntN(Size)
		for j := range p[i:min(Size, i+r.IntN(1500))] {
			p[i+j] = byte(r.Uint32())
		}
	case 5: // all of it, compressible
		for i := range p {
			p[i] = "some text "[(i+r.IntN(2))%10]
		}
	case 6: // all of it, random
		random(r, p)
	}
}

func random(r *rand.Rand, p *[Size]byte) {
	for i := range p {
		p[i] = byte(r.Uint32())
	}
}

// sample is a valid record of each kind, of page 7, and what base is before it.
type sample struct {
	name       string
	base, page [Size]byte
	record     []byte
}

func samples() []sample {
	r := rand.New(rand.NewPCG(1, 2))
	var noise, text, edited [Size]byte
	random(r, &noise)
	copy(text[:], strings.Repeat("the quick brown fox ", Size/20+1))
	edited = noise
	edited[0], edited[100], edited[4095] = 1, 2, 3
	out := []sample{
		{name: "zero", base: noise},
		{name: "delta", base: noise, page: edited},
		{name: "s2", base: noise, page: text},
		{name: "raw", base: text, page: noise},
	}
	for i := range out {
		s := &out[i]
		e := NewEncoder(1)
		if s.name == "delta" {
			e.Append(nil, 7, s.base[:])
		}
		s.record = e.Append(nil, 7, s.page[:])
	}
	return out
}

func (s *sample) decode(b []byte) (page []byte, err error) {
	d := NewDecoder(guestPages, func(_ PFN, dst []byte) error { copy(dst, s.base[:]); return nil })
	err = d.Decode(b, func(pfn PFN, data []byte) error {
		if pfn != 7 {
			return fmt.Errorf("page %v", pfn)
		}
		page = bytes.Clone(data)
		return nil
	})
	// Both ways to decode agree, and an error leaves what was there.
	before := []PFN{1}
	pfns, pages, err2 := d.AppendPages(before, zero[:Size:Size], b)
	switch {
	case fmt.Sprint(err) != fmt.Sprint(err2):
		err = fmt.Errorf("decoded straight: %v; appended: %v", err, err2)
	case err == nil && page == nil || err != nil:
		if len(pfns) != 1 || len(pages) != Size {
			err = fmt.Errorf("%v; appended all the same: %v", err, pfns)
		}
	case !slices.Equal(pfns, []PFN{1, 7}) || !bytes.Equal(pages[Size:], page):
		err = fmt.Errorf("appended: %v", pfns)
	}
	return page, err
}

func TestKinds(t *testing.T) {
	for i, s := range samples() {
		if k := kind(s.record[0] >> 5); k != kind(i+1) {
			t.Errorf("%s: kind %d of %d bytes", s.name, k, len(s.record))
		}
		if p, err := s.decode(s.record); err != nil || !bytes.Equal(p, s.page[:]) {
			t.Errorf("%s: does not come out: %v", s.name, err)
		}
	}
}

// Golden bytes hold the format: a change here needs a new version of the wire
// format.
func TestGolden(t *testing.T) {
	want := map[string]string{
		"zero":  "200000000000000760533bf3",
		"delta": "4022000000000007eaf2b979030000000000008001000000870000050000000000f5000000800000000000000098",
		"s2":    "601d0000000000078d79b6f980204c74686520717569636b2062726f776e20666f782011141900e00e",
		"raw":   "900000000000000728382b6186ad05dc987f806230a13ca07796da768f640748d1a3f6aaba40044b98753a43c64be5ba0b03ca371d084a2cbdb184da2624d739aacaef9c58891c0c3bddddf34bf0c81fdf82edab63bf68a0bca481c7dbdc0578",
	}
	for _, s := range samples() {
		b := s.record[:min(len(s.record), 96)]
		if got := hex.EncodeToString(b); got != want[s.name] {
			t.Errorf("%s: %s", s.name, got)
		}
	}
}

func TestTruncated(t *testing.T) {
	for _, s := range samples() {
		for n := range s.record {
			p, err := s.decode(s.record[:n])
			if n == 0 {
				if err != nil || p != nil {
					t.Errorf("%s: nothing is an error: %v", s.name, err)
				}
				continue
			}
			if !errors.Is(err, ErrFormat) || p != nil {
				t.Errorf("%s cut to %d bytes: %v", s.name, n, err)
			}
		}
	}
}

func TestBitFlips(t *testing.T) {
	for _, s := range samples() {
		for bit := range len(s.record) * 8 {
			b := bytes.Clone(s.record)
			b[bit/8] ^= 1 << (bit % 8)
			if p, err := s.decode(b); !errors.Is(err, ErrFormat) && !errors.Is(err, ErrBase) || p != nil {
				t.Errorf("%s with bit %d flipped: %v", s.name, bit, err)
			}
		}
	}
}

// Encoder and decoder stay in step over any history in which the owner keeps its
// promise, and what the standby has is what the guest had at the last epoch that
// arrived.
func TestInStep(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		e := NewEncoder(rapid.SampledFrom([]int{0, 1, 2, 7, 32, 64, 100}).Draw(t, "cache"))
		guest, other := make(map[PFN]*[Size]byte), make(standby)
		dirty := make(map[PFN]bool)
		for range rapid.IntRange(1, 40).Draw(t, "epochs") {
			for range r.IntN(20) {
				pfn := PFN(r.IntN(int(guestPages)))
				if guest[pfn] == nil {
					guest[pfn] = new([Size]byte)
				}
				scribble(r, guest[pfn])
				dirty[pfn] = true
			}
			var b []byte
			for pfn := range dirty {
				n := len(b)
				if b = e.Append(b, pfn, guest[pfn][:]); len(b) > n+MaxEncoded {
					t.Fatalf("one page in %d bytes", len(b)-n)
				}
			}
			switch rapid.SampledFrom([]string{"arrives", "arrives", "arrives", "lost", "reset"}).Draw(t, "epoch") {
			case "lost": // its pages stay dirty
				for pfn := range dirty {
					e.Forget(pfn)
				}
				continue
			case "reset":
				e.Reset()
				continue
			}
			if err := other.receive(b); err != nil {
				t.Fatal(err)
			}
			clear(dirty)
			for pfn, p := range guest {
				if other[pfn] != *p {
					t.Fatalf("page %v differs", pfn)
				}
			}
		}
	})
}

// A lost epoch that is not forgotten is found out at the latest when one of its
// pages changes again.
func TestOutOfStep(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		e, other := NewEncoder(8), make(standby)
		var p [Size]byte
		random(r, &p)
		if err := other.receive(e.Append(nil, 3, p[:])); err != nil {
			t.Fatal(err)
		}
		p[r.IntN(Size)]++
		e.Append(nil, 3, p[:]) // lost
		p[r.IntN(Size)]++
		b := e.Append(nil, 3, p[:])
		if err := other.receive(b); len(b) > 0 && !errors.Is(err, ErrBase) {
			t.Fatalf("got %v", err)
		}
	})
}

// Compressing is given up where it does not pay, and taken up where it does again.
func TestCompressionAdapts(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	var noise, text [Size]byte
	random(r, &noise)
	copy(text[:], strings.Repeat("text ", Size))
	tries := func(e *Encoder, p *[Size]byte, n int) (tries int, compressed uint64) {
		before := e.Stats().Compressed
		for range n {
			was := e.gauge.tries
			e.Append(nil, 1, p[:])
			if e.gauge.tries != was {
				tries++
			}
		}
		return tries, e.Stats().Compressed - before
	}
	e := NewEncoder(0)
	if n, c := tries(e, &text, 100); n != 100 || c != 100 {
		t.Errorf("of 100 pages that compress %d were tried, %d compressed", n, c)
	}
	tries(e, &noise, 100)
	if n, c := tries(e, &noise, 320); n != 10 || c != 0 {
		t.Errorf("of 320 pages that don't compress %d were tried, %d compressed", n, c)
	}
	if tries(e, &text, 1000); e.gauge.size/16 > worthwhile {
		t.Errorf("never tried again: %d", e.gauge.size/16)
	}
	if _, c := tries(e, &text, 100); c != 100 {
		t.Errorf("of 100 pages that compress again %d were", c)
	}
	e.SetLink(100e9)
	if n, _ := tries(e, &text, 100); n != 0 {
		t.Errorf("with a link faster than any compression %d of 100 pages were tried", n)
	}
	e.SetLink(10e3)
	if _, c := tries(e, &text, 100); c != 100 {
		t.Errorf("with a slow link %d of 100 pages were compressed", c)
	}
	e.gauge.cost = 16 * 1e6
	e.SetLink(10e6) // takes 0.4 ms for a page
	if n, _ := tries(e, &text, 32); n != 1 {
		t.Errorf("with compression slower than the link %d of 32 pages were tried", n)
	}
}

func TestStats(t *testing.T) {
	e, n := NewEncoder(1), 0
	var p [Size]byte
	for _, change := range []func(){
		func() {},           // zero
		func() {},           // unchanged
		func() { p[7] = 7 }, // delta
		func() {},           // unchanged
		func() { random(rand.New(rand.NewPCG(1, 2)), &p) },   // raw
		func() { copy(p[:], strings.Repeat("text ", Size)) }, // compressed
	} {
		change()
		n += len(e.Append(nil, 1, p[:]))
	}
	if want := (Stats{Unchanged: 2, Zero: 1, Delta: 1, Compressed: 1, Raw: 1, Bytes: uint64(n)}); e.Stats() != want {
		t.Errorf("got %+v, want %+v", e.Stats(), want)
	}
}

// What is dirty once must not drive out what is dirty all the time.
func TestCacheKeepsWhatIsHot(t *testing.T) {
	e := NewEncoder(32)
	var p [Size]byte
	cold := PFN(1000)
	for epoch := range 100 {
		p[0] = byte(epoch + 1)
		for hot := range PFN(8) {
			e.Append(nil, hot, p[:])
		}
		for range 24 {
			e.Append(nil, cold, p[:])
			cold++
		}
	}
	if s := e.Stats(); s.Delta < 99*8 {
		t.Errorf("of %d changes of hot pages %d were deltas", 99*8, s.Delta)
	}
}

// The cache against a map: what it has is right, it has no more than it may, and
// misses nothing while there is room.
func TestCache(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.IntRange(0, 20).Draw(t, "size")
		c, model := newCache(size), make(map[PFN]byte)
		for range rapid.IntRange(0, 200).Draw(t, "steps") {
			// Few and far apart, so that they share places in the index.
			pfn := PFN(rapid.IntRange(0, 30).Draw(t, "pfn")) << rapid.SampledFrom([]int{0, 40}).Draw(t, "shift")
			switch rapid.IntRange(0, 9).Draw(t, "what") {
			case 0:
				c.drop(pfn)
				delete(model, pfn)
			case 1:
				if rapid.IntRange(0, 9).Draw(t, "really") == 0 {
					c.reset()
					clear(model)
				}
			default:
				p := c.get(pfn)
				if b, ok := model[pfn]; p != nil && (!ok || p[99] != b) {
					t.Fatalf("page %v is wrong", pfn)
				} else if p == nil && ok && len(model) <= size {
					t.Fatalf("page %v is missing, of %d", pfn, len(model))
				}
				if p == nil {
					p = c.put(pfn)
				}
				if (p == nil) != (size == 0) {
					t.Fatalf("no room in a cache of %d", size)
				}
				if p != nil {
					p[99]++
					model[pfn] = p[99]
				}
			}
			n := 0
			for pfn := range model {
				if i := c.find(pfn); c.index[i] != 0 {
					n++
				} else if len(model) > size {
					delete(model, pfn) // evicted
				}
			}
			used := 0
			for _, slot := range c.index {
				if slot != 0 {
					used++
				}
			}
			if used != n || n > size {
				t.Fatalf("%d pages of %d, %d in the index", n, size, used)
			}
		}
	})
}

// What a record says of lengths is looked at before anything is done about it.
func TestHostileLengths(t *testing.T) {
	rec := func(k kind, n int, pfn PFN, body ...byte) []byte {
		b := binary.BigEndian.AppendUint64(nil, uint64(k)<<61|uint64(n)<<48|uint64(pfn))
		return append(append(b, 0, 0, 0, 0), body...)
	}
	huge := binary.AppendUvarint(nil, 0xffffffff)
	for name, b := range map[string][]byte{
		"no kind":             make([]byte, headerSize),
		"unknown kind":        rec(kindLast+1, 0, 7),
		"last kind":           rec(7, 0, 7),
		"zero with payload":   rec(kindZero, 1, 7, 0),
		"raw without":         rec(kindRaw, 0, 7),
		"raw too short":       rec(kindRaw, Size-1, 7, zero[1:]...),
		"raw too long":        rec(kindRaw, Size+1, 7, append([]byte{0}, zero[:]...)...),
		"beyond the end":      rec(kindRaw, 0x1fff, 7, zero[:]...),
		"outside the guest":   rec(kindZero, 0, guestPages),
		"far outside":         rec(kindZero, 0, MaxPFN),
		"S2 of nothing":       rec(kindS2, 0, 7),
		"S2 of four GiB":      rec(kindS2, len(huge), 7, huge...),
		"S2 of a page, empty": rec(kindS2, 2, 7, 0x80, 0x20),
		"delta of nothing":    rec(kindDelta, 0, 7),
		"delta of no line":    rec(kindDelta, 8, 7, make([]byte, 8)...),
	} {
		d := NewDecoder(guestPages, func(PFN, []byte) error { return nil })
		out := func(PFN, []byte) error { t.Errorf("%s: comes out", name); return nil }
		if err := d.Decode(b, out); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for range 100 {
			d.Decode(b, out)
		}
		runtime.ReadMemStats(&after)
		if n := (after.TotalAlloc - before.TotalAlloc) / 100; n > 2000 {
			t.Errorf("%s: %d bytes are allocated", name, n)
		}
	}
}

// A page the standby never had is as much out of step as one it has otherwise.
func TestNoBase(t *testing.T) {
	e, other := NewEncoder(1), make(standby)
	p := zero
	p[9] = 9
	e.Append(nil, 7, p[:]) // lost
	p[9] = 10
	if err := other.receive(e.Append(nil, 7, p[:])); !errors.Is(err, ErrBase) {
		t.Errorf("got %v", err)
	}
	stop := errors.New("enough")
	if err := NewDecoder(8, other.base).Decode(NewEncoder(0).Append(nil, 7, p[:]), func(PFN, []byte) error { return stop }); err != stop {
		t.Errorf("the receiver's error became %v", err)
	}
}

func FuzzDecode(f *testing.F) {
	for _, s := range samples() {
		f.Add(s.record)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		d := NewDecoder(guestPages, func(_ PFN, dst []byte) error { copy(dst, zero[:]); return nil })
		n := 0
		err := d.Decode(b, func(pfn PFN, data []byte) error {
			if pfn >= guestPages || len(data) != Size {
				t.Fatalf("page %v of %d bytes", pfn, len(data))
			}
			n++
			return nil
		})
		pfns, data, err2 := d.AppendPages(nil, nil, b)
		if fmt.Sprint(err) != fmt.Sprint(err2) || err == nil && len(pfns) != n || len(data) != len(pfns)*Size {
			t.Fatalf("%d pages, %v; appended: %d, %v", n, err, len(pfns), err2)
		}
		if n > MaxPages(len(b)) || err != nil && !errors.Is(err, ErrFormat) && !errors.Is(err, ErrBase) {
			t.Fatalf("%d pages of %d bytes: %v", n, len(b), err)
		}
	})
}
