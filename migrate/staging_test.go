package migrate

import (
	"bytes"
	"context"
	"encoding/binary"
	"maps"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"pgregory.net/rapid"

	"kemari/migrate/page"
	"kemari/migrate/wire"
)

// Whatever is staged, and whenever it is compacted, the last content of each page is
// what comes out last.
func TestStaging(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var s staging
		for range rapid.IntRange(1, 3).Draw(t, "epochs") {
			want := make(map[page.PFN]uint64)
			var b [page.Size]byte
			n := rapid.IntRange(0, 2*slabPages).Draw(t, "pages")
			some := rapid.Uint64Range(1, slabPages).Draw(t, "of")
			for i := range n {
				pfn := page.PFN(uint64(i) * 2654435761 % some)
				binary.BigEndian.PutUint64(b[:], uint64(i))
				s.add(pfn, b[:])
				want[pfn] = uint64(i)
				if i == n/2 || i == n-1 {
					if s.compact(); s.pages != len(want) {
						t.Fatalf("%d pages are left, want %d", s.pages, len(want))
					}
				}
			}
			got := make(map[page.PFN]uint64)
			s.drain(func(p *Pages) error {
				if len(p.PFNs) > slabPages || len(p.Data) != len(p.PFNs)*page.Size {
					t.Fatalf("a slab of %d pages in %d bytes", len(p.PFNs), len(p.Data))
				}
				for i, pfn := range p.PFNs {
					got[pfn] = binary.BigEndian.Uint64(p.Page(i))
				}
				return nil
			})
			if !maps.Equal(got, want) || s.pages != 0 {
				t.Fatalf("%d pages came out, want %d, %d are left", len(got), len(want), s.pages)
			}
		}
	})
}

// The memory of a large epoch is given back.
func TestStagingShrinks(t *testing.T) {
	var s staging
	b := make([]byte, page.Size)
	for i := range 3 * keptSlabs * slabPages {
		s.add(page.PFN(i), b)
	}
	s.reset()
	if len(s.slabs) != keptSlabs {
		t.Errorf("%d slabs are kept", len(s.slabs))
	}
}

// sink is a connection that takes everything.
type sink struct{ net.Conn }

func (sink) Write(b []byte) (int, error)      { return len(b), nil }
func (sink) SetWriteDeadline(time.Time) error { return nil }

// counted counts writes.
type counted struct {
	sink
	writes, bytes int
}

func (c *counted) Write(b []byte) (int, error) {
	c.writes++
	c.bytes += len(b)
	return len(b), nil
}

// A small epoch leaves in one write, and one of any size in few, of bounded size.
func TestOneWrite(t *testing.T) {
	for _, x := range []struct{ pages, state, most int }{{0, 0, 1}, {1, 10_000, 1}, {60, 10_000, 1}, {300, 600_000, 5}, {5000, 0, 5000*page.Size/wire.MaxPayload + 2}} {
		p := NewPrimary(PrimaryConfig{CachePages: 1}, nil, nil, nil, nil)
		var conn counted
		l := &primaryLine{link: newLink(&conn, 1, &p.life), refused: make(chan string, 1)}
		c := Capture{State: make([]byte, x.state)}
		noise := rand.NewChaCha8([32]byte{1})
		for i := range x.pages {
			b := make([]byte, page.Size)
			noise.Read(b)
			c.Append(page.PFN(i), b)
		}
		w := epochWriter{p: p, line: l, epoch: 2, frames: p.frames[:0]}
		if err := w.finish(&c); err != nil {
			t.Fatal(err)
		}
		if conn.writes > x.most || conn.bytes < x.pages*page.Size+x.state {
			t.Errorf("%d pages and %d bytes: %d writes of %d bytes", x.pages, x.state, conn.writes, conn.bytes)
		}
		if &w.frames[:1][0] != &p.frames[:1][0] {
			t.Error("the buffer has grown")
		}
	}
}

// Nothing is allocated per page, neither to encode and send nor to decode and stage.
func TestNoAllocation(t *testing.T) {
	const pages = 4 * slabPages
	p := NewPrimary(PrimaryConfig{CachePages: pages}, nil, nil, nil, nil)
	l := &primaryLine{link: newLink(sink{}, 1, &p.life), refused: make(chan string, 1)}
	var c Capture
	for i := range pages {
		b := make([]byte, page.Size)
		binary.BigEndian.PutUint64(b, uint64(i)|1)
		c.Append(page.PFN(i), b)
	}
	round := byte(0)
	if n := testing.AllocsPerRun(20, func() {
		for i := range pages {
			c.Page(i)[round] ^= 0x55
		}
		round++
		w := epochWriter{p: p, line: l, epoch: 2, frames: p.frames[:0]}
		if err := w.pages(&c.Pages); err != nil || w.end.Pages != pages {
			t.Fatal(err, w.end.Pages)
		}
	}); n > 4 {
		t.Errorf("%v allocations to send %d pages", n, pages)
	}

	sh := fixed{page: bytes.Repeat([]byte{7}, page.Size)}
	s := NewStandby(StandbyConfig{MemoryKiB: pages * 4, Limit: pages}, nil, sh, nil)
	enc := page.NewEncoder(0)
	var records []byte
	for i := range 60 {
		records = enc.Append(records, page.PFN(i), c.Page(i))
	}
	if n := testing.AllocsPerRun(20, func() {
		for range 4 * slabPages / 60 {
			if err := s.pages(records, false); err != nil {
				t.Fatal(err)
			}
		}
		s.staged.reset()
	}); n > 40 { // some for each frame
		t.Errorf("%v allocations to receive %d pages", n, pages)
	}
}

// fixed is a shadow with the same content everywhere.
type fixed struct{ page []byte }

func (f fixed) Head([]byte) error                      { return nil }
func (f fixed) Base(_ page.PFN, dst []byte) error      { copy(dst, f.page); return nil }
func (f fixed) Check([]byte) error                     { return nil }
func (f fixed) Apply(*Pages) error                     { return nil }
func (f fixed) TakeOver(context.Context, []byte) error { return nil }
func (f fixed) Close() error                           { return nil }

// An epoch that names pages many times is held in bounded memory, and one of more
// pages than the guest can have is refused.
func TestStandbyBound(t *testing.T) {
	s := NewStandby(StandbyConfig{MemoryKiB: 64, Limit: 1 << 20}, nil, fixed{}, nil)
	most := 64/4 + slack
	enc := page.NewEncoder(0)
	one := func(pfn int) error { return s.pages(enc.Append(nil, page.PFN(pfn), make([]byte, page.Size)), false) }
	for i := range 2 * most {
		if err := one(i % most); err != nil {
			t.Fatal(err)
		}
	}
	if s.staged.pages > most+most/4 {
		t.Errorf("%d pages are staged", s.staged.pages)
	}
	var err error
	for i := 0; i < 2*most && err == nil; i++ {
		err = one(i)
	}
	if err == nil {
		t.Error("a whole other guest was taken")
	}
}
