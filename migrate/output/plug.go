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
)

// Plug holds the output of one guest. Its methods are safe for concurrent use.
//
//	passing ─Seal→ holding, one sealed ─Release→ holding ─Seal→ …
//	any ─Pass→ passing
//	any ─Close→ closed (passing, everything removed)
type Plug struct {
	log  *slog.Logger
	held chan struct{}
	taps []*tap

	mu     sync.Mutex // guards what follows
	k      *kernel
	devs   []*device
	fill   int            // the band new frames go to
	sealed int            // the band that waits for its release, or none
	open   [numBands]bool // bands that let everything out
	broken error          // a Seal has failed: an epoch may be mixed with the next
	closed bool
	drops  uint64 // as of Close
}

const none = -1

// Open puts a plug, passing everything, behind each of the interfaces. They are
// named as in dom0; none at all is fine.
func Open(ctx context.Context, log *slog.Logger, vifs []string) (_ *Plug, err error) {
	p := &Plug{log: log, held: make(chan struct{}, 1), fill: bandPass, sealed: none}
	p.open[bandPass] = true
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
		t, err := openTap(d.vif, d.vifIndex, p.held, log)
		if err != nil {
			return nil, fmt.Errorf("listen on interface %s: %w", vif, err)
		}
		p.taps = append(p.taps, t)
	}
	return p, nil
}

// Seal closes the epoch: what is held so far belongs to the epoch that is being
// checkpointed, what comes next to the following one. The first Seal turns the
// plug from passing to holding. It is to be called while the guest is suspended,
// takes one request to the kernel per interface, and returns ErrOutstanding,
// having done nothing, if an epoch is sealed already.
//
// If an interface is gone it does its work for the others and returns ErrGone.
// After any other error nothing is released any more but by Close.
func (p *Plug) Seal() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		return ErrClosed
	case p.broken != nil:
		return p.broken
	case p.sealed != none:
		return ErrOutstanding
	}
	next := nextBand(p.fill)
	var errs []error
	for i, d := range p.devs {
		gone := p.taps[i].gone()
		if err := p.k.request(d.fill[next]); err != nil && !gone {
			// The frames to come join those of this epoch.
			p.broken = fmt.Errorf("seal the output of %s: %w", d.vif, err)
			errs = append(errs, p.broken)
		}
		if gone {
			errs = append(errs, fmt.Errorf("%s: %w", d.vif, ErrGone))
		}
	}
	p.sealed, p.fill = p.fill, next
	return errors.Join(errs...)
}

// Release lets out exactly the frames of the sealed epoch. If an interface is
// gone it does its work for the others and returns ErrGone.
func (p *Plug) Release() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		return ErrClosed
	case p.broken != nil:
		return p.broken
	case p.sealed == none:
		return ErrNotSealed
	}
	opening := p.sealed
	p.sealed = none
	return p.openBand(opening)
}

// Pass lets out what is held, sealed or not, and all that comes, until the next
// Seal. It is idempotent. If an interface is gone it does its work for the others
// and returns ErrGone.
func (p *Plug) Pass() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		return ErrClosed
	case p.broken != nil:
		return p.broken
	}
	var errs []error
	if p.sealed != none { // first, so that nothing overtakes it
		errs = append(errs, p.openBand(p.sealed))
		p.sealed = none
	}
	if !p.open[p.fill] {
		errs = append(errs, p.openBand(p.fill))
	}
	return errors.Join(errs...)
}

// openBand lets out a band, and shuts the one that is next to be filled.
func (p *Plug) openBand(opening int) error {
	closing := nextBand(p.fill)
	var errs []error
	for i, d := range p.devs {
		err := p.releaseOne(d, opening, closing)
		if p.taps[i].gone() {
			err = ErrGone
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("release the output of %s: %w", d.vif, err))
		}
	}
	p.open[opening], p.open[closing] = true, false
	return errors.Join(errs...)
}

// releaseOne opens a band, and closes the one that is next to be filled, which
// was opened thirteen epochs ago.
//
// A later epoch has a later band, so that it cannot overtake, but where the bands
// begin anew. There this waits until the epochs released before have left. They
// have long, unless the host is starved of processor time.
func (p *Plug) releaseOne(d *device, opening, closing int) error {
	if opening == firstEpoch {
		var before []int
		for band, open := range p.open {
			if open {
				before = append(before, band)
			}
		}
		if err := p.k.drain(settleTime, func() (bool, error) { return p.k.plugEmpty(d, before...) }); err != nil {
			p.log.Warn("frames released before have not left yet", "interface", d.vif, "err", err)
		}
	}
	if !p.open[opening] {
		if err := p.k.request(d.open[opening]); err != nil {
			return err
		}
	}
	if !p.open[closing] {
		return nil
	}
	return p.k.request(d.shut[closing])
}

// Arm forgets the frames seen so far and has the next one reported by Held. A frame that arrives between a Seal and an Arm is forgotten
// too, so call Arm before Seal, with the guest suspended.
func (p *Plug) Arm() {
	// In this order: a frame that comes in between is reported rather too often
	// than not at all.
	select {
	case <-p.held:
	default:
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	for _, t := range p.taps {
		t.arm()
	}
}

// Held receives when a first frame has arrived after Arm. It is never closed.
func (p *Plug) Held() <-chan struct{} { return p.held }

// Drops returns how many frames the plug had to drop since Open, because an
// epoch sent more than Limit.
func (p *Plug) Drops() (uint64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return p.drops, nil
	}
	return p.countDrops()
}

func (p *Plug) countDrops() (n uint64, err error) {
	if len(p.devs) == 0 {
		return 0, nil
	}
	qdiscs, err := p.k.qdiscs()
	if err != nil {
		return 0, fmt.Errorf("count dropped frames: %w", err)
	}
	for _, d := range p.devs {
		for _, q := range qdiscs {
			if q.ifindex == d.ifb && q.handle == rootHandle {
				n += uint64(q.drops)
			}
		}
	}
	return n, nil
}

// Close lets everything out, takes the guest's interfaces off their plugs and
// removes these, without losing a frame. It is idempotent and takes some tens of
// milliseconds, during which frames pass.
func (p *Plug) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	p.closed = true
	for _, t := range p.taps {
		t.Close()
	}
	p.drops, _ = p.countDrops()
	if p.drops > 0 {
		p.log.Warn("frames were dropped by the plug", "frames", p.drops, "limit", Limit)
	}
	return errors.Join(p.k.remove(p.devs), p.k.Close())
}

// Cleanup removes what the Plug of a process that died has left behind on these
// interfaces, and plugs whose interface is gone, whoever's they were. What is
// held is let out first. It is idempotent, and fine if there is nothing.
func Cleanup(ctx context.Context, vifs []string) error {
	k, err := openKernel()
	if err != nil {
		return err
	}
	devs, err := k.find(vifs)
	if err == nil {
		err = context.Cause(ctx)
	}
	if err == nil {
		err = k.remove(devs)
	}
	return errors.Join(err, k.Close())
}

const (
	// drainTime bounds how long what was let out may take to leave. It takes
	// microseconds, so that more than this is a bug, in the kernel or here.
	drainTime = 2 * time.Second
	// settleTime bounds how long is waited for the sake of the order: by Close for
	// a moment without traffic, and by Release where the bands begin anew.
	settleTime = 100 * time.Millisecond
)
