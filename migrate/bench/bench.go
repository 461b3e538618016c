package bench

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Result is what became of a promise.
type Result struct {
	Name  string
	Value float64
	Unit  string
	Bound float64
	Most  bool // Bound is the most the value may be, not the least
	Info  bool // nothing is promised
}

// OK tells whether the promise is kept.
func (r Result) OK() bool {
	if r.Most {
		return r.Value <= r.Bound
	}
	return r.Value >= r.Bound
}

// String is the line of SPEC.md, or one that begins with INFO.
func (r Result) String() string {
	if r.Info {
		return fmt.Sprintf("INFO name=%s value=%.4g%s", r.Name, r.Value, r.Unit)
	}
	rel := ">="
	if r.Most {
		rel = "<="
	}
	return fmt.Sprintf("BENCH name=%s value=%.4g%s bound=%s%g%s ok=%t", r.Name, r.Value, r.Unit, rel, r.Bound, r.Unit, r.OK())
}

// Clock stops the time of what is measured while something else has to be done.
type Clock struct{ spent, since time.Duration }

// Without runs fn and does not count it.
func (c *Clock) Without(fn func()) {
	c.spent += threadTime() - c.since
	fn()
	c.since = threadTime()
}

// Cost is what something took, over the rounds.
type Cost struct{ Least, Median time.Duration }

// Interleave runs each of fns once a round, one after the other, and returns the
// cost of each: the processor time of its thread, so that what else runs on this
// machine counts only by what it does to the caches and to the memory's speed. fns
// must not start goroutines. One round before is not counted.
//
// The least cost is nearest to what the code itself needs: it is for what is held
// against a figure. What is held against something else of the same run is a
// ratio of medians.
func Interleave(rounds int, fns ...func(*Clock)) []Cost {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	runtime.GC()
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	costs := make([][]time.Duration, len(fns))
	for round := range rounds + 1 {
		for i, fn := range fns {
			c := Clock{since: threadTime()}
			fn(&c)
			if c.spent += threadTime() - c.since; round > 0 {
				costs[i] = append(costs[i], c.spent)
			}
		}
	}
	all := make([]Cost, len(fns))
	for i, c := range costs {
		slices.Sort(c)
		all[i] = Cost{Least: c[0], Median: c[len(c)/2]}
	}
	return all
}

func threadTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		panic(err) // every Linux has it
	}
	return time.Duration(ts.Nano())
}

// Speed is bytes a nanosecond, that is GB/s.
func (c Cost) Speed(bytes int) float64 { return float64(bytes) / float64(max(c.Least, 1)) }

// Ratio is how much faster c is than other.
func (c Cost) Ratio(other Cost) float64 { return float64(other.Median) / float64(max(c.Median, 1)) }
