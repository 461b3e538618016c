package wire

import (
	"bytes"
	"errors"
	"io"
	"testing"
)

const gen = 0x0102030405060708

func frames(t testing.TB) map[Type][]byte {
	t.Helper()
	var end EpochEnd
	data := Frame{Type: TypeData, Generation: gen, Epoch: 7, Payload: []byte("pages")}
	out := make(map[Type][]byte)
	for _, f := range []*Frame{
		{Type: TypeHello, Payload: Hello{UUID: [16]byte{1, 2, 15: 16}, MemoryKiB: 131072}.Append(nil)},
		{Type: TypeWelcome},
		&data,
		{Type: TypeEpochEnd, Epoch: 7, Payload: end.Append(nil)},
		{Type: TypeAck, Epoch: 7},
		{Type: TypeHeartbeat},
		{Type: TypeEnd, Payload: []byte("asked to")},
		{Type: TypeTakenOver},
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
	}
	if _, err := r.Read(); err != io.EOF {
		t.Errorf("at the end: %v", err)
	}
}

// Golden bytes hold the format: a change here needs a new version.
func TestGolden(t *testing.T) {
	want := []byte("KMRI\x01\x05\x00\x00\x01\x02\x03\x04\x05\x06\x07\x08\x00\x00\x00\x00\x00\x00\x00\x07\x00\x00\x00\x00")
	if got := frames(t)[TypeAck]; !bytes.Equal(got[:28], want) || len(got) != HeaderSize {
		t.Errorf("ack: %x, want %x and a checksum", got, want)
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

func TestRefused(t *testing.T) {
	if _, err := (&Frame{Type: TypeData, Payload: make([]byte, MaxPayload+1)}).Append(nil); !errors.Is(err, ErrTooLong) {
		t.Errorf("long payload: %v", err)
	}
	if _, err := (&Frame{}).Append(nil); !errors.Is(err, ErrFormat) {
		t.Errorf("type 0: %v", err)
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
	b := bytes.Clone(frames(t)[TypeData])
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
	sum := func(payloads ...string) (e EpochEnd) {
		for _, p := range payloads {
			f := Frame{Type: TypeData, Generation: gen, Epoch: 1, Payload: []byte(p)}
			if _, err := f.Append(nil); err != nil {
				t.Fatal(err)
			}
			e.Add(f)
		}
		return e
	}
	whole := sum("a", "b", "c")
	for _, other := range []EpochEnd{sum("a", "c"), sum("b", "a", "c"), sum("a", "b", "b"), sum("a", "b", "c", "c")} {
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
				return
			}
			if _, err := fr.Append(nil); err != nil {
				t.Fatalf("read what cannot be written: %v", err)
			}
		}
	})
}

func FuzzPayloads(f *testing.F) {
	f.Add(Hello{}.Append(nil))
	f.Add(EpochEnd{}.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := ParseHello(b); (err == nil) != (len(b) == 24) || err == nil && !bytes.Equal(h.Append(nil), b) {
			t.Errorf("hello %x: %+v, %v", b, h, err)
		}
		if e, err := ParseEpochEnd(b); (err == nil) != (len(b) == 12) || err == nil && !bytes.Equal(e.Append(nil), b) {
			t.Errorf("epoch end %x: %+v, %v", b, e, err)
		}
	})
}
