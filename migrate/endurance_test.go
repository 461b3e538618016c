package migrate_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"kemari/migrate"
	"kemari/migrate/migratetest"
	"kemari/migrate/wire"
)

// TestEndurance is TestManyEpochs on real connections and in real time: twenty
// thousand epochs in one process, with connections that break meanwhile, leave no
// memory, goroutine, descriptor or mapping behind.
func TestEndurance(t *testing.T) {
	const early, late, breaks = 4000, 20000, 10
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	accept := func(ctx context.Context) (net.Conn, error) {
		defer context.AfterFunc(ctx, func() { l.Close() })()
		c, err := l.Accept()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return c, err
	}
	var mu sync.Mutex
	var last net.Conn
	dial := func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		c, err := d.DialContext(ctx, "tcp", l.Addr().String())
		if err == nil {
			mu.Lock()
			defer mu.Unlock()
			last = c
		}
		return c, err
	}
	g, out, shadow := migratetest.NewGuest(32, 1), migratetest.NewOutput(), migratetest.NewShadow()
	g.Output, g.Suspend, g.Copy, g.Resuming = out, 0, 0, 0
	hb := migrate.Heartbeat{Interval: 100 * time.Millisecond, Timeout: 20 * time.Second} // the machine may be busy
	log := slog.New(slog.DiscardHandler)
	p := migrate.NewPrimary(migrate.PrimaryConfig{
		UUID: [16]byte{1}, MemoryKiB: 32 * 4, Generation: 3, Heartbeat: hb, CachePages: 16,
		Policy: migrate.Policy{Trigger: migrate.TriggerInterval, Max: 50 * time.Microsecond, Share: 1},
	}, dial, g, out, log)
	s := migrate.NewStandby(migrate.StandbyConfig{
		UUID: [16]byte{1}, MemoryKiB: 32 * 4, Limit: migratetest.Limit, Generation: 3, Heartbeat: hb,
	}, accept, shadow, log)
	perr, serr := make(chan error, 1), make(chan error, 1)
	go func() { perr <- p.Run(t.Context()) }()
	go func() { serr <- s.Run(t.Context()) }()

	reach := func(epoch wire.Epoch) migratetest.Holds {
		for p.Stats().Epoch < epoch {
			select {
			case err := <-perr:
				t.Fatalf("the primary ended after %d epochs: %v", p.Stats().Epoch, err)
			case err := <-serr:
				t.Fatalf("the standby ended after %d epochs: %v", s.Stats().Epoch, err)
			case <-time.After(5 * time.Millisecond):
			}
			out.Trim()
		}
		return migratetest.Measure(t)
	}
	before := reach(early)
	for i := range breaks {
		mu.Lock()
		last.Close()
		mu.Unlock()
		reach(early + wire.Epoch(i+1)*(late-early)/breaks)
	}
	after := migratetest.Measure(t)
	if err := after.Grown(before); err != nil {
		t.Error(err)
	}
	if n := p.Stats().Reconnects; n < breaks/2 {
		t.Errorf("only %d connections were made anew", n)
	}
	t.Logf("%d epochs, %d connections; %v, then %v", p.Stats().Epoch, p.Stats().Reconnects+1, before, after)
	p.End("enough")
	if err := errors.Join(<-perr, <-serr); err != nil {
		t.Error(err)
	}
}
