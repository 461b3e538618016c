package bench

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"kemari/migrate/bench/trace"
)

func TestResult(t *testing.T) {
	for _, c := range []struct {
		r    Result
		line string
	}{
		{Result{Name: "a", Value: 2.5, Unit: "GB/s", Bound: 2}, "BENCH name=a value=2.5GB/s bound=>=2GB/s ok=true"},
		{Result{Name: "a", Value: 1.99996, Unit: "GB/s", Bound: 2}, "BENCH name=a value=2GB/s bound=>=2GB/s ok=false"},
		{Result{Name: "b", Value: 200, Unit: "us", Bound: 200, Most: true}, "BENCH name=b value=200us bound=<=200us ok=true"},
		{Result{Name: "b", Value: 0.51, Bound: 0.5, Most: true}, "BENCH name=b value=0.51 bound=<=0.5 ok=false"},
		{Result{Name: "c", Value: 1, Info: true}, "INFO name=c value=1"},
	} {
		if got := c.r.String(); got != c.line {
			t.Errorf("got %q, want %q", got, c.line)
		}
	}
}

func TestInterleave(t *testing.T) {
	burn := func(d time.Duration) {
		for end := threadTime() + d; threadTime() < end; {
		}
	}
	order := ""
	costs := Interleave(3,
		func(*Clock) { order += "a"; burn(5 * time.Millisecond) },
		func(c *Clock) {
			order += "b"
			burn(time.Millisecond)
			c.Without(func() { burn(20 * time.Millisecond) })
		},
	)
	if order != "abababab" {
		t.Errorf("ran %s", order)
	}
	if a, b := costs[0], costs[1]; a.Least < 5*time.Millisecond || b.Least < time.Millisecond || b.Least >= a.Least || a.Median < a.Least {
		t.Errorf("got %+v", costs)
	}
}

// Every promise that Native measures is in SPEC.md with its bound's figure, and the
// other way round.
func TestSpec(t *testing.T) {
	spec, err := os.ReadFile("SPEC.md")
	if err != nil {
		t.Fatal(err)
	}
	section, _, _ := strings.Cut(string(spec), "## In the laboratory")
	var want []string
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)`.*\\| at (?:least|most) ([0-9.]+)").FindAllStringSubmatch(section, -1) {
		want = append(want, m[1]+" "+m[2])
	}
	var out strings.Builder
	small := map[string]*trace.Trace{"small": trace.Synthetic(1, 50, 3, 40)}
	if _, err := Native(&out, small, small, 1); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range regexp.MustCompile(`(?m)^BENCH name=(\S+) value=[0-9.e+]+\S* bound=[<>]=([0-9.]+)\S* ok=(?:true|false)$`).FindAllStringSubmatch(out.String(), -1) {
		got = append(got, m[1]+" "+m[2])
	}
	if !slices.Equal(got, want) {
		t.Errorf("measured %q, promised %q", got, want)
	}
	if strings.Count(out.String(), "BENCH ") != len(got) {
		t.Errorf("a line is malformed:\n%s", &out)
	}
}

// What comes with the project can be read, is what the codec was made for, and
// comes out of it as it went in.
func TestSamples(t *testing.T) {
	traces, err := Samples()
	if err != nil {
		t.Fatal(err)
	}
	if len(traces) == 0 {
		t.Fatal("there are none")
	}
	for name, x := range traces {
		f, err := Codec(x, 1)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if f.PerPage > 2000 || f.PerPagePacked > f.PerPage {
			t.Errorf("%s: a page is %.0f bytes, %.0f compressed", name, f.PerPage, f.PerPagePacked)
		}
	}
}
