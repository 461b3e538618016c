package migratetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"kemari/migrate"
	"kemari/migrate/page"
)

// Shadow is a fake copy of a Guest. It implements migrate.Shadow and is strict
// about the order of calls.
type Shadow struct {
	Points *Points

	mu     sync.Mutex
	mem    map[page.PFN]*[page.Size]byte
	head   bool
	state  *State // it runs from
	closed bool
	err    error
	unread error // of Base
	balk   error // of TakeOver
	hang   bool  // TakeOver does, until its time is over
	writes int
}

// NewShadow returns an empty one.
func NewShadow() *Shadow { return &Shadow{mem: make(map[page.PFN]*[page.Size]byte)} }

// Fail makes Apply fail from now on.
func (s *Shadow) Fail(err error) { s.mu.Lock(); defer s.mu.Unlock(); s.err = err }

// Balk makes TakeOver fail.
func (s *Shadow) Balk(err error) { s.mu.Lock(); defer s.mu.Unlock(); s.balk = err }

// Hang makes TakeOver last for as long as it may, and fail.
func (s *Shadow) Hang() { s.mu.Lock(); defer s.mu.Unlock(); s.hang = true }

// Unread makes Base fail from now on.
func (s *Shadow) Unread(err error) { s.mu.Lock(); defer s.mu.Unlock(); s.unread = err }

// Lose makes it have nothing of a page.
func (s *Shadow) Lose(pfn page.PFN) { s.mu.Lock(); defer s.mu.Unlock(); delete(s.mem, pfn) }

// Spoil changes a page of the copy behind the engine's back.
func (s *Shadow) Spoil(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, pfn := range slices.Sorted(keys(s.mem)) {
		if n--; n < 0 {
			return
		}
		s.mem[pfn][17] ^= 0xff
	}
}

// SpoilPage is Spoil of one page.
func (s *Shadow) SpoilPage(pfn page.PFN) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mem[pfn][17] ^= 0xff
}

func keys(m map[page.PFN]*[page.Size]byte) func(func(page.PFN) bool) {
	return func(yield func(page.PFN) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// Over returns the state it runs from, or nil. Closed tells whether it is gone.
func (s *Shadow) Over() *State { s.mu.Lock(); defer s.mu.Unlock(); return s.state }
func (s *Shadow) Closed() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.closed }

// Writes is how many pages have been applied.
func (s *Shadow) Writes() int { s.mu.Lock(); defer s.mu.Unlock(); return s.writes }

func (s *Shadow) usable() error {
	if s.closed || s.state != nil {
		return fmt.Errorf("used while closed: %v, or running: %v", s.closed, s.state != nil)
	}
	return nil
}

// Head implements migrate.Shadow.
func (s *Shadow) Head(b []byte) error {
	s.Points.Hit("shadow: head")
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.head || string(b) != Head {
		return fmt.Errorf("head %q, after one: %v", b, s.head)
	}
	s.head = true
	return s.usable()
}

// Base implements migrate.Shadow.
func (s *Shadow) Base(pfn page.PFN, dst []byte) error {
	s.Points.Hit("shadow: base")
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.unread != nil {
		return s.unread
	}
	p := s.mem[pfn]
	if p == nil {
		return fmt.Errorf("page %v: %w", pfn, migrate.ErrNoPage)
	}
	copy(dst, p[:])
	return s.usable()
}

// Check implements migrate.Shadow.
func (s *Shadow) Check(state []byte) error {
	s.Points.Hit("shadow: check")
	_, err := ParseState(state)
	return err
}

// Apply implements migrate.Shadow.
func (s *Shadow) Apply(p *migrate.Pages) error {
	s.Points.Hit("shadow: apply")
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.head {
		return errors.New("pages before the head")
	}
	if len(p.Data) != len(p.PFNs)*page.Size {
		return errors.New("another number of pages than of contents")
	}
	for i, pfn := range p.PFNs {
		if s.mem[pfn] == nil {
			s.mem[pfn] = new([page.Size]byte)
		}
		copy(s.mem[pfn][:], p.Page(i))
		s.writes++
	}
	return errors.Join(s.err, s.usable())
}

// Sum is of the copy's memory.
func (s *Shadow) Sum() (x uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, pfn := range slices.Sorted(keys(s.mem)) {
		x = sum(x, pfn, s.mem[pfn][:])
	}
	return x
}

// TakeOver implements migrate.Shadow. It fails if the memory is not that of the
// state.
func (s *Shadow) TakeOver(ctx context.Context, state []byte) error {
	s.Points.Hit("shadow: take over")
	time.Sleep(50 * time.Millisecond)
	st, err := ParseState(state)
	if err != nil {
		return err
	}
	if x := s.Sum(); x != st.Sum {
		return fmt.Errorf("the copy's memory has sum %#x, and not %#x as the guest's had at %d", x, st.Sum, st.Count)
	}
	s.mu.Lock()
	hang := s.hang
	s.mu.Unlock()
	if hang {
		<-ctx.Done()
		return context.Cause(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := errors.Join(s.balk, s.usable()); err != nil {
		return err
	}
	s.state = &st
	return nil
}

// Close implements migrate.Shadow.
func (s *Shadow) Close() error {
	s.Points.Hit("shadow: close")
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return nil
}
