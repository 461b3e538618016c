package trace

import (
	"slices"

	"kemari/migrate/page"
)

// Recorder makes a trace of the pages of checkpoint after checkpoint. It keeps
// one page in every Sample, chosen by number so that the history of a page is
// whole, and drops pages that are never dirty.
type Recorder struct {
	Sample uint64 // 0 and 1: keep all
	Skip   int    // checkpoints after the first that only say what pages were

	before map[page.PFN][]byte // what pages were before that
	dirty  map[page.PFN]bool   // pages of later ones
	now    Epoch
	at     map[page.PFN]int // where in now
	epochs []Epoch
	ends   int
}

// Page takes a page of the checkpoint under way; data is copied. Where a page
// comes twice, the last one is what it is at the checkpoint.
func (r *Recorder) Page(pfn page.PFN, data []byte) {
	// The multiplication spreads the sample: neighbours are often alike.
	if r.Sample > 1 && uint64(pfn)*0x9e3779b97f4a7c15>>32%r.Sample != 0 {
		return
	}
	if r.ends > r.Skip {
		if i, ok := r.at[pfn]; ok {
			copy(r.now.Page(i), data)
			return
		}
		if r.dirty == nil {
			r.dirty, r.at = make(map[page.PFN]bool), make(map[page.PFN]int)
		}
		r.dirty[pfn], r.at[pfn] = true, len(r.now.PFNs)
		r.now.Add(pfn, data)
		return
	}
	if r.before == nil {
		r.before = make(map[page.PFN][]byte)
	}
	r.before[pfn] = append(r.before[pfn][:0], data...)
}

// Checkpoint ends the one under way, and returns how many have ended.
func (r *Recorder) Checkpoint() int {
	if r.ends > r.Skip {
		r.epochs = append(r.epochs, r.now)
		r.now = Epoch{}
		clear(r.at)
	}
	r.ends++
	return r.ends
}

// Trace returns what was recorded.
func (r *Recorder) Trace(about string) *Trace {
	var first Epoch
	for pfn := range r.before {
		if r.dirty[pfn] {
			first.PFNs = append(first.PFNs, pfn)
		}
	}
	slices.Sort(first.PFNs)
	for _, pfn := range first.PFNs {
		first.Data = append(first.Data, r.before[pfn]...)
	}
	return &Trace{About: about, Epochs: append([]Epoch{first}, r.epochs...)}
}
