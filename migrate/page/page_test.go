package page

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
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
		"zero":  "200000000000000786d7610f",
		"delta": "40230000000000076816468f03000000000000800187000000000000001000000000f5000000800000000000000098",
		"s2":    "601d000000000007d23027ef80204c74686520717569636b2062726f776e20666f782011141900e00e",
		"raw":   "9000000000000007c659f37686ad05dc987f806230a13ca07796da768f640748d1a3f6aaba40044b98753a43c64be5ba0b03ca371d084a2cbdb184da2624d739aacaef9c58891c0c3bddddf34bf0c81fdf82edab63bf68a0bca481c7dbdc0578",
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
		was := p
		p[r.IntN(Size)]++
		e.Append(nil, 3, p[:]) // lost
		if p == was {
			t.Skip()
		}
		p[r.IntN(Size)]++
		b := e.Append(nil, 3, p[:])
		if err := other.receive(b); len(b) > 0 && !errors.Is(err, ErrBase) {
			t.Fatalf("got %v", err)
		}
	})
}

func TestNoAllocation(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	var pages [16][Size]byte
	e, buf := NewEncoder(8), make([]byte, 0, 64*MaxEncoded)
	n := testing.AllocsPerRun(500, func() {
		buf = buf[:0]
		for i := range pages {
			scribble(r, &pages[i])
			buf = e.Append(buf, PFN(i), pages[i][:])
		}
		e.Forget(3)
	})
	if n != 0 {
		t.Errorf("encoding 16 pages allocates %v times", n)
	}
	for _, s := range samples() {
		d := NewDecoder(guestPages, func(_ PFN, dst []byte) error { copy(dst, s.base[:]); return nil })
		out := func(PFN, []byte) error { return nil }
		if n := testing.AllocsPerRun(500, func() { d.Decode(s.record, out) }); n != 0 {
			t.Errorf("decoding %s allocates %v times", s.name, n)
		}
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
			n += headerSize
			return nil
		})
		if n > len(b) || err != nil && !errors.Is(err, ErrFormat) && !errors.Is(err, ErrBase) {
			t.Fatalf("%d bytes of headers in %d: %v", n, len(b), err)
		}
	})
}
