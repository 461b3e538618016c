package xen

import (
	"context"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"kemari/migrate/page"
	"kemari/migrate/xen/internal/sys"
	"kemari/migrate/xen/xenstore"
	"kemari/migrate/xen/xenstore/xenstoretest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	fakeID     = 7
	fakeCanary = 1
)

// frame is a page of the machine's memory; who holds it keeps it from being freed.
type frame struct {
	data [page.Size]byte
	refs int  // mappings
	ours bool // the guest has it
}

// fakeXen is one guest and as much of the hypervisor as is asked about it.
type fakeXen struct {
	mu     sync.Mutex
	limit  uint64
	p2m    map[page.PFN]*frame
	own    map[page.PFN]*frame // Xen's, which it shows to the guest
	total  int                 // frames that are not free
	max    int                 // what Xen lets it have; 0: anything
	dirty  map[page.PFN]bool
	count  uint32 // dirty_count
	unmark bool   // a page given back counts as unchanged, as it does from Xen 4.22 on
	log    bool   // log-dirty
	bitmap []uint64
	info   sys.Info
	pauses int // by who controls it
	absent bool
	port   uint32 // subscribed

	resumed int
	events  chan struct{} // bound port
	fail    error         // of the next Stand or Clean
	inClean func()        // what the guest does just before the next Clean
	inLook  func()        // and before each Populated
	noLog   error         // of EnableLogDirty
	state   byte          // changes the HVM context
	grants  func(func(pfn uint64, to uint16)) error
	noPV    bool       // no PV drivers are loaded
	running func(bool) // told before the guest goes on
}

func newFakeXen(limit uint64) *fakeXen {
	return &fakeXen{
		limit: limit, p2m: map[page.PFN]*frame{}, own: map[page.PFN]*frame{}, dirty: map[page.PFN]bool{},
		info: sys.Info{HVM: true, Handle: [16]byte{1, 2, 3}}, events: make(chan struct{}, 1),
	}
}

// The guest's side.

func (x *fakeXen) mark(p page.PFN) {
	if x.log && !x.dirty[p] {
		x.dirty[p] = true
		x.count++
	}
}

func (x *fakeXen) populate(p page.PFN) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.p2m[p] == nil && (x.max == 0 || x.total < x.max) {
		x.p2m[p] = &frame{ours: true}
		x.total++
		x.mark(p)
	}
}

func (x *fakeXen) balloonOut(p page.PFN) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if f := x.p2m[p]; f != nil {
		f.ours = false
		delete(x.p2m, p)
		if x.unmark && x.dirty[p] {
			delete(x.dirty, p)
			x.count--
		}
		x.unref(f)
	}
}

func (x *fakeXen) unref(f *frame) {
	if !f.ours && f.refs == 0 {
		x.total--
	}
}

// write is the guest's; the canary is a page it does not write to.
func (x *fakeXen) write(p page.PFN, b byte) {
	if p == fakeCanary {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if f := x.p2m[p]; f != nil {
		f.data[int(b)%page.Size]++
		f.data[0] = b
		x.mark(p)
	}
}

func (x *fakeXen) pfns() []page.PFN {
	x.mu.Lock()
	defer x.mu.Unlock()
	return slices.Sorted(maps.Keys(x.p2m))
}

// contents is the guest's memory.
func (x *fakeXen) contents() map[page.PFN][page.Size]byte {
	x.mu.Lock()
	defer x.mu.Unlock()
	m := map[page.PFN][page.Size]byte{}
	for p, f := range x.p2m {
		m[p] = f.data
	}
	return m
}

func (x *fakeXen) shutdown(reason sys.Shutdown) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.info.Down, x.info.Reason = true, reason
	if reason == sys.ShutdownSuspend && x.port != 0 {
		select {
		case x.events <- struct{}{}:
		default:
		}
	}
}

func (x *fakeXen) set(f func(*sys.Info)) {
	x.mu.Lock()
	defer x.mu.Unlock()
	f(&x.info)
}

func (x *fakeXen) runs() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return !x.info.Down && !x.info.Dying && !x.absent
}

// The hypervisor's side: control.

func (x *fakeXen) Info() (sys.Info, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.absent {
		return sys.Info{}, sys.ErrNoDomain
	}
	i := x.info
	i.TotPages = uint64(x.total)
	return i, nil
}

func (x *fakeXen) Resume(bool) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.absent {
		return sys.ErrNoDomain
	}
	if !x.info.Down {
		panic("resumed while it runs")
	}
	if x.running != nil {
		x.running(true)
	}
	x.info.Down = false
	x.resumed++
	return nil
}

func (x *fakeXen) Pause() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.pauses++
	x.info.Paused = true
	return nil
}

func (x *fakeXen) Unpause() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.pauses == 0 {
		return syscall.EINVAL
	}
	x.pauses--
	x.info.Paused = x.pauses > 0
	return nil
}

func (x *fakeXen) paused() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.pauses
}

func (x *fakeXen) Prepare() error {
	x.bitmap = make([]uint64, (x.limit+63)/64)
	return nil
}

func (x *fakeXen) Limit() uint64 { return uint64(len(x.bitmap)) * 64 }

func (x *fakeXen) HighestPage() (uint64, error) { return x.limit - 1, nil }

func (x *fakeXen) EnableLogDirty() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.noLog != nil {
		return x.noLog
	}
	if x.log {
		return syscall.EINVAL
	}
	x.log = true
	return nil
}

func (x *fakeXen) DisableLogDirty() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if !x.log {
		return syscall.EINVAL
	}
	x.log, x.count = false, 0
	clear(x.dirty)
	return nil
}

func (x *fakeXen) clean() {
	clear(x.bitmap)
	for p := range x.dirty {
		if uint64(p) < x.Limit() { // what is above stays, and is not counted again
			x.bitmap[p/64] |= 1 << (p % 64)
			delete(x.dirty, p)
		}
	}
	x.count = 0
}

// foreignClean is somebody else's reading.
func (x *fakeXen) foreignClean() {
	x.mu.Lock()
	defer x.mu.Unlock()
	clear(x.dirty)
	x.count = 0
}

func (x *fakeXen) Clean(canary uint64) (sys.Dirty, error) {
	if act := x.inClean; act != nil {
		x.inClean = nil
		act()
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if err := x.fail; err != nil {
		x.fail = nil
		return sys.Dirty{}, err
	}
	d := sys.Dirty{Pages: x.count}
	x.clean()
	if x.p2m[page.PFN(canary)] != nil {
		x.mark(page.PFN(canary))
	}
	return d, nil
}

func (x *fakeXen) Stand(canary uint64, st *sys.State) error {
	d, err := x.Clean(canary)
	if err != nil {
		return err
	}
	i, err := x.Info()
	*st = sys.State{Info: i, Dirty: d, TSCkHz: 1000, Context: []byte{x.state, 1, 2}}
	st.Params[0] = 1
	return err
}

func (x *fakeXen) Bitmap() []uint64 { return x.bitmap }

func (x *fakeXen) Populated(pfns []uint64, ok []bool) error {
	if x.inLook != nil {
		x.inLook()
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	for i, p := range pfns {
		ok[i] = x.p2m[page.PFN(p)] != nil
	}
	return nil
}

func (x *fakeXen) Policies() ([]byte, []byte, error) { return make([]byte, 48), make([]byte, 32), nil }
func (x *fakeXen) Param(p sys.Param) (uint64, error) {
	if p == sys.ParamCallbackIRQ && x.noPV {
		return 0, nil
	}
	return 1, nil
}
func (x *fakeXen) Granted(f func(uint64, uint16)) error {
	if x.grants == nil {
		return nil
	}
	return x.grants(f)
}
func (x *fakeXen) AllocPort() (uint32, error) { return 12, nil }
func (x *fakeXen) PortFree(p uint32) bool     { return p == 12 }
func (x *fakeXen) Close()                     {}
func (x *fakeXen) Subscribe(port uint32) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.port = port
	return nil
}

type fakePort struct{ c chan struct{} }

func (p fakePort) C() <-chan struct{} { return p.c }
func (p fakePort) Close()             {}

// fakeWindow maps the guest's frames.
type fakeWindow struct {
	x     *fakeXen
	slots [][sys.SlotPages]*frame
	fail  error
}

func newFakeWindow(x *fakeXen, slots int) *fakeWindow {
	return &fakeWindow{x: x, slots: make([][sys.SlotPages]*frame, slots)}
}

func (w *fakeWindow) Map(slot int, first uint64) (ok uint64, err error) {
	if w.fail != nil {
		return 0, w.fail
	}
	w.Unmap(slot)
	w.x.mu.Lock()
	defer w.x.mu.Unlock()
	for i := range w.slots[slot] {
		p := page.PFN(first) + page.PFN(i)
		f := w.x.p2m[p]
		if f == nil {
			f = w.x.own[p]
		}
		if f != nil {
			f.refs++
			w.slots[slot][i] = f
			ok |= 1 << i
		}
	}
	return ok, nil
}

func (w *fakeWindow) Unmap(slot int) error {
	w.x.mu.Lock()
	defer w.x.mu.Unlock()
	for i, f := range w.slots[slot] {
		if f != nil {
			f.refs--
			w.x.unref(f)
			w.slots[slot][i] = nil
		}
	}
	return nil
}

func (w *fakeWindow) Page(slot, i int) *[page.Size]byte { return &w.slots[slot][i].data }

func (w *fakeWindow) Close() error {
	for i := range w.slots {
		w.Unmap(i)
	}
	return nil
}

// tb is testing.TB, or rapid.T.
type tb interface {
	Helper()
	Fatal(...any)
	Cleanup(func())
	Context() context.Context
}

func tempDir(t tb) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "xen")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// fixture is a Domain over a fake guest that suspends when asked.
type fixture struct {
	*Domain
	x     *fakeXen
	w     *fakeWindow
	store *xenstoretest.Server
	mark  string
	// What sums are read by, and why not.
	another  *fakeWindow
	noWindow error
	// answers is what the guest does when asked to suspend; nil: it suspends.
	mu      sync.Mutex
	answers func()
}

func (f *fixture) answer(how func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answers = how
}

func dialStore(t tb) (*xenstoretest.Server, func() *xenstore.Client) {
	t.Helper()
	socket := filepath.Join(tempDir(t), "s")
	srv, err := xenstoretest.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(srv.Close)
	return srv, func() *xenstore.Client {
		c, err := xenstore.DialSocket(socket)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
}

func newFixture(t tb, x *fakeXen, slots int) *fixture {
	t.Helper()
	f := &fixture{x: x, w: newFakeWindow(x, slots), mark: filepath.Join(tempDir(t), "mark")}
	var dial func() *xenstore.Client
	f.another = newFakeWindow(x, 1)
	f.store, dial = dialStore(t)
	m, err := openMark(f.mark)
	if err != nil {
		t.Fatal(err)
	}
	f.Domain = &Domain{
		xen: x, mark: m, log: slog.New(slog.DiscardHandler),
		version: func() (uint16, uint16) { return 4, 17 },
		bind:    func(uint32) (port, error) { return fakePort{x.events}, nil },
		window:  func() (window, error) { return f.another, f.noWindow },
		mem:     newMapping(f.w, slots),
		susp: suspender{
			id: fakeID, xen: x, store: dial(), mark: m,
			look: 5 * time.Millisecond, limit: 30 * time.Second,
		},
	}
	f.store.Set("/local/domain/7/control/shutdown", "")
	f.guest(t, dial())
	t.Cleanup(func() { f.Close() })
	return f
}

// guest suspends when asked to, as Linux does: it reads and empties the node.
func (f *fixture) guest(t tb, c *xenstore.Client) {
	ctx, cancel := context.WithCancel(t.Context())
	w, err := c.Watch(ctx, f.susp.node())
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { cancel(); c.Close(); wg.Wait() })
	wg.Go(func() {
		for range w.C() {
			asked := false
			err := c.Transact(ctx, func(tx *xenstore.Tx) error {
				v, err := tx.Read(ctx, f.susp.node())
				if asked = err == nil && v == "suspend"; asked {
					err = tx.Write(ctx, f.susp.node(), "")
				}
				return err
			})
			if err != nil || !asked {
				continue
			}
			f.mu.Lock()
			how := f.answers
			f.mu.Unlock()
			if how == nil {
				f.x.shutdown(sys.ShutdownSuspend)
			} else {
				how()
			}
		}
	})
}
