package rpc

// The procedures that answer with typed parameters.
const (
	ProcDomainGetJobInfo         Procedure = 163
	ProcDomainGetJobStats        Procedure = 298
	ProcConnectGetAllDomainStats Procedure = 344
)

// DomainFlagsArgs are the arguments of the many procedures that take a domain and
// flags, ProcDomainGetJobStats among them.
type DomainFlagsArgs struct {
	Domain Domain
	Flags  uint32
}

// DecodeDomainFlagsArgs decodes the arguments.
func DecodeDomainFlagsArgs(b []byte) (*DomainFlagsArgs, error) {
	d := decoder{b: b}
	v := DomainFlagsArgs{Domain: d.domain(), Flags: d.uint32()}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded arguments.
func (v *DomainFlagsArgs) Append(b []byte) []byte {
	return appendUint32(appendDomain(b, v.Domain), v.Flags)
}

// JobStatsRet is the result of ProcDomainGetJobStats.
type JobStatsRet struct {
	Type   int32 // virDomainJobType
	Params []TypedParam
}

// DecodeJobStatsRet decodes the result.
func DecodeJobStatsRet(b []byte) (*JobStatsRet, error) {
	d := decoder{b: b}
	v := JobStatsRet{Type: int32(d.uint32()), Params: d.params(jobStatsMax)}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded result.
func (v *JobStatsRet) Append(b []byte) []byte {
	return appendParams(appendUint32(b, uint32(v.Type)), v.Params)
}

// DomainStats is remote_domain_stats_record.
type DomainStats struct {
	Domain Domain
	Params []TypedParam
}

// DomainStatsRet is the result of ProcConnectGetAllDomainStats.
type DomainStatsRet []DomainStats

// DecodeDomainStatsRet decodes the result.
func DecodeDomainStatsRet(b []byte) (*DomainStatsRet, error) {
	d := decoder{b: b}
	// The shortest is of a domain without a name and has no parameters.
	n := d.count(domainListMax, 4+16+4+4)
	v := make(DomainStatsRet, 0, n)
	for range n {
		v = append(v, DomainStats{Domain: d.domain(), Params: d.params(domainStatsMax)})
	}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded result.
func (v *DomainStatsRet) Append(b []byte) []byte {
	b = appendUint32(b, uint32(len(*v)))
	for _, r := range *v {
		b = appendParams(appendDomain(b, r.Domain), r.Params)
	}
	return b
}
