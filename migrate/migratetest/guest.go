package migratetest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"kemari/migrate"
	"kemari/migrate/page"
)

// Hole is where the second half of a fake guest's memory begins, as that of a real
// one has a hole below 4 GiB. Limit is above all of it.
const (
	Hole  page.PFN = 1 << 20
	Limit page.PFN = Hole + 1<<16
)

// Head is what a fake guest's Begin returns.
const Head = "head of a fake guest"

var crc = crc32.MakeTable(crc32.Castagnoli) // for which processors have an instruction

// State is a fake guest's processors: how far it has come, and what its memory
// must be then.
type State struct {
	Count uint64 // pieces of work done, each of which it told the world
	Sum   uint32 // of its memory
}

const stateMagic = "fake state"

// Append appends the state's encoding.
func (s State) Append(b []byte) []byte {
	b = append(b, stateMagic...)
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64(b, s.Count), s.Sum)
}

// ParseState decodes a State.
func ParseState(b []byte) (s State, err error) {
	if len(b) != len(stateMagic)+12 || string(b[:len(stateMagic)]) != stateMagic {
		return s, fmt.Errorf("no state of a fake guest: %q", b)
	}
	b = b[len(stateMagic):]
	return State{binary.BigEndian.Uint64(b), binary.BigEndian.Uint32(b[8:])}, nil
}

// sum is of all memory: of pages in ascending order.
func sum(s uint32, pfn page.PFN, data []byte) uint32 {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], uint64(pfn))
	return crc32.Update(crc32.Update(s, crc, b[:]), crc, data)
}

// baton is a lock that is waited for as time passes in testing/synctest, which a
// sync.Mutex is not.
type baton chan struct{}

func (b baton) take() { b <- struct{}{} }
func (b baton) give() { <-b }

// Guest is a fake guest. Work makes it run a little; it also runs while it is
// captured, as a real one does. It implements migrate.Guest.
type Guest struct {
	Output *Output // is told of each piece of work
	Points *Points

	// What a checkpoint takes, and how many pages the guest changes between two.
	Suspend, Copy, Resuming time.Duration
	Dirty                   int

	run       baton // who has it runs or is captured
	rand      *rand.Rand
	mem       []byte
	dirty     map[int]bool // by index
	count     uint64
	rounds    int
	confused  Confusion
	shared    map[page.PFN]string
	others    func()
	unsummed  error
	begun     bool
	held      bool // left standing, the baton not given back
	err       error
	destroyed atomic.Bool
	ended     atomic.Bool
	closed    bool
	batch     migrate.Pages
}

// NewGuest returns a guest of so many pages, all of which have content.
func NewGuest(pages int, seed uint64) *Guest {
	g := &Guest{
		Suspend: 3 * time.Millisecond, Copy: time.Millisecond, Resuming: time.Millisecond, Dirty: 8,
		run: make(baton, 1), rand: rand.New(rand.NewPCG(seed, 1)), mem: make([]byte, pages*page.Size), dirty: make(map[int]bool),
	}
	for i := range pages {
		g.write(i)
	}
	return g
}

// PFN is that of its i-th page.
func (g *Guest) PFN(i int) page.PFN { return g.pfn(i) }

// Quiet has it change no page any more by itself; Touch changes one.
func (g *Guest) Quiet() { g.Changes(0) }

// Changes sets Dirty while the guest runs.
func (g *Guest) Changes(pages int) { g.run.take(); defer g.run.give(); g.Dirty = pages }

func (g *Guest) Touch(i int) {
	g.run.take()
	defer g.run.give()
	g.page(i)[5]++
	g.dirty[i] = true
}

func (g *Guest) pfn(i int) page.PFN {
	if half := len(g.mem) / page.Size / 2; i >= half {
		return Hole + page.PFN(i-half)
	}
	return page.PFN(i)
}

func (g *Guest) page(i int) []byte { return g.mem[i*page.Size : (i+1)*page.Size] }

// write changes a page in one of the ways that make a difference when encoded.
func (g *Guest) write(i int) {
	p := g.page(i)
	switch g.rand.IntN(6) {
	case 0:
		clear(p)
	case 1:
		for j := 0; j < len(p); j += 8 {
			binary.LittleEndian.PutUint64(p[j:], g.rand.Uint64())
		}
	case 2: // written, and yet the same
	default:
		for range 1 + g.rand.IntN(20) {
			p[g.rand.IntN(len(p))] = byte(g.rand.Uint32())
		}
	}
	g.dirty[i] = true
}

// Work lets the guest run a little, and say so.
func (g *Guest) Work() {
	g.run.take()
	defer g.run.give()
	g.work()
}

func (g *Guest) work() {
	for range g.Dirty {
		g.write(g.rand.IntN(len(g.mem) / page.Size))
	}
	g.count++
	if g.Output != nil {
		g.Output.Emit(g.count)
	}
}

// Fail makes what is asked of the guest next, and from then on, fail.
func (g *Guest) Fail(err error) {
	g.run.take()
	defer g.run.give()
	g.err = err
	g.ended.Store(errors.Is(err, migrate.ErrGuestGone))
}

// Ended implements migrate.Guest.
func (g *Guest) Ended() bool { return g.ended.Load() }

// Confusion is what can become of the log of changed pages.
type Confusion int

const (
	Clear  Confusion = iota
	Before           // found out before the output is sealed
	After            // and after
)

// Confuse makes the guest's next checkpoint fail, for the log of changed pages has
// been lost.
func (g *Guest) Confuse(c Confusion) {
	g.run.take()
	defer g.run.give()
	g.confused = c
}

func (g *Guest) lost(at Confusion) error {
	if g.confused != at {
		return nil
	}
	g.confused, g.rounds = Clear, 0
	return fmt.Errorf("a fake save: %w", migrate.ErrPagesUnknown)
}

// Destroyed and Closed tell what became of it.
func (g *Guest) Destroyed() bool { return g.destroyed.Load() }
func (g *Guest) Closed() bool    { g.run.take(); defer g.run.give(); return g.closed }

// Count is how far it has come.
func (g *Guest) Count() uint64 { g.run.take(); defer g.run.give(); return g.count }

// Begin implements migrate.Guest.
func (g *Guest) Begin(context.Context) ([]byte, error) {
	g.Points.Hit("guest: begin")
	g.run.take()
	defer g.run.give()
	if g.begun {
		return nil, errors.New("begun twice")
	}
	g.begun = true
	clear(g.dirty)
	return []byte(Head), g.err
}

// take appends the pages that changed, and forgets that they did.
func (g *Guest) take(p *migrate.Pages) {
	for i := range len(g.mem) / page.Size {
		if g.dirty[i] {
			p.Append(g.pfn(i), g.page(i))
		}
	}
	clear(g.dirty)
}

// Round implements migrate.Guest.
func (g *Guest) Round(ctx context.Context, send func(*migrate.Pages) error) (int, error) {
	g.Points.Hit("guest: round")
	g.run.take()
	if !g.begun || g.err != nil {
		defer g.run.give()
		return 0, errors.Join(errors.New("round"), g.err)
	}
	if g.rounds++; g.rounds == 1 {
		for i := range len(g.mem) / page.Size {
			g.dirty[i] = true
		}
	}
	var all migrate.Pages
	g.take(&all)
	g.run.give()
	for i := 0; i < len(all.PFNs); i += 100 {
		n := min(i+100, len(all.PFNs))
		g.batch.Reset()
		g.batch.PFNs = append(g.batch.PFNs, all.PFNs[i:n]...)
		g.batch.Data = append(g.batch.Data, all.Data[i*page.Size:n*page.Size]...)
		g.Work()
		if err := send(&g.batch); err != nil {
			return i, err
		}
		clear(g.batch.Data) // it is not valid any more
	}
	return len(all.PFNs), nil
}

// Again implements migrate.Guest.
func (g *Guest) Again() error {
	g.run.take()
	defer g.run.give()
	g.rounds = 0
	return nil
}

// Checkpoint implements migrate.Guest.
func (g *Guest) Checkpoint(ctx context.Context, seal func() error, c *migrate.Capture) error {
	g.Points.Hit("guest: asked to suspend")
	g.Work()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(g.Suspend):
	}
	g.run.take()
	defer func() {
		if !g.held {
			g.run.give()
		}
	}()
	if g.err != nil {
		return g.err
	}
	g.Points.Hit("guest: suspended")
	if err := g.lost(Before); err != nil {
		return err
	}
	if err := seal(); err != nil {
		return err
	}
	g.Points.Hit("guest: sealed")
	if err := g.lost(After); err != nil {
		return err
	}
	if g.rounds == 0 {
		return errors.New("a checkpoint without all pages having been handed over")
	}
	c.Reset()
	g.take(&c.Pages)
	s := State{Count: g.count}
	for i := range len(g.mem) / page.Size {
		s.Sum = sum(s.Sum, g.pfn(i), g.page(i))
	}
	c.State = s.Append(c.State[:0])
	time.Sleep(g.Copy)
	g.Points.Hit("guest: captured")
	c.Suspend, c.Copy, c.Resume, c.SumsTook = g.Suspend, g.Copy, g.Resuming, 0
	if c.Sums != nil {
		g.sums(c.Sums)
		time.Sleep(SumsTake)
		c.SumsTook = SumsTake
		c.Copy += SumsTake
	}
	if c.Hold {
		g.held, c.Resume = true, 0
		g.Points.Hit("guest: held")
		return nil
	}
	time.Sleep(g.Resuming)
	g.Points.Hit("guest: resumed")
	return nil
}

// Resume implements migrate.Guest.
func (g *Guest) Resume() error {
	if !g.let() {
		return errors.New("resumed while it runs")
	}
	return nil
}

// let lets it run if it was left standing.
func (g *Guest) let() bool {
	if !g.held {
		return false
	}
	g.held = false
	g.Points.Hit("guest: goes on")
	g.run.give()
	return true
}

// SumsTake is how long a checkpoint with sums takes more.
const SumsTake = 300 * time.Millisecond

func (g *Guest) sums(s *migrate.Sums) {
	g.Points.Hit("guest: summed")
	s.Reset()
	s.Shared, s.Err = g.shared, g.unsummed
	if g.others != nil {
		g.others()
	}
	for i := range len(g.mem) / page.Size {
		s.Add(g.pfn(i), g.page(i))
	}
}

// Share names pages of the guest, by their order, that others write to; what f does is
// done while the guest stands, after it was captured. Both are for sums alone: what
// others write is not noted.
func (g *Guest) Share(pages map[int]string, f func(write func(i int))) {
	g.run.take()
	defer g.run.give()
	g.shared, g.others = make(map[page.PFN]string), nil
	for i, by := range pages {
		g.shared[g.pfn(i)] = by
	}
	if f != nil {
		g.others = func() { f(func(i int) { g.page(i)[9] ^= 0xff }) }
	}
}

// Unsummed makes sums fail.
func (g *Guest) Unsummed(err error) { g.run.take(); defer g.run.give(); g.unsummed = err }

// Destroy implements migrate.Guest.
func (g *Guest) Destroy(context.Context) error {
	g.Points.Hit("guest: destroy")
	g.destroyed.Store(true)
	g.let() // nobody hears it any more
	return nil
}

// Close implements migrate.Guest.
func (g *Guest) Close() error {
	g.let()
	g.run.take()
	defer g.run.give()
	g.closed = true
	return nil
}

// Output is a fake output: of each piece of a guest's work a frame, with its
// number. It implements migrate.Output.
type Output struct {
	Points *Points

	mu       sync.Mutex
	holding  bool
	held     []uint64 // of this epoch
	sealed   []uint64
	isSealed bool
	armed    bool
	notice   chan struct{}
	released []uint64
	closed   bool
	broken   error       // what Seal and Release end with
	gone     func() bool // the guest has been destroyed: nothing of it comes through
}

// NewOutput returns an output that passes.
func NewOutput() *Output { return &Output{notice: make(chan struct{}, 1)} }

// Emit is the guest's.
func (o *Output) Emit(n uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.holding {
		o.let(n)
		return
	}
	o.held = append(o.held, n)
	if o.armed {
		o.armed = false
		select {
		case o.notice <- struct{}{}:
		default:
		}
	}
}

func (o *Output) let(n ...uint64) {
	if o.gone == nil || !o.gone() {
		o.released = append(o.released, n...)
	}
}

// Released returns the numbers that left, in their order.
func (o *Output) Released() []uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]uint64(nil), o.released...)
}

// Closed tells whether it was closed.
func (o *Output) Closed() bool { o.mu.Lock(); defer o.mu.Unlock(); return o.closed }

// Break makes Seal and Release fail from now on, though they do their work, as where an
// interface has gone.
func (o *Output) Break(err error) { o.mu.Lock(); defer o.mu.Unlock(); o.broken = err }

// Trim forgets what has left.
func (o *Output) Trim() { o.mu.Lock(); defer o.mu.Unlock(); o.released = o.released[:0] }

// Seal implements migrate.Output.
func (o *Output) Seal() error {
	o.Points.Hit("output: seal")
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.isSealed || o.closed {
		return fmt.Errorf("seal: sealed %v, closed %v", o.isSealed, o.closed)
	}
	o.sealed, o.held, o.isSealed, o.holding = o.held, o.sealed[:0], true, true
	return o.broken
}

// Release implements migrate.Output.
func (o *Output) Release() error {
	o.Points.Hit("output: release")
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.isSealed || o.closed {
		return fmt.Errorf("release: sealed %v, closed %v", o.isSealed, o.closed)
	}
	o.let(o.sealed...)
	o.sealed, o.isSealed = o.sealed[:0], false
	return o.broken
}

// Pass implements migrate.Output.
func (o *Output) Pass() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.pass()
	return nil
}

func (o *Output) pass() {
	o.let(o.sealed...)
	o.let(o.held...)
	o.sealed, o.held, o.isSealed, o.holding = o.sealed[:0], o.held[:0], false, false
}

// Arm implements migrate.Output.
func (o *Output) Arm() {
	o.mu.Lock()
	defer o.mu.Unlock()
	select {
	case <-o.notice:
	default:
	}
	o.armed = true
}

// Held implements migrate.Output.
func (o *Output) Held() <-chan struct{} { return o.notice }

// Drops implements migrate.Output.
func (o *Output) Drops() (uint64, error) { return 0, nil }

// Close implements migrate.Output.
func (o *Output) Close() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.pass()
	o.closed = true
	return nil
}
