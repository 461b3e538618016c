package xen

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"kemari/migrate"
	"kemari/migrate/page"
)

// summed checks that sums are of what the guest has, all of it and nothing else.
func summed(x *fakeXen, s *migrate.Sums) error {
	var want migrate.Sums
	all := x.contents()
	for _, p := range x.pfns() {
		data := all[p]
		want.Add(p, data[:])
	}
	if s.Err != nil || s.Unread > 0 || !slices.Equal(s.PFNs, want.PFNs) || !slices.Equal(s.Sums, want.Sums) {
		return fmt.Errorf("sums of %d pages, %d unread, %w, are not those of the guest's %d", len(s.PFNs), s.Unread, s.Err, len(want.PFNs))
	}
	return nil
}

func TestSums(t *testing.T) {
	x := newFakeXen(1 << 14)
	for p := range page.PFN(300) {
		x.populate(p)
	}
	x.populate(1<<14 - 9)
	f := newFixture(t, x, 64)
	begin(t, f, replica{})
	var c Capture
	checkpoint := func() *migrate.Sums {
		t.Helper()
		c.Sums = new(migrate.Sums)
		if err := f.Checkpoint(t.Context(), nothing, &c); err != nil || !x.runs() {
			t.Fatalf("%v, and it runs: %v", err, x.runs())
		}
		return c.Sums
	}
	s := checkpoint()
	if err := summed(x, s); err != nil || c.SumsTook <= 0 || c.SumsTook > c.Copy {
		t.Errorf("%v; took %v of %v", err, c.SumsTook, c.Copy)
	}
	if s.Note != "" || s.Shared[1] == "" {
		t.Errorf("shared: %v, %q", s.Shared, s.Note)
	}

	// What a checkpoint cannot know of is seen: memory that came and was not logged, and
	// other memory at a page than the one that is mapped.
	x.mu.Lock()
	x.p2m[5000] = &frame{ours: true}
	x.p2m[77] = &frame{ours: true}
	x.p2m[77].data[3] = 9
	x.total += 2 // the other one at 77 is mapped still
	x.mu.Unlock()
	s = checkpoint()
	if err := summed(x, s); err != nil || !slices.Contains(s.PFNs, 5000) {
		t.Error(err)
	}
	// What was given back is not.
	x.balloonOut(77)
	if err := summed(x, checkpoint()); err != nil {
		t.Error(err)
	}

	// Pages that are shared, by name.
	x.grants = func(g func(uint64, uint16)) error { g(8, 0); g(9, 3); g(1, 0); return nil }
	want := map[page.PFN]string{1: "xenstore ring", 8: "granted to domain 0", 9: "granted to domain 3"}
	s = checkpoint()
	if fmt.Sprint(s.Shared) != fmt.Sprint(want) {
		t.Errorf("%v, want %v", s.Shared, want)
	}
	x.grants = func(func(uint64, uint16)) error { return errors.New("too old") }
	if s = checkpoint(); s.Note == "" || s.Err != nil || s.Shared[1] != "xenstore ring" {
		t.Errorf("%v, %q", s.Shared, s.Note)
	}

	// What goes wrong with sums is theirs alone.
	f.another.fail = errors.New("no memory")
	if s = checkpoint(); s.Err == nil {
		t.Error("no error")
	}
	f.another.fail, f.noWindow = nil, errors.New("no room")
	if s = checkpoint(); s.Err == nil {
		t.Error("no error")
	}
	f.noWindow = nil
	ctx, cancel := context.WithCancel(t.Context())
	c.Sums = new(migrate.Sums)
	err := f.Checkpoint(ctx, func() error { cancel(); return nil }, &c)
	if !x.runs() || err == nil && c.Sums.Err == nil {
		t.Errorf("interrupted: %v, %v", err, c.Sums.Err)
	}
	if _, err := f.Round(t.Context(), func(*Pages) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if err := summed(x, checkpoint()); err != nil {
		t.Error(err)
	}
	// The next one is without.
	c.Sums = nil
	if err := f.Checkpoint(t.Context(), nothing, &c); err != nil || c.SumsTook != 0 {
		t.Errorf("%v, %v", err, c.SumsTook)
	}
}
