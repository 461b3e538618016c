package xen

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"kemari/migrate/page"
)

// TestMapping copies at random through few slots, while pages come and go.
func TestMapping(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x := newFakeXen(4096)
		m := newMapping(newFakeWindow(x, 5), rapid.IntRange(1, 5).Draw(t, "slots"))
		defer m.Close()
		m.grow(4096)
		data := make([]byte, 2000*page.Size)
		for range 20 {
			for range rapid.IntRange(0, 200).Draw(t, "changes") {
				p := page.PFN(rand.IntN(4096))
				if rand.IntN(4) == 0 {
					x.balloonOut(p)
				}
				x.populate(p)
				x.write(p, byte(rand.IntN(256)))
			}
			m.distrust(rapid.IntRange(0, 1).Draw(t, "trusted") == 0 || m.count != x.total)
			var want []page.PFN
			seen := map[page.PFN]bool{}
			for range rapid.IntRange(0, 1000).Draw(t, "asked") {
				p := page.PFN(rand.IntN(4200)) // some of them outside
				if !seen[p] {
					want = append(want, p)
					seen[p] = true
				}
			}
			got := slices.Clone(want)
			n, err := m.copyOut(t.Context(), got, data)
			if err != nil {
				t.Fatal(err)
			}
			if n+len(m.vanished) != len(want) {
				t.Fatalf("%d pages and %d without memory, of %d", n, len(m.vanished), len(want))
			}
			for i, p := range got[:n] {
				if !bytes.Equal(data[i*page.Size:][:page.Size], x.p2m[p].data[:]) {
					t.Fatalf("page %v differs", p)
				}
			}
			for _, p := range m.vanished {
				if x.p2m[p] != nil {
					t.Fatalf("page %v is there", p)
				}
			}
		}
	})
}

// TestHot: what is used again stays mapped.
func TestHot(t *testing.T) {
	x := newFakeXen(1 << 16)
	for p := range page.PFN(1 << 16) {
		if p%64 == 0 {
			x.populate(p)
		}
	}
	m := newMapping(newFakeWindow(x, 8), 8)
	defer m.Close()
	m.grow(1 << 16)
	data := make([]byte, 8*page.Size)
	for i := range 500 {
		// Three hot chunks, and one that is new every time.
		if _, err := m.copyOut(t.Context(), []page.PFN{0, 64, 128, page.PFN(192 + 64*i)}, data); err != nil {
			t.Fatal(err)
		}
	}
	if m.maps > 520 {
		t.Errorf("%d mappings for 503 chunks", m.maps)
	}
}

// TestPopulation holds the runs that are scanned to the pages there are.
func TestPopulation(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const limit = 20000
		var p population
		p.reset(limit)
		model := map[page.PFN]bool{}
		for range rapid.IntRange(0, 300).Draw(t, "changes") {
			pfn := page.PFN(rapid.IntRange(0, limit-1).Draw(t, "pfn"))
			if rapid.IntRange(0, 3).Draw(t, "remove") == 0 {
				p.remove(pfn)
				delete(model, pfn)
			} else {
				p.add(pfn)
				model[pfn] = true
			}
		}
		p.rescan()
		if p.pages != len(model) {
			t.Fatalf("%d pages, want %d", p.pages, len(model))
		}
		all := make([]uint64, (limit+63)/64)
		for i := range all {
			all[i] = ^uint64(0)
		}
		scanned := map[page.PFN]bool{}
		for _, q := range page.AppendPFNs(nil, page.AppendRuns(nil, all, p.scan)) {
			scanned[q] = true
		}
		for q := range model {
			if !p.has(q) || !scanned[q] {
				t.Fatalf("page %v: there %v, scanned %v", q, p.has(q), scanned[q])
			}
		}
		var listed []page.PFN
		for word := 0; ; {
			part := make([]page.PFN, 0, 128)
			if part, word = p.appendAll(part, word); len(part) == 0 && word == len(p.words) {
				break
			}
			listed = append(listed, part...)
		}
		if len(listed) != len(model) || !slices.IsSorted(listed) {
			t.Fatalf("%d pages listed, want %d", len(listed), len(model))
		}
	})
}

func TestMemory(t *testing.T) {
	x := newFakeXen(1024)
	x.populate(3)
	m := &Memory{newMapping(newFakeWindow(x, 4), 4), func() (uint64, error) { return 999, nil }, closer{}}
	defer m.Close()
	two := append(bytes.Repeat([]byte{5}, page.Size), bytes.Repeat([]byte{6}, page.Size)...)
	missing, err := m.WritePages([]page.PFN{3, 4}, two)
	if err != nil || !slices.Equal(missing, []int{1}) || x.p2m[3].data[9] != 5 {
		t.Fatalf("%v, %v", missing, err)
	}
	x.populate(4) // by the stream
	if missing, err := m.WritePages([]page.PFN{3, 4}, two); err != nil || len(missing) != 0 {
		t.Fatalf("%v, %v", missing, err)
	}
	got := make([]byte, page.Size)
	if err := m.ReadPage(4, got); err != nil || !bytes.Equal(got, two[page.Size:]) {
		t.Errorf("read back: %v", err)
	}
	for _, p := range []page.PFN{5, 999, 1000, 1 << 50} {
		if err := m.ReadPage(p, got); !errors.Is(err, ErrNotPopulated) {
			t.Errorf("page %v: %v", p, err)
		}
	}
	if _, err := m.WritePages([]page.PFN{3}, two); err == nil {
		t.Error("took a page of two pages' length")
	}
}

type closer struct{}

func (closer) Close() error { return nil }
