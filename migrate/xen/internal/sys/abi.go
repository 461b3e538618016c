package sys

// Hypercalls, __HYPERVISOR_* of xen.h.
const (
	hypercallMemory    = 12
	hypercallMulticall = 13
	hypercallVersion   = 17
	hypercallGrant     = 20
	hypercallEvent     = 32
	hypercallHVM       = 34
	hypercallDomctl    = 36
	hypercallDM        = 41
)

const (
	memoryMaximumGPFN   = 14 // XENMEM_maximum_gpfn
	grantQuerySize      = 6  // GNTTABOP_query_size
	grantGetVersion     = 10 // GNTTABOP_get_version
	versionVersion      = 0  // XENVER_version
	versionExtraVersion = 1  // XENVER_extraversion
	eventStatus         = 5  // EVTCHNOP_status
	eventAllocUnbound   = 6  // EVTCHNOP_alloc_unbound
	hvmGetParam         = 1  // HVMOP_get_param
	dmModifiedMemory    = 11 // XEN_DMOP_modified_memory
)

// Operations on a domain, XEN_DOMCTL_* of domctl.h.
const (
	domctlDestroy        = 2
	domctlPause          = 3
	domctlUnpause        = 4
	domctlGetInfo        = 5
	domctlShadow         = 10
	domctlSetVCPU        = 12
	domctlGetVCPU        = 13
	domctlResume         = 27
	domctlSubscribe      = 29
	domctlGetHVMContext  = 33
	domctlGetTSCInfo     = 59
	domctlGetPageTypes   = 61 // getpageframeinfo3
	domctlSetExtState    = 62 // setvcpuextstate
	domctlGetExtState    = 63
	domctlGetCPUPolicy   = 82
	shadowOff            = 0 // XEN_DOMCTL_SHADOW_OP_*
	shadowEnableLogDirty = 2
	shadowClean          = 11
	shadowFinal          = 1 // mode: take pages Xen itself has mapped for dirty
)

// domctl is struct xen_domctl.
type domctl struct {
	cmd, version uint32
	domain       uint16
	_            [3]uint16
	u            [16]uint64
}

// infoCtl is struct xen_domctl_getdomaininfo.
type infoCtl struct {
	domain      uint16
	_           uint16
	flags       uint32
	totPages    uint64
	maxPages    uint64
	_           [4]uint64 // outstanding, shared, paged; frame of shared_info
	cpuTime     uint64
	onlineVCPUs uint32
	maxVCPU     uint32
	_           uint32 // ssidref
	handle      [16]byte
	_           uint32 // cpupool
	gpaddrBits  uint8
	_           [7]uint8
	emulation   uint32 // arch_config.emulation_flags
	_           uint32
}

// Flags of infoCtl, XEN_DOMINF_*.
const (
	infoDying    = 1 << 0
	infoHVM      = 1 << 1
	infoShutdown = 1 << 2
	infoPaused   = 1 << 3
	infoReason   = 16 // shift of the shutdown reason, a byte

	emulationLAPIC = 1 // XEN_X86_EMU_LAPIC: all that a PVH guest is given
)

// shadowCtl is struct xen_domctl_shadow_op.
type shadowCtl struct {
	op, mode uint32
	_        [2]uint32 // mb, padding
	bitmap   uint64
	pages    uint64
	faults   uint32
	dirty    uint32
}

// bufferCtl is struct xen_domctl_hvmcontext, and xen_domctl_vcpucontext.
type bufferCtl struct {
	size   uint32 // or vcpu
	_      uint32
	buffer uint64
}

// extStateCtl is struct xen_domctl_vcpuextstate.
type extStateCtl struct {
	_        [2]uint32 // vcpu: the first; padding
	features uint64
	size     uint64
	buffer   uint64
}

// typesCtl is struct xen_domctl_getpageframeinfo3.
type typesCtl struct{ num, array uint64 }

// tscCtl is struct xen_domctl_tsc_info.
type tscCtl struct {
	mode, khz, incarnation uint32
	_                      uint32
	nsec                   uint64
}

// policyCtl is struct xen_domctl_cpu_policy.
type policyCtl struct {
	leaves, msrs       uint32
	leavesPtr, msrsPtr uint64
	_                  [4]uint32 // errors of setting; padding
}

const (
	leafSize = 24 // xen_cpuid_leaf_t
	msrSize  = 16 // xen_msr_entry_t

	vcpuContextSize = 5168 // vcpu_guest_context_t
	vcpuContextRAX  = 600  // user_regs.rax within

	typeMask   = 0xf << 28 // XEN_DOMCTL_PFINFO_LTAB_MASK
	typeBroken = 0xd << 28 // and above: XALLOC, XTAB
)

// multicallEntry is struct multicall_entry.
type multicallEntry struct {
	op     uint64
	result int64
	args   [6]uint64
}

// hvmParam is struct xen_hvm_param.
type hvmParam struct {
	domain uint16
	_      uint16
	index  uint32
	value  uint64
}

// dmOp is struct xen_dm_op with modified_memory, dmBuf xen_dm_op_buf, dmExtent
// xen_dm_op_modified_memory_extent.
type (
	dmOp struct {
		op, _           uint32
		extents, opaque uint32
		_               [2]uint64
	}
	dmBuf    struct{ ptr, size uint64 }
	dmExtent struct {
		n, _  uint32
		first uint64
	}
)

// allocUnbound is struct evtchn_alloc_unbound, evtchnStatus evtchn_status.
type (
	allocUnbound struct {
		domain, remote uint16
		port           uint32
	}
	evtchnStatus struct {
		domain       uint16
		_            uint16
		port, status uint32
		_            uint32 // vcpu
		remote       uint16 // of an unbound port
		_            uint16
		_            uint32
	}
)

// grantSize is struct gnttab_query_size, grantVersion gnttab_get_version, grantEntry
// grant_entry_v1, and the beginning of grant_entry_v2.
type (
	grantSize struct {
		domain uint16
		_      uint16
		frames uint32
		_      uint32 // the most there may be
		status int16
		_      uint16
	}
	grantVersion struct {
		domain  uint16
		_       uint16
		version uint32
	}
	grantEntry struct {
		flags, domain uint16
		frame         uint32
	}
	grantEntry2 struct {
		flags, domain uint16
		_             uint32
		frame         uint64
	}
)

// Flags of a grant, GTF_*.
const (
	grantTypeMask     = 3
	grantPermitAccess = 1
	grantReadOnly     = 1 << 2
	grantSubPage      = 1 << 8 // the other may only copy from it
)

const resourceGrantTable = 1 // XENMEM_resource_grant_table; id 0: the entries

const evtchnUnbound = 1 // EVTCHNSTAT_unbound

// Of the kernel: ioctls of privcmd and evtchn, with their structures.
const (
	ioctlHypercall       = 0x305000 // IOCTL_PRIVCMD_HYPERCALL
	ioctlMapBatch        = 0x205004 // IOCTL_PRIVCMD_MMAPBATCH_V2
	ioctlMapResource     = 0x205007 // IOCTL_PRIVCMD_MMAP_RESOURCE
	ioctlBindInterdomain = 0x084501 // IOCTL_EVTCHN_BIND_INTERDOMAIN
)

type (
	privcmdHypercall struct {
		op  uint64
		arg [5]uint64
	}
	privcmdMapBatch struct {
		num    uint32
		domain uint16
		_      uint16
		addr   uint64
		arr    uint64
		err    uint64
	}
	privcmdMapResource struct {
		domain        uint16
		_             uint16
		typ, id, from uint32
		num, addr     uint64
	}
	bindInterdomain struct{ domain, port uint32 }
)

// Param is the index of an HVM parameter, HVM_PARAM_* of hvm/params.h.
type Param uint32

// Parameters the code names.
const (
	ParamCallbackIRQ    Param = 0
	ParamStorePFN       Param = 1
	ParamConsolePFN     Param = 17
	ParamPagingRingPFN  Param = 27
	ParamMonitorRingPFN Param = 28
	ParamSharingRingPFN Param = 29
)

// StreamParams are the parameters an HVM_PARAMS record has, in libxenguest's order:
// store, ioreq, bufioreq, paging, monitor and sharing ring pfns, vm86 TSS, console
// pfn, ACPI ports, viridian, identity page table, generation id, ioreq server pfn
// and pages, x87 FIP width, MCA.
var StreamParams = [...]Param{1, 5, 6, 27, 28, 29, 37, 17, 19, 9, 12, 34, 32, 33, 36, 38}
