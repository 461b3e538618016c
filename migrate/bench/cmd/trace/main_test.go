package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kemari/migrate"
	"kemari/migrate/bench"
	"kemari/migrate/bench/trace"
	"kemari/migrate/migratetest"
	"kemari/migrate/page"
	"kemari/migrate/xen"
)

func headers() []byte {
	b := append(bytes.Repeat([]byte{0xff}, 8), "XENF\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00\x00"...)
	return append(b, 2, 0, 0, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
}

func appendRecord(b []byte, typ xen.RecordType, body []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(typ))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(body)))
	b = append(b, body...)
	return append(b, make([]byte, -len(body)&7)...)
}

// pageData is a PAGE_DATA body: each page is filled with its number plus add. Those
// of type XTAB have no content.
func pageData(add byte, pfns ...uint64) []byte {
	b := binary.LittleEndian.AppendUint64(nil, uint64(len(pfns)))
	for _, p := range pfns {
		b = binary.LittleEndian.AppendUint64(b, p)
	}
	for _, p := range pfns {
		if p>>60 != 0xf {
			b = append(b, bytes.Repeat([]byte{byte(p) + add}, page.Size)...)
		}
	}
	return b
}

func TestRecord(t *testing.T) {
	s := headers()
	s = appendRecord(s, xen.RecordStaticDataEnd, nil)
	s = appendRecord(s, xen.RecordPageData, pageData(0, 1, 0xf<<60|2, 3))
	s = appendRecord(s, xen.RecordHVMContext, []byte("context"))
	s = appendRecord(s, xen.RecordCheckpoint, nil)
	s = appendRecord(s, xen.RecordPageData, pageData(1, 3))
	s = appendRecord(s, xen.RecordCheckpoint, nil)
	s = appendRecord(s, xen.RecordPageData, pageData(2, 3, 1))
	s = appendRecord(s, xen.RecordCheckpoint, nil)
	whole := len(s)
	s = appendRecord(s, xen.RecordPageData, pageData(3, 3))
	for _, c := range []struct {
		name    string
		stream  []byte
		epochs  int
		pages   []int
		refused bool
	}{
		{"all", s[:whole], 0, []int{2, 1, 2}, false},
		{"cut in an epoch", s, 0, []int{2, 1, 2}, false},
		{"cut in a record", s[:len(s)-5], 0, []int{2, 1, 2}, false},
		{"one", s, 1, []int{1, 1}, false},
		{"no stream", make([]byte, 100), 0, nil, true},
	} {
		file := filepath.Join(t.TempDir(), "x.trace.zst")
		err := record(bytes.NewReader(c.stream), file, "a test", c.epochs, &trace.Recorder{Sample: 1})
		if c.refused {
			if err == nil {
				t.Errorf("%s: taken", c.name)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		traces, err := bench.Files([]string{file})
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		x := traces["x"]
		if x.About != "a test" || len(x.Epochs) != len(c.pages) {
			t.Errorf("%s: %q, %d epochs", c.name, x.About, len(x.Epochs))
			continue
		}
		for i, n := range c.pages {
			e := &x.Epochs[i]
			if len(e.PFNs) != n {
				t.Errorf("%s: epoch %d has %d pages", c.name, i, len(e.PFNs))
			}
			for j, pfn := range e.PFNs {
				if want := byte(pfn) + byte(i); e.Page(j)[0] != want {
					t.Errorf("%s: epoch %d, page %v: %d, want %d", c.name, i, pfn, e.Page(j)[0], want)
				}
			}
		}
		var text strings.Builder
		if err := showFile(&text, file); err != nil || !strings.Contains(text.String(), "x: a test\nepoch 0: ") {
			t.Errorf("%s: %q, %v", c.name, text.String(), err)
		}
	}
}

// guest counts how often it is suspended.
type guest struct {
	*migratetest.Guest
	suspended int
}

func (g *guest) Checkpoint(ctx context.Context, seal func() error, c *migrate.Capture) error {
	g.suspended++
	return g.Guest.Checkpoint(ctx, seal, c)
}

// TestCheckpoints: a guest is recorded from its first copy on, for as many epochs as
// asked for, or until it is enough.
func TestCheckpoints(t *testing.T) {
	const pages = 50
	for name, c := range map[string]struct {
		skip, epochs, want int
		live               bool
	}{
		"some":              {0, 5, 5, false},
		"not the first":     {3, 5, 5, false},
		"until interrupted": {1, 0, 8, false},
		"running":           {0, 5, 5, true},
	} {
		synctest.Test(t, func(t *testing.T) {
			g := &guest{Guest: migratetest.NewGuest(pages, 1)}
			rec := &trace.Recorder{Skip: c.skip}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if c.epochs == 0 {
				time.AfterFunc(10*time.Second+500*time.Millisecond, cancel)
			}
			if err := checkpoints(ctx, g, time.Second, c.epochs, c.live, rec); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if c.live == (g.suspended > 0) {
				t.Errorf("%s: suspended %d times", name, g.suspended)
			}
			x := rec.Trace("")
			if got := len(x.Epochs) - 1; got < c.want-1 || got > c.want+1 || c.epochs > 0 && got != c.want {
				t.Errorf("%s: %d epochs, want %d", name, got, c.want)
			}
			was := map[page.PFN]bool{}
			for i, e := range x.Epochs {
				if len(e.PFNs) == 0 {
					t.Errorf("%s: nothing in epoch %d", name, i)
				}
				for _, p := range e.PFNs {
					if i > 0 && !was[p] {
						t.Errorf("%s: nobody knows what page %v was before epoch %d", name, p, i)
					}
					was[p] = true
				}
			}
		})
	}
}
