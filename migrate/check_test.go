package migrate

import (
	"errors"
	"log/slog"
	"net"
	"testing"
	"time"

	"kemari/migrate/page"
	"kemari/migrate/wire"
)

// A list that is cut says nothing of the shared pages that may be in what is missing.
func TestJudgeCut(t *testing.T) {
	c := &check{}
	a := wire.Compared{Pages: wire.MaxDiffering + 2, Differ: wire.MaxDiffering + 1}
	for i := range a.Pages {
		c.sums.Add(page.PFN(i), nil)
		if i < wire.MaxDiffering {
			a.PFNs = append(a.PFNs, i)
		}
	}
	if b := a.Append(nil); len(b) > wire.MaxPayload {
		t.Errorf("%d bytes do not fit in a frame", len(b))
	} else if _, err := wire.ParseCompared(b); err != nil {
		t.Error(err)
	}
	if v, err := c.judge(a); err != nil || v.Differ != int(a.Differ) {
		t.Errorf("nothing is shared: %+v, %v", v, err)
	}
	c.sums.Shared = map[page.PFN]string{wire.MaxDiffering: "a ring"}
	if v, err := c.judge(a); err == nil {
		t.Errorf("a verdict: %+v", v)
	}
}

// What nobody waits for any more is sent no further than the frame under way, be it
// that protection ends or that whoever asked has given up.
func TestSumsUnwanted(t *testing.T) {
	for name, stop := range map[string]func(p *Primary){
		"ended":    func(p *Primary) { p.End("enough") },
		"given up": func(p *Primary) { p.forget() },
		"another":  func(p *Primary) { p.forget(); p.mu.Lock(); p.check = &check{}; p.mu.Unlock() },
	} {
		t.Run(name, func(t *testing.T) {
			p := NewPrimary(PrimaryConfig{}, nil, nil, nil, slog.New(slog.DiscardHandler))
			ours, theirs := net.Pipe()
			p.last = &primaryLine{link: newLink(ours, 1, &life{born: time.Now()})}
			c := &check{failed: make(chan error, 1)}
			p.check = c
			for i := range 10 {
				c.sums.Add(page.PFN(2*i), nil) // each in a frame of its own
			}
			frames := make(chan int)
			go func() {
				for n, r := 0, wire.NewReader(theirs, 1); ; n++ {
					if _, err := r.Read(); err != nil {
						frames <- n
						return
					}
					if n == 2 {
						stop(p)
					}
				}
			}()
			p.compare(5, c)
			select {
			case err := <-c.failed:
				if !errors.Is(err, errUnwanted) {
					t.Error(err)
				}
			case <-time.After(time.Minute):
				t.Error("it goes on")
			}
			// The connection is as good as before.
			if err := p.last.send(wire.TypeHeartbeat, 0, nil); err != nil {
				t.Error(err)
			}
			ours.Close()
			if n := <-frames; n < 4 || n > 5 { // one may be under way; a heartbeat
				t.Errorf("%d frames", n)
			}
		})
	}
}
