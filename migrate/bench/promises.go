package bench

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"

	"kemari/migrate/bench/trace"
)

// Native measures the promises of SPEC.md that need no laboratory, and writes their
// lines to w, with what else was measured before them. Those of page encoding are
// held on the worst of the recorded traces; what others come to is only told. It
// returns whether all are kept.
func Native(w io.Writer, recorded, others map[string]*trace.Trace, rounds int) (bool, error) {
	if len(recorded) == 0 {
		return false, errors.New("no trace")
	}
	var lines []Result
	info := func(name string, value float64, unit string) {
		lines = append(lines, Result{Name: name, Value: value, Unit: unit, Info: true})
	}
	codec := func(name string, t *trace.Trace) (*CodecFigures, error) {
		f, err := Codec(t, rounds)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		info(name+"/pages", float64(f.Size)/(1<<20), "MiB")
		info(name+"/bytes-per-page", f.PerPage, "")
		info(name+"/bytes-per-page-compressed", f.PerPagePacked, "")
		info(name+"/delta-encode", f.Encode, "GB/s")
		info(name+"/delta-decode", f.Decode, "GB/s")
		info(name+"/encode-compressed", f.EncodePacked, "GB/s")
		info(name+"/encode-first-compressed", f.FirstPacked, "GB/s")
		info(name+"/decode-into-memory", f.Applied, "GB/s")
		info(name+"/decode-stage-apply", f.Whole, "GB/s")
		info(name+"/decode-stage-apply-to-memcpy", f.WholeRatio, "")
		info(name+"/memcpy", f.Memcpy, "GB/s")
		return f, nil
	}
	for _, name := range slices.Sorted(maps.Keys(others)) {
		if _, err := codec(name, others[name]); err != nil {
			return false, err
		}
	}
	encode, decode, apply := math.Inf(1), math.Inf(1), math.Inf(1)
	for _, name := range slices.Sorted(maps.Keys(recorded)) {
		f, err := codec(name, recorded[name])
		if err != nil {
			return false, err
		}
		encode, decode, apply = min(encode, f.Encode), min(decode, f.Decode), min(apply, f.AppliedRatio)
	}

	warm, cold := Bitmap(64<<30, 1000, 10*rounds)
	info("bitmap-scan-64GiB-cold", float64(cold.Nanoseconds())/1e3, "us")

	capture, memcpy, err := Capture(256<<20, 4096, rounds)
	if err != nil {
		return false, err
	}
	info("capture-copy/memcpy-cold", memcpy, "GB/s")
	captureWarm, memcpyWarm, err := Capture(2<<20, 100, rounds*10)
	if err != nil {
		return false, err
	}
	info("capture-copy/memcpy-warm", memcpyWarm, "GB/s")
	info("capture-copy-warm", captureWarm, "")

	lines = append(lines,
		Result{Name: "delta-encode", Value: encode, Unit: "GB/s", Bound: 2},
		Result{Name: "delta-decode", Value: decode, Unit: "GB/s", Bound: 4},
		Result{Name: "bitmap-scan-64GiB", Value: float64(warm.Nanoseconds()) / 1e3, Unit: "us", Bound: 200, Most: true},
		Result{Name: "capture-copy", Value: capture, Bound: 0.8},
		Result{Name: "standby-apply", Value: apply, Bound: 0.5},
	)
	ok := true
	for _, l := range lines {
		ok = ok && (l.Info || l.OK())
		if _, err := fmt.Fprintln(w, l); err != nil {
			return false, err
		}
	}
	return ok, nil
}
