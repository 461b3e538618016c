package output

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/florianl/go-tc"
	link "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// remove takes interfaces off their plugs without losing a frame, as far as there
// is anything: each step is fine with having been done before.
//
// A few frames that are sent just then may overtake others, as with any change
// of a network's paths. The order of the steps matters. Sealed epochs go out before the one being filled; then the
// plug passes, the redirect goes, the frames that were on their way when it went
// leave, and only then the ifb may go, which would take them with it.
func (k *kernel) remove(devs []*device) error {
	if len(devs) == 0 {
		return nil
	}
	var errs []error
	fail := func(d *device, step string, err error) {
		if err != nil && !isGone(err) {
			errs = append(errs, fmt.Errorf("unplug %s: %s: %w", d.vif, step, err))
		}
	}
	for _, d := range devs {
		fail(d, "let frames out", k.letOut(d))
	}
	for _, d := range devs {
		// For the order's sake: once the redirect is gone, new frames overtake what
		// is still in the plug. Under traffic there may be some at any moment, so
		// this waits for a good one and not for ever.
		_ = k.drain(settleTime, func() (bool, error) {
			empty, err := k.plugEmpty(d)
			if !empty || err != nil {
				return false, err
			}
			return k.ifbEmpty(d)
		})
		fail(d, "remove the redirect", k.unredirect(d))
	}
	gracePeriod() // nobody is about to put a frame into a plug any more
	for _, d := range devs {
		fail(d, "drain the plug", k.drain(drainTime, func() (bool, error) { return k.plugEmpty(d) }))
	}
	gracePeriod() // nobody is about to put one from a plug into its ifb
	for _, d := range devs {
		fail(d, "drain the ifb", k.drain(drainTime, func() (bool, error) { return k.ifbEmpty(d) }))
		// By index: a name could be somebody else's by now.
		err := k.links.LinkDel(&link.Ifb{LinkAttrs: link.LinkAttrs{Index: int(d.ifb)}})
		fail(d, "remove the ifb", err)
	}
	return errors.Join(errs...)
}

// letOut opens the bands from the oldest epoch to the newest.
func (k *kernel) letOut(d *device) error {
	qdiscs, err := k.qdiscs()
	if err != nil {
		return err
	}
	fill, ok := bandPass, false
	for _, q := range qdiscs {
		if q.ifindex == d.ifb && q.handle == rootHandle {
			fill, ok = q.fillBand()
		}
	}
	if !ok || fill == bandPass {
		return nil // it was never holding, or there was no time to build it
	}
	for band := nextBand(fill); ; band = nextBand(band) {
		if err := k.request(d.open[band]); err != nil || band == fill {
			return err
		}
		// A band that comes later may have priority, and must not overtake.
		for _, q := range qdiscs {
			if q.ifindex != d.ifb || q.handle != bandHandle(band) || q.qlen == 0 {
				continue
			}
			if err := k.drain(drainTime, func() (bool, error) { return k.plugEmpty(d, band) }); err != nil {
				return err
			}
		}
	}
}

// unredirect removes the filter, and the clsact qdisc if it was there for ours only.
func (k *kernel) unredirect(d *device) error {
	if d.vifIndex == 0 {
		return nil // it was not labelled yet, and the redirect comes last
	}
	if _, err := k.links.LinkByIndex(int(d.vifIndex)); err != nil {
		return err
	}
	// Without a clsact there can be no filter, and asking is an error.
	missing := true
	qdiscs, err := k.qdiscs()
	if err != nil {
		return err
	}
	for _, q := range qdiscs {
		if q.ifindex == d.vifIndex && q.kind == "clsact" {
			missing = false
		}
	}
	if missing {
		return nil
	}
	if err := k.tc.Filter().Delete(d.filter()); err != nil && !isGone(err) {
		return err
	}
	if !d.ownClsact {
		return nil
	}
	for _, hook := range []uint32{tc.HandleMinIngress, tc.HandleMinEgress} {
		// Somebody may use it by now.
		if some, err := k.filters(d.vifIndex, hook); some || err != nil {
			return err
		}
	}
	return k.tc.Qdisc().Delete(d.clsact())
}

// drain waits until there is nothing left.
func (k *kernel) drain(limit time.Duration, empty func() (bool, error)) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		ok, err := empty()
		if ok || err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("frames are left after %v", limit)
		}
	}
}

// plugEmpty: no frame waits in any of these bands, of all if none is named.
func (k *kernel) plugEmpty(d *device, bands ...int) (bool, error) {
	qdiscs, err := k.qdiscs()
	if err != nil {
		return false, err
	}
	for _, q := range qdiscs {
		if q.ifindex == d.ifb && q.qlen > 0 && (len(bands) == 0 ||
			slices.ContainsFunc(bands, func(band int) bool { return q.handle == bandHandle(band) })) {
			return false, nil
		}
	}
	return true, nil
}

// ifbEmpty: all that came into the ifb has gone back to its interface. It counts
// what comes in as received, and what goes out as sent.
func (k *kernel) ifbEmpty(d *device) (bool, error) {
	l, err := k.links.LinkByIndex(int(d.ifb))
	if err != nil {
		return false, err
	}
	s := l.Attrs().Statistics
	return s == nil || s.RxPackets == s.TxPackets+s.RxDropped, nil
}

// gracePeriod waits until every frame that is being handled now has been: the
// kernel handles them within RCU read sections.
func gracePeriod() {
	const membarrierGlobal = 1 // MEMBARRIER_CMD_GLOBAL: a synchronize_rcu
	if _, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, membarrierGlobal, 0, 0); errno != 0 {
		// A kernel with nohz_full does not offer it.
		time.Sleep(50 * time.Millisecond)
	}
}

// find returns the plugs of these interfaces, and those whose interface is gone.
func (k *kernel) find(vifs []string) ([]*device, error) {
	links, err := k.list()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	byName, byIndex := map[string]link.Link{}, map[uint32]bool{}
	for _, l := range links {
		byName[l.Attrs().Name] = l
		byIndex[uint32(l.Attrs().Index)] = true
	}
	named := map[string]string{} // ifb to vif
	for _, vif := range vifs {
		named[ifbName(vif)] = vif
	}
	var devs []*device
	for _, l := range links {
		if l.Type() != "ifb" {
			continue
		}
		a := l.Attrs()
		mark, ours := parseLabel(a.Alias)
		vif, asked := named[a.Name]
		switch {
		case asked && ours:
		case asked && a.Alias == "":
			// Its maker died before it could label it.
			mark = label{vif: vif}
		case ours && !byIndex[mark.index] && byName[mark.vif] == nil:
		default:
			continue
		}
		d := &device{vif: mark.vif, vifIndex: mark.index, ifb: uint32(a.Index), ownClsact: mark.ownClsact}
		d.prepare()
		devs = append(devs, d)
	}
	return devs, nil
}

// list lists all interfaces, again if something changed meanwhile.
func (k *kernel) list() (links []link.Link, err error) {
	for range 10 {
		links, err = k.links.LinkList()
		if !errors.Is(err, link.ErrDumpInterrupted) {
			break
		}
	}
	return links, err
}
