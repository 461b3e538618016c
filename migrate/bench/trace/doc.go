// Package trace keeps recorded histories of dirty pages, so that the benchmarks
// of page encoding run on what guests really do.
//
// A trace file is one Zstandard stream of, big-endian,
//
//	16 bytes  magic and version: "kemari trace 1\n" and a zero
//	u16, text what was recorded, in words
//	epochs, each
//	  u32     number of pages
//	  pages, each
//	    u64   pfn
//	    4096  content
//
// Epoch 0 says what the pages were before the first checkpoint, where that is
// known; each later one holds the pages that were dirty at that checkpoint.
//
// The command migrate/bench/cmd/trace records; Synthetic makes up a trace for
// where there is no recorded one.
package trace
