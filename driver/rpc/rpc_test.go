package rpc

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"os"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func ptr[T any](v T) *T { return &v }

var g1 = Domain{Name: "g1", UUID: UUID{0: 0xaa, 15: 0xff}, ID: 7}

// codec is one decoder, with a valid message of every shape it knows.
type codec struct {
	name   string
	decode func([]byte) (any, error)
	valid  []interface{ Append([]byte) []byte }
}

// wrap keeps a nil pointer a nil interface.
func wrap[T any](f func([]byte) (*T, error)) func([]byte) (any, error) {
	return func(b []byte) (any, error) {
		v, err := f(b)
		if v == nil {
			return nil, err
		}
		return v, err
	}
}

type msgs = []interface{ Append([]byte) []byte }

var allParams = []TypedParam{
	{Field: "destination_xml", Type: ParamString, String: "<domain/>"},
	{Field: "bandwidth", Type: ParamULLong, Number: 1 << 40},
	{Field: "i", Type: ParamInt, Number: 0xffffffff},
	{Field: "u", Type: ParamUInt, Number: 1},
	{Field: "l", Type: ParamLLong, Number: 1 << 63},
	{Field: "d", Type: ParamDouble, Number: 0x3ff8000000000000},
	{Field: "b", Type: ParamBoolean, Number: 1},
}

var codecs = []codec{
	{"open", wrap(DecodeConnectOpenArgs), msgs{
		&ConnectOpenArgs{Flags: 1},
		&ConnectOpenArgs{Name: ptr(""), Flags: 0},
		&ConnectOpenArgs{Name: ptr("kemari:///system"), Flags: 1},
	}},
	{"get uri", wrap(DecodeConnectGetURIRet), msgs{&ConnectGetURIRet{URI: "kemari:///system"}}},
	{"int", wrap(DecodeInt), msgs{ptr(Int(8)), ptr(Int(-1))}},
	{"abort", wrap(func(b []byte) (*AbortJobArgs, error) { return DecodeAbortJobArgs(b, false) }), msgs{&AbortJobArgs{Domain: g1}}},
	{"abort flags", wrap(func(b []byte) (*AbortJobArgs, error) { return DecodeAbortJobArgs(b, true) }), msgs{&AbortJobArgs{Domain: g1, HasFlags: true, Flags: 1}}},
	{"perform", wrap(DecodeMigratePerformArgs), msgs{
		&MigratePerformArgs{Domain: g1, Params: []TypedParam{}, Cookie: []byte{}},
		&MigratePerformArgs{Domain: g1, URI: ptr("kemari+ssh://xen2/system"), Params: allParams, Cookie: []byte("c"), Flags: MigrateKemari},
	}},
	{"begin", wrap(DecodeMigrateBeginArgs), msgs{&MigrateBeginArgs{Domain: g1, Params: allParams[:2], Flags: 3}}},
	{"begun", wrap(DecodeMigrateBeginRet), msgs{&MigrateBeginRet{Cookie: []byte{}, XML: ""}, &MigrateBeginRet{Cookie: []byte("c"), XML: "<x/>"}}},
	{"prepare", wrap(DecodeMigratePrepareArgs), msgs{&MigratePrepareArgs{Params: allParams, Cookie: []byte("c"), Flags: 1}}},
	{"prepared", wrap(DecodeMigratePrepareRet), msgs{&MigratePrepareRet{Cookie: []byte{}}, &MigratePrepareRet{Cookie: []byte("c"), URI: ptr("tcp://x")}}},
	{"finish", wrap(DecodeMigrateFinishArgs), msgs{&MigrateFinishArgs{Params: []TypedParam{}, Cookie: []byte("c"), Flags: 1, Cancelled: -1}}},
	{"finished", wrap(DecodeMigrateFinishRet), msgs{&MigrateFinishRet{Domain: g1, Cookie: []byte("c")}}},
	{"begin3", wrap(DecodeMigrateBegin3Args), msgs{&MigrateBegin3Args{Domain: g1, XML: ptr("<x/>"), Flags: 1 << 40, Resource: 9}}},
	{"event register", wrap(DecodeEventRegisterArgs), msgs{
		&EventRegisterArgs{Event: EventJobCompleted},
		&EventRegisterArgs{Event: EventLifecycle, Domain: &g1},
	}},
	{"lifecycle", wrap(DecodeLifecycleEvent), msgs{&LifecycleEvent{Callback: 3, Domain: g1, Event: 4, Detail: 1}}},
	{"iteration", wrap(DecodeIterationEvent), msgs{&IterationEvent{Callback: 3, Domain: g1, Iteration: -1}}},
	{"job completed", wrap(DecodeJobCompletedEvent), msgs{&JobCompletedEvent{Callback: 3, Domain: g1, Params: allParams}}},
	{"metadata", wrap(DecodeMetadataEvent), msgs{
		&MetadataEvent{Callback: 3, Domain: g1, Type: 2, Namespace: ptr("urn:x")},
		&MetadataEvent{Domain: g1},
	}},
	{"domain flags", wrap(DecodeDomainFlagsArgs), msgs{&DomainFlagsArgs{Domain: g1, Flags: 1 << 31}}},
	{"job stats", wrap(DecodeJobStatsRet), msgs{&JobStatsRet{Type: 2, Params: allParams}, &JobStatsRet{Params: []TypedParam{}}}},
	{"domain stats", wrap(DecodeDomainStatsRet), msgs{
		&DomainStatsRet{},
		&DomainStatsRet{{Domain: g1, Params: allParams}, {Domain: g1, Params: []TypedParam{}}},
	}},
	{"auth list", wrap(DecodeAuthListRet), msgs{&AuthListRet{AuthNone, AuthPolkit}, &AuthListRet{}}},
	{"set identity", wrap(DecodeSetIdentityArgs), msgs{&SetIdentityArgs{Params: allParams, Flags: 1}, &SetIdentityArgs{Params: []TypedParam{}}}},
	{"error", wrap(DecodeError), msgs{&Error{Code: CodeRPC, From: FromRPC, Message: "no"}}},
	{"opaque", func(b []byte) (any, error) {
		v, err := DecodeOpaque(b)
		if v == nil {
			return nil, err
		}
		return &v, err
	}, msgs{ptr(Opaque("{}\n")), ptr(Opaque{})}},
	{"packet", wrap(ParsePacket), msgs{frame{&Packet{
		Header:  Header{ProgramRemote, 1, ProcDomainSave, Stream, 5, Continue},
		Payload: []byte("data"),
	}}}},
}

// frame makes a packet fit for the table.
type frame struct{ *Packet }

func (f frame) Append(b []byte) []byte {
	b, err := f.Packet.Append(b)
	if err != nil {
		panic(err)
	}
	return b
}

func TestRoundTrip(t *testing.T) {
	for _, c := range codecs {
		for _, v := range c.valid {
			b := v.Append(nil)
			got, err := c.decode(b)
			if err != nil {
				t.Errorf("%s: %v", c.name, err)
				continue
			}
			want := any(v)
			if f, ok := want.(frame); ok {
				want = f.Packet
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("%s: got %+v, want %+v", c.name, got, want)
			}
		}
	}
}

// TestDamage cuts every valid message everywhere, and flips each of its bits:
// there must be no panic, and an error if and only if there is no result.
func TestDamage(t *testing.T) {
	for _, c := range codecs {
		for _, v := range c.valid {
			b := v.Append(nil)
			for n := range b {
				if got, err := c.decode(b[:n:n]); err == nil || got != nil {
					t.Errorf("%s: cut to %d of %d bytes: %v, %v", c.name, n, len(b), got, err)
				}
			}
			if got, err := c.decode(append(bytes.Clone(b), 0, 0, 0, 0)); err == nil || got != nil {
				t.Errorf("%s: with four bytes more: %v, %v", c.name, got, err)
			}
			for bit := range len(b) * 8 {
				d := bytes.Clone(b)
				d[bit/8] ^= 1 << (bit % 8)
				if got, err := c.decode(d); (got == nil) != (err != nil) {
					t.Errorf("%s: bit %d: %v, %v", c.name, bit, got, err)
				}
			}
		}
	}
}

func fuzz(f *testing.F, name string) {
	for _, c := range codecs {
		if c.name != name {
			continue
		}
		for _, v := range c.valid {
			f.Add(v.Append(nil))
		}
		f.Fuzz(func(t *testing.T, b []byte) {
			got, err := c.decode(b)
			if (got == nil) != (err != nil) {
				t.Fatalf("%v, %v", got, err)
			}
			if err != nil && !errors.Is(err, ErrXDR) && !errors.Is(err, ErrFrame) {
				t.Fatalf("unmarked error %v", err)
			}
			// What is accepted means the same when it is passed on.
			if a, ok := got.(interface{ Append([]byte) []byte }); ok {
				again, err := c.decode(a.Append(nil))
				if err != nil || !reflect.DeepEqual(again, got) {
					t.Fatalf("%+v became %+v, %v", got, again, err)
				}
			}
		})
	}
}

func FuzzOpen(f *testing.F)          { fuzz(f, "open") }
func FuzzGetURI(f *testing.F)        { fuzz(f, "get uri") }
func FuzzInt(f *testing.F)           { fuzz(f, "int") }
func FuzzAbort(f *testing.F)         { fuzz(f, "abort") }
func FuzzAbortFlags(f *testing.F)    { fuzz(f, "abort flags") }
func FuzzPerform(f *testing.F)       { fuzz(f, "perform") }
func FuzzBegin(f *testing.F)         { fuzz(f, "begin") }
func FuzzBegin3(f *testing.F)        { fuzz(f, "begin3") }
func FuzzEventRegister(f *testing.F) { fuzz(f, "event register") }
func FuzzLifecycle(f *testing.F)     { fuzz(f, "lifecycle") }
func FuzzIteration(f *testing.F)     { fuzz(f, "iteration") }
func FuzzJobCompleted(f *testing.F)  { fuzz(f, "job completed") }
func FuzzMetadata(f *testing.F)      { fuzz(f, "metadata") }
func FuzzDomainFlags(f *testing.F)   { fuzz(f, "domain flags") }
func FuzzJobStats(f *testing.F)      { fuzz(f, "job stats") }
func FuzzDomainStats(f *testing.F)   { fuzz(f, "domain stats") }
func FuzzAuthList(f *testing.F)      { fuzz(f, "auth list") }
func FuzzSetIdentity(f *testing.F)   { fuzz(f, "set identity") }
func FuzzError(f *testing.F)         { fuzz(f, "error") }
func FuzzOpaque(f *testing.F)        { fuzz(f, "opaque") }
func FuzzPacket(f *testing.F)        { fuzz(f, "packet") }

func FuzzDomainPrefix(f *testing.F) {
	f.Add((&AbortJobArgs{Domain: g1}).Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if got, err := DecodeDomainPrefix(b); (got == nil) != (err != nil) {
			t.Fatalf("%v, %v", got, err)
		}
		if got, err := DecodeSnapshotPrefix(b); (got == nil) != (err != nil) {
			t.Fatalf("%v, %v", got, err)
		}
	})
}

// FuzzReadPacket feeds a stream to the reader of frames.
func FuzzReadPacket(f *testing.F) {
	b, _ := Keepalive(KeepalivePing).Append(nil)
	f.Add(append(b, b...))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		for {
			p, err := ReadPacket(r)
			if (p == nil) != (err != nil) {
				t.Fatalf("%v, %v", p, err)
			}
			if err != nil {
				return
			}
		}
	})
}

// TestGolden holds bytes as libvirt's own client and server send them.
func TestGolden(t *testing.T) {
	for _, g := range []struct{ name, want, got string }{
		{"keepalive", "0000001c 6b656570 00000001 00000001 00000002 00000000 00000000",
			hex.EncodeToString(frame{Keepalive(KeepalivePing)}.Append(nil))},
		{"open", "00000001 00000010 74657374 3a2f2f2f 64656661 756c742f 00000001",
			hex.EncodeToString((&ConnectOpenArgs{Name: ptr("test:///default/"), Flags: 1}).Append(nil))},
		{"job completed", "00000003 00000002 67310000 aa000000 00000000 00000000 000000ff 00000007" +
			"00000001 00000009 6f706572 6174696f 6e000000 00000001 00000006",
			hex.EncodeToString((&JobCompletedEvent{3, g1, []TypedParam{{Field: "operation", Type: ParamInt, Number: 6}}}).Append(nil))},
		{"lifecycle", "0000001c 20008086 00000001 0000013e 00000002 00000000 00000000",
			hex.EncodeToString(frame{Event(ProcDomainEventCallbackLifecycle, nil)}.Append(nil))},
		{"auth list", "00000001 00000002", hex.EncodeToString((&AuthListRet{AuthPolkit}).Append(nil))},
		{"abort", "00000002 67310000 aa000000 00000000 00000000 000000ff 00000007",
			hex.EncodeToString((&AbortJobArgs{Domain: g1}).Append(nil))},
		{"error", "00000027 00000007 00000001 00000002 6e6f0000 00000002 00000000" +
			"00000001 00000002 25730000 00000001 00000002 6e6f0000 00000000 00000000 00000000 00000000",
			hex.EncodeToString((&Error{Code: CodeRPC, From: FromRPC, Message: "no"}).Append(nil))},
	} {
		if want := strings.ReplaceAll(g.want, " ", ""); g.got != want {
			t.Errorf("%s:\n got %s\nwant %s", g.name, g.got, want)
		}
	}
}

func TestHostileLengths(t *testing.T) {
	u32 := func(v ...uint32) []byte {
		var b []byte
		for _, w := range v {
			b = binary.BigEndian.AppendUint32(b, w)
		}
		return b
	}
	for name, b := range map[string][]byte{
		"string of 4 GiB":        u32(1, 0xffffffff),
		"string over the limit":  append(u32(1, stringMax+1), make([]byte, stringMax+8)...),
		"padding":                append(u32(1, 1), 'a', 0, 1, 0, 0, 0, 0, 0),
		"NUL":                    append(u32(1, 4), 'a', 0, 'b', 'c', 0, 0, 0, 0),
		"nothing":                nil,
		"length wraps with pads": u32(1, 0xfffffffd, 0),
	} {
		if v, err := DecodeConnectOpenArgs(b); err == nil || v != nil {
			t.Errorf("%s: %v, %v", name, v, err)
		}
	}
	args := appendDomain(nil, g1)
	args = appendBool(args, false)
	if v, err := DecodeMigratePerformArgs(appendUint32(args, 65)); err == nil || v != nil {
		t.Errorf("65 parameters: %v, %v", v, err)
	}
	if v, err := DecodeOpaque(append(u32(MaxOpaque+4), make([]byte, MaxOpaque+4)...)); err == nil || v != nil {
		t.Errorf("opaque over the limit: %v", err)
	}
	for _, n := range []uint32{0, 4, 27, MaxFrame + 1, 0xffffffff} {
		if p, err := ReadPacket(bytes.NewReader(append(u32(n), make([]byte, 64)...))); !errors.Is(err, ErrFrame) || p != nil {
			t.Errorf("frame of length %d: %v, %v", n, p, err)
		}
	}
	// A length alone must not cost its memory.
	if _, err := ReadPacket(bytes.NewReader(u32(MaxFrame, 1))); err != io.ErrUnexpectedEOF {
		t.Error(err)
	}
	if b, err := readGrowing(bytes.NewReader(make([]byte, 100)), nil, MaxFrame); err == nil || cap(b) > 1<<20 {
		t.Errorf("%d bytes for an announced frame", cap(b))
	}
}

// TestForeignBoolean is how digitalocean's go-libvirt opens a connection.
func TestForeignBoolean(t *testing.T) {
	b, err := hex.DecodeString("0100000000000005783a2f2f2f00000000000000")
	if err != nil {
		t.Fatal(err)
	}
	v, err := DecodeConnectOpenArgs(b)
	if err != nil || v.Name == nil || *v.Name != "x:///" || v.Flags != 0 {
		t.Errorf("%+v, %v", v, err)
	}
}

func TestReadPacketEnds(t *testing.T) {
	p := &Packet{Header: Header{Program: ProgramRemote, Version: 1, Procedure: 3}, Payload: make([]byte, 300<<10)}
	b, err := p.Append(nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ReadPacket(iotest.HalfReader(bytes.NewReader(b)))
	if err != nil || !reflect.DeepEqual(got, p) {
		t.Fatalf("%v", err)
	}
	if _, err := ReadPacket(bytes.NewReader(nil)); err != io.EOF {
		t.Errorf("between frames: %v", err)
	}
	for _, n := range []int{1, 4, 5, 27, 28, 70000, len(b) - 1} {
		if _, err := ReadPacket(bytes.NewReader(b[:n])); err != io.ErrUnexpectedEOF {
			t.Errorf("after %d bytes: %v", n, err)
		}
	}
	if _, err := (&Packet{Payload: make([]byte, MaxPayload+1)}).Append(nil); !errors.Is(err, ErrFrame) {
		t.Errorf("payload too long: %v", err)
	}
}

func TestParseUUID(t *testing.T) {
	const s = "6695eb01-f6a4-8304-79aa-97f2502e193f"
	u, err := ParseUUID(s)
	if err != nil || u.String() != s {
		t.Fatal(u, err)
	}
	for _, bad := range []string{
		"", s[1:], s + "0", strings.ToUpper(s), strings.ReplaceAll(s, "-", ""), "../../../etc/passwd-aaaa-bbbbbbbbbbbb",
		"6695eb01-f6a4-8304-79aa-97f2502e193g", "6695eb01 f6a4-8304-79aa-97f2502e193f", "6695eb01-f6a4-8304-79aa-97f2502e19é",
	} {
		if _, err := ParseUUID(bad); !errors.Is(err, ErrUUID) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// socketpair is two ends with room between them, as a net.Pipe has not.
func socketpair(t *testing.T) (a, b net.Conn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		ends[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
	return ends[0], ends[1]
}

// serve answers the frames of one connection with f until it ends.
func serve(t *testing.T, f func(p *Packet) []*Packet) *Client {
	t.Helper()
	a, b := socketpair(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer b.Close()
		for {
			p, err := ReadPacket(b)
			if err != nil {
				return
			}
			for _, r := range f(p) {
				if r == nil || WritePacket(b, r) != nil {
					return
				}
			}
		}
	}()
	c := NewClient(a)
	t.Cleanup(func() { c.Close(); <-done })
	return c
}

func TestClient(t *testing.T) {
	c := serve(t, func(p *Packet) []*Packet {
		if p.Program == ProgramKeepalive {
			return nil
		}
		switch p.Procedure {
		case 1: // with an event, a stranger's reply and a ping before it
			return []*Packet{
				{Header: Header{Program: ProgramRemote, Type: Message}},
				{Header: Header{Program: p.Program, Type: Reply, Serial: 999}},
				Keepalive(KeepalivePing),
				{Header: p.Reply(OK), Payload: p.Payload},
			}
		case 2:
			return []*Packet{ErrorReply(p.Header, &Error{Code: CodeNoDomain, From: FromDomain, Message: "who?"})}
		case 3:
			return nil // never
		}
		return []*Packet{nil} // hang up
	})
	call := func(ctx context.Context, proc Procedure) ([]byte, error) {
		return c.Call(ctx, ProgramKemari, 1, proc, []byte("abcd"))
	}
	ctx := context.Background()
	if b, err := call(ctx, 1); err != nil || string(b) != "abcd" {
		t.Errorf("%q, %v", b, err)
	}
	var e *Error
	if _, err := call(ctx, 2); !errors.As(err, &e) || e.Code != CodeNoDomain || e.Message != "who?" {
		t.Errorf("%v", err)
	}
	short, cancel := context.WithTimeout(ctx, 10*time.Millisecond)
	defer cancel()
	if _, err := call(short, 3); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	if b, err := call(ctx, 1); err != nil || string(b) != "abcd" {
		t.Errorf("after a call was given up: %q, %v", b, err)
	}
	if _, err := call(ctx, 4); !errors.Is(err, ErrClosed) {
		t.Errorf("hung up: %v", err)
	}
	if _, err := call(ctx, 1); !errors.Is(err, ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
	c.Close()
	c.Close()
}
