package main

import (
	"fmt"
	"sort"
	"time"
)

// answer is a request that was answered.
type answer struct {
	start, end time.Duration
	value      uint64
}

// Result is what a run saw.
type Result struct {
	Answers    int
	Highest    uint64  // number acknowledged
	Last       uint64  // the counter, asked at the end
	Lost       int     // answers not above one acknowledged before they were asked for
	Doubled    int     // numbers given twice
	Reconnects int     // of the connection that is kept
	Gap        float64 // longest time without an answer; from the mark, if there is one
	GapAt      float64 // when that began, since the start
	Median     float64 // of a request's time
}

func (r Result) String() string {
	return fmt.Sprintf("answers=%d highest=%d last=%d lost=%d doubled=%d reconnects=%d gap_s=%.3f median_ms=%.1f",
		r.Answers, r.Highest, r.Last, r.Lost, r.Doubled, r.Reconnects, r.Gap, r.Median)
}

// judge checks the answers as the history of a counter: it is linearizable if and
// only if values are unique and grow from any request to any that began after its
// answer.
func judge(answers []answer, mark time.Duration) Result {
	r := Result{Answers: len(answers)}
	if len(answers) == 0 {
		return r
	}
	byEnd := append([]answer(nil), answers...)
	sort.Slice(byEnd, func(i, j int) bool { return byEnd[i].end < byEnd[j].end })
	byStart := append([]answer(nil), answers...)
	sort.Slice(byStart, func(i, j int) bool { return byStart[i].start < byStart[j].start })

	seen := make(map[uint64]bool, len(answers))
	var acked uint64 // highest value answered before the request at hand began
	next := 0
	took := make([]time.Duration, 0, len(answers))
	for _, a := range byStart {
		for next < len(byEnd) && byEnd[next].end < a.start {
			acked = max(acked, byEnd[next].value)
			next++
		}
		if a.value <= acked {
			r.Lost++
		}
		if seen[a.value] {
			r.Doubled++
		}
		seen[a.value] = true
		r.Highest = max(r.Highest, a.value)
		took = append(took, a.end-a.start)
	}
	sort.Slice(took, func(i, j int) bool { return took[i] < took[j] })
	r.Median = float64(took[len(took)/2].Microseconds()) / 1e3

	var longest, from, to time.Duration
	for i := 1; i < len(byEnd); i++ {
		if mark > 0 && byEnd[i].end < mark {
			continue
		}
		if d := byEnd[i].end - byEnd[i-1].end; d > longest {
			longest, from, to = d, byEnd[i-1].end, byEnd[i].end
		}
	}
	if mark > 0 {
		from = mark
	}
	r.Gap = (to - from).Seconds()
	return r
}
