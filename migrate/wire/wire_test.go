package wire

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"io"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files anew; a changed one needs a new version")

const gen = 0x0102030405060708

var (
	hello   = Hello{Lowest: 3, Highest: 3, UUID: [16]byte{1, 2, 15: 16}, MemoryKiB: 131072, Session: 0x1122334455667788, Committed: 41}
	welcome = Welcome{Version: 3, Committed: 42}
	end     = EpochEnd{Pages: 3, Bytes: 12345, CRC: 0xdeadbeef}
	sums    = Sums{Total: 32768, Before: 4096, First: 0x1000, Sums: []uint64{0x0123456789abcdef, 42}}
	said    = Compared{Pages: 32768, Differ: 2, Missing: 1, PFNs: []uint64{0x1f, 0xfeffc}}
)

func frames(t testing.TB) map[Type][]byte {
	t.Helper()
	out := make(map[Type][]byte)
	for _, f := range []*Frame{
		{Type: TypeHello, Payload: hello.Append(nil)},
		{Type: TypeWelcome, Payload: welcome.Append(nil)},
		{Type: TypePages, Epoch: 7, Payload: []byte("records")},
		{Type: TypeEpochEnd, Epoch: 7, Payload: end.Append(nil)},
		{Type: TypeAck, Epoch: 7},
		{Type: TypeHeartbeat},
		{Type: TypeEnd, Payload: []byte("asked to")},
		{Type: TypeTakenOver},
		{Type: TypeHead, Epoch: 1, Payload: []byte("what the guest is")},
		{Type: TypeState, Epoch: 7, Payload: []byte("its state")},
		{Type: TypeResync, Epoch: 7, Payload: []byte("page 0x7 did not come out")},
		{Type: TypeRestart, Epoch: 7},
		{Type: TypeSums, Epoch: 7, Payload: sums.Append(nil)},
		{Type: TypeCompared, Epoch: 7, Payload: said.Append(nil)},
		{Type: TypeHandover, Epoch: 7},
	} {
		f.Generation = gen
		b, err := f.Append(nil)
		if err != nil {
			t.Fatal(err)
		}
		out[f.Type] = b
	}
	return out
}

func TestRoundTrip(t *testing.T) {
	var stream []byte
	all := frames(t)
	for typ := Type(1); typ <= typeLast; typ++ {
		stream = append(stream, all[typ]...)
	}
	r := NewReader(bytes.NewReader(stream), gen)
	for typ := Type(1); typ <= typeLast; typ++ {
		f, err := r.Read()
		if err != nil || f.Type != typ {
			t.Fatalf("frame %v: got %v, %v", typ, f.Type, err)
		}
		b, err := f.Append(nil)
		if err != nil || !bytes.Equal(b, all[typ]) {
			t.Errorf("%v: %x, want %x (%v)", typ, b, all[typ], err)
		}
		g := Frame{Type: f.Type, Generation: f.Generation, Epoch: f.Epoch}
		b = append(Room(b[:0]), f.Payload...)
		if err := g.Fill(b); err != nil || !bytes.Equal(b, all[typ]) || g.CRC != f.CRC {
			t.Errorf("%v in place: %x, want %x (%v)", typ, b, all[typ], err)
		}
	}
	if _, err := r.Read(); err != io.EOF {
		t.Errorf("at the end: %v", err)
	}
	if h, err := ParseHello(hello.Append(nil)); err != nil || h != hello {
		t.Errorf("hello: %+v, %v", h, err)
	}
	if w, err := ParseWelcome(welcome.Append(nil)); err != nil || w != welcome {
		t.Errorf("welcome: %+v, %v", w, err)
	}
	if e, err := ParseEpochEnd(end.Append(nil)); err != nil || e != end {
		t.Errorf("epoch end: %+v, %v", e, err)
	}
	if s, err := ParseSums(sums.Append(nil)); err != nil || !reflect.DeepEqual(s, sums) {
		t.Errorf("sums: %+v, %v", s, err)
	}
	if c, err := ParseCompared(said.Append(nil)); err != nil || !reflect.DeepEqual(c, said) {
		t.Errorf("compared: %+v, %v", c, err)
	}
}

// Golden files hold the format: a change of one needs a new version.
func TestGolden(t *testing.T) {
	for typ, b := range frames(t) {
		name := filepath.Join("testdata", "v3", strings.ToLower(typ.String())+".hex")
		if *update {
			if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(name, []byte(hex.Dump(b)), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if got := hex.Dump(b); got != string(want) {
			t.Errorf("%v:\n%swant\n%s", typ, got, want)
		}
	}
}

// A frame as version 1 wrote it, an acknowledgement of epoch 7: the operator reads
// which releases meet.
func TestVersion1(t *testing.T) {
	old := []byte("KMRI\x01\x05\x00\x00\x01\x02\x03\x04\x05\x06\x07\x08\x00\x00\x00\x00\x00\x00\x00\x07\x00\x00\x00\x00\x00\x00\x00\x00")
	_, err := NewReader(bytes.NewReader(old), gen).Read()
	if !errors.Is(err, ErrVersion) || !strings.Contains(err.Error(), "theirs is 1, ours 3") {
		t.Errorf("version 1: %v", err)
	}
}

func TestChoose(t *testing.T) {
	for _, c := range []struct {
		lowest, highest uint8
		ok              bool
	}{{1, 2, false}, {1, 3, true}, {3, 3, true}, {1, 9, true}, {4, 9, false}} {
		v, err := Hello{Lowest: c.lowest, Highest: c.highest}.Choose()
		if (err == nil) != c.ok || c.ok && v != Version || !c.ok && !errors.Is(err, ErrVersion) {
			t.Errorf("%d to %d: %d, %v", c.lowest, c.highest, v, err)
		}
	}
}

func TestTruncated(t *testing.T) {
	for typ, b := range frames(t) {
		for n := range len(b) {
			_, err := NewReader(bytes.NewReader(b[:n]), gen).Read()
			if want := map[bool]error{true: io.EOF, false: io.ErrUnexpectedEOF}[n == 0]; err != want {
				t.Errorf("%v cut to %d bytes: %v, want %v", typ, n, err, want)
			}
		}
	}
}

func TestBitFlips(t *testing.T) {
	for typ, b := range frames(t) {
		for bit := range len(b) * 8 {
			c := bytes.Clone(b)
			c[bit/8] ^= 1 << (bit % 8)
			if f, err := NewReader(bytes.NewReader(c), gen).Read(); err == nil {
				t.Errorf("%v with bit %d flipped was read as %v", typ, bit, f.Type)
			}
		}
	}
}

// The payloads by themselves: of another length they are refused, and so is what
// must be zero and is not.
func TestPayloadsRefused(t *testing.T) {
	parse := map[string]struct {
		b []byte
		f func([]byte) error
	}{
		"hello":     {hello.Append(nil), func(b []byte) error { _, err := ParseHello(b); return err }},
		"welcome":   {welcome.Append(nil), func(b []byte) error { _, err := ParseWelcome(b); return err }},
		"epoch end": {end.Append(nil), func(b []byte) error { _, err := ParseEpochEnd(b); return err }},
		// A sum less is a frame, too; so one without any, and a difference unnamed.
		"sums":     {Sums{Total: 1, First: 7, Sums: []uint64{8}}.Append(nil), func(b []byte) error { _, err := ParseSums(b); return err }},
		"compared": {said.Append(nil), func(b []byte) error { _, err := ParseCompared(b); return err }},
	}
	for name, p := range parse {
		for n := range len(p.b) {
			if err := p.f(p.b[:n]); !errors.Is(err, ErrFormat) {
				t.Errorf("%s cut to %d bytes: %v", name, n, err)
			}
		}
		if err := p.f(append(bytes.Clone(p.b), 0)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s and a byte: %v", name, err)
		}
	}
	for name, h := range map[string]Hello{
		"no session": {Lowest: 3, Highest: 3}, "no version": {Session: 1}, "versions turned round": {Lowest: 3, Highest: 2, Session: 1},
	} {
		if _, err := ParseHello(h.Append(nil)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ParseWelcome(Welcome{Version: 1}.Append(nil)); !errors.Is(err, ErrVersion) {
		t.Errorf("welcome to version 1: %v", err)
	}
}

// Counts that cannot be, and more than a frame may have.
func TestSumsRefused(t *testing.T) {
	for name, s := range map[string]Sums{
		"none":                  {Total: 1},
		"of nothing":            {Sums: []uint64{1}},
		"more than there are":   {Total: 1, Sums: []uint64{1, 2}},
		"more than are left":    {Total: 9, Before: 8, Sums: []uint64{1, 2}},
		"behind the end":        {Total: 9, Before: 9, Sums: []uint64{1}},
		"far behind the end":    {Total: 9, Before: math.MaxUint64, Sums: []uint64{1}},
		"no such page":          {Total: 1, First: maxPFN + 1, Sums: []uint64{1}},
		"over the last page":    {Total: 2, First: maxPFN, Sums: []uint64{1, 2}},
		"round the clock":       {Total: 2, First: math.MaxUint64, Sums: []uint64{1, 2}},
		"more than a frame has": {Total: 2 * MaxSums, Sums: make([]uint64, MaxSums+1)},
	} {
		if got, err := ParseSums(s.Append(nil)); !errors.Is(err, ErrFormat) || got.Sums != nil {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	many := make([]uint64, MaxDiffering+1)
	for i := range many {
		many[i] = uint64(i)
	}
	for name, c := range map[string]Compared{
		"more than all differ":     {Pages: 1, Differ: 2, PFNs: []uint64{1, 2}},
		"more missing than differ": {Pages: 3, Differ: 1, Missing: 2, PFNs: []uint64{1}},
		"one not named":            {Pages: 3, Differ: 2, PFNs: []uint64{1}},
		"one named for nothing":    {Pages: 3, Differ: 1, PFNs: []uint64{1, 2}},
		"one named twice":          {Pages: 3, Differ: 2, PFNs: []uint64{1, 1}},
		"turned round":             {Pages: 3, Differ: 2, PFNs: []uint64{2, 1}},
		"no such page":             {Pages: 3, Differ: 1, PFNs: []uint64{maxPFN + 1}},
		"more than a frame names":  {Pages: 9999, Differ: 9999, PFNs: many},
	} {
		if got, err := ParseCompared(c.Append(nil)); !errors.Is(err, ErrFormat) || got.PFNs != nil {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	for _, c := range []Compared{{Pages: 5}, {Pages: 99999, Differ: 99999, PFNs: many[:MaxDiffering]}} {
		if got, err := ParseCompared(c.Append(nil)); err != nil || !slices.Equal(got.PFNs, c.PFNs) {
			t.Errorf("%d of %d: %v", c.Differ, c.Pages, err)
		}
	}
}

func TestRefused(t *testing.T) {
	if _, err := (&Frame{Type: TypePages, Payload: make([]byte, MaxPayload+1)}).Append(nil); !errors.Is(err, ErrTooLong) {
		t.Errorf("long payload: %v", err)
	}
	for _, typ := range []Type{0, typeLast + 1} {
		if _, err := (&Frame{Type: typ}).Append(nil); !errors.Is(err, ErrFormat) {
			t.Errorf("type %d: %v", typ, err)
		}
	}
	if _, err := NewReader(bytes.NewReader(frames(t)[TypeAck]), gen+1).Read(); !errors.Is(err, ErrGeneration) {
		t.Errorf("another generation: %v", err)
	}
	if _, err := NewReader(bytes.NewReader(make([]byte, 64)), gen).Read(); !errors.Is(err, ErrFormat) {
		t.Errorf("zeroes: %v", err)
	}
}

// A hostile length must not make the reader allocate before it has been checked.
func TestHostileLength(t *testing.T) {
	b := bytes.Clone(frames(t)[TypePages])
	b[24] = 0xff
	r := NewReader(bytes.NewReader(b), gen)
	if _, err := r.Read(); !errors.Is(err, ErrTooLong) {
		t.Errorf("got %v", err)
	}
	if cap(r.buf) > HeaderSize+MaxPayload {
		t.Errorf("holds %d bytes", cap(r.buf))
	}
}

func TestEpochEndSeesOrder(t *testing.T) {
	sum := func(typ Type, payloads ...string) (e EpochEnd) {
		for _, p := range payloads {
			f := Frame{Type: typ, Generation: gen, Epoch: 1, Payload: []byte(p)}
			if _, err := f.Append(nil); err != nil {
				t.Fatal(err)
			}
			e.Add(f)
		}
		return e
	}
	whole := sum(TypePages, "a", "b", "c")
	for _, other := range []EpochEnd{
		sum(TypePages, "a", "c"), sum(TypePages, "b", "a", "c"), sum(TypePages, "a", "b", "b"),
		sum(TypePages, "a", "b", "c", "c"), sum(TypeState, "a", "b", "c"),
	} {
		if other == whole {
			t.Errorf("%+v equals %+v", other, whole)
		}
	}
}

func FuzzRead(f *testing.F) {
	for _, b := range frames(f) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := NewReader(bytes.NewReader(b), gen)
		for {
			fr, err := r.Read()
			if err != nil {
				if fr.Type != 0 {
					t.Fatalf("an error, and yet %v", fr.Type)
				}
				return
			}
			if _, err := fr.Append(nil); err != nil {
				t.Fatalf("read what cannot be written: %v", err)
			}
		}
	})
}

func FuzzHello(f *testing.F) {
	f.Add(hello.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := ParseHello(b); err == nil && !bytes.Equal(h.Append(nil), b) || err != nil && h != (Hello{}) {
			t.Errorf("%x: %+v, %v", b, h, err)
		}
	})
}

func FuzzWelcome(f *testing.F) {
	f.Add(welcome.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if w, err := ParseWelcome(b); err == nil && !bytes.Equal(w.Append(nil), b) || err != nil && w != (Welcome{}) {
			t.Errorf("%x: %+v, %v", b, w, err)
		}
	})
}

func FuzzEpochEnd(f *testing.F) {
	f.Add(end.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if e, err := ParseEpochEnd(b); (err == nil) != (len(b) == 20) || err == nil && !bytes.Equal(e.Append(nil), b) {
			t.Errorf("%x: %+v, %v", b, e, err)
		}
	})
}

func FuzzSums(f *testing.F) {
	f.Add(sums.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := ParseSums(b)
		if err == nil && !bytes.Equal(s.Append(nil), b) || err != nil && s.Sums != nil {
			t.Errorf("%x: %+v, %v", b, s, err)
		}
		if err == nil && (len(s.Sums) == 0 || len(s.Sums) > MaxSums || s.Before+uint64(len(s.Sums)) > s.Total) {
			t.Errorf("%d sums after %d of %d", len(s.Sums), s.Before, s.Total)
		}
	})
}

func FuzzCompared(f *testing.F) {
	f.Add(said.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := ParseCompared(b)
		if err == nil && !bytes.Equal(c.Append(nil), b) || err != nil && c.PFNs != nil {
			t.Errorf("%x: %+v, %v", b, c, err)
		}
		if err == nil && (uint64(len(c.PFNs)) != min(c.Differ, MaxDiffering) || !slices.IsSorted(c.PFNs)) {
			t.Errorf("%d of %d named", len(c.PFNs), c.Differ)
		}
	})
}
