package rpc

import (
	"bytes"
	"errors"
	"testing"
)

func init() {
	codecs = append(codecs,
		codec{"list args", wrap(DecodeListAllDomainsArgs), msgs{&ListAllDomainsArgs{1, 3}, &ListAllDomainsArgs{}}},
		codec{"list", wrap(DecodeListAllDomainsRet), msgs{&ListAllDomainsRet{[]Domain{g1, {Name: "x", ID: -1}}, 2}, &ListAllDomainsRet{[]Domain{}, 7}}},
		codec{"state", wrap(DecodeDomainState), msgs{&DomainState{3, 2}}},
		codec{"info", wrap(DecodeDomainInfo), msgs{&DomainInfo{3, 1 << 40, 5, 2, 1 << 50}}},
		codec{"job info", wrap(DecodeJobInfo), msgs{&JobInfo{Type: 2, TimeElapsed: 1 << 40, FileRemaining: 9}}},
		codec{"stats args", wrap(DecodeDomainStatsArgs), msgs{&DomainStatsArgs{[]Domain{g1}, 1, 2}, &DomainStatsArgs{[]Domain{}, 0, 0}}},
		codec{"set metadata", wrap(DecodeSetMetadataArgs), msgs{&SetMetadataArgs{g1, 2, ptr("<x/>"), ptr("k"), ptr("urn:x"), 3}, &SetMetadataArgs{Domain: g1}}},
		codec{"perform3", wrap(DecodeMigratePerform3Args), msgs{
			&MigratePerform3Args{Domain: g1, XML: ptr("<x/>"), Cookie: []byte("c"), ConnURI: ptr("a"), URI: ptr("b"), Flags: 1 << 40, Name: ptr("n"), Bandwidth: 8},
			&MigratePerform3Args{Domain: g1, Cookie: []byte{}},
		}},
	)
}

func FuzzListArgs(f *testing.F)    { fuzz(f, "list args") }
func FuzzList(f *testing.F)        { fuzz(f, "list") }
func FuzzState(f *testing.F)       { fuzz(f, "state") }
func FuzzInfo(f *testing.F)        { fuzz(f, "info") }
func FuzzJobInfo(f *testing.F)     { fuzz(f, "job info") }
func FuzzStatsArgs(f *testing.F)   { fuzz(f, "stats args") }
func FuzzSetMetadata(f *testing.F) { fuzz(f, "set metadata") }
func FuzzPerform3(f *testing.F)    { fuzz(f, "perform3") }

// everyLayout has each letter.
const everyLayout Layout = "dsSuUoxXpS"

func everyMessage(xml string) []byte {
	b := appendString(appendDomain(nil, g1), "file")
	b = appendUint64(appendUint32(appendOptString(b, ptr("o")), 7), 8)
	b = appendOptString(appendString(appendOpaque(b, []byte("ab")), xml), ptr(xml))
	params := append([]TypedParam{
		{Field: "xml", Type: ParamString, String: xml}, {Field: "persistent_xml", Type: ParamString, String: xml}, {Field: "xml", Type: ParamInt, Number: 3},
	}, allParams...)
	params[3].String = xml
	return appendOptString(appendParams(b, params), nil)
}

func TestMapXML(t *testing.T) {
	calls := 0
	got, err := everyLayout.MapXML(everyMessage("<a/>"), func(s string) (string, error) {
		if calls++; s != "<a/>" {
			t.Errorf("asked to map %q", s)
		}
		return "<longer/>", nil
	})
	if err != nil || calls != 5 || !bytes.Equal(got, everyMessage("<longer/>")) {
		t.Errorf("%d calls, %v\n%q", calls, err, got)
	}
	no := errors.New("no")
	calls = 0
	if b, err := everyLayout.MapXML(everyMessage("<a/>"), func(string) (string, error) { calls++; return "", no }); b != nil || err != no || calls != 1 {
		t.Errorf("%q, %v after %d calls", b, err, calls)
	}
	same := func(s string) (string, error) { return s, nil }
	whole := everyMessage("<a/>")
	for n := range whole {
		if b, err := everyLayout.MapXML(whole[:n:n], same); b != nil || !errors.Is(err, ErrXDR) {
			t.Errorf("cut to %d: %q, %v", n, b, err)
		}
	}
	for bit := range len(whole) * 8 {
		b := bytes.Clone(whole)
		b[bit/8] ^= 1 << (bit % 8)
		if got, err := everyLayout.MapXML(b, same); (got == nil) != (err != nil) {
			t.Errorf("bit %d: %q, %v", bit, got, err)
		}
	}
	if LastFlags([]byte{1, 2, 3}) != 0 || LastFlags([]byte{9, 0, 0, 1, 2}) != 0x102 {
		t.Error("last flags")
	}
}

func FuzzMapXML(f *testing.F) {
	f.Add(everyMessage("<a/>"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := everyLayout.MapXML(b, func(s string) (string, error) { return s, nil })
		if (got == nil) != (err != nil) {
			t.Fatalf("%v, %v", got, err)
		}
	})
}
