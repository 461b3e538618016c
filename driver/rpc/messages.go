package rpc

import (
	"encoding/hex"
	"errors"
	"fmt"
)

// Limits of remote_protocol.x and virnetprotocol.x.
const (
	stringMax        = 4 << 20 // REMOTE_STRING_MAX
	cookieMax        = 4 << 20 // REMOTE_MIGRATE_COOKIE_MAX
	migrateParamsMax = 64      // REMOTE_DOMAIN_MIGRATE_PARAM_LIST_MAX
	jobStatsMax      = 64      // REMOTE_DOMAIN_JOB_STATS_MAX
	domainListMax    = 16384   // REMOTE_DOMAIN_LIST_MAX
	domainStatsMax   = 1 << 18 // REMOTE_CONNECT_GET_ALL_DOMAIN_STATS_MAX
	authTypesMax     = 20      // REMOTE_AUTH_TYPE_LIST_MAX
	identityMax      = 20      // REMOTE_CONNECT_IDENTITY_PARAMS_MAX
	// MaxOpaque bounds the JSON of ProgramKemari.
	MaxOpaque = 1 << 20
)

// UUID is a domain's.
type UUID [16]byte

func (u UUID) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[0:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// ErrUUID is returned by ParseUUID.
var ErrUUID = errors.New("not a UUID in its canonical form")

// ParseUUID accepts the canonical lower-case form only, since UUIDs become parts
// of paths and unit names.
func ParseUUID(s string) (UUID, error) {
	var u UUID
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return u, ErrUUID
	}
	if _, err := hex.Decode(u[:], []byte(s[0:8]+s[9:13]+s[14:18]+s[19:23]+s[24:])); err != nil {
		return u, ErrUUID
	}
	if u.String() != s { // upper case
		return u, ErrUUID
	}
	return u, nil
}

// Domain is remote_nonnull_domain.
type Domain struct {
	Name string
	UUID UUID
	ID   int32 // -1 if the client knows of none
}

func (d *decoder) domain() Domain {
	var v Domain
	v.Name = d.string(stringMax)
	copy(v.UUID[:], d.fixed(len(v.UUID)))
	v.ID = int32(d.uint32())
	return v
}

func appendDomain(b []byte, v Domain) []byte {
	b = appendString(b, v.Name)
	b = appendFixed(b, v.UUID[:])
	return appendUint32(b, uint32(v.ID))
}

// DecodeDomainPrefix decodes the domain that many messages begin with, and
// ignores what follows.
func DecodeDomainPrefix(b []byte) (*Domain, error) {
	d := decoder{b: b}
	v := d.domain()
	if d.err != nil {
		return nil, d.err
	}
	return &v, nil
}

// DecodeSnapshotPrefix decodes the domain of the snapshot that a message begins
// with, and ignores what follows.
func DecodeSnapshotPrefix(b []byte) (*Domain, error) {
	d := decoder{b: b}
	d.string(stringMax) // the snapshot's name
	v := d.domain()
	if d.err != nil {
		return nil, d.err
	}
	return &v, nil
}

// ConnectOpenArgs are the arguments of ProcConnectOpen.
type ConnectOpenArgs struct {
	Name  *string // a URI, nil or empty for the default one
	Flags uint32
}

// DecodeConnectOpenArgs decodes the arguments of ProcConnectOpen.
func DecodeConnectOpenArgs(b []byte) (*ConnectOpenArgs, error) {
	d := decoder{b: b}
	v := ConnectOpenArgs{Name: d.optString(stringMax), Flags: d.uint32()}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded arguments.
func (v *ConnectOpenArgs) Append(b []byte) []byte {
	return appendUint32(appendOptString(b, v.Name), v.Flags)
}

// ConnectGetURIRet is the result of ProcConnectGetURI.
type ConnectGetURIRet struct{ URI string }

// DecodeConnectGetURIRet decodes the result of ProcConnectGetURI.
func DecodeConnectGetURIRet(b []byte) (*ConnectGetURIRet, error) {
	d := decoder{b: b}
	v := ConnectGetURIRet{URI: d.string(stringMax)}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded result.
func (v *ConnectGetURIRet) Append(b []byte) []byte { return appendString(b, v.URI) }

// Int is a message of one integer: the arguments (which feature) and the result
// (1 for supported) of ProcConnectSupportsFeature.
type Int int32

// DecodeInt decodes a message of one integer.
func DecodeInt(b []byte) (*Int, error) {
	d := decoder{b: b}
	v := Int(d.uint32())
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded integer.
func (v Int) Append(b []byte) []byte { return appendUint32(b, uint32(v)) }

// AbortJobArgs are the arguments of ProcDomainAbortJob and, with HasFlags, of
// ProcDomainAbortJobFlags.
type AbortJobArgs struct {
	Domain   Domain
	HasFlags bool
	Flags    uint32
}

// DecodeAbortJobArgs decodes either form.
func DecodeAbortJobArgs(b []byte, hasFlags bool) (*AbortJobArgs, error) {
	d := decoder{b: b}
	v := AbortJobArgs{Domain: d.domain(), HasFlags: hasFlags}
	if hasFlags {
		v.Flags = d.uint32()
	}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded arguments.
func (v *AbortJobArgs) Append(b []byte) []byte {
	b = appendDomain(b, v.Domain)
	if v.HasFlags {
		b = appendUint32(b, v.Flags)
	}
	return b
}

// ParamType is the type of a typed parameter.
type ParamType int32

// The types of virTypedParameterType.
const (
	ParamInt ParamType = 1 + iota
	ParamUInt
	ParamLLong
	ParamULLong
	ParamDouble
	ParamBoolean
	ParamString
)

// TypedParam is remote_typed_param. Number holds the bits of every type but
// ParamString, as they are on the wire.
type TypedParam struct {
	Field  string
	Type   ParamType
	Number uint64
	String string
}

func (d *decoder) params(limit int) []TypedParam {
	// The shortest has an empty name, a type and a 32-bit value.
	n := d.count(limit, 12)
	v := make([]TypedParam, 0, n)
	for range n {
		p := TypedParam{Field: d.string(stringMax), Type: ParamType(d.uint32())}
		switch p.Type {
		case ParamInt, ParamUInt, ParamBoolean:
			p.Number = uint64(d.uint32())
		case ParamLLong, ParamULLong, ParamDouble:
			p.Number = d.uint64()
		case ParamString:
			p.String = d.string(stringMax)
		default:
			d.fail("parameter type %d", p.Type)
		}
		v = append(v, p)
	}
	return v
}

func appendParams(b []byte, v []TypedParam) []byte {
	b = appendUint32(b, uint32(len(v)))
	for _, p := range v {
		b = appendUint32(appendString(b, p.Field), uint32(p.Type))
		switch p.Type {
		case ParamLLong, ParamULLong, ParamDouble:
			b = appendUint64(b, p.Number)
		case ParamString:
			b = appendString(b, p.String)
		default:
			b = appendUint32(b, uint32(p.Number))
		}
	}
	return b
}

// MigratePerformArgs are the arguments of ProcDomainMigratePerform3Params.
type MigratePerformArgs struct {
	Domain Domain
	URI    *string // dconnuri
	Params []TypedParam
	Cookie []byte
	Flags  uint32
}

// DecodeMigratePerformArgs decodes the arguments of ProcDomainMigratePerform3Params.
func DecodeMigratePerformArgs(b []byte) (*MigratePerformArgs, error) {
	d := decoder{b: b}
	v := MigratePerformArgs{
		Domain: d.domain(),
		URI:    d.optString(stringMax),
		Params: d.params(migrateParamsMax),
		Cookie: d.opaque(cookieMax),
		Flags:  d.uint32(),
	}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded arguments.
func (v *MigratePerformArgs) Append(b []byte) []byte {
	b = appendOptString(appendDomain(b, v.Domain), v.URI)
	b = appendOpaque(appendParams(b, v.Params), v.Cookie)
	return appendUint32(b, v.Flags)
}

// MigrateBeginArgs are the arguments of ProcDomainMigrateBegin3Params.
type MigrateBeginArgs struct {
	Domain Domain
	Params []TypedParam
	Flags  uint32
}

// DecodeMigrateBeginArgs decodes the arguments of ProcDomainMigrateBegin3Params.
func DecodeMigrateBeginArgs(b []byte) (*MigrateBeginArgs, error) {
	d := decoder{b: b}
	v := MigrateBeginArgs{Domain: d.domain(), Params: d.params(migrateParamsMax), Flags: d.uint32()}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded arguments.
func (v *MigrateBeginArgs) Append(b []byte) []byte {
	return appendUint32(appendParams(appendDomain(b, v.Domain), v.Params), v.Flags)
}

// MigrateBegin3Args are the arguments of ProcDomainMigrateBegin3, the older form.
type MigrateBegin3Args struct {
	Domain   Domain
	XML      *string
	Flags    uint64
	Name     *string
	Resource uint64
}

// DecodeMigrateBegin3Args decodes the arguments of ProcDomainMigrateBegin3.
func DecodeMigrateBegin3Args(b []byte) (*MigrateBegin3Args, error) {
	d := decoder{b: b}
	v := MigrateBegin3Args{
		Domain: d.domain(), XML: d.optString(stringMax), Flags: d.uint64(),
		Name: d.optString(stringMax), Resource: d.uint64(),
	}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded arguments.
func (v *MigrateBegin3Args) Append(b []byte) []byte {
	b = appendOptString(appendDomain(b, v.Domain), v.XML)
	b = appendOptString(appendUint64(b, v.Flags), v.Name)
	return appendUint64(b, v.Resource)
}

// Opaque is a message of one counted string of bytes: ProgramKemari's JSON, or
// the cookie that ProcDomainMigratePerform3Params returns.
type Opaque []byte

// DecodeOpaque decodes a message of at most MaxOpaque bytes.
func DecodeOpaque(b []byte) (Opaque, error) {
	d := decoder{b: b}
	v := d.opaque(MaxOpaque)
	if err := d.done(); err != nil {
		return nil, err
	}
	return v, nil
}

// Append appends the encoded bytes.
func (v Opaque) Append(b []byte) []byte { return appendOpaque(b, v) }
