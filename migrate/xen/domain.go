package xen

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"syscall"
	"time"

	"kemari/migrate"
	"kemari/migrate/page"
	"kemari/migrate/xen/internal/sys"
	"kemari/migrate/xen/xenstore"
)

var (
	// ErrLogDirtyLost: somebody else read or ended the log of changed pages, as
	// `virsh save` and `virsh migrate` do, or Xen had no memory for it. What changed
	// is not known any more: the next Round hands over everything.
	ErrLogDirtyLost = fmt.Errorf("%w: somebody else has read or ended their log", migrate.ErrPagesUnknown)
	// ErrIncomplete: there was no Round since Begin, or since an error left unknown
	// what changed.
	ErrIncomplete = fmt.Errorf("%w: a Round must come first", migrate.ErrPagesUnknown)
	// ErrDeviceModel: the guest has a device model whose state, or whose writes to the
	// guest's memory, cannot be captured.
	ErrDeviceModel = errors.New("the guest's device model cannot be captured")
	// ErrNoPVDrivers: an HVM guest that has no PV drivers cannot suspend, and what its
	// emulated devices send is not held.
	ErrNoPVDrivers = errors.New("the guest has loaded no PV drivers (yet); without them it cannot suspend")
	// ErrVersion: this Xen's interface is none of those known.
	ErrVersion = sys.ErrVersion
)

const (
	roundPages   = 256  // of a batch that Round hands over
	reservePages = 1024 // that a Capture has room for at least
	// bootTimeout is for an HVM guest that is protected as soon as it is started.
	bootTimeout = 30 * time.Second
)

// control is a domain as the hypervisor shows it; see sys.Domain.
type control interface {
	suspendControl
	Prepare() error
	Limit() uint64
	HighestPage() (uint64, error)
	EnableLogDirty() error
	DisableLogDirty() error
	Clean(canary uint64) (sys.Dirty, error)
	Stand(canary uint64, st *sys.State) error
	Bitmap() []uint64
	Populated(pfns []uint64, ok []bool) error
	Policies() (cpuid, msr []byte, err error)
	Param(sys.Param) (uint64, error)
	Granted(f func(pfn uint64, to uint16)) error
	AllocPort() (uint32, error)
	PortFree(port uint32) bool
	Subscribe(port uint32) error
	Close()
}

// port is our end of the guest's suspend event channel; see sys.Port.
type port interface {
	C() <-chan struct{}
	Close()
}

// Domain is a running PVH or HVM guest that is checkpointed by hypercalls of our own.
// It implements the engine's Guest. Its methods are called by one goroutine.
//
// While the guest stands, one hypercall reads and clears the bitmap, one reads the
// processors' state; the pages are copied from mappings that are kept; two hypercalls
// resume it. The cost grows with the changed pages, and with 1 bit for each page of
// the guest.
//
// Within a checkpoint all is exact, or it returns an error: a page that the guest
// does not write to, the canary, is marked as changed whenever the bitmap is cleared,
// so that it is missed when somebody else has cleared it since. A guest may give memory
// back and get other memory (ballooning): Xen marks what it gets as changed, and a page
// that is mapped in vain shows by the number of pages, see mapping. Then what is copied
// is mapped anew, which the checkpoint after a guest got memory pays for, and every one
// of a guest that is larger than what can be mapped.
//
// An HVM guest's device model is stopped before the bitmap is read, and let go on just
// before the guest is: so what it has written by then is in the bitmap, and what it
// saves, while we copy, is of the same moment.
type Domain struct {
	susp    suspender
	xen     control
	boots   time.Duration // how long a guest may take to load its PV drivers
	release func() error  // closes the connections
	version func() (major, minor uint16)
	bind    func(remote uint32) (port, error)
	window  func() (window, error) // another one, of one slot
	port    port
	mark    *mark
	mem     *mapping
	destroy func(context.Context) error
	log     *slog.Logger

	canary  uint64
	pop     population
	all     []page.Run // every pfn there can be
	known   bool       // all but what the bitmap says has been handed over
	lost    bool       // logging must be begun anew
	stand   sys.State
	batch   Pages
	beat    []page.PFN // of patrol
	beatAt  int        // the word of pop it goes on from
	changed []page.PFN // of a Round
	runs    []page.Run
	unknown []uint64
	there   []bool
	stats   Stats
	begun   bool
	held    bool // left standing
	closed  bool
}

// Stats are counts since OpenDomain.
type Stats struct {
	Checkpoints int
	Pages       int // in checkpoints
	Maps        int // how often a chunk of 64 pages was mapped
	Appeared    int // pages that got memory since Begin
	Vanished    int // pages that had memory and have none any more
	Searches    int // how often changed pages were looked for outside the known ones
	Ballooned   int // how often what was copied was mapped anew
}

// OpenDomain opens a running domain to be checkpointed. In the file mark it keeps
// what CleanupDomain needs to know. Destroy ends the domain through whoever manages
// it. It waits for the PV drivers of a guest that boots. It returns migrate.ErrGuestGone, ErrNoLogDirty, ErrDeviceModel or ErrNoPVDrivers
// for a domain that cannot be protected, ErrVersion for a Xen that is not known.
func OpenDomain(ctx context.Context, domid uint32, markPath string, destroy func(context.Context) error, log *slog.Logger) (*Domain, error) {
	if domid == 0 || domid >= 0x7ff0 {
		return nil, fmt.Errorf("%d is not the id of a guest", domid)
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	id := uint16(domid)
	conn, err := sys.Open()
	if err != nil {
		return nil, err
	}
	d := &Domain{version: conn.Version, destroy: destroy, log: log, boots: bootTimeout}
	d.release = conn.Close
	fail := func(err error) (*Domain, error) {
		d.free()
		if errors.Is(err, sys.ErrNoDomain) {
			err = migrate.ErrGuestGone
		}
		return nil, err
	}
	xd, err := conn.Domain(id)
	if err != nil {
		return fail(err)
	}
	d.xen = xd
	store, err := xenstore.Dial()
	if err != nil {
		return fail(err)
	}
	d.release = func() error { return errors.Join(store.Close(), conn.Close()) }
	d.bind = func(remote uint32) (port, error) { return sys.BindPort(id, remote) }
	d.window = func() (window, error) { return conn.Window(id, 1, false) }
	w, err := conn.Window(id, mapSlots, false)
	if err != nil {
		return fail(err)
	}
	d.mem = newMapping(w, mapSlots)
	if d.mark, err = openMark(markPath); err != nil {
		return fail(err)
	}
	d.susp = suspender{id: id, xen: xd, store: store, mark: d.mark, look: lookInterval, limit: suspendTimeout}
	if err := d.check(ctx); err != nil {
		return fail(err)
	}
	return d, nil
}

// check refuses a guest that cannot be protected before anything is done to it. That
// its kernel can suspend is not to be seen: Linux says so in control/feature-suspend
// when it boots, but not again where it has been restored.
func (d *Domain) check(ctx context.Context) error {
	info, err := d.xen.Info()
	switch {
	case err != nil:
		return err
	case standingOf(info) == gone:
		return migrate.ErrGuestGone
	case !info.HVM:
		return ErrNoLogDirty
	case info.DeviceModel:
		return d.checkEmulator(ctx)
	}
	return nil
}

// checkEmulator is check for a guest that has a device model.
func (d *Domain) checkEmulator(ctx context.Context) error {
	// One that has just been started is on its way to load them.
	for end := time.Now().Add(d.boots); ; {
		irq, err := d.xen.Param(sys.ParamCallbackIRQ)
		if err == nil && irq != 0 {
			break
		}
		if err != nil || !time.Now().Before(end) {
			return errors.Join(err, ErrNoPVDrivers)
		}
		select {
		case <-time.After(d.susp.look):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	node := fmt.Sprintf("/local/domain/%d/image/device-model-domid", d.susp.id)
	switch in, err := d.susp.store.Read(ctx, node); {
	case err == nil && in != "0":
		return fmt.Errorf("%w: it runs in domain %s, a stub domain", ErrDeviceModel, in)
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return err
	}
	// What QEMU keeps there, built for a Xen older than 4.10, would have to follow, too.
	node = fmt.Sprintf("/local/domain/0/device-model/%d/physmap", d.susp.id)
	switch names, err := d.susp.store.List(ctx, node); {
	case len(names) > 0:
		return fmt.Errorf("%w: it keeps a part of its state in xenstore, as QEMU does that was built for a Xen older than 4.10", ErrDeviceModel)
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return err
	}
	d.susp.dm = openQEMU(monitorPath(d.susp.id))
	return nil
}

// Stats returns the counts so far.
func (d *Domain) Stats() Stats {
	d.stats.Maps = d.mem.maps
	return d.stats
}

// why makes the guest's end of an error that comes of it.
func (d *Domain) why(err error) error {
	if err == nil || errors.Is(err, migrate.ErrGuestGone) {
		return err
	}
	if errors.Is(err, sys.ErrNoDomain) || d.Ended() {
		return migrate.ErrGuestGone
	}
	return err
}

// Begin begins to log changed pages, takes the guest's suspends to ourselves, and
// returns the head of the libxc stream: headers, CPUID_POLICY, MSR_POLICY and
// STATIC_DATA_END.
func (d *Domain) Begin(ctx context.Context) ([]byte, error) {
	head, err := d.begin(ctx)
	return head, d.why(err)
}

func (d *Domain) begin(ctx context.Context) ([]byte, error) {
	if d.begun {
		return nil, errors.New("begun already")
	}
	if err := d.logAnew(); err != nil {
		return nil, err
	}
	d.begun = true
	if err := d.xen.Prepare(); err != nil {
		return nil, err
	}
	if err := d.subscribe(ctx); err != nil {
		return nil, err
	}
	if err := d.chooseCanary(); err != nil {
		return nil, err
	}
	cpuid, msr, err := d.xen.Policies()
	if err != nil {
		return nil, err
	}
	major, minor := d.version()
	head := AppendHeaders(nil, major, minor)
	head = AppendRecord(head, RecordCPUIDPolicy, cpuid)
	head = AppendRecord(head, RecordMSRPolicy, msr)
	return AppendRecord(head, RecordStaticDataEnd, nil), context.Cause(ctx)
}

// chooseCanary finds a page the guest does not write to, or else its own writing
// would hide that somebody has cleared the bitmap: one of the pages that every guest
// is given for rings between Xen and a monitor, of which the guest knows nothing. The
// last resort is the console's page, written to only when the guest prints.
func (d *Domain) chooseCanary() error {
	for _, p := range []sys.Param{sys.ParamPagingRingPFN, sys.ParamSharingRingPFN, sys.ParamMonitorRingPFN, sys.ParamConsolePFN} {
		pfn, err := d.xen.Param(p)
		if err != nil {
			return err
		}
		if pfn == 0 || pfn >= d.xen.Limit() {
			continue
		}
		var there [1]bool
		if err := d.xen.Populated([]uint64{pfn}, there[:]); err != nil {
			return err
		}
		if there[0] {
			d.canary = pfn
			return nil
		}
	}
	return errors.New("the guest has no page to mark as changed")
}

// logAnew begins to log, though somebody may have left it on. Who ends Xen's logging,
// as libxl does, ends the device model's, too.
func (d *Domain) logAnew() error {
	if d.susp.dm != nil {
		if err := d.susp.dm.Log(); err != nil {
			return fmt.Errorf("%w: %w", ErrDeviceModel, err)
		}
	}
	err := d.xen.EnableLogDirty()
	if err != nil {
		if derr := d.xen.DisableLogDirty(); derr == nil {
			err = d.xen.EnableLogDirty()
		}
	}
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrNoLogDirty, err)
		if d.susp.dm != nil && !d.begun { // Close would leave it on
			err = errors.Join(err, d.susp.dm.Unlog())
		}
		return err
	}
	d.lost = false
	return nil
}

// subscribe lets Xen signal the guest's suspends to an event channel of ours and not
// by VIRQ_DOM_EXC, so that neither xenstored nor libvirt takes a checkpoint for a
// shutdown. A port once allocated in the guest stays: the next process uses it again.
func (d *Domain) subscribe(ctx context.Context) error {
	info, err := d.xen.Info()
	if err != nil {
		return err
	}
	handle := fmt.Sprintf("%x", info.Handle)
	_, remote, of := d.mark.get()
	if remote == 0 || of != handle || !d.xen.PortFree(remote) {
		if remote, err = d.xen.AllocPort(); err != nil {
			return err
		}
	}
	if d.port, err = d.bind(remote); err != nil {
		return err
	}
	d.susp.events = d.port.C()
	if err := d.mark.setPort(remote, handle); err != nil {
		return err
	}
	return d.xen.Subscribe(remote)
}

// Round hands over the pages that changed since the last one, or every page of the
// guest if that is not known, while the guest runs.
func (d *Domain) Round(ctx context.Context, send func(*Pages) error) (int, error) {
	n, err := d.round(ctx, send)
	if err != nil {
		d.known = false
	}
	return n, d.why(err)
}

// Again has the next Round hand over every page of the guest.
func (d *Domain) Again() error {
	d.known = false
	return nil
}

func (d *Domain) round(ctx context.Context, send func(*Pages) error) (total int, err error) {
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	if cap(d.batch.PFNs) == 0 {
		d.batch = Pages{PFNs: make([]page.PFN, 0, roundPages), Data: make([]byte, roundPages*page.Size)}
	}
	var pfns []page.PFN // what to hand over, unless it is everything
	word := 0
	if d.known {
		dirty, err := d.xen.Clean(d.canary)
		if err = d.logged(err); err != nil {
			return 0, err
		}
		// After the bitmap, so that what comes to a page from now on changes it anew:
		// the other way round its bit could be read here, and its old memory copied.
		info, err := d.xen.Info()
		if err != nil {
			return 0, err
		}
		if standingOf(info) == gone {
			return 0, migrate.ErrGuestGone
		}
		full := d.ballooned(info)
		if d.changed, err = d.dirty(d.changed[:0], dirty, full); err != nil {
			return 0, err
		}
		pfns = d.changed
	} else if err := d.restart(ctx); err != nil {
		return 0, err
	}
	everything := !d.known
	for {
		if ctx.Err() != nil {
			return total, context.Cause(ctx)
		}
		b := &d.batch
		b.PFNs = b.PFNs[:0]
		if everything {
			b.PFNs, word = d.pop.appendAll(b.PFNs, word)
		} else {
			n := min(len(pfns), roundPages)
			b.PFNs, pfns = append(b.PFNs, pfns[:n]...), pfns[n:]
		}
		if len(b.PFNs) == 0 && everything {
			everything = false
			if pfns, err = d.rest(ctx); err != nil {
				return total, err
			}
			continue
		}
		if len(b.PFNs) == 0 {
			break
		}
		n, err := d.mem.copyOut(ctx, b.PFNs, b.Data[:cap(b.Data)])
		if err != nil {
			return total, err
		}
		d.gone()
		b.PFNs, b.Data = b.PFNs[:n], b.Data[:n*page.Size]
		if n > 0 {
			if err := send(b); err != nil {
				return total, err
			}
		}
		total += n
	}
	if d.pop.stale {
		d.pop.rescan()
	}
	d.known = true
	return total, nil
}

// restart begins to know the guest: logging, and where it has memory.
func (d *Domain) restart(ctx context.Context) error {
	if d.lost {
		if err := d.logAnew(); err != nil {
			return err
		}
	}
	if err := d.xen.Prepare(); err != nil { // the highest page may have changed
		return err
	}
	limit := d.xen.Limit()
	d.all = append(d.all[:0], page.Run{N: limit})
	d.mem.dropAll() // before the pages are counted, since what was given back counts until then
	info, err := d.xen.Info()
	if err != nil {
		return err
	}
	d.mem.grow(limit)
	d.pop.reset(limit)
	d.mem.known = d.pop.word
	d.mem.distrust(false)
	d.beatAt = 0
	// Twice, to see that the canary is one. What the bitmap says is of no interest:
	// everything is handed over.
	for range 2 {
		if _, err := d.xen.Clean(d.canary); err != nil {
			return err
		}
	}
	if !d.sings() {
		return fmt.Errorf("page %#x cannot be marked as changed", d.canary)
	}
	if err := d.populate(ctx, &d.pop, limit, info.TotPages, d.pop.add); err != nil {
		return err
	}
	d.pop.rescan()
	return nil
}

// populate tells of each page where the guest has memory. It may stop once pop has as
// many pages as the guest has: so it begins with the special ones at the end, and goes
// up from the bottom, and the hole between is not looked at.
func (d *Domain) populate(ctx context.Context, pop *population, limit, total uint64, yes func(page.PFN)) error {
	d.unknown = d.unknown[:0]
	top := limit - min(limit, sys.TypesBatch)
	for pfn := top; pfn < limit; pfn++ {
		d.unknown = append(d.unknown, pfn)
	}
	found := func(p page.PFN, there bool) {
		if there {
			yes(p)
		}
	}
	for pfn := uint64(0); ; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := d.look(found); err != nil {
			return err
		}
		if pfn >= top || uint64(pop.pages) >= total {
			return nil
		}
		for end := min(top, pfn+sys.TypesBatch); pfn < end; pfn++ {
			d.unknown = append(d.unknown, pfn)
		}
	}
}

// rest is what a Round of everything has left out: a guest that got memory and gave
// some back while populate looked may have made it stop too soon. Once all has been
// copied, and so mapped, nothing is left out if as many are mapped as Xen counts.
func (d *Domain) rest(ctx context.Context) ([]page.PFN, error) {
	info, err := d.xen.Info()
	if err != nil || uint64(d.mem.count) == info.TotPages {
		return nil, err
	}
	d.changed = d.changed[:0]
	err = d.populate(ctx, &d.pop, d.xen.Limit(), ^uint64(0), func(p page.PFN) {
		if !d.pop.has(p) {
			d.pop.add(p)
			d.changed = append(d.changed, p)
		}
	})
	return d.changed, err
}

// patrol looks whether a part of the known pages still have memory, each time the
// next part, and frees what the guest has given back: mapped, it would neither be the
// host's again, nor would Xen let the guest have other memory for it. The guest runs;
// the cost does not grow with it. What goes wrong is no matter: a chunk that is not
// mapped is mapped when it is copied.
func (d *Domain) patrol() {
	if d.beat == nil {
		d.beat = make([]page.PFN, 0, sys.TypesBatch)
	}
	d.beat, d.beatAt = d.pop.appendAll(d.beat[:0], d.beatAt)
	if d.beatAt >= len(d.pop.words) {
		d.beatAt = 0
	}
	d.unknown = d.unknown[:0]
	for _, p := range d.beat {
		d.unknown = append(d.unknown, uint64(p))
	}
	left := d.beat[:0]
	err := d.look(func(p page.PFN, there bool) {
		if !there {
			d.pop.remove(p)
			left = append(left, p)
		}
	})
	d.stats.Vanished += len(left)
	for i, p := range left {
		chunk := p / sys.SlotPages
		if d.mem.of[chunk] != 0 && (i == 0 || chunk != left[i-1]/sys.SlotPages) {
			_, merr := d.mem.again(p)
			err = errors.Join(err, merr)
		}
	}
	if err != nil {
		d.log.Debug("look whether the guest has given memory back", "error", err)
	}
}

// look asks of the pages in unknown whether they have memory, and empties it.
func (d *Domain) look(tell func(p page.PFN, there bool)) error {
	if d.there == nil {
		d.there = make([]bool, sys.TypesBatch)
	}
	for u := d.unknown; len(u) > 0; {
		n := min(len(u), sys.TypesBatch)
		if err := d.xen.Populated(u[:n], d.there); err != nil {
			return err
		}
		for i, p := range u[:n] {
			tell(page.PFN(p), d.there[i])
		}
		u = u[n:]
	}
	d.unknown = d.unknown[:0]
	return nil
}

// sings tells whether the canary's bit is set.
func (d *Domain) sings() bool {
	b := d.xen.Bitmap()
	w := d.canary / 64
	return w < uint64(len(b)) && b[w]>>(d.canary%64)&1 != 0
}

// logged tells whether the bitmap just read is whole.
func (d *Domain) logged(err error) error {
	switch {
	case err == nil && d.sings():
		return nil
	case err == nil:
		err = ErrLogDirtyLost
	case errors.Is(err, syscall.ENOMEM), errors.Is(err, syscall.EBUSY):
		// No memory to log a change with; or another's reading is under way.
		err = fmt.Errorf("%w: %w", ErrLogDirtyLost, err)
	default:
		return err
	}
	d.lost = true
	return err
}

// ballooned tells whether a page may have got other memory than what is mapped for it;
// then what is copied is mapped anew. It must come after the bitmap is read, or while
// the guest stands: what comes to a page after it must mark the page for the next time.
func (d *Domain) ballooned(info sys.Info) bool {
	bad := uint64(d.mem.count) != info.TotPages
	d.mem.distrust(bad)
	if bad {
		d.stats.Ballooned++
	}
	return bad
}

// dirty appends the pages of the bitmap just read to pfns. Where Xen has counted
// more changes than are found, or full is set, it looks outside the known pages too.
func (d *Domain) dirty(pfns []page.PFN, count sys.Dirty, full bool) ([]page.PFN, error) {
	bitmap := d.xen.Bitmap()
	d.runs = d.runs[:0]
	if !full {
		d.runs = page.AppendRuns(d.runs, bitmap, d.pop.scan)
		found := uint64(0)
		for _, r := range d.runs {
			found += r.N
		}
		full = found < uint64(count.Pages)
	}
	if full {
		d.stats.Searches++
		d.runs = page.AppendRuns(d.runs[:0], bitmap, d.all)
		if err := d.withinLimit(); err != nil {
			return nil, err
		}
	}
	d.unknown = d.unknown[:0]
	for _, r := range d.runs {
		for p := r.First; p < r.First+page.PFN(r.N); p++ {
			if d.pop.has(p) {
				pfns = append(pfns, p)
			} else {
				d.unknown = append(d.unknown, uint64(p))
			}
		}
	}
	if len(d.unknown) == 0 {
		return pfns, nil
	}
	if full {
		for _, p := range d.unknown {
			d.pop.note(page.PFN(p)) // found at once the next time
		}
	}
	err := d.look(func(p page.PFN, there bool) {
		if there {
			d.pop.add(p)
			d.stats.Appeared++
			pfns = append(pfns, p)
		}
	})
	return pfns, err
}

// withinLimit returns ErrLogDirtyLost if the guest has got memory above what the
// bitmap is read of.
func (d *Domain) withinLimit() error {
	top, err := d.xen.HighestPage()
	if err != nil || top < d.xen.Limit() {
		return err
	}
	return fmt.Errorf("%w: the guest has got memory at %#x, above all it had", ErrLogDirtyLost, top)
}

// gone forgets the pages that had no memory when they were to be copied: the guest
// has given them back, and what they held is of no interest to anybody.
func (d *Domain) gone() {
	for _, p := range d.mem.vanished {
		d.pop.remove(p)
	}
	d.stats.Vanished += len(d.mem.vanished)
}

// Checkpoint suspends the guest, calls seal while it stands, captures what changed,
// and resumes it, unless c.Hold says not to. After an error the guest runs, unless it
// is gone or the error says that it cannot be resumed; the next call must be Round,
// which hands over everything, or Close.
func (d *Domain) Checkpoint(ctx context.Context, seal func() error, c *Capture) error {
	if !d.known {
		return ErrIncomplete
	}
	d.patrol()
	// Memory is had before the guest stands.
	reserve(c, max(reservePages, 2*len(c.PFNs)))
	c.PFNs, c.Data, c.State, c.SumsTook = c.PFNs[:0], c.Data[:0], c.State[:0], 0
	var sums *summer
	if c.Sums != nil {
		sums = d.summer(c.Sums)
		defer sums.close()
	}
	start := time.Now()
	info, err := d.susp.suspend(ctx)
	if err != nil {
		return d.why(err)
	}
	stood := time.Now()
	fresh, err := d.capture(ctx, info, seal, c)
	if err == nil && sums != nil {
		began := time.Now()
		sums.sum(ctx)
		c.SumsTook = time.Since(began)
	}
	copied := time.Now()
	if d.held = c.Hold && err == nil; !d.held {
		if rerr := d.susp.resume(fresh); rerr != nil {
			err = errors.Join(err, rerr)
		}
	}
	c.Suspend, c.Copy, c.Resume = stood.Sub(start), copied.Sub(stood), time.Since(copied)
	if err != nil {
		d.known = false
		return d.why(err)
	}
	if d.pop.stale {
		d.pop.rescan()
	}
	d.stats.Checkpoints++
	d.stats.Pages += len(c.PFNs)
	return nil
}

// Resume lets the guest go on that Checkpoint has left standing. To Close it is one
// whose suspend is under way, and to CleanupDomain, too.
func (d *Domain) Resume() error {
	if !d.held {
		return errors.New("the guest was not left standing")
	}
	d.held = false
	return d.why(d.susp.resume(false))
}

// capture reads a guest that stands; fresh is what Resume is told.
func (d *Domain) capture(ctx context.Context, info sys.Info, seal func() error, c *Capture) (fresh bool, err error) {
	if err := seal(); err != nil {
		return false, fmt.Errorf("seal: %w", err)
	}
	if d.susp.dm != nil {
		if err := d.susp.dm.Stop(); err != nil {
			return false, err
		}
	}
	full := d.ballooned(info)
	st := &d.stand
	if err := d.logged(d.xen.Stand(d.canary, st)); err != nil {
		return false, err
	}
	if standingOf(st.Info) != suspended {
		return true, ErrBusy
	}
	c.State = appendState(c.State, st)
	if c.PFNs, err = d.dirty(c.PFNs, st.Dirty, full); err != nil {
		return true, err
	}
	reserve(c, len(c.PFNs))
	n, err := d.mem.copyOut(ctx, c.PFNs, c.Data[:cap(c.Data)])
	if err != nil {
		return true, err
	}
	d.gone()
	c.PFNs, c.Data = c.PFNs[:n], c.Data[:n*page.Size]
	if d.susp.dm != nil {
		if c.State, err = appendEmulator(c.State, d.susp.dm.Saved); err != nil {
			return true, err
		}
	}
	return true, nil
}

// reserve makes room for n pages, in memory that has been touched.
func reserve(c *Capture, n int) {
	if cap(c.PFNs) < n {
		c.PFNs = append(make([]page.PFN, 0, n+n/4), c.PFNs...)
	}
	if cap(c.Data) < n*page.Size {
		c.Data = make([]byte, (n+n/4)*page.Size)
		for i := 0; i < len(c.Data); i += page.Size {
			c.Data[i] = 1
		}
	}
}

func appendState(b []byte, st *sys.State) []byte {
	b = AppendTSCInfo(b, TSCInfo{Mode: st.TSCMode, KHz: st.TSCkHz, Incarnation: st.TSCIncarnation, Nsec: st.TSCNsec})
	b = AppendRecord(b, RecordHVMContext, st.Context)
	var params [len(sys.StreamParams)]HVMParam
	for i, p := range sys.StreamParams {
		params[i] = HVMParam{uint64(p), st.Params[i]}
	}
	return AppendHVMParams(b, params[:])
}

// Ended implements migrate.Guest.
func (d *Domain) Ended() bool {
	st, _, err := d.susp.state()
	return err == nil && st == gone
}

// Destroy ends the guest, because another copy of it runs. It retries until it has
// succeeded or ctx ends. Idempotent.
func (d *Domain) Destroy(ctx context.Context) error { return d.destroy(ctx) }

// Close leaves the guest running, or paused if an operator has paused it, and
// unobserved. Idempotent.
func (d *Domain) Close() error {
	if d.closed {
		return nil
	}
	d.closed = true
	var err error
	if d.begun {
		err = leave(d.xen, &d.susp)
	}
	return errors.Join(err, d.free())
}

// leave ends what Begin has begun.
func leave(x control, s *suspender) error {
	var errs []error
	// First, while its suspend is told to us and not to libvirt.
	if left, _, _ := s.mark.get(); left == markSuspending {
		if err := s.settle(context.Background()); err != nil {
			errs = append(errs, fmt.Errorf("resume the guest: %w", err))
		}
	}
	if err := s.leaveEmulator(); err != nil {
		errs = append(errs, err)
	}
	if err := x.DisableLogDirty(); !offAlready(err) {
		errs = append(errs, err)
	}
	// Shutdowns are libvirt's to see again.
	if err := x.Subscribe(0); err != nil {
		errs = append(errs, err)
	}
	if st, _, err := s.state(); err == nil && st == gone {
		return nil
	}
	return errors.Join(errs...)
}

func (d *Domain) free() error {
	var errs []error
	if d.port != nil {
		d.port.Close()
	}
	if d.susp.dm != nil {
		errs = append(errs, d.susp.dm.Close())
	}
	if d.mem != nil {
		errs = append(errs, d.mem.Close())
	}
	if d.xen != nil {
		d.xen.Close()
	}
	if d.mark != nil {
		errs = append(errs, d.mark.Close())
	}
	if d.release != nil {
		errs = append(errs, d.release())
	}
	return errors.Join(errs...)
}

// CleanupDomain takes back what a process left that was killed: a guest that stands,
// a suspend under way, a device model that is stopped, log-dirty mode, the
// subscription. A guest that is gone is no
// error. Idempotent.
func CleanupDomain(ctx context.Context, domid uint32, markPath string) error {
	id := uint16(domid)
	conn, err := sys.Open()
	if err != nil {
		return err
	}
	defer conn.Close()
	x, err := conn.Domain(id)
	if errors.Is(err, sys.ErrNoDomain) {
		return nil
	}
	if err != nil {
		return err
	}
	defer x.Close()
	store, err := xenstore.Dial()
	if err != nil {
		return err
	}
	defer store.Close()
	m, err := openMark(markPath)
	if err != nil {
		return err
	}
	defer m.Close()
	s := &suspender{id: id, xen: x, store: store, mark: m, look: lookInterval, limit: suspendTimeout}
	if info, err := x.Info(); err == nil && info.DeviceModel {
		s.dm = openQEMU(monitorPath(id))
		defer s.dm.Close()
	}
	return cleanup(ctx, x, s)
}

func cleanup(ctx context.Context, x control, s *suspender) error {
	st, _, err := s.state()
	if err != nil {
		return err
	}
	if st == gone {
		return nil
	}
	// Without a mark of ours that says otherwise, a guest that stands is ours to
	// resume; with it, somebody else's.
	left, _, _ := s.mark.get()
	if left == markSuspending || left != markRunning && st == suspended {
		if err = x.Prepare(); err == nil {
			err = s.settle(ctx)
		}
		if err != nil {
			return fmt.Errorf("resume the guest: %w", err)
		}
	}
	return leave(x, s)
}
