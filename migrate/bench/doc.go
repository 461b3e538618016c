// Package bench holds Kemari to what it promises. SPEC.md lists the promises,
// each with its benchmark; `make bench` measures those that need no laboratory and
// prints a line for each.
package bench
