package xen

import (
	"context"
	"fmt"
	"math/bits"
	"slices"

	"kemari/migrate"
	"kemari/migrate/page"
	"kemari/migrate/xen/internal/sys"
)

// summer sums up all of a guest's memory while the guest stands. Where there is memory
// it asks Xen anew, and it maps that anew: neither what a checkpoint takes for the
// guest's pages nor the mappings that are kept can mislead it. What has no memory is
// left out, as it is by a checkpoint: pages the guest has given back, and those that
// are Xen's own, grant frames and shared_info, at which Xen says that there is none.
type summer struct {
	d *Domain
	s *migrate.Sums
	w window
	p population
}

// summer gets ready, before the guest stands.
func (d *Domain) summer(s *migrate.Sums) *summer {
	s.Reset()
	m := &summer{d: d, s: s}
	m.w, s.Err = d.window()
	// All that is known, and a little: the guest is not to stand while memory is had.
	s.PFNs, s.Sums = slices.Grow(s.PFNs, d.pop.pages+reservePages), slices.Grow(s.Sums, d.pop.pages+reservePages)
	m.p.reset(d.xen.Limit())
	return m
}

// sum is for the guest as capture has just found it.
func (m *summer) sum(ctx context.Context) {
	if m.s.Err == nil {
		m.s.Err = m.all(ctx)
	}
	if m.s.Err == nil {
		m.share()
	}
}

func (m *summer) all(ctx context.Context) error {
	// The highest page may have gone up since the last Round.
	if err := m.d.withinLimit(); err != nil {
		return err
	}
	if err := m.d.populate(ctx, &m.p, m.d.xen.Limit(), m.d.stand.Info.TotPages, m.p.add); err != nil {
		return err
	}
	for word, there := range m.p.words {
		if there == 0 {
			continue
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		first := uint64(word) * sys.SlotPages
		ok, err := m.w.Map(0, first)
		if err != nil {
			return err
		}
		m.s.Unread += bits.OnesCount64(there &^ ok)
		for there &= ok; there != 0; there &= there - 1 {
			i := bits.TrailingZeros64(there)
			m.s.Add(page.PFN(first)+page.PFN(i), m.w.Page(0, i)[:])
		}
	}
	return nil
}

// share names the pages that Dom0 and others write to by mappings of their own, which
// Xen does not log: the xenstore's and the console's ring, which libxl clears anyway
// where a guest is restored, and what the guest has granted for writing, as it grants
// its devices' rings and buffers. A guest that goes on elsewhere makes all these anew.
func (m *summer) share() {
	m.s.Shared = map[page.PFN]string{}
	err := m.d.xen.Granted(func(pfn uint64, to uint16) {
		m.s.Shared[page.PFN(pfn)] = fmt.Sprintf("granted to domain %d", to)
	})
	if err != nil {
		m.s.Note = fmt.Sprintf("which pages the guest shares with its devices is not known: %v", err)
	}
	for i, p := range sys.StreamParams {
		pfn := page.PFN(m.d.stand.Params[i])
		switch {
		case pfn == 0: // it has none
		case p == sys.ParamStorePFN:
			m.s.Shared[pfn] = "xenstore ring"
		case p == sys.ParamConsolePFN:
			m.s.Shared[pfn] = "console ring"
		}
	}
}

func (m *summer) close() {
	if m.w != nil {
		m.w.Close()
	}
}
