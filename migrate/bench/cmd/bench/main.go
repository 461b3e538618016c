// Bench measures the promises of migrate/bench/SPEC.md that need no laboratory and
// prints a line for each; it fails if one is not kept.
//
//	bench [--rounds N] [TRACE…]
//
// Without traces it holds the promises on those that come with the project, and
// also says what a synthetic one comes to.
package main

import (
	"flag"
	"fmt"
	"os"

	"kemari/migrate/bench"
	"kemari/migrate/bench/trace"
)

func main() {
	rounds := flag.Int("rounds", 11, "take the median of `N`")
	flag.Parse()
	ok, err := run(flag.Args(), *rounds)
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

func run(files []string, rounds int) (bool, error) {
	if len(files) > 0 {
		traces, err := bench.Files(files)
		if err != nil {
			return false, err
		}
		return bench.Native(os.Stdout, traces, nil, rounds)
	}
	traces, err := bench.Samples()
	if err != nil {
		return false, err
	}
	// Larger than the processor's caches, as the samples are not.
	others := map[string]*trace.Trace{"synthetic": trace.Synthetic(1, 8192, 40, 1000)}
	return bench.Native(os.Stdout, traces, others, rounds)
}
