package xen

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"kemari/migrate/page"
	"kemari/migrate/xen/internal/sys"
)

func goodHead() []byte {
	b := AppendHeaders(nil, 4, 17)
	b = AppendRecord(b, RecordCPUIDPolicy, make([]byte, 48))
	b = AppendRecord(b, RecordMSRPolicy, make([]byte, 16))
	return AppendRecord(b, RecordStaticDataEnd, nil)
}

func goodState() []byte {
	st := &sys.State{TSCMode: 1, TSCkHz: 2, TSCIncarnation: 3, TSCNsec: 4, Context: []byte("thirteen byte")}
	st.Params[0], st.Params[4] = 5, 6
	return appendState(nil, st)
}

// TestWriterBytes holds the records to bytes written down by hand.
func TestWriterBytes(t *testing.T) {
	for name, c := range map[string]struct{ got, want []byte }{
		"headers": {AppendHeaders(nil, 4, 17), []byte("\xff\xff\xff\xff\xff\xff\xff\xffXENF\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00\x00" +
			"\x02\x00\x00\x00\x0c\x00\x00\x00\x04\x00\x00\x00\x11\x00\x00\x00")},
		"record": {AppendRecord(nil, RecordHVMContext, []byte("abc")), []byte("\x09\x00\x00\x00\x03\x00\x00\x00abc\x00\x00\x00\x00\x00")},
		"tsc": {AppendTSCInfo(nil, TSCInfo{1, 2, 3, 4}), []byte("\x08\x00\x00\x00\x18\x00\x00\x00" +
			"\x01\x00\x00\x00\x02\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00")},
		"params": {AppendHVMParams(nil, []HVMParam{{1, 2}, {3, 0}}), []byte("\x0a\x00\x00\x00\x18\x00\x00\x00" +
			"\x01\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00")},
		"no params": {AppendHVMParams(nil, []HVMParam{{3, 0}}), nil},
		"page": {AppendPageData(nil, []page.PFN{0x123}, bytes.Repeat([]byte{7}, page.Size)),
			append([]byte("\x01\x00\x00\x00\x10\x10\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x23\x01\x00\x00\x00\x00\x00\x00"), bytes.Repeat([]byte{7}, page.Size)...)},
	} {
		if !bytes.Equal(c.got, c.want) {
			t.Errorf("%s:\n%x, want\n%x", name, c.got, c.want)
		}
	}
}

// TestWriteRead: what the writer writes, the reader reads.
func TestWriteRead(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.SampledFrom([]int{0, 1, 1023, 1024, 1025, 2500}).Draw(t, "pages")
		pfns, data := make([]page.PFN, n), make([]byte, n*page.Size)
		for i := range pfns {
			pfns[i] = page.PFN(rapid.Uint32().Draw(t, "pfn"))
			data[i*page.Size+i%page.Size] = byte(i)
		}
		stream := append(AppendPageData(goodHead(), pfns, data), goodState()...)
		var gotPFNs []page.PFN
		var gotData, state []byte
		s := Splitter{
			Headers: func([]byte) error { return nil },
			Record: func(r Record) error {
				switch r.Type {
				case RecordPageData:
					k, err := CheckPageData(r.Body, 1<<32)
					for i := range k {
						gotPFNs = append(gotPFNs, page.PFN(word(r.Body[8+8*i:])))
					}
					gotData = append(gotData, r.Body[8+8*k:]...)
					return err
				case RecordTSCInfo, RecordHVMContext, RecordHVMParams:
					state = append(state, r.Raw...)
				}
				return nil
			},
		}
		for step := rapid.IntRange(1, 20000).Draw(t, "step"); len(stream) > 0; {
			k := min(step, len(stream))
			if err := s.Push(stream[:k]); err != nil {
				t.Fatal(err)
			}
			stream = stream[k:]
		}
		if !slices.Equal(gotPFNs, pfns) || !bytes.Equal(gotData, data) || s.Partial() {
			t.Fatalf("%d pages back of %d", len(gotPFNs), n)
		}
		if err := CheckState(state, false); err != nil {
			t.Fatal(err)
		}
	})
}

func word(b []byte) (v uint64) {
	for i := range 8 {
		v |= uint64(b[i]) << (8 * i)
	}
	return v
}

// TestChecks: every truncation is refused, and what libxenguest's restore would
// refuse.
func TestChecks(t *testing.T) {
	for name, c := range map[string]struct {
		good  []byte
		check func([]byte) error
	}{
		"head":                   {goodHead(), CheckHead},
		"state":                  {goodState(), func(b []byte) error { return CheckState(b, false) }},
		"state and device model": {goodEmulated(), func(b []byte) error { return CheckState(b, true) }},
	} {
		if err := c.check(c.good); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for n := range c.good {
			if err := c.check(c.good[:n:n]); !errors.Is(err, ErrStream) {
				t.Errorf("%s cut to %d: %v", name, n, err)
			}
		}
		if err := c.check(append(bytes.Clone(c.good), 0)); !errors.Is(err, ErrStream) {
			t.Errorf("%s and a byte: %v", name, err)
		}
		// A flipped bit is refused or changes but contents, and never more than that.
		for i := range len(c.good) * 8 {
			b := bytes.Clone(c.good)
			b[i/8] ^= 1 << (i % 8)
			c.check(b)
		}
	}
	lying := goodState()
	i := bytes.Index(lying, []byte{byte(RecordHVMParams), 0, 0, 0, 40})
	lying[i+8] = 3
	if err := CheckState(lying, false); !errors.Is(err, ErrStream) {
		t.Errorf("lying count: %v", err)
	}
	for name, c := range map[string]struct {
		state       []byte
		deviceModel bool
	}{
		"of an HVM guest for a PVH guest":  {goodEmulated(), false},
		"of a PVH guest for an HVM guest":  {goodState(), true},
		"of another emulator":              {replaced(goodEmulated(), "\x02\x00\x00\x00\x00\x00\x00\x00QEVM", "\x01\x00\x00\x00\x00\x00\x00\x00QEVM"), true},
		"of an emulator's twin":            {replaced(goodEmulated(), "\x02\x00\x00\x00\x00\x00\x00\x00QEVM", "\x02\x00\x00\x00\x01\x00\x00\x00QEVM"), true},
		"of an emulator that says nothing": {replaced(goodEmulated(), "\x11\x00\x00\x00\x02", "\x08\x00\x00\x00\x02"), true},
		"with another record":              {append(goodEmulated(), make([]byte, 8)...), true},
	} {
		if err := CheckState(c.state, c.deviceModel); !errors.Is(err, ErrStream) {
			t.Errorf("a state %s: %v", name, err)
		}
	}
}

func replaced(b []byte, from, to string) []byte {
	return bytes.Replace(b, []byte(from), []byte(to), 1)
}

func goodEmulated() []byte {
	b, err := appendEmulator(goodState(), func(b []byte) ([]byte, error) { return append(b, "QEVM said"...), nil })
	if err != nil {
		panic(err)
	}
	return b
}

// TestTail holds what ends the streams to bytes written down by hand: the libxc
// stream's END, the libxl stream's EMULATOR_CONTEXT if there is a device model, and its
// END.
func TestTail(t *testing.T) {
	end := "\x00\x00\x00\x00\x00\x00\x00\x00"
	for deviceModel, want := range map[bool]string{
		false: end + end,
		true: end + "\x03\x00\x00\x00\x11\x00\x00\x00" + "\x02\x00\x00\x00\x00\x00\x00\x00QEVM said" +
			"\x00\x00\x00\x00\x00\x00\x00" + end,
	} {
		state := goodState()
		if deviceModel {
			state = goodEmulated()
		}
		if got := AppendTail([]byte("x"), state, deviceModel); string(got) != "x"+string(goodState())+want {
			t.Errorf("device model %v: %x", deviceModel, got)
		}
	}
}

// TestSplitterFlips: every flipped bit of a stream's headers and record headers is
// refused, or the records still are what is left.
func TestSplitterFlips(t *testing.T) {
	stream := append(goodHead(), goodState()...)
	for i := range len(stream) * 8 {
		b := bytes.Clone(stream)
		b[i/8] ^= 1 << (i % 8)
		total := 0
		s := Splitter{
			Headers: func(h []byte) error { total += len(h); return nil },
			Record:  func(r Record) error { total += len(r.Raw); return nil },
		}
		if err := s.Push(b); err == nil && total+len(s.buf) != len(b) {
			t.Fatalf("bit %d: %d bytes of %d", i, total, len(b))
		}
	}
}

func FuzzCheckHead(f *testing.F) {
	f.Add(goodHead())
	f.Fuzz(func(t *testing.T, b []byte) {
		if CheckHead(b) == nil && (len(b) < HeadersSize+3*8 || len(b)%8 != 0) {
			t.Errorf("took %d bytes", len(b))
		}
	})
}

func FuzzCheckState(f *testing.F) {
	f.Add(goodState())
	f.Add(goodEmulated())
	f.Fuzz(func(t *testing.T, b []byte) {
		if (CheckState(b, false) == nil || CheckState(b, true) == nil) && (len(b) < 8+24+8+8+8+8 || len(b)%8 != 0) {
			t.Errorf("took %d bytes", len(b))
		}
	})
}

func FuzzCheckPageData(f *testing.F) {
	f.Add(pageData(1, 2), uint64(100))
	f.Fuzz(func(t *testing.T, b []byte, limit uint64) {
		n, err := CheckPageData(b, limit)
		if err != nil && n != 0 || err == nil && len(b) < 16+n*page.Size {
			t.Errorf("%d pages in %d bytes, %v", n, len(b), err)
		}
	})
}
