package driver

import (
	"fmt"

	"kemari/driver/rpc"
	"kemari/xml"
)

// verdict says whether the host there can be the standby of the guest here, with
// all that stands against it.
func verdict(g Guest, here Host, there *checkReply) error {
	rs := verdictReasons(g, here, there)
	if here.Boot == there.Host.Boot {
		return refuse(rpc.CodeInvalidArg, rs[0].Text, rs[0].Remedy)
	}
	return refuseAll(rs)
}

func verdictReasons(g Guest, here Host, there *checkReply) []xml.Reason {
	if here.Boot == there.Host.Boot {
		// All else would follow from it, and only confuse.
		return []xml.Reason{{Text: "the standby is this very host", Remedy: "name another one"}}
	}
	var rs []xml.Reason
	name := there.Host.Name
	if here.Xen.Release != there.Host.Xen.Release {
		rs = append(rs, xml.Reason{
			Text:   fmt.Sprintf("Xen is %s here and %s on %s, and the state of a guest fits only the same release", here.Xen, there.Host.Xen, name),
			Remedy: "bring both hosts to the same release",
		})
	}
	rs = append(rs, deviceModelReasons(g, there)...)
	rs = append(rs, there.conflicts(g.Name, name)...)
	if need := neededKiB(g.MemoryKiB); there.Shadow == "" && there.FreeMemoryKiB < need {
		rs = append(rs, xml.Reason{
			Text:   fmt.Sprintf("%s has %d MiB of memory free, and the guest needs %d", name, there.FreeMemoryKiB/1024, (need+1023)/1024),
			Remedy: "free some there, or give its dom0 less (xl mem-set 0 …)",
		})
	}
	return rs
}

// neededKiB is what Xen takes for a guest: its memory, the tables that map it,
// and some for itself.
func neededKiB(memory uint64) uint64 { return memory + memory/64 + memoryMarginKiB }

// conflict is conflicts as one error.
func (r *checkReply) conflict(name, host string) error { return refuseAll(r.conflicts(name, host)) }

// conflicts are the domains and protections that are in the way at the standby.
func (r *checkReply) conflicts(name, host string) []xml.Reason {
	var rs []xml.Reason
	add := func(remedy, format string, a ...any) {
		rs = append(rs, xml.Reason{Text: fmt.Sprintf(format, a...), Remedy: remedy})
	}
	if r.NameTaken != "" {
		add("rename one of the two", "%s has another domain %q, of UUID %s", host, name, r.NameTaken)
	}
	if r.UUIDTaken != "" {
		add("undefine that, or give one of the two a UUID of its own", "%s has a domain of the same UUID, %q", host, r.UUIDTaken)
	}
	if r.Active && r.Shadow == "" { // a shadow is a domain too
		add("destroy one of the two: never may both run", "the guest is active on %s too", host)
	}
	if r.Primary != "" {
		add("end that there first", "%s is protecting a guest of the same UUID (%s)", host, r.Primary)
	}
	if r.Shadow != "" {
		add(fmt.Sprintf("end it there with: virsh -c %s domjobabort %s", uri, name), "a shadow of it, for %s, stands on %s already (%s)", r.ShadowOf, host, r.Shadow)
	}
	return rs
}
