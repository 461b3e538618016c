package output

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// Limit is how many bytes of frames one epoch may hold in one interface: a
// quarter of a second at 1 Gbit/s. It guards dom0's memory, of which a frame
// takes about 0.7 KiB besides its bytes: half a million of the smallest frames,
// the worst a guest can send, would take some 400 MiB.
const Limit = 32 << 20

var (
	// ErrGone is returned when an interface has disappeared, and so most likely
	// its guest.
	ErrGone = errors.New("interface is gone")
	// ErrOutstanding is returned by Seal if the epoch sealed before has not been
	// released.
	ErrOutstanding = errors.New("the sealed epoch is not released yet")
	// ErrNotSealed is returned by Release if there is no sealed epoch.
	ErrNotSealed = errors.New("no epoch is sealed")
	// ErrClosed is returned by what is called after Close.
	ErrClosed = errors.New("plug is closed")

	errFull = errors.New("frames released long ago have not left")
)

// Plug holds the output of one guest. Its methods are safe for concurrent use.
//
//	passing ─Seal→ holding, one sealed ─Release→ holding ─Seal→ …
//	any ─Pass→ passing
//	any ─Close→ closed (passing, everything removed)
type Plug struct {
	log   *slog.Logger
	pause Pause
	held  chan struct{}
	taps  []*tap
	tapMu sync.Mutex // see tap

	later sync.WaitGroup // of catchUp, when it is due

	mu     sync.Mutex // guards what follows
	k      *kernel
	devs   []*device
	sealed bool  // an epoch waits for its release
	broken error // a Seal has failed: an epoch may be mixed with the next
	closed bool
	retry  *time.Timer // calls catchUp; nil before it was needed
	due    bool        // it will
	behind time.Time   // since when there are released frames that cannot leave yet, or zero

	drops  uint64    // as last seen
	warned uint64    // so many of them have been logged,
	warn   time.Time // and none are before this
}

// Pause stops the guest for as long as its interfaces are taken off their plugs,
// and returns once nothing that it sent before is still on its way to them.
type Pause func() (resume func(), err error)

// Option changes how a plug is removed.
type Option func(*Pause)

// WithPause has the guest stand still for the moment in which its redirects are
// removed, some tens of milliseconds; then no frame overtakes another there either.
func WithPause(p Pause) Option { return func(to *Pause) { *to = p } }

func pauseOf(opts []Option) (p Pause) {
	for _, o := range opts {
		o(&p)
	}
	return p
}

// Open puts a plug, passing everything, behind each of the interfaces. They are
// named as in dom0; none at all is fine.
func Open(ctx context.Context, log *slog.Logger, vifs []string, opts ...Option) (_ *Plug, err error) {
	p := &Plug{log: log, pause: pauseOf(opts), held: make(chan struct{}, 1)}
	if p.k, err = openKernel(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			// The caller's context may be what has ended.
			err = errors.Join(err, p.Close())
		}
	}()
	for _, vif := range vifs {
		if err := context.Cause(ctx); err != nil {
			return nil, err
		}
		d, err := p.k.create(vif)
		if err != nil {
			return nil, fmt.Errorf("plug interface %s: %w", vif, err)
		}
		p.devs = append(p.devs, d)
		t, err := openTap(d.vif, d.vifIndex, &p.tapMu, p.held, log)
		if err != nil {
			return nil, fmt.Errorf("listen on interface %s: %w", vif, err)
		}
		p.taps = append(p.taps, t)
	}
	return p, nil
}

// ready says why nothing can be sealed or released.
func (p *Plug) ready() error {
	if p.closed {
		return ErrClosed
	}
	return p.broken
}

// Seal closes the epoch: what is held so far belongs to the epoch that is being
// checkpointed, what comes next to the following one. The first Seal, and the
// first after Pass, turns the plug from passing to holding. It is to be called
// while the guest is suspended, takes one request to the kernel per interface, and
// returns ErrOutstanding, having done nothing, if an epoch is sealed already.
//
// If an interface is gone it does its work for the others and returns ErrGone.
// After any other error nothing is released any more but by Close.
func (p *Plug) Seal() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.ready(); err != nil {
		return err
	}
	if p.sealed {
		return ErrOutstanding
	}
	p.sealed = true
	return p.each("seal", func(d *device) error {
		band, ok := d.ring.seal()
		if !ok {
			return errFull // Release and Pass have waited for it
		}
		return p.k.request(d.fill[band])
	})
}

// each does something for each interface. Of one that is gone it says so and
// nothing else; any other error breaks the plug, since frames of one epoch may
// then have joined those of another, or a band may be open that must not be.
func (p *Plug) each(what string, f func(*device) error) error {
	var errs []error
	for i, d := range p.devs {
		err := f(d)
		switch {
		case p.taps[i].gone():
			errs = append(errs, fmt.Errorf("%s: %w", d.vif, ErrGone))
		case err != nil:
			err = fmt.Errorf("%s the output of %s: %w", what, d.vif, err)
			p.broken = errors.Join(p.broken, err)
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Release lets out exactly the frames of the sealed epoch, after those of the
// epochs before. It waits for these in the background: they have long left, unless
// the host is starved of processor time. Only where it is that by more than a
// dozen epochs does Release itself wait.
//
// If an interface is gone it does its work for the others and returns ErrGone.
func (p *Plug) Release() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.ready(); err != nil {
		return err
	}
	if !p.sealed {
		return ErrNotSealed
	}
	p.sealed = false
	for _, d := range p.devs {
		d.ring.release()
	}
	return p.letOut()
}

// Pass lets out what is held, sealed or not, and all that comes, until the next
// Seal. It is idempotent. If an interface is gone it does its work for the others
// and returns ErrGone.
func (p *Plug) Pass() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.ready(); err != nil {
		return err
	}
	p.sealed = false
	for _, d := range p.devs {
		d.ring.pass()
	}
	return p.letOut()
}

// letOut opens what may be opened, now or later. There is a free band for the next
// Seal when it has returned nil.
func (p *Plug) letOut() error {
	err := p.each("release", func(d *device) error {
		deadline := time.Now().Add(drainTime)
		for {
			if err := p.advance(d); err != nil || !d.ring.full() {
				return err
			}
			if time.Now().After(deadline) {
				return errFull
			}
			time.Sleep(retryTime)
		}
	})
	p.reckon()
	return err
}

// advance opens the next band of an interface, if it can.
func (p *Plug) advance(d *device) error {
	if !d.ring.behind() {
		return nil
	}
	bands, err := p.k.bands(d)
	if err != nil {
		d.ring.head = d.ring.allowed // for an interface that is gone; else the plug is broken
		return err
	}
	d.countDrops(bands)
	open, shut, ok := d.ring.step(func(band int) uint32 { return bands[band].qlen })
	if !ok {
		return nil
	}
	if err := p.k.request(d.open[open]); err != nil {
		return err
	}
	return p.k.request(d.shut[shut])
}

// catchUp goes on where advance had to leave something for later.
func (p *Plug) catchUp() {
	defer p.later.Done()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.due = false
	if p.ready() != nil {
		return
	}
	if err := p.each("release", p.advance); err != nil && !errors.Is(err, ErrGone) {
		p.log.Error("the plug is broken", "err", err) // the next call returns it
		return
	}
	p.reckon()
}

// reckon has catchUp called if something is left to do, and logs what an operator
// should know.
func (p *Plug) reckon() {
	var behind bool
	var drops uint64
	for _, d := range p.devs {
		behind = behind || d.ring.behind()
		drops += d.drops
	}
	now := time.Now()
	if p.drops = drops; drops > p.warned && now.After(p.warn) {
		p.log.Warn("the plug was full and dropped frames", "frames", drops, "limit", Limit)
		p.warned, p.warn = drops, now.Add(10*time.Second)
	}
	switch {
	case !behind:
		p.behind = time.Time{}
	case p.behind.IsZero():
		p.behind = now
	case now.Sub(p.behind) > time.Second:
		p.log.Warn("released frames have not left for a second; is the host short of processor time?")
		p.behind = now
	}
	if !behind || p.due || p.broken != nil {
		return
	}
	p.due = true
	p.later.Add(1)
	if p.retry == nil {
		p.retry = time.AfterFunc(retryTime, p.catchUp)
	} else {
		p.retry.Reset(retryTime)
	}
}

// Arm forgets the frames seen so far and has the next one reported by Held. A
// frame that arrives between a Seal and an Arm is forgotten too, so call Arm before
// Seal, with the guest suspended.
func (p *Plug) Arm() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.tapMu.Lock()
	defer p.tapMu.Unlock()
	for _, t := range p.taps {
		t.arm()
	}
	select {
	case <-p.held:
	default:
	}
}

// Held receives when a first frame has arrived after Arm. It is never closed.
func (p *Plug) Held() <-chan struct{} { return p.held }

// Drops returns how many frames the plug had to drop since Open, because an
// epoch sent more than Limit. The first are logged when they are seen, and then
// what has been added, every ten seconds at most.
func (p *Plug) Drops() (uint64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return p.drops, nil
	}
	return p.countDrops()
}

func (p *Plug) countDrops() (uint64, error) {
	p.drops = 0
	for _, d := range p.devs {
		bands, err := p.k.bands(d)
		if err != nil {
			return 0, fmt.Errorf("count dropped frames: %w", err)
		}
		d.countDrops(bands)
		p.drops += d.drops
	}
	return p.drops, nil
}

func (d *device) countDrops(bands [numBands]bandStats) {
	d.drops = 0
	for _, b := range bands {
		d.drops += uint64(b.drops)
	}
}

// Close lets everything out, takes the guest's interfaces off their plugs and
// removes these, without losing a frame. It is idempotent and takes some tens of
// milliseconds, during which frames pass. After an error they pass all the same, and
// Cleanup may remove what was left.
func (p *Plug) Close() error {
	err := p.close()
	p.later.Wait()
	return err
}

func (p *Plug) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	p.closed = true
	if p.due && p.retry.Stop() {
		p.later.Done()
	}
	for _, t := range p.taps {
		t.Close()
	}
	if _, err := p.countDrops(); err == nil && p.drops > p.warned {
		p.log.Warn("the plug was full and dropped frames", "frames", p.drops, "limit", Limit)
	}
	return errors.Join(p.k.remove(p.devs, p.pause), p.k.Close())
}

// Cleanup removes what the Plug of a process that died has left behind on these
// interfaces, and plugs whose interface is gone, whoever's they were. What is
// held is let out first. It is idempotent, and fine if there is nothing.
func Cleanup(ctx context.Context, vifs []string, opts ...Option) error {
	k, err := openKernel()
	if err != nil {
		return err
	}
	devs, err := k.find(vifs)
	if err == nil {
		err = context.Cause(ctx)
	}
	if err == nil {
		err = k.remove(devs, pauseOf(opts))
	}
	return errors.Join(err, k.Close())
}

const (
	// drainTime bounds how long what was let out may take to leave, out of all
	// interfaces together where they are taken off their plugs. It takes
	// microseconds, or as long as a starved host does not run its kernel's threads.
	drainTime = 10 * time.Second
	// settleTime bounds how long is waited for a moment without traffic, for the
	// sake of the order, before redirects are removed; pauseTime how long for one
	// while the guest is paused.
	settleTime = 100 * time.Millisecond
	pauseTime  = time.Second
	// retryTime is how soon bands are looked at again that were not empty.
	retryTime = time.Millisecond
)
