package main

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"kemari/migrate/bench"
)

// figures are what was measured in one run. What is empty was not.
type figures struct {
	epochs int // asked for

	idle   []seen    // the primary while the guest is idle and checkpointed at intervals
	remus  *remusRun // xl remus to the other host
	hole   *remusRun // and to nowhere
	bare   *copyRun  // of as many pages as an idle epoch has
	link   []float64 // round trips between the hosts, in µs
	plain  []float64 // to the guest before it is protected
	pinged []float64 // to the guest while it is, checkpointed on output
	usual  []float64 // the same, with the intervals that are usual
	answer []seen    // the primary during pinged

	primary, standby []seen // during the epochs in a row
}

// results are the lines of SPEC.md, and what else was measured.
func (f *figures) results() (all []bench.Result) {
	info := func(name string, value float64, unit string) {
		if !math.IsNaN(value) {
			all = append(all, bench.Result{Name: name, Value: value, Unit: unit, Info: true})
		}
	}
	most := func(name string, value, bound float64) {
		all = append(all, bench.Result{Name: name, Value: value, Bound: bound, Most: true})
	}
	ms := func(name string, us float64) { info(name, us/1000, "ms") }

	pause, rest := medianOf(f.idle, pauseOf), medianOf(f.idle, restOf)
	pages, bytes := medianOf(f.idle, func(s seen) float64 { return float64(s.PagesLast) }), perEpoch(f.idle)
	if len(f.idle) > 0 {
		info("idle/epochs-seen", float64(len(f.idle)), "")
	}
	ms("idle/pause", pause)
	ms("idle/suspend", medianOf(f.idle, suspendOf))
	ms("idle/copy", medianOf(f.idle, copyOf))
	ms("idle/resume", medianOf(f.idle, func(s seen) float64 { return float64(s.ResumeLast) }))
	ms("idle/commit-lag", medianOf(f.idle, lagOf))
	info("idle/pages-per-epoch", pages, "")
	info("idle/bytes-per-epoch", bytes, "")
	ms("remus/pause", f.remus.pause())
	info("remus/bytes-per-epoch", f.remus.bytes(), "")
	ms("remus-to-nowhere/pause", f.hole.pause())
	info("remus-to-nowhere/bytes-per-epoch", f.hole.bytes(), "")
	info("pause-to-remus-to-nowhere", pause/f.hole.pause(), "")
	ms("bare-copy", f.bare.median())
	ms("ping/link", median(f.link))
	ms("ping/unprotected", median(f.plain))
	ms("ping/protected", median(f.pinged))
	ms("ping/protected-usual-intervals", median(f.usual))
	suspend, copied := medianOf(f.answer, suspendOf), medianOf(f.answer, copyOf)
	ms("ping/suspend", suspend)
	ms("ping/copy", copied)
	ms("ping/resume", medianOf(f.answer, func(s seen) float64 { return float64(s.ResumeLast) }))
	ms("ping/commit-lag", medianOf(f.answer, lagOf))
	grown, lines := growth(map[string][]seen{"primary": f.primary, "standby": f.standby})
	all = append(all, lines...)
	if n := len(f.primary); n > 1 {
		first, last := f.primary[0], f.primary[n-1]
		took := float64(last.At-first.At) / 1e9
		info("endurance/epochs", float64(last.Epoch-first.Epoch), "")
		info("endurance/epochs-per-second", float64(last.Epoch-first.Epoch)/took, "")
		if last.Epoch-first.Epoch < uint64(f.epochs) {
			grown = math.NaN()
		}
	}

	most("pause-to-remus", pause/f.remus.pause(), 0.5)
	most("pause-to-copy", rest/f.bare.median(), 2)
	most("bytes-to-remus", bytes/f.remus.bytes(), 0.1)
	most("ping-to-parts", median(f.pinged)/(suspend+copied+median(f.link)), 1.3)
	most("endurance", grown, 0)
	return all
}

// seen is what a side of the protection said of itself at a time.
type seen struct {
	At int64 `json:"at"` // ns of a clock that goes on

	Epoch     uint64 `json:"epoch"`
	PagesLast int64  `json:"pages"`
	Bytes     int64  `json:"bytes"` // since protection began

	// Of the last committed epoch, in µs.
	PauseLast   int64 `json:"pause_us"`
	SuspendLast int64 `json:"suspend_us"`
	CopyLast    int64 `json:"copy_us"`
	ResumeLast  int64 `json:"resume_us"`
	Lag         int64 `json:"lag_us"`

	Usage *usage `json:"usage,omitempty"`
}

// usage is what its process holds.
type usage struct {
	MemoryKiB   int64 `json:"memory_kib"` // of its own: anonymous and resident
	Descriptors int64 `json:"descriptors"`
	Mappings    int64 `json:"mappings"`
	Threads     int64 `json:"threads"`
}

func pauseOf(s seen) float64   { return float64(s.PauseLast) }
func suspendOf(s seen) float64 { return float64(s.SuspendLast) }
func copyOf(s seen) float64    { return float64(s.CopyLast) }
func lagOf(s seen) float64     { return float64(s.Lag) }

// restOf is the pause less the suspend and resume calls.
func restOf(s seen) float64 { return float64(s.PauseLast - s.SuspendLast - s.ResumeLast) }

// perEpoch is the mean of what was sent.
func perEpoch(s []seen) float64 {
	if len(s) < 2 {
		return math.NaN()
	}
	first, last := s[0], s[len(s)-1]
	return float64(last.Bytes-first.Bytes) / float64(last.Epoch-first.Epoch)
}

func medianOf(s []seen, of func(seen) float64) float64 {
	var all []float64
	for _, x := range s {
		all = append(all, of(x))
	}
	return median(all)
}

// median is NaN of nothing.
func median(all []float64) float64 {
	if len(all) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(all))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// remusRun is what was seen of xl remus, an entry an epoch.
type remusRun struct {
	Pause []float64 `json:"pause_us"` // the request to suspend to resumed
	Wrote []int64   `json:"wrote"`    // to the stream, so far, at the end of the pause; -1: not known
}

func (r *remusRun) pause() float64 {
	if r == nil {
		return math.NaN()
	}
	return median(r.Pause)
}

// bytes is the mean of an epoch.
func (r *remusRun) bytes() float64 {
	if r == nil {
		return math.NaN()
	}
	first, last := -1, -1
	for i, n := range r.Wrote {
		if n >= 0 && first < 0 {
			first = i
		}
		if n >= 0 {
			last = i
		}
	}
	if last <= first {
		return math.NaN()
	}
	return float64(r.Wrote[last]-r.Wrote[first]) / float64(last-first)
}

// copyRun is the bare copy of so many pages.
type copyRun struct {
	Pages int       `json:"pages"`
	Took  []float64 `json:"took_us"`
}

func (c *copyRun) median() float64 {
	if c == nil {
		return math.NaN()
	}
	return median(c.Took)
}

// slack is what a process's memory may be more without counting as growth: a garbage
// collector leaves some, this time or that.
const slack = 1024 // KiB

// growth counts of what the processes hold what has grown: has, in the last quarter of
// the time, never been as little as it had been at most in the second one. In the first
// it may grow, until caches and pools are full. NaN if a process was not watched.
func growth(of map[string][]seen) (grown float64, lines []bench.Result) {
	for _, side := range sortedKeys(of) {
		var all []seen
		for _, s := range of[side] {
			if s.Usage != nil {
				all = append(all, s)
			}
		}
		n := len(all)
		if n < 8 {
			grown = math.NaN()
			continue
		}
		for _, what := range []struct {
			name  string
			unit  string
			of    func(seen) int64
			slack int64
		}{
			{"memory", "KiB", func(s seen) int64 { return s.Usage.MemoryKiB }, slack},
			{"descriptors", "", func(s seen) int64 { return s.Usage.Descriptors }, 0},
			{"mappings", "", func(s seen) int64 { return s.Usage.Mappings }, 0},
			{"threads", "", func(s seen) int64 { return s.Usage.Threads }, 0},
		} {
			by := func(a, b seen) int { return cmp.Compare(what.of(a), what.of(b)) }
			before := what.of(slices.MaxFunc(all[n/4:n/2], by))
			after := what.of(slices.MinFunc(all[n-n/4:], by))
			if after > before+what.slack {
				grown++
			}
			for _, x := range []struct {
				when  string
				value int64
			}{{"before-at-most", before}, {"after-at-least", after}} {
				lines = append(lines, bench.Result{Name: fmt.Sprintf("endurance/%s-%s-%s", side, what.name, x.when), Value: float64(x.value), Unit: what.unit, Info: true})
			}
		}
	}
	return grown, lines
}

func sortedKeys[V any](m map[string]V) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
