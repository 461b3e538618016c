package trace

import (
	"bytes"
	"errors"
	"reflect"
	"testing"

	"github.com/klauspost/compress/zstd"
	"pgregory.net/rapid"

	"kemari/migrate/page"
)

const enough = 1 << 30

func write(t testing.TB, x *Trace) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := x.Write(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// small is a trace of two pages in a few hundred bytes.
func small() *Trace {
	x := &Trace{About: "small", Epochs: make([]Epoch, 2)}
	p := make([]byte, page.Size)
	for i := range x.Epochs {
		for j := range 40 {
			p[j*i*100] = byte(j)
		}
		x.Epochs[i].Add(7, p)
	}
	return x
}

func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pages := rapid.IntRange(0, 9).Draw(t, "pages")
		want := Synthetic(rapid.Uint64().Draw(t, "seed"), pages, rapid.IntRange(0, 5).Draw(t, "epochs"), rapid.IntRange(0, 20).Draw(t, "dirty"))
		var b bytes.Buffer
		if err := want.Write(&b); err != nil {
			t.Fatal(err)
		}
		if got, err := Read(&b, enough); err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("does not come out: %v", err)
		}
	})
}

// Golden bytes hold the format.
func TestGolden(t *testing.T) {
	x := &Trace{About: "two pages", Epochs: []Epoch{{}, {}}}
	x.Epochs[1].Add(0x123456789a, bytes.Repeat([]byte{0xab}, page.Size))
	z, err := zstd.NewReader(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	got, err := z.DecodeAll(write(t, x), nil)
	want := "kemari trace 1\n\x00\x00\x09two pages\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x12\x34\x56\x78\x9a" + string(x.Epochs[1].Data)
	if err != nil || string(got) != want {
		t.Errorf("got %q, %v", got[:min(len(got), 80)], err)
	}
}

func TestBroken(t *testing.T) {
	want := small()
	b := write(t, want)
	for n := range b {
		if x, err := Read(bytes.NewReader(b[:n]), enough); !errors.Is(err, ErrFormat) || x != nil {
			t.Fatalf("cut to %d of %d bytes: %v", n, len(b), err)
		}
	}
	for bit := range len(b) * 8 {
		c := bytes.Clone(b)
		c[bit/8] ^= 1 << (bit % 8)
		// Some bits say nothing about the content.
		if x, err := Read(bytes.NewReader(c), enough); (err != nil) == (x != nil) || err == nil && !reflect.DeepEqual(x, want) {
			t.Fatalf("bit %d flipped: %v", bit, err)
		}
	}
	if _, err := Read(bytes.NewReader(b), page.Size); !errors.Is(err, ErrFormat) {
		t.Errorf("beyond the limit: %v", err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add(write(f, small()))
	f.Add(write(f, &Trace{}))
	f.Fuzz(func(t *testing.T, b []byte) {
		x, err := Read(bytes.NewReader(b), 1<<20)
		if (err != nil) == (x != nil) {
			t.Fatalf("%v, %v", x, err)
		}
	})
}

func TestRecorder(t *testing.T) {
	content := func(b byte) []byte { return bytes.Repeat([]byte{b}, page.Size) }
	record := func(r *Recorder) *Trace {
		for pfn := range page.PFN(10) {
			r.Page(pfn, content(0))
		}
		r.Page(3, content(1)) // sent again while the guest ran
		r.Checkpoint()
		r.Page(3, content(2))
		r.Page(5, content(2))
		r.Page(5, content(3))
		r.Checkpoint()
		r.Page(3, content(4))
		r.Page(42, content(4))
		if n := r.Checkpoint(); n != 3 {
			t.Errorf("%d checkpoints", n)
		}
		r.Page(3, content(5)) // of a checkpoint that does not end
		return r.Trace("test")
	}
	type pages map[page.PFN]byte
	for _, c := range []struct {
		name string
		r    Recorder
		want []pages
	}{
		{"all", Recorder{}, []pages{{3: 1, 5: 0}, {3: 2, 5: 3}, {3: 4, 42: 4}}},
		{"skip", Recorder{Skip: 1}, []pages{{3: 2}, {3: 4, 42: 4}}},
	} {
		x := record(&c.r)
		var got []pages
		for i := range x.Epochs {
			m := make(pages)
			for j, pfn := range x.Epochs[i].PFNs {
				m[pfn] = x.Epochs[i].Page(j)[0]
			}
			got = append(got, m)
		}
		if !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: got %v, want %v", c.name, got, c.want)
		}
	}
	r := Recorder{Sample: 4}
	r.Checkpoint()
	for pfn := range page.PFN(4000) {
		r.Page(pfn, content(1))
	}
	r.Checkpoint()
	if n := len(r.Trace("").Epochs[1].PFNs); n < 900 || n > 1100 {
		t.Errorf("one in four of 4000 pages are %d", n)
	}
}
