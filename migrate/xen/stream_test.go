package xen

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
	"testing/iotest"

	"io"
)

func headers() []byte {
	b := bytes.Repeat([]byte{0xff}, 8)
	b = append(b, "XENF"...)
	b = binary.BigEndian.AppendUint32(b, 3)
	b = append(b, make([]byte, 8)...)
	b = binary.LittleEndian.AppendUint32(b, 2)
	b = binary.LittleEndian.AppendUint16(b, 12)
	return append(b, make([]byte, 10)...)
}

func record(t RecordType, body []byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, uint32(t))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(body)))
	b = append(b, body...)
	return append(b, make([]byte, -len(body)&7)...)
}

func pageData(pfns ...uint64) []byte {
	b := binary.LittleEndian.AppendUint64(nil, uint64(len(pfns)))
	for _, p := range pfns {
		b = binary.LittleEndian.AppendUint64(b, p)
	}
	return append(b, make([]byte, PageSize*len(pfns))...)
}

func collect(t *testing.T, r io.Reader) (types []RecordType, raw []byte, err error) {
	t.Helper()
	s := Splitter{
		Headers: func(b []byte) error { raw = append(raw, b...); return nil },
		Record: func(r Record) error {
			types, raw = append(types, r.Type), append(raw, r.Raw...)
			return nil
		},
	}
	b := make([]byte, 5000)
	for {
		n, rerr := r.Read(b)
		if err := s.Push(b[:n]); err != nil {
			return types, raw, err
		}
		if rerr != nil {
			if s.Partial() {
				return types, raw, io.ErrUnexpectedEOF
			}
			return types, raw, nil
		}
	}
}

func TestSplitter(t *testing.T) {
	stream := headers()
	want := []RecordType{RecordStaticDataEnd, RecordPageData, RecordPageData, RecordHVMContext, RecordHVMParams, RecordCheckpoint}
	for i, typ := range want {
		body := []byte("odd length, so padded"[:i*3])
		if typ == RecordPageData {
			body = pageData(1, 2, 3)
		}
		stream = append(stream, record(typ, body)...)
	}
	for name, r := range map[string]io.Reader{
		"pieces": bytes.NewReader(stream),
		"bytes":  iotest.OneByteReader(bytes.NewReader(stream)),
		"halves": iotest.HalfReader(bytes.NewReader(stream)),
	} {
		types, raw, err := collect(t, r)
		if err != nil || !bytes.Equal(raw, stream) || len(types) != len(want) {
			t.Errorf("%s: %v, %d of %d bytes, %v", name, types, len(raw), len(stream), err)
		}
	}
	for n := 1; n < len(stream); n += 101 {
		types, _, err := collect(t, bytes.NewReader(stream[:n]))
		if err == nil && len(types) == len(want) {
			t.Errorf("cut to %d bytes: whole", n)
		}
	}
}

func TestSplitterRefuses(t *testing.T) {
	big := headers()
	big = binary.LittleEndian.AppendUint32(big, uint32(RecordPageData))
	big = binary.LittleEndian.AppendUint32(big, 0xfffffff0)
	for name, b := range map[string][]byte{"zeroes": make([]byte, 64), "huge record": big} {
		if _, _, err := collect(t, bytes.NewReader(b)); !errors.Is(err, ErrStream) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCheckPageData(t *testing.T) {
	const xtab = 0xf << 60
	good := pageData(0, 99)
	noContent := binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, 1), xtab|7)
	for _, c := range []struct {
		name  string
		b     []byte
		pages int
		ok    bool
	}{
		{"two pages", good, 2, true},
		{"page without content", noContent, 0, true},
		{"outside the guest", pageData(100), 0, false},
		{"short", good[:len(good)-1], 0, false},
		{"long", append(bytes.Clone(good), 0), 0, false},
		{"empty", nil, 0, false},
		{"no pages", make([]byte, 8), 0, false},
		{"lying count", append([]byte{0xff, 0xff, 0xff, 0xff}, good[4:]...), 0, false},
	} {
		n, err := CheckPageData(c.b, 100)
		if (err == nil) != c.ok || n != c.pages {
			t.Errorf("%s: %d, %v", c.name, n, err)
		}
	}
}

func FuzzSplitter(f *testing.F) {
	f.Add(append(headers(), record(RecordPageData, pageData(1))...))
	f.Add(append(headers(), record(RecordHVMParams, []byte("12345"))...))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := Splitter{
			Headers: func([]byte) error { return nil },
			Record: func(r Record) error {
				if r.Type == RecordPageData {
					CheckPageData(r.Body, 1000)
				}
				return nil
			},
		}
		for len(b) > 0 && s.Push(b[:min(len(b), 97)]) == nil {
			b = b[min(len(b), 97):]
			if len(s.buf) > 8+MaxRecord+7 {
				t.Fatalf("holds %d bytes", len(s.buf))
			}
		}
	})
}
