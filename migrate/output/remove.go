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
// The order of the steps matters. Epochs go out from the oldest to the newest; then
// the plug passes, the redirect goes, the frames that were on their way when it
// went leave, and only then the ifb may go, which would take them with it. Where one
// of these steps fails the ifb stays, passing: a redirect to nowhere would cut the
// guest off. Cleanup can be tried again.
func (k *kernel) remove(devs []*device, pause Pause) error {
	if len(devs) == 0 {
		return nil
	}
	var errs []error
	fail := func(d *device, step string, err error) bool {
		if err == nil || isGone(err) {
			return false
		}
		errs = append(errs, fmt.Errorf("unplug %s: %s: %w", d.vif, step, err))
		return true
	}
	left := slices.Clone(devs)
	each := func(step string, f func(*device) error) {
		left = slices.DeleteFunc(left, func(d *device) bool { return fail(d, step, f(d)) })
	}
	deadline := time.Now().Add(drainTime)
	for _, d := range devs {
		fail(d, "let frames out", k.letOut(d, deadline))
	}
	resume, paused, err := rest(pause)
	if err != nil {
		errs = append(errs, err)
	}
	k.settle(devs, paused)
	each("remove the redirect; its frames pass", k.unredirect)
	resume()
	gracePeriod() // nobody is about to put a frame into a plug any more
	deadline = time.Now().Add(drainTime)
	each("drain the plug", func(d *device) error {
		return drain(deadline, func() (bool, error) { return k.plugEmpty(d) })
	})
	gracePeriod() // nobody is about to put one from a plug into its ifb
	each("drain the ifb", func(d *device) error {
		return drain(deadline, func() (bool, error) { return k.ifbEmpty(d) })
	})
	for _, d := range left {
		fail(d, "remove clsact", k.removeClsact(d))
		// By index: a name could be somebody else's by now.
		fail(d, "remove the ifb", k.links.LinkDel(&link.Ifb{LinkAttrs: link.LinkAttrs{Index: int(d.ifb)}}))
	}
	return errors.Join(errs...)
}

// letOut opens the bands from the oldest epoch to the newest, each when those
// before have left, and lets the last one pass what comes. If something is in the
// way of that it opens all: frames are better late than lost, and a guest is not to
// be cut off.
func (k *kernel) letOut(d *device, deadline time.Time) error {
	err := k.letOutInOrder(d, deadline)
	if err != nil {
		for band := range numBands {
			err = errors.Join(err, k.request(d.open[band]))
		}
	}
	return err
}

func (k *kernel) letOutInOrder(d *device, deadline time.Time) error {
	qdiscs, err := k.qdiscs()
	if err != nil {
		return err
	}
	fill, ok := 0, false
	for _, q := range qdiscs {
		if q.ifindex == d.ifb && q.handle == rootHandle {
			fill, ok = q.fillBand()
		}
	}
	if !ok {
		return nil // there was no time to build it
	}
	bands, err := k.bands(d)
	if err != nil {
		return err
	}
	for band := nextBand(fill); band != fill; band = nextBand(band) {
		if bands[band].qlen == 0 {
			continue
		}
		if err := k.request(d.open[band]); err != nil {
			return err
		}
		if err := drain(deadline, func() (bool, error) { return k.plugEmpty(d, band) }); err != nil {
			return err
		}
	}
	// What these had is to be out before the redirect goes.
	came, _, err := k.ifbCounts(d)
	if err != nil {
		return err
	}
	if err := drain(deadline, func() (bool, error) {
		_, went, err := k.ifbCounts(d)
		return went >= came, err
	}); err != nil {
		return err
	}
	return k.request(d.open[fill])
}

// rest has the guest stand still, if it can.
func rest(pause Pause) (resume func(), paused bool, err error) {
	if pause != nil {
		if resume, err = pause(); err == nil {
			return resume, true, nil
		}
		if errors.Is(err, ErrGone) {
			err = nil
		} else {
			err = fmt.Errorf("pause the guest to unplug it: %w", err)
		}
	}
	return func() {}, false, err
}

// settle waits for a moment when nothing is on its way through the plugs, which new
// frames would overtake. There is one where the guest stands; else, under traffic,
// there may be some at any moment.
func (k *kernel) settle(devs []*device, paused bool) {
	limit := settleTime
	if paused {
		limit = pauseTime
	}
	deadline := time.Now().Add(limit)
	for _, d := range devs {
		_ = drain(deadline, func() (bool, error) {
			empty, err := k.plugEmpty(d)
			if !empty || err != nil {
				return false, err
			}
			return k.ifbEmpty(d)
		})
	}
	if paused {
		gracePeriod() // what the ifb has counted as gone has also been received
	}
}

// unredirect removes the filter.
func (k *kernel) unredirect(d *device) error {
	// Without a clsact there can be no filter, and asking is an error.
	if has, err := k.hasClsact(d); !has || err != nil {
		return err
	}
	return k.tc.Filter().Delete(d.filter())
}

// removeClsact removes that qdisc if it was there for our filter only, and nobody
// else uses it by now.
func (k *kernel) removeClsact(d *device) error {
	if has, err := k.hasClsact(d); !has || !d.ownClsact || err != nil {
		return err
	}
	for _, hook := range []uint32{tc.HandleMinIngress, tc.HandleMinEgress} {
		if some, err := k.filters(d.vifIndex, hook); some || err != nil {
			return err
		}
	}
	return k.tc.Qdisc().Delete(d.clsact())
}

func (k *kernel) hasClsact(d *device) (bool, error) {
	qdiscs, err := k.qdiscs()
	return slices.ContainsFunc(qdiscs, func(q qdisc) bool {
		// An interface that was not labelled yet has no index; its redirect comes last.
		return d.vifIndex != 0 && q.ifindex == d.vifIndex && q.kind == "clsact"
	}), err
}

// drain waits until there is nothing left.
func drain(deadline time.Time, empty func() (bool, error)) error {
	for began := time.Now(); ; time.Sleep(time.Millisecond) {
		ok, err := empty()
		if ok || err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("frames are left after %v", time.Since(began).Round(time.Millisecond))
		}
	}
}

// plugEmpty: no frame waits in any of these bands, of all if none is named.
func (k *kernel) plugEmpty(d *device, bands ...int) (bool, error) {
	all, err := k.bands(d)
	if err != nil {
		return false, err
	}
	for n, b := range all {
		if b.qlen > 0 && (len(bands) == 0 || slices.Contains(bands, n)) {
			return false, nil
		}
	}
	return true, nil
}

// ifbEmpty: all that came into the ifb has gone back to its interface.
func (k *kernel) ifbEmpty(d *device) (bool, error) {
	came, went, err := k.ifbCounts(d)
	return came == went, err
}

// ifbCounts reads how many frames came from the plug into the ifb, which counts
// them as received, and how many left it.
func (k *kernel) ifbCounts(d *device) (came, went uint64, err error) {
	l, err := k.links.LinkByIndex(int(d.ifb))
	if err != nil {
		return 0, 0, err
	}
	s := l.Attrs().Statistics
	if s == nil {
		return 0, 0, nil
	}
	return s.RxPackets, s.TxPackets + s.RxDropped, nil
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
