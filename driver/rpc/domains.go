package rpc

// More codes that the driver uses or tells apart.
const (
	CodeNoSupport Code = 3  // VIR_ERR_NO_SUPPORT
	CodeXMLError  Code = 27 // VIR_ERR_XML_ERROR
)

// ListAllDomainsArgs are the arguments of ProcConnectListAllDomains.
type ListAllDomainsArgs struct {
	NeedResults int32
	Flags       uint32
}

// DecodeListAllDomainsArgs decodes the arguments of ProcConnectListAllDomains.
func DecodeListAllDomainsArgs(b []byte) (*ListAllDomainsArgs, error) {
	d := decoder{b: b}
	v := ListAllDomainsArgs{NeedResults: int32(d.uint32()), Flags: d.uint32()}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded arguments.
func (v *ListAllDomainsArgs) Append(b []byte) []byte {
	return appendUint32(appendUint32(b, uint32(v.NeedResults)), v.Flags)
}

// ListAllDomainsRet is the result of ProcConnectListAllDomains.
type ListAllDomainsRet struct {
	Domains []Domain // empty unless NeedResults
	Count   uint32
}

// DecodeListAllDomainsRet decodes the result of ProcConnectListAllDomains.
func DecodeListAllDomainsRet(b []byte) (*ListAllDomainsRet, error) {
	d := decoder{b: b}
	v := ListAllDomainsRet{Domains: d.domains(), Count: d.uint32()}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded result.
func (v *ListAllDomainsRet) Append(b []byte) []byte {
	return appendUint32(appendDomains(b, v.Domains), v.Count)
}

func (d *decoder) domains() []Domain {
	// The shortest has an empty name.
	n := d.count(domainListMax, 4+16+4)
	v := make([]Domain, 0, n)
	for range n {
		v = append(v, d.domain())
	}
	return v
}

func appendDomains(b []byte, v []Domain) []byte {
	b = appendUint32(b, uint32(len(v)))
	for _, dom := range v {
		b = appendDomain(b, dom)
	}
	return b
}

// DomainState is the result of ProcDomainGetState.
type DomainState struct{ State, Reason int32 }

// DecodeDomainState decodes the result of ProcDomainGetState.
func DecodeDomainState(b []byte) (*DomainState, error) {
	d := decoder{b: b}
	v := DomainState{State: int32(d.uint32()), Reason: int32(d.uint32())}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded result.
func (v *DomainState) Append(b []byte) []byte {
	return appendUint32(appendUint32(b, uint32(v.State)), uint32(v.Reason))
}

// DomainInfo is the result of ProcDomainGetInfo.
type DomainInfo struct {
	State          uint32
	MaxMem, Memory uint64 // in KiB
	VCPUs          uint32
	CPUTime        uint64 // in ns
}

// DecodeDomainInfo decodes the result of ProcDomainGetInfo.
func DecodeDomainInfo(b []byte) (*DomainInfo, error) {
	d := decoder{b: b}
	v := DomainInfo{State: d.uint32(), MaxMem: d.uint64(), Memory: d.uint64(), VCPUs: d.uint32(), CPUTime: d.uint64()}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded result.
func (v *DomainInfo) Append(b []byte) []byte {
	b = appendUint64(appendUint64(appendUint32(b, v.State), v.MaxMem), v.Memory)
	return appendUint64(appendUint32(b, v.VCPUs), v.CPUTime)
}

// JobInfo is the result of ProcDomainGetJobInfo. Times are in ms, sizes in bytes.
type JobInfo struct {
	Type                                    int32
	TimeElapsed, TimeRemaining              uint64
	DataTotal, DataProcessed, DataRemaining uint64
	MemTotal, MemProcessed, MemRemaining    uint64
	FileTotal, FileProcessed, FileRemaining uint64
}

func (v *JobInfo) numbers() [11]*uint64 {
	return [...]*uint64{
		&v.TimeElapsed, &v.TimeRemaining, &v.DataTotal, &v.DataProcessed, &v.DataRemaining,
		&v.MemTotal, &v.MemProcessed, &v.MemRemaining, &v.FileTotal, &v.FileProcessed, &v.FileRemaining,
	}
}

// DecodeJobInfo decodes the result of ProcDomainGetJobInfo.
func DecodeJobInfo(b []byte) (*JobInfo, error) {
	d := decoder{b: b}
	v := JobInfo{Type: int32(d.uint32())}
	for _, n := range v.numbers() {
		*n = d.uint64()
	}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded result.
func (v *JobInfo) Append(b []byte) []byte {
	b = appendUint32(b, uint32(v.Type))
	for _, n := range v.numbers() {
		b = appendUint64(b, *n)
	}
	return b
}

// DomainStatsArgs are the arguments of ProcConnectGetAllDomainStats.
type DomainStatsArgs struct {
	Domains []Domain // none for all that Flags select
	Stats   uint32   // none for all groups
	Flags   uint32
}

// DecodeDomainStatsArgs decodes the arguments of ProcConnectGetAllDomainStats.
func DecodeDomainStatsArgs(b []byte) (*DomainStatsArgs, error) {
	d := decoder{b: b}
	v := DomainStatsArgs{Domains: d.domains(), Stats: d.uint32(), Flags: d.uint32()}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded arguments.
func (v *DomainStatsArgs) Append(b []byte) []byte {
	return appendUint32(appendUint32(appendDomains(b, v.Domains), v.Stats), v.Flags)
}

// MetadataElement is VIR_DOMAIN_METADATA_ELEMENT: an element in a namespace.
const MetadataElement = 2

// SetMetadataArgs are the arguments of ProcDomainSetMetadata.
type SetMetadataArgs struct {
	Domain   Domain
	Type     int32
	Metadata *string // nil removes it
	Key, URI *string
	Flags    uint32
}

// DecodeSetMetadataArgs decodes the arguments of ProcDomainSetMetadata.
func DecodeSetMetadataArgs(b []byte) (*SetMetadataArgs, error) {
	d := decoder{b: b}
	v := SetMetadataArgs{
		Domain: d.domain(), Type: int32(d.uint32()), Metadata: d.optString(stringMax),
		Key: d.optString(stringMax), URI: d.optString(stringMax), Flags: d.uint32(),
	}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded arguments.
func (v *SetMetadataArgs) Append(b []byte) []byte {
	b = appendOptString(appendUint32(appendDomain(b, v.Domain), uint32(v.Type)), v.Metadata)
	return appendUint32(appendOptString(appendOptString(b, v.Key), v.URI), v.Flags)
}

// MigratePerform3Args are the arguments of ProcDomainMigratePerform3, the older
// form.
type MigratePerform3Args struct {
	Domain    Domain
	XML       *string
	Cookie    []byte
	ConnURI   *string // dconnuri: the destination's libvirt, if it is peer to peer
	URI       *string
	Flags     uint64
	Name      *string
	Bandwidth uint64
}

// DecodeMigratePerform3Args decodes the arguments of ProcDomainMigratePerform3.
func DecodeMigratePerform3Args(b []byte) (*MigratePerform3Args, error) {
	d := decoder{b: b}
	v := MigratePerform3Args{
		Domain: d.domain(), XML: d.optString(stringMax), Cookie: d.opaque(cookieMax),
		ConnURI: d.optString(stringMax), URI: d.optString(stringMax), Flags: d.uint64(),
		Name: d.optString(stringMax), Bandwidth: d.uint64(),
	}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded arguments.
func (v *MigratePerform3Args) Append(b []byte) []byte {
	b = appendOpaque(appendOptString(appendDomain(b, v.Domain), v.XML), v.Cookie)
	b = appendUint64(appendOptString(appendOptString(b, v.ConnURI), v.URI), v.Flags)
	return appendUint64(appendOptString(b, v.Name), v.Bandwidth)
}
