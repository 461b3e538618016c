package migrate

import "kemari/migrate/page"

// slabPages is how many pages are brought into the shadow at once: 1 MiB.
const slabPages = 256

// keptSlabs is how much memory of an epoch is kept for the next one.
const keptSlabs = 64

// staging holds the decoded pages of an epoch in slabs that are used again, so
// that a large epoch neither copies what it holds already in order to grow nor
// keeps its memory for good.
type staging struct {
	slabs []*Pages
	full  int // slabs in use that are full; the next one is being filled
	pages int
}

// add appends a page.
func (s *staging) add(pfn page.PFN, data []byte) {
	if s.full == len(s.slabs) {
		s.slabs = append(s.slabs, &Pages{
			PFNs: make([]page.PFN, 0, slabPages),
			Data: make([]byte, 0, slabPages*page.Size),
		})
	}
	b := s.slabs[s.full]
	b.Append(pfn, data)
	s.pages++
	if len(b.PFNs) == slabPages {
		s.full++
	}
}

// compact drops all but the last of each page's contents. It is for an epoch that
// names pages several times, and takes memory and time; others are never compacted.
func (s *staging) compact() {
	last := make(map[page.PFN]int, s.pages)
	for i := range s.pages {
		last[s.slabs[i/slabPages].PFNs[i%slabPages]] = i
	}
	n := 0
	for i := range s.pages {
		from, j := s.slabs[i/slabPages], i%slabPages
		if pfn := from.PFNs[j]; last[pfn] == i {
			to, k := s.slabs[n/slabPages], n%slabPages
			to.PFNs[k] = pfn
			copy(to.Page(k), from.Page(j))
			n++
		}
	}
	for i, b := range s.slabs {
		k := min(max(n-i*slabPages, 0), len(b.PFNs))
		b.PFNs, b.Data = b.PFNs[:k], b.Data[:k*page.Size]
	}
	s.full, s.pages = n/slabPages, n
}

// drain hands all pages to f, in their order, and empties s. It stops at the first
// error.
func (s *staging) drain(f func(*Pages) error) error {
	defer s.reset()
	for i, b := range s.slabs {
		if i > s.full || len(b.PFNs) == 0 {
			return nil
		}
		if err := f(b); err != nil {
			return err
		}
	}
	return nil
}

func (s *staging) reset() {
	if len(s.slabs) > keptSlabs {
		clear(s.slabs[keptSlabs:])
		s.slabs = s.slabs[:keptSlabs]
	}
	for _, b := range s.slabs {
		b.Reset()
	}
	s.full, s.pages = 0, 0
}
