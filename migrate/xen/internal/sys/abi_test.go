package sys

import (
	"testing"
	"unsafe"
)

// TestLayout holds the structures to what a C compiler made of the headers of Xen
// 4.17 and 4.20 for x86-64.
func TestLayout(t *testing.T) {
	for _, c := range []struct {
		what      string
		got, want uintptr
	}{
		{"xen_domctl", unsafe.Sizeof(domctl{}), 144},
		{"xen_domctl.domain", unsafe.Offsetof(domctl{}.domain), 8},
		{"xen_domctl.u", unsafe.Offsetof(domctl{}.u), 16},
		{"getdomaininfo", unsafe.Sizeof(infoCtl{}), 112},
		{"getdomaininfo.flags", unsafe.Offsetof(infoCtl{}.flags), 4},
		{"getdomaininfo.tot_pages", unsafe.Offsetof(infoCtl{}.totPages), 8},
		{"getdomaininfo.max_pages", unsafe.Offsetof(infoCtl{}.maxPages), 16},
		{"getdomaininfo.cpu_time", unsafe.Offsetof(infoCtl{}.cpuTime), 56},
		{"getdomaininfo.nr_online_vcpus", unsafe.Offsetof(infoCtl{}.onlineVCPUs), 64},
		{"getdomaininfo.max_vcpu_id", unsafe.Offsetof(infoCtl{}.maxVCPU), 68},
		{"getdomaininfo.handle", unsafe.Offsetof(infoCtl{}.handle), 76},
		{"getdomaininfo.gpaddr_bits", unsafe.Offsetof(infoCtl{}.gpaddrBits), 96},
		{"getdomaininfo.arch_config", unsafe.Offsetof(infoCtl{}.emulation), 104},
		{"shadow_op", unsafe.Sizeof(shadowCtl{}), 40},
		{"shadow_op.mode", unsafe.Offsetof(shadowCtl{}.mode), 4},
		{"shadow_op.dirty_bitmap", unsafe.Offsetof(shadowCtl{}.bitmap), 16},
		{"shadow_op.pages", unsafe.Offsetof(shadowCtl{}.pages), 24},
		{"shadow_op.stats.fault_count", unsafe.Offsetof(shadowCtl{}.faults), 32},
		{"shadow_op.stats.dirty_count", unsafe.Offsetof(shadowCtl{}.dirty), 36},
		{"hvmcontext", unsafe.Sizeof(bufferCtl{}), 16},
		{"hvmcontext.buffer", unsafe.Offsetof(bufferCtl{}.buffer), 8},
		{"vcpuextstate", unsafe.Sizeof(extStateCtl{}), 32},
		{"vcpuextstate.xfeature_mask", unsafe.Offsetof(extStateCtl{}.features), 8},
		{"vcpuextstate.size", unsafe.Offsetof(extStateCtl{}.size), 16},
		{"vcpuextstate.buffer", unsafe.Offsetof(extStateCtl{}.buffer), 24},
		{"getpageframeinfo3", unsafe.Sizeof(typesCtl{}), 16},
		{"getpageframeinfo3.array", unsafe.Offsetof(typesCtl{}.array), 8},
		{"tsc_info", unsafe.Sizeof(tscCtl{}), 24},
		{"tsc_info.gtsc_khz", unsafe.Offsetof(tscCtl{}.khz), 4},
		{"tsc_info.incarnation", unsafe.Offsetof(tscCtl{}.incarnation), 8},
		{"tsc_info.elapsed_nsec", unsafe.Offsetof(tscCtl{}.nsec), 16},
		{"cpu_policy", unsafe.Sizeof(policyCtl{}), 40},
		{"cpu_policy.nr_msrs", unsafe.Offsetof(policyCtl{}.msrs), 4},
		{"cpu_policy.leaves", unsafe.Offsetof(policyCtl{}.leavesPtr), 8},
		{"cpu_policy.msrs", unsafe.Offsetof(policyCtl{}.msrsPtr), 16},
		{"multicall_entry", unsafe.Sizeof(multicallEntry{}), 64},
		{"multicall_entry.args", unsafe.Offsetof(multicallEntry{}.args), 16},
		{"xen_hvm_param", unsafe.Sizeof(hvmParam{}), 16},
		{"xen_hvm_param.index", unsafe.Offsetof(hvmParam{}.index), 4},
		{"xen_hvm_param.value", unsafe.Offsetof(hvmParam{}.value), 8},
		{"xen_dm_op", unsafe.Sizeof(dmOp{}), 32},
		{"xen_dm_op.u", unsafe.Offsetof(dmOp{}.extents), 8},
		{"xen_dm_op.u.opaque", unsafe.Offsetof(dmOp{}.opaque), 12},
		{"xen_dm_op_buf", unsafe.Sizeof(dmBuf{}), 16},
		{"xen_dm_op_buf.size", unsafe.Offsetof(dmBuf{}.size), 8},
		{"modified_memory_extent", unsafe.Sizeof(dmExtent{}), 16},
		{"modified_memory_extent.first_pfn", unsafe.Offsetof(dmExtent{}.first), 8},
		{"evtchn_alloc_unbound", unsafe.Sizeof(allocUnbound{}), 8},
		{"evtchn_alloc_unbound.remote_dom", unsafe.Offsetof(allocUnbound{}.remote), 2},
		{"evtchn_alloc_unbound.port", unsafe.Offsetof(allocUnbound{}.port), 4},
		{"evtchn_status", unsafe.Sizeof(evtchnStatus{}), 24},
		{"evtchn_status.port", unsafe.Offsetof(evtchnStatus{}.port), 4},
		{"evtchn_status.status", unsafe.Offsetof(evtchnStatus{}.status), 8},
		{"evtchn_status.u", unsafe.Offsetof(evtchnStatus{}.remote), 16},
		{"gnttab_query_size", unsafe.Sizeof(grantSize{}), 16},
		{"gnttab_query_size.nr_frames", unsafe.Offsetof(grantSize{}.frames), 4},
		{"gnttab_query_size.status", unsafe.Offsetof(grantSize{}.status), 12},
		{"gnttab_get_version", unsafe.Sizeof(grantVersion{}), 8},
		{"gnttab_get_version.version", unsafe.Offsetof(grantVersion{}.version), 4},
		{"grant_entry_v1", unsafe.Sizeof(grantEntry{}), 8},
		{"grant_entry_v1.frame", unsafe.Offsetof(grantEntry{}.frame), 4},
		{"grant_entry_v2", unsafe.Sizeof(grantEntry2{}), 16},
		{"grant_entry_v2.frame", unsafe.Offsetof(grantEntry2{}.frame), 8},
		{"privcmd_mmap_resource.num", unsafe.Offsetof(privcmdMapResource{}.num), 16},
		{"privcmd_mmap_resource.addr", unsafe.Offsetof(privcmdMapResource{}.addr), 24},
		{"privcmd_hypercall", unsafe.Sizeof(privcmdHypercall{}), 48},
		{"privcmd_mmapbatch_v2", unsafe.Sizeof(privcmdMapBatch{}), 32},
		{"privcmd_mmapbatch_v2.dom", unsafe.Offsetof(privcmdMapBatch{}.domain), 4},
		{"privcmd_mmapbatch_v2.addr", unsafe.Offsetof(privcmdMapBatch{}.addr), 8},
		{"privcmd_mmapbatch_v2.arr", unsafe.Offsetof(privcmdMapBatch{}.arr), 16},
		{"privcmd_mmapbatch_v2.err", unsafe.Offsetof(privcmdMapBatch{}.err), 24},
		{"ioctl_evtchn_bind_interdomain", unsafe.Sizeof(bindInterdomain{}), 8},
	} {
		if c.got != c.want {
			t.Errorf("%s: %d, want %d", c.what, c.got, c.want)
		}
	}
	// An ioctl's number has the size of its structure.
	for name, c := range map[string]struct{ ioctl, size uintptr }{
		"hypercall":        {ioctlHypercall, unsafe.Sizeof(privcmdHypercall{})},
		"mmapbatch":        {ioctlMapBatch, unsafe.Sizeof(privcmdMapBatch{})},
		"mmap resource":    {ioctlMapResource, unsafe.Sizeof(privcmdMapResource{})},
		"bind interdomain": {ioctlBindInterdomain, unsafe.Sizeof(bindInterdomain{})},
	} {
		if c.ioctl>>16&0x3fff != c.size {
			t.Errorf("ioctl %s: number says %d bytes, structure has %d", name, c.ioctl>>16&0x3fff, c.size)
		}
	}
}
