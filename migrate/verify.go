package migrate

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cespare/xxhash/v2"

	"kemari/migrate/page"
	"kemari/migrate/wire"
)

// Sums is what all of a guest's memory is at a checkpoint, for the standby to
// compare its copy with. It is looked up and read anew, so that it is not misled by
// what checkpoints go by.
type Sums struct {
	PFNs []page.PFN // ascending
	Sums []uint64   // the XXH64 of each one's content

	// Shared names pages that others than the guest write to, without the guest doing
	// anything and without it being noted: they may differ, and are of no use to a guest
	// that runs elsewhere.
	Shared map[page.PFN]string
	// Note says what keeps Shared from being complete.
	Note string
	// Unread is how many pages the guest has that could not be read. Whoever takes
	// checkpoints leaves them out as well.
	Unread int
	// Err is why there are no sums.
	Err error
}

// Add is for pages in ascending order.
func (s *Sums) Add(pfn page.PFN, data []byte) {
	s.PFNs = append(s.PFNs, pfn)
	s.Sums = append(s.Sums, xxhash.Sum64(data))
}

// Reset empties s and keeps its memory.
func (s *Sums) Reset() { *s = Sums{PFNs: s.PFNs[:0], Sums: s.Sums[:0]} }

// settle puts in the sums of what was captured, which is what the standby has been
// sent. Between that and Add, others may have written to pages of a guest that
// stands: Xen notes events there, a backend hands over a packet. It returns how many
// pages that were.
func (s *Sums) settle(p *Pages) (moved int) {
	for i, pfn := range p.PFNs {
		j, ok := slices.BinarySearch(s.PFNs, pfn)
		if !ok {
			continue
		}
		if sum := xxhash.Sum64(p.Page(i)); sum != s.Sums[j] {
			s.Sums[j] = sum
			moved++
		}
	}
	return moved
}

// send sends the sums of a committed epoch, until wanted returns an error.
func (s *Sums) send(l *link, e wire.Epoch, wanted func() error) error {
	var b []byte
	for i := 0; i < len(s.PFNs); {
		if err := wanted(); err != nil {
			return err
		}
		n := 1
		for n < wire.MaxSums && i+n < len(s.PFNs) && s.PFNs[i+n] == s.PFNs[i]+page.PFN(n) {
			n++
		}
		w := wire.Sums{Total: uint64(len(s.PFNs)), Before: uint64(i), First: uint64(s.PFNs[i]), Sums: s.Sums[i : i+n]}
		b = w.Append(b[:0])
		if err := l.send(wire.TypeSums, e, b); err != nil {
			return err
		}
		i += n
	}
	return nil
}

// maxShown bounds the pages that a Verified names.
const maxShown = 64

// Verified is what a comparison of the standby's copy with the guest has shown.
type Verified struct {
	Epoch  wire.Epoch
	Pause  time.Duration // of the guest, for that checkpoint
	Pages  int           // compared
	Differ int           // of them, but for Shared
	// Missing is how many of all that differ the standby has nothing of.
	Missing int
	// Differing are the first of those that differ.
	Differing []page.PFN
	// Shared is how many differ that others than the guest write to: no fault.
	// SharedPages are the first of them.
	Shared      int
	SharedPages []SharedPage
	// Moved is how many pages others wrote to while the guest stood; they were compared
	// as they were captured.
	Moved int
	// Unread and Note are those of Sums.
	Unread int
	Note   string
}

// SharedPage is a page, and how Sums.Shared names it.
type SharedPage struct {
	PFN page.PFN
	By  string
}

// check is a Verify under way.
type check struct {
	// Of Run's goroutine, until sent is.
	sums  Sums
	moved int
	pause time.Duration

	epoch  wire.Epoch         // Primary.mu; 0 before that epoch is committed
	sent   chan *primaryLine  // on which the sums were sent
	failed chan error         // why they were not
	answer chan wire.Compared // the standby's
}

// verifyFor bounds a Verify.
const verifyFor = 5 * time.Minute

// Verify has the next checkpoint sum up all of the guest's memory, for which the
// guest stands longer than for others, and the standby compare its copy with it once
// that epoch is committed and applied. Nothing else changes: what keeps the
// comparison from being made is this call's error and no end of the protection.
//
// It blocks until the standby has answered. It may be called at any time; one at a
// time is made.
func (p *Primary) Verify(ctx context.Context) (*Verified, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, verifyFor, fmt.Errorf("not done within %v", verifyFor))
	defer cancel()
	c := &check{sent: make(chan *primaryLine, 1), failed: make(chan error, 1), answer: make(chan wire.Compared, 1)}
	if err := p.ask(c); err != nil {
		return nil, err
	}
	defer p.forget()
	var l *primaryLine
	select {
	case l = <-c.sent:
	case err := <-c.failed:
		return nil, err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-p.canceled.Done():
		return nil, errors.New("protection has ended meanwhile")
	}
	select {
	case a := <-c.answer:
		return c.judge(a)
	case <-l.done:
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for the standby's answer: %w", context.Cause(ctx))
	}
	select {
	case a := <-c.answer: // its last word
		return c.judge(a)
	default:
		return nil, fmt.Errorf("before the standby answered: %w", l.err)
	}
}

// ask lets c wait for the next checkpoint.
func (p *Primary) ask(c *check) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.canceled.Err() != nil:
		return errors.New("protection has ended")
	case p.stats.Alone:
		return errors.New("the standby is silent; there is nothing to compare with until it is back")
	case !p.stats.Protected:
		return errors.New("the first copy is not complete yet")
	case p.check != nil:
		return errors.New("the memory is being verified already")
	}
	p.check = c
	return nil
}

// forget makes room for another check. What is under way of the last one is not
// waited for.
func (p *Primary) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.check = nil
}

// checked takes a checkpoint with the sums that somebody may have asked for, or one
// that leaves the guest standing.
func (p *Primary) checked(ctx context.Context, hold bool) (*check, error) {
	p.mu.Lock()
	c := p.check
	if c != nil && (c.epoch > 0 || hold) {
		c = nil // it waits for its answer, or for the next one
	}
	p.mu.Unlock()
	if c != nil {
		p.capture.Sums = &c.sums
	}
	p.capture.Hold = hold
	err := p.checkpoint(ctx)
	p.capture.Sums, p.capture.Hold = nil, false
	p.held = hold && err == nil
	return c, err
}

// compare sends the sums of the epoch that was just committed. It is not waited for
// the answer: the next epoch may come meanwhile, and is dealt with after it.
func (p *Primary) compare(epoch wire.Epoch, c *check) {
	p.mu.Lock()
	c.epoch, c.pause = epoch, p.stats.Last.Pause()
	p.mu.Unlock()
	if err := c.sums.Err; err != nil {
		c.failed <- fmt.Errorf("read the guest's memory: %w", err)
		return
	}
	if len(c.sums.PFNs) == 0 {
		c.failed <- errors.New("the guest has no memory to be seen")
		return
	}
	c.moved = c.sums.settle(&p.capture.Pages)
	l := p.last
	err := c.sums.send(l.link, epoch, func() error { return p.wanted(c) })
	switch {
	case errors.Is(err, errUnwanted): // nor does the standby mind
		c.failed <- err
		return
	case err != nil:
		p.hangUp(l) // half a frame may be out
		c.failed <- fmt.Errorf("send what the memory is: %w", err)
		return
	}
	c.sent <- l
}

var errUnwanted = errors.New("nobody waits for it any more")

// wanted returns errUnwanted once a check is of no use.
func (p *Primary) wanted(c *check) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.check != c || p.canceled.Err() != nil {
		return errUnwanted
	}
	return nil
}

// compared takes the standby's answer. One to a check that nobody waits for any more
// is of no interest.
func (p *Primary) compared(f wire.Frame) error {
	a, err := wire.ParseCompared(f.Payload)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.check; c != nil && c.epoch == f.Epoch {
		select {
		case c.answer <- a:
		default:
		}
	}
	return nil
}

// judge makes of the standby's answer what it means, having checked that it is one.
func (c *check) judge(a wire.Compared) (*Verified, error) {
	s := &c.sums
	if a.Pages != uint64(len(s.PFNs)) {
		return nil, fmt.Errorf("the standby says that it compared %d pages, where %d were to be", a.Pages, len(s.PFNs))
	}
	v := &Verified{
		Epoch: c.epoch, Pause: c.pause, Pages: len(s.PFNs), Differ: int(a.Differ), Missing: int(a.Missing),
		Moved: c.moved, Unread: s.Unread, Note: s.Note,
	}
	if n := uint64(len(a.PFNs)); n < a.Differ && len(s.Shared) > 0 {
		return nil, fmt.Errorf("%d pages differ, and only %d of them are known: it could not be told how many of the others are shared", a.Differ, n)
	}
	for _, n := range a.PFNs {
		pfn := page.PFN(n)
		if _, ok := slices.BinarySearch(s.PFNs, pfn); !ok {
			return nil, fmt.Errorf("the standby says that page %v differs, which it was not asked for", pfn)
		}
		if by, ok := s.Shared[pfn]; ok {
			v.Differ--
			if v.Shared++; len(v.SharedPages) < maxShown {
				v.SharedPages = append(v.SharedPages, SharedPage{pfn, by})
			}
		} else if len(v.Differing) < maxShown {
			v.Differing = append(v.Differing, pfn)
		}
	}
	return v, nil
}

// comparison is a check on the standby's side.
type comparison struct {
	epoch wire.Epoch
	end   page.PFN // the next page is not below it
	total uint64
	wire.Compared
}

// compare looks at pages of the copy, and answers when it has seen all of the check.
// What comes in order is looked at as it comes, after the epoch was applied and before
// anything of the next one.
func (s *Standby) compare(l *standbyLine, f wire.Frame) error {
	w, err := wire.ParseSums(f.Payload)
	if err != nil {
		return err
	}
	most := s.cfg.MemoryKiB/(page.Size>>10) + slack
	first, n := page.PFN(w.First), page.PFN(len(w.Sums))
	switch c := &s.check; {
	case w.Total > most:
		return fmt.Errorf("%w: sums of %d pages, the guest has %d at most", wire.ErrFormat, w.Total, most)
	case first >= s.cfg.Limit || n > s.cfg.Limit-first:
		return fmt.Errorf("%w: sums of %d pages from %v on, outside the guest", wire.ErrFormat, n, first)
	case w.Before == 0:
		*c = comparison{epoch: f.Epoch, total: w.Total}
	case f.Epoch != c.epoch || w.Total != c.total || w.Before != c.Pages || first < c.end:
		return fmt.Errorf("%w: sums of %d pages from %v on, after %d of %d, do not go on after %d of %d", wire.ErrFormat, n, first, w.Before, w.Total, c.Pages, c.total)
	}
	c := &s.check
	c.end = first + n
	var data [page.Size]byte
	for i, sum := range w.Sums {
		pfn := first + page.PFN(i)
		err := s.shadow.Base(pfn, data[:])
		c.Pages++
		switch {
		case errors.Is(err, ErrNoPage):
			if c.Missing++; c.Missing == 1 {
				s.log.Warn("the copy has nothing of a page", "epoch", uint64(f.Epoch), "page", pfn.String())
			}
		case err != nil: // may take its time, and the next one would, too
			return fmt.Errorf("read page %v of the copy: %w", pfn, err)
		case xxhash.Sum64(data[:]) == sum:
			continue
		}
		if c.Differ++; len(c.PFNs) < wire.MaxDiffering {
			c.PFNs = append(c.PFNs, uint64(pfn))
		}
	}
	if c.Pages < c.total {
		return nil
	}
	s.log.Info("compared with the primary", "epoch", uint64(f.Epoch), "pages", c.Pages, "differ", c.Differ, "missing", c.Missing)
	answer := c.Append(nil)
	*c = comparison{}
	return l.send(wire.TypeCompared, f.Epoch, answer)
}
