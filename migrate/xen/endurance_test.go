package xen

import (
	"testing"

	"kemari/migrate/migratetest"
	"kemari/migrate/page"
)

// TestEndurance: twenty thousand checkpoints in one process, of a guest that also gives
// memory back and gets other memory, leave no memory, goroutine, descriptor or mapping
// behind.
func TestEndurance(t *testing.T) {
	const early, late, pages = 4000, 20000, 4096
	x := newFakeXen(pages)
	for p := range page.PFN(pages / 2) {
		x.populate(p)
	}
	f := newFixture(t, x, pages/64)
	if _, err := f.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	none := func(*Pages) error { return nil }
	if _, err := f.Round(t.Context(), none); err != nil {
		t.Fatal(err)
	}
	var c Capture
	taken := 0
	reach := func(epochs int) migratetest.Holds {
		for ; taken < epochs; taken++ {
			for i := range 20 {
				x.write(page.PFN((taken*31+i*97)%(pages/2)), byte(taken))
			}
			if taken%50 == 0 { // a page comes, another one goes
				x.populate(page.PFN(pages/2 + taken/50%(pages/2)))
				x.balloonOut(page.PFN(pages/2 + (taken/50+7)%(pages/2)))
			}
			if taken%100 == 99 {
				if _, err := f.Round(t.Context(), none); err != nil {
					t.Fatalf("after %d checkpoints: %v", taken, err)
				}
			}
			if err := f.Checkpoint(t.Context(), func() error { return nil }, &c); err != nil {
				t.Fatalf("checkpoint %d: %v", taken, err)
			}
		}
		return migratetest.Measure(t)
	}
	before := reach(early)
	after := reach(late)
	if err := after.Grown(before); err != nil {
		t.Error(err)
	}
	t.Logf("%d checkpoints; %v, then %v; %+v", taken, before, after, f.Stats())
}
