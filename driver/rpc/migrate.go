package rpc

// The messages of a migration that the client manages, beside those that begin it.

// MigrateBeginRet is the result of ProcDomainMigrateBegin3Params.
type MigrateBeginRet struct {
	Cookie []byte
	XML    string
}

// DecodeMigrateBeginRet decodes the result of ProcDomainMigrateBegin3Params.
func DecodeMigrateBeginRet(b []byte) (*MigrateBeginRet, error) {
	d := decoder{b: b}
	v := MigrateBeginRet{Cookie: d.opaque(cookieMax), XML: d.string(stringMax)}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded result.
func (v *MigrateBeginRet) Append(b []byte) []byte {
	return appendString(appendOpaque(b, v.Cookie), v.XML)
}

// MigratePrepareArgs are the arguments of ProcDomainMigratePrepare3Params.
type MigratePrepareArgs struct {
	Params []TypedParam
	Cookie []byte
	Flags  uint32
}

// DecodeMigratePrepareArgs decodes the arguments of ProcDomainMigratePrepare3Params.
func DecodeMigratePrepareArgs(b []byte) (*MigratePrepareArgs, error) {
	d := decoder{b: b}
	v := MigratePrepareArgs{Params: d.params(migrateParamsMax), Cookie: d.opaque(cookieMax), Flags: d.uint32()}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded arguments.
func (v *MigratePrepareArgs) Append(b []byte) []byte {
	return appendUint32(appendOpaque(appendParams(b, v.Params), v.Cookie), v.Flags)
}

// MigratePrepareRet is the result of ProcDomainMigratePrepare3Params.
type MigratePrepareRet struct {
	Cookie []byte
	URI    *string
}

// DecodeMigratePrepareRet decodes the result of ProcDomainMigratePrepare3Params.
func DecodeMigratePrepareRet(b []byte) (*MigratePrepareRet, error) {
	d := decoder{b: b}
	v := MigratePrepareRet{Cookie: d.opaque(cookieMax), URI: d.optString(stringMax)}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded result.
func (v *MigratePrepareRet) Append(b []byte) []byte {
	return appendOptString(appendOpaque(b, v.Cookie), v.URI)
}

// MigrateFinishArgs are the arguments of ProcDomainMigrateFinish3Params.
type MigrateFinishArgs struct {
	Params    []TypedParam
	Cookie    []byte
	Flags     uint32
	Cancelled int32
}

// DecodeMigrateFinishArgs decodes the arguments of ProcDomainMigrateFinish3Params.
func DecodeMigrateFinishArgs(b []byte) (*MigrateFinishArgs, error) {
	d := decoder{b: b}
	v := MigrateFinishArgs{
		Params: d.params(migrateParamsMax), Cookie: d.opaque(cookieMax),
		Flags: d.uint32(), Cancelled: int32(d.uint32()),
	}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded arguments.
func (v *MigrateFinishArgs) Append(b []byte) []byte {
	b = appendOpaque(appendParams(b, v.Params), v.Cookie)
	return appendUint32(appendUint32(b, v.Flags), uint32(v.Cancelled))
}

// MigrateFinishRet is the result of ProcDomainMigrateFinish3Params.
type MigrateFinishRet struct {
	Domain Domain
	Cookie []byte
}

// DecodeMigrateFinishRet decodes the result of ProcDomainMigrateFinish3Params.
func DecodeMigrateFinishRet(b []byte) (*MigrateFinishRet, error) {
	d := decoder{b: b}
	v := MigrateFinishRet{Domain: d.domain(), Cookie: d.opaque(cookieMax)}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded result.
func (v *MigrateFinishRet) Append(b []byte) []byte {
	return appendOpaque(appendDomain(b, v.Domain), v.Cookie)
}
