package shadow

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"kemari/migrate"
	"kemari/migrate/xen"
)

// A take-over that libvirtd does not confirm is only said to be none when it has been
// seen to that the copy does not run.
func TestTakeOverUnconfirmed(t *testing.T) {
	state := xen.AppendTSCInfo(nil, xen.TSCInfo{Mode: 1})
	state = xen.AppendRecord(state, xen.RecordHVMContext, make([]byte, 16))
	state = xen.AppendHVMParams(state, []xen.HVMParam{{Index: 1, Value: 2}})
	failed := errors.New("the hypervisor does not answer")
	for name, c := range map[string]struct {
		restarts bool // libvirtd, instead of hanging
		stuck    bool // nor does it take the end of the stream
		end      func(ctx context.Context) error
		ends     int
		mayRun   bool
	}{
		"libvirtd restarts":              {restarts: true, end: func(context.Context) error { return nil }, ends: 1},
		"libvirtd hangs":                 {end: func(context.Context) error { return nil }, ends: 1},
		"the copy cannot be ended":       {end: func(context.Context) error { return failed }, ends: 1, mayRun: true},
		"it takes for ever to end it":    {end: func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }, ends: 1, mayRun: true},
		"nobody can":                     {mayRun: true},
		"libvirt was not asked to start": {stuck: true, end: func(context.Context) error { return failed }},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ours, theirs := net.Pipe()
				gone := make(chan struct{})
				go func() { defer close(gone); libvirtd(theirs, 2, true) }()
				mark := filepath.Join(t.TempDir(), "mark")
				ends := 0
				s := &Shadow{cfg: Config{Mark: mark}, log: slog.New(slog.DiscardHandler)}
				if c.end != nil {
					s.cfg.End = func(ctx context.Context) error { ends++; return c.end(ctx) }
				}
				if err := s.connectOver(t.Context(), ours); err != nil {
					t.Fatal(err)
				}
				stream, sink := net.Pipe()
				defer sink.Close()
				if !c.stuck {
					go io.Copy(io.Discard, sink)
				}
				s.feed = newFeed(stream, limit)
				if c.restarts {
					time.AfterFunc(time.Second, func() { theirs.Close() })
				}
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				began := time.Now()
				err := s.TakeOver(ctx, state)
				if err == nil || errors.Is(err, migrate.ErrMayRun) != c.mayRun || ends != c.ends {
					t.Errorf("%v, ended %d times", err, ends)
				}
				if d := time.Since(began); d > 20*time.Second+endFor {
					t.Errorf("took %v", d)
				}
				if b, _ := os.ReadFile(mark); c.stuck != (string(b) == markOpen) || !c.stuck && b != nil {
					t.Errorf("marked %q", b)
				}
				theirs.Close()
				s.Close()
				<-gone
			})
		})
	}
}
