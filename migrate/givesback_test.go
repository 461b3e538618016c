package migrate_test

import (
	"bytes"
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kemari/migrate"
	"kemari/migrate/migratetest"
	"kemari/migrate/page"
)

// givesBack is a guest that gives a page back while all of its memory is sent anew,
// and gets it back later as it was.
type givesBack struct {
	migrate.Guest
	mu      sync.Mutex // all below
	pfn     page.PFN
	sent    func() // when all has been sent once
	content []byte // of the page, once it has been sent
	gone    bool
	taken   int // checkpoints without it
}

func (g *givesBack) Round(ctx context.Context, send func(*migrate.Pages) error) (int, error) {
	return g.Guest.Round(ctx, func(b *migrate.Pages) error {
		g.mu.Lock()
		defer g.mu.Unlock()
		var left migrate.Pages
		for i, pfn := range b.PFNs {
			if pfn == g.pfn && g.sent != nil {
				g.content = bytes.Clone(b.Page(i))
			}
			if pfn != g.pfn || !g.gone {
				left.Append(pfn, b.Page(i))
			}
		}
		err := send(&left)
		if g.sent != nil && g.content != nil {
			g.sent()
			g.sent = nil
		}
		return err
	})
}

func (g *givesBack) Again() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.gone = true
	return g.Guest.Again()
}

func (g *givesBack) Checkpoint(ctx context.Context, seal func() error, c *migrate.Capture) error {
	err := g.Guest.Checkpoint(ctx, seal, c)
	g.mu.Lock()
	defer g.mu.Unlock()
	if err == nil && g.gone {
		if g.taken++; g.taken == 2 { // the first one is the copy's own
			c.Append(g.pfn, g.content)
		}
	}
	return err
}

// What the standby dropped with a connection is not taken for something it has.
func TestCopyAnewWithoutAPage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := new(givesBack)
		x := start(t, migratetest.Options{Automatic: true, Cache: 256, Guest: func(m migrate.Guest) migrate.Guest { g.Guest = m; return g }})
		x.Guest.Quiet()
		x.Work(2, 50*time.Millisecond)
		g.mu.Lock()
		g.pfn = x.Guest.PFN(5)
		x.Guest.Touch(5) // so that the page is not what the standby has of it
		g.sent = x.Net.Reset
		g.mu.Unlock()
		x.Guest.Confuse(migratetest.After)
		x.Work(40, 50*time.Millisecond)
		g.mu.Lock()
		taken := g.taken
		g.mu.Unlock()
		if taken < 2 {
			t.Fatal("the page did not come back")
		}
		v, err := x.Primary.Verify(t.Context())
		if err != nil || v.Differ > 0 {
			t.Errorf("the copy is not the guest: %+v, %v", v, err)
		}
		x.Primary.End("enough")
		ended(t, x, nil, nil)
	})
}
