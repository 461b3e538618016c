package sys

import (
	"errors"
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrNoDomain means that there is no such domain, or none any more.
var ErrNoDomain = errors.New("there is no such domain")

// Shutdown is why a domain has shut down, SHUTDOWN_* of sched.h.
type Shutdown uint8

// ShutdownSuspend is a guest that has suspended itself.
const ShutdownSuspend Shutdown = 2

// Info is what the hypervisor knows of a domain.
type Info struct {
	HVM           bool // or PVH; not PV
	DeviceModel   bool // it has a device model: HVM and not PVH
	Dying, Paused bool
	Down          bool // it has shut down, for Reason
	Reason        Shutdown
	TotPages      uint64 // pages allocated to it, those still mapped elsewhere included
	Handle        [16]byte
}

func (c *infoCtl) info() Info {
	return Info{
		HVM:         c.flags&infoHVM != 0,
		DeviceModel: c.flags&infoHVM != 0 && c.emulation&^emulationLAPIC != 0,
		Dying:       c.flags&infoDying != 0,
		Paused:      c.flags&infoPaused != 0,
		Down:        c.flags&infoShutdown != 0,
		Reason:      Shutdown(c.flags >> infoReason),
		TotPages:    c.totPages,
		Handle:      c.handle,
	}
}

// Domain is one domain. Its methods are called by one goroutine at a time.
type Domain struct {
	c     *Conn
	id    uint16
	limit uint64 // pfns are below it

	// Of Standing, in hypercall memory.
	args   *buffer // operations and small structures
	bitmap *buffer
	state  *buffer // HVM context
	types  *buffer // of Populated
	vcpu   *buffer // vCPU 0's context
	ext    *buffer // and its extended state, of
	xcr    uint64  // these features; none where the host has no XSAVE
	extLen uint64  // what of ext was read last
}

// Layout of Domain.args.
const (
	maxCalls = 32                    // multicallEntry
	maxCtls  = 8                     // domctl
	nParams  = len(StreamParams) + 1 // hvmParam; the callback's last

	argsCtl    uintptr = maxCalls * 64
	argsParams         = argsCtl + maxCtls*144
	argsDM             = argsParams + uintptr(nParams)*16 // dmOp
	argsDMBufs         = argsDM + 32                      // dmBuf × 2
	argsExtent         = argsDMBufs + 2*16                // dmExtent
	argsSize           = argsExtent + 16

	maxExtState = 1 << 16 // of the processors there are the largest has 11 KiB

	stateMargin = 4096 // what an HVM context may grow by meanwhile
)

// Domain opens a domain. Close frees it; the connection stays its opener's.
func (c *Conn) Domain(id uint16) (*Domain, error) {
	d := &Domain{c: c, id: id}
	if _, err := d.Info(); err != nil {
		return nil, err
	}
	return d, nil
}

// Close frees what was allocated. Idempotent.
func (d *Domain) Close() {
	for _, b := range []*buffer{d.args, d.bitmap, d.state, d.types, d.vcpu, d.ext} {
		b.free()
	}
}

// Limit is what Prepare found: pfns are below it.
func (d *Domain) Limit() uint64 { return d.limit }

// ctl makes one operation on the domain, outside of Standing.
func (d *Domain) ctl(what string, cmd uint32, set, get func(op *domctl)) error {
	d.c.mu.Lock()
	defer d.c.mu.Unlock()
	op, addr := at[domctl](d.c.scratch, 0)
	*op = domctl{cmd: cmd, version: d.c.version, domain: d.id}
	if set != nil {
		set(op)
	}
	if _, err := d.c.call(what, hypercallDomctl, addr); err != nil {
		if errors.Is(err, unix.ESRCH) {
			err = fmt.Errorf("%w: %d: %w", ErrNoDomain, d.id, err)
		}
		return err
	}
	if get != nil {
		get(op)
	}
	return nil
}

// Info tells about the domain, or returns ErrNoDomain.
func (d *Domain) Info() (info Info, err error) {
	var found uint16
	err = d.ctl("get domain information", domctlGetInfo, nil, func(op *domctl) {
		i := payload[infoCtl](op)
		found, info = i.domain, i.info()
	})
	if err == nil && found != d.id { // Xen 4.17 goes on to the next one
		return Info{}, fmt.Errorf("%w: %d", ErrNoDomain, d.id)
	}
	return info, err
}

func (d *Domain) shadow(what string, s shadowCtl) error {
	return d.ctl(what, domctlShadow, func(op *domctl) { *payload[shadowCtl](op) = s }, nil)
}

// EnableLogDirty begins to log which pages the guest changes, with none logged yet.
// EINVAL: it is on already.
func (d *Domain) EnableLogDirty() error {
	return d.shadow("enable log-dirty mode", shadowCtl{op: shadowEnableLogDirty})
}

// DisableLogDirty ends it. EINVAL: it is off already.
func (d *Domain) DisableLogDirty() error {
	return d.shadow("disable log-dirty mode", shadowCtl{op: shadowOff})
}

// Pause keeps the guest's processors from running, once more than before.
func (d *Domain) Pause() error { return d.ctl("pause", domctlPause, nil, nil) }

// Unpause takes one Pause back, also of somebody else's. EINVAL: there is none.
func (d *Domain) Unpause() error { return d.ctl("unpause", domctlUnpause, nil, nil) }

// Destroy ends the domain: it does not run any more, and is gone once nobody has any
// of its memory mapped. It is no error if it is gone already.
func (d *Domain) Destroy() error {
	for {
		err := d.ctl("destroy", domctlDestroy, nil, nil)
		switch {
		case errors.Is(err, ErrNoDomain):
			return nil
		case !errors.Is(err, unix.EAGAIN): // it takes its time, and is to be asked again
			return err
		}
	}
}

// Subscribe lets the guest's suspending be told by its event channel port instead
// of to xenstore; 0 ends that.
func (d *Domain) Subscribe(port uint32) error {
	return d.ctl("subscribe to suspends", domctlSubscribe, func(op *domctl) { *payload[uint32](op) = port }, nil)
}

// Param reads an HVM parameter.
func (d *Domain) Param(p Param) (uint64, error) {
	d.c.mu.Lock()
	defer d.c.mu.Unlock()
	h, addr := at[hvmParam](d.c.scratch, 0)
	*h = hvmParam{domain: d.id, index: uint32(p)}
	_, err := d.c.call("get HVM parameter", hypercallHVM, hvmGetParam, addr)
	return h.value, err
}

// AllocPort allocates an event channel port in the guest for dom0 to bind.
func (d *Domain) AllocPort() (uint32, error) {
	d.c.mu.Lock()
	defer d.c.mu.Unlock()
	a, addr := at[allocUnbound](d.c.scratch, 0)
	*a = allocUnbound{domain: d.id} // for domain 0
	_, err := d.c.call("allocate an event channel", hypercallEvent, eventAllocUnbound, addr)
	return a.port, err
}

// PortFree tells whether the guest's port is one that AllocPort made and nobody is
// bound to.
func (d *Domain) PortFree(port uint32) bool {
	d.c.mu.Lock()
	defer d.c.mu.Unlock()
	s, addr := at[evtchnStatus](d.c.scratch, 0)
	*s = evtchnStatus{domain: d.id, port: port}
	_, err := d.c.call("event channel status", hypercallEvent, eventStatus, addr)
	return err == nil && s.status == evtchnUnbound && s.remote == 0
}

// Policies are the bodies of a stream's CPUID_POLICY and MSR_POLICY records.
func (d *Domain) Policies() (cpuid, msr []byte, err error) {
	const leaves, msrs = 4096, 4096 // far more than there can be; fewer are ENOBUFS
	b, err := d.c.newBuffer(leaves*leafSize + msrs*msrSize)
	if err != nil {
		return nil, nil, err
	}
	defer b.free()
	err = d.ctl("get processor policy", domctlGetCPUPolicy, func(op *domctl) {
		*payload[policyCtl](op) = policyCtl{
			leaves: leaves, msrs: msrs,
			leavesPtr: b.addr(), msrsPtr: b.addr() + leaves*leafSize,
		}
	}, func(op *domctl) {
		p := payload[policyCtl](op)
		cpuid = append(cpuid, b.mem[:leafSize*min(p.leaves, leaves)]...)
		msr = append(msr, b.mem[leaves*leafSize:][:msrSize*min(p.msrs, msrs)]...)
	})
	return cpuid, msr, err
}

// TypesBatch is how many pages Populated may be asked for at once.
const TypesBatch = 1024

// Populated tells of each page whether the guest has memory there: ok[i] of pfns[i].
func (d *Domain) Populated(pfns []uint64, ok []bool) error {
	if len(pfns) > TypesBatch {
		return fmt.Errorf("%d pages: %w", len(pfns), syscall.E2BIG)
	}
	if d.types == nil {
		var err error
		if d.types, err = d.c.newBuffer(TypesBatch * 8); err != nil {
			return err
		}
	}
	b := d.types
	types := unsafe.Slice((*uint64)(unsafe.Pointer(&b.mem[0])), TypesBatch)
	copy(types, pfns)
	err := d.ctl("get page types", domctlGetPageTypes, func(op *domctl) {
		*payload[typesCtl](op) = typesCtl{num: uint64(len(pfns)), array: b.addr()}
	}, nil)
	if err != nil {
		return err
	}
	for i := range pfns {
		ok[i] = types[i]&typeMask < typeBroken
	}
	return nil
}

// HighestPage is the highest pfn there has been memory at.
func (d *Domain) HighestPage() (uint64, error) {
	d.c.mu.Lock()
	defer d.c.mu.Unlock()
	id, addr := at[uint16](d.c.scratch, 0)
	*id = d.id
	top, err := d.c.call("get the highest page", hypercallMemory, memoryMaximumGPFN, addr)
	return uint64(top), err
}

// Prepare allocates what Clean, Stand and Resume need. It must come first, and
// again if they say ENOSPC.
func (d *Domain) Prepare() error {
	limit, err := d.HighestPage()
	if err != nil {
		return err
	}
	d.limit = limit + 1
	var size uint32
	err = d.ctl("get the size of the HVM context", domctlGetHVMContext, nil,
		func(op *domctl) { size = payload[bufferCtl](op).size })
	if err != nil {
		return err
	}
	var most uint64
	err = d.ctl("get the size of the extended processor state", domctlGetExtState, nil, func(op *domctl) {
		e := payload[extStateCtl](op)
		d.xcr, most = e.features, e.size
	})
	if err != nil {
		return err
	}
	for _, n := range []struct {
		b    **buffer
		size int
	}{
		{&d.ext, int(min(most, maxExtState))},
		{&d.args, int(argsSize)},
		{&d.bitmap, int(d.limit+63) / 64 * 8},
		{&d.state, int(size) + stateMargin},
		{&d.vcpu, vcpuContextSize},
	} {
		if *n.b != nil && len((*n.b).mem) >= n.size {
			continue
		}
		(*n.b).free()
		if *n.b, err = d.c.newBuffer(n.size); err != nil {
			return err
		}
	}
	return nil
}

// Bitmap is what Clean and Stand read: bit i of word w is page 64*w+i. It is valid
// until the next of them.
func (d *Domain) Bitmap() []uint64 {
	return unsafe.Slice((*uint64)(unsafe.Pointer(&d.bitmap.mem[0])), (d.limit+63)/64)
}

// Dirty is what the hypervisor counted beside the bitmap.
type Dirty struct {
	Pages uint32 // bits set since the last Clean or Stand
}

// calls is a multicall being put together.
type calls struct {
	d    *Domain
	n    int
	ctls int
}

func (m *calls) entry(i int) *multicallEntry {
	e, _ := at[multicallEntry](m.d.args, uintptr(i)*64)
	return e
}

func (m *calls) add(op uint64, args ...uint64) int {
	e := m.entry(m.n)
	*e = multicallEntry{op: op}
	copy(e.args[:], args)
	m.n++
	return m.n - 1
}

func (m *calls) ctl(cmd uint32) (*domctl, int) {
	op, addr := at[domctl](m.d.args, argsCtl+uintptr(m.ctls)*144)
	*op = domctl{cmd: cmd, version: m.d.c.version, domain: m.d.id}
	m.ctls++
	return op, m.add(hypercallDomctl, addr)
}

// canary marks a page as changed.
func (m *calls) canary(pfn uint64) {
	d := m.d
	dm, dmAddr := at[dmOp](d.args, argsDM)
	*dm = dmOp{op: dmModifiedMemory, extents: 1}
	ex, exAddr := at[dmExtent](d.args, argsExtent)
	*ex = dmExtent{n: 1, first: pfn}
	b0, bufs := at[dmBuf](d.args, argsDMBufs)
	*b0 = dmBuf{ptr: dmAddr, size: uint64(unsafe.Sizeof(*dm))}
	b1, _ := at[dmBuf](d.args, argsDMBufs+16)
	*b1 = dmBuf{ptr: exAddr, size: uint64(unsafe.Sizeof(*ex))}
	m.add(hypercallDM, uint64(d.id), 2, bufs)
}

// do makes the hypercalls, and returns the first one's error that has one.
func (m *calls) do(what string) error {
	if _, err := m.d.c.call(what, hypercallMulticall, m.d.args.addr(), uint64(m.n)); err != nil {
		return err
	}
	for i := range m.n {
		if e := m.entry(i); e.result < 0 {
			err := syscall.Errno(-e.result)
			if err == unix.ESRCH {
				return fmt.Errorf("%s: %w: %d", what, ErrNoDomain, m.d.id)
			}
			return fmt.Errorf("%s: hypercall %d (%d): %w", what, i, e.op, err)
		}
	}
	return nil
}

// clean reads and clears the bitmap. It is no part of a multicall: Xen interrupts it
// where it takes long, and a multicall does not go on with it but begins it anew,
// which is refused, with the guest left paused.
func (d *Domain) clean(mode uint32) (dirty Dirty, err error) {
	err = d.ctl("read the dirty bitmap", domctlShadow, func(op *domctl) {
		*payload[shadowCtl](op) = shadowCtl{op: shadowClean, mode: mode, bitmap: d.bitmap.addr(), pages: d.limit}
	}, func(op *domctl) {
		dirty.Pages = payload[shadowCtl](op).dirty
	})
	return dirty, err
}

// Clean reads and clears the bitmap of a guest that runs, and at once marks the
// page canary as changed: if it is not, the next time, then somebody else has
// cleared the bitmap meanwhile, or ended the logging.
func (d *Domain) Clean(canary uint64) (Dirty, error) {
	dirty, err := d.clean(0)
	if err != nil {
		return Dirty{}, err
	}
	m := calls{d: d}
	m.canary(canary)
	return dirty, m.do("mark a page as changed")
}

// State is of a guest that stands.
type State struct {
	Info  Info
	Dirty Dirty

	TSCMode, TSCkHz, TSCIncarnation uint32
	TSCNsec                         uint64

	Context []byte // the HVM context; valid until the next hypercall of the Domain's
	Params  [len(StreamParams)]uint64
}

// Stand reads all that a checkpoint needs of a guest that stands, in two hypercalls:
// the bitmap as Clean does, with what Xen itself has changed; and the processors'
// state with what Resume needs.
func (d *Domain) Stand(canary uint64, st *State) error {
	dirty, err := d.clean(shadowFinal)
	if err != nil {
		return err
	}
	m := calls{d: d}
	m.canary(canary)
	op, _ := m.ctl(domctlGetInfo)
	info := payload[infoCtl](op)
	op, _ = m.ctl(domctlGetTSCInfo)
	tsc := payload[tscCtl](op)
	op, _ = m.ctl(domctlGetHVMContext)
	hvm := payload[bufferCtl](op)
	*hvm = bufferCtl{size: uint32(len(d.state.mem)), buffer: d.state.addr()}
	for i := range nParams {
		p, addr := at[hvmParam](d.args, argsParams+uintptr(i)*16)
		*p = hvmParam{domain: d.id, index: uint32(ParamCallbackIRQ)}
		if i < len(StreamParams) {
			p.index = uint32(StreamParams[i])
		}
		m.add(hypercallHVM, hvmGetParam, addr)
	}
	ext := m.readVCPU()
	if err := m.do("read the standing guest"); err != nil {
		return err
	}
	d.extLen = ext.size
	if info.domain != d.id {
		return fmt.Errorf("%w: %d", ErrNoDomain, d.id)
	}
	st.Info, st.Dirty = info.info(), dirty
	st.TSCMode, st.TSCkHz, st.TSCIncarnation, st.TSCNsec = tsc.mode, tsc.khz, tsc.incarnation, tsc.nsec
	st.Context = d.state.mem[:min(int(hvm.size), len(d.state.mem))]
	for i := range st.Params {
		p, _ := at[hvmParam](d.args, argsParams+uintptr(i)*16)
		st.Params[i] = p.value
	}
	return nil
}

// readVCPU reads of vCPU 0 what Resume has to write. Xen's call that sets registers
// clears those that only XSAVE knows, such as the upper halves of AVX's, and a guest
// that is merely resumed does not load them again: so they are set after it.
func (m *calls) readVCPU() (ext *extStateCtl) {
	d := m.d
	op, _ := m.ctl(domctlGetVCPU)
	*payload[bufferCtl](op) = bufferCtl{buffer: d.vcpu.addr()}
	if d.xcr == 0 {
		return &extStateCtl{}
	}
	op, _ = m.ctl(domctlGetExtState)
	ext = payload[extStateCtl](op)
	*ext = extStateCtl{features: d.xcr, size: uint64(len(d.ext.mem)), buffer: d.ext.addr()}
	return ext
}

// Resume lets a guest run on that has suspended itself: its suspend hypercall
// returns 1, which tells it that it goes on in the same domain, with its devices
// connected. It reads the processor's state anew unless fresh says that Stand has
// just done so. The caller has seen that the guest stands.
func (d *Domain) Resume(fresh bool) error {
	irq, _ := at[hvmParam](d.args, argsParams+uintptr(len(StreamParams))*16)
	if !fresh {
		m := calls{d: d}
		ext := m.readVCPU()
		p, addr := at[hvmParam](d.args, argsParams+uintptr(len(StreamParams))*16)
		*p = hvmParam{domain: d.id, index: uint32(ParamCallbackIRQ)}
		m.add(hypercallHVM, hvmGetParam, addr)
		if err := m.do("read the standing guest's processor"); err != nil {
			return err
		}
		d.extLen = ext.size
	}
	m := calls{d: d}
	// A guest without PV drivers has made no hypercall that could return.
	if irq.value != 0 {
		*(*uint64)(unsafe.Pointer(&d.vcpu.mem[vcpuContextRAX])) = 1
		op, _ := m.ctl(domctlSetVCPU)
		*payload[bufferCtl](op) = bufferCtl{buffer: d.vcpu.addr()}
		if d.extLen > 0 {
			op, _ := m.ctl(domctlSetExtState)
			*payload[extStateCtl](op) = extStateCtl{size: d.extLen, buffer: d.ext.addr()}
		}
	}
	m.ctl(domctlResume)
	return m.do("resume the guest")
}
