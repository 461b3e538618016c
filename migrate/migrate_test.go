package migrate_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"kemari/migrate"
	"kemari/migrate/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const interval, timeout = 100 * time.Millisecond, 500 * time.Millisecond

// guest is a fake: its state is a number that grows with every epoch, and each
// epoch says it to the output.
type guest struct {
	mu        sync.Mutex
	state     uint64
	err       error // what the next Checkpoint returns
	destroyed bool
	closed    bool
}

func (g *guest) Checkpoint(ctx context.Context, seal func() error, send func([]byte) error) (migrate.Checkpoint, error) {
	select {
	case <-ctx.Done():
		return migrate.Checkpoint{}, context.Cause(ctx)
	case <-time.After(10 * time.Millisecond):
	}
	g.mu.Lock()
	if g.err != nil {
		defer g.mu.Unlock()
		return migrate.Checkpoint{}, g.err
	}
	g.state++
	b := binary.BigEndian.AppendUint64(nil, g.state)
	g.mu.Unlock()
	if err := seal(); err != nil {
		return migrate.Checkpoint{}, err
	}
	big := append(bytes.Repeat([]byte{0xaa}, 600<<10), b...) // several frames
	return migrate.Checkpoint{Suspend: time.Millisecond, Pages: 150}, send(big)
}
func (g *guest) Destroy(context.Context) error { g.destroyed = true; return nil }
func (g *guest) Close() error                  { g.closed = true; return nil }

// output is a fake that knows which epoch's frames are out.
type output struct {
	mu       sync.Mutex
	sealed   bool
	released int // epochs
	closed   bool
	held     chan struct{}
}

func (o *output) Seal() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.sealed {
		return errors.New("sealed twice")
	}
	o.sealed = true
	return nil
}

func (o *output) Release() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.sealed {
		return errors.New("nothing sealed")
	}
	o.sealed = false
	o.released++
	return nil
}
func (o *output) Arm()                   {}
func (o *output) Held() <-chan struct{}  { return o.held }
func (o *output) Drops() (uint64, error) { return 0, nil }
func (o *output) Close() error           { o.closed = true; return nil }

// shadow is a fake that checks the order of calls.
type shadow struct {
	mu       sync.Mutex
	staged   []byte
	state    uint64 // sealed
	epochs   int
	unfed    bool
	stageErr error
	over     bool
	closed   bool
}

func (s *shadow) Stage(p []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.unfed {
		return errors.New("staged before applied")
	}
	s.staged = append(s.staged, p...)
	return s.stageErr
}

func (s *shadow) Seal() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state = binary.BigEndian.Uint64(s.staged[len(s.staged)-8:])
	s.staged, s.unfed = nil, true
	s.epochs++
	return nil
}
func (s *shadow) Apply() error { s.unfed = false; return nil }
func (s *shadow) TakeOver(context.Context) error {
	time.Sleep(50 * time.Millisecond)
	s.over = true
	return nil
}
func (s *shadow) Close() error { s.closed = true; return nil }

// pair is a primary and a standby in one process, their connection in our hands.
type pair struct {
	g        *guest
	o        *output
	s        *shadow
	p        *migrate.Primary
	sb       *migrate.Standby
	link     *cut
	perr     chan error
	serr     chan error
	standbyC net.Conn
}

// cut is a connection that can go silent, both ways, without being closed.
type cut struct {
	net.Conn
	mu   sync.Mutex
	dead bool
}

func (c *cut) silence(dead bool) { c.mu.Lock(); c.dead = dead; c.mu.Unlock() }
func (c *cut) silent() bool      { c.mu.Lock(); defer c.mu.Unlock(); return c.dead }

// Write swallows what is written into a dead line.
func (c *cut) Write(b []byte) (int, error) {
	if c.silent() {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

func start(t *testing.T, automatic bool) *pair {
	t.Helper()
	a, b := net.Pipe()
	log := slog.New(slog.DiscardHandler)
	x := &pair{
		g: &guest{}, o: &output{held: make(chan struct{}, 1)}, s: &shadow{},
		link: &cut{Conn: a}, perr: make(chan error, 1), serr: make(chan error, 1), standbyC: b,
	}
	hb := migrate.Heartbeat{Interval: interval, Timeout: timeout}
	x.p = migrate.NewPrimary(migrate.PrimaryConfig{UUID: [16]byte{1}, MemoryKiB: 4096, Generation: 3,
		Trigger: migrate.TriggerOutput, Min: 5 * time.Millisecond, Max: 200 * time.Millisecond, Heartbeat: hb}, x.link, x.g, x.o, log)
	x.sb = migrate.NewStandby(migrate.StandbyConfig{UUID: [16]byte{1}, MemoryKiB: 4096, Generation: 3, Heartbeat: hb, Automatic: automatic}, b, x.s, log)
	go func() { x.perr <- x.p.Run(t.Context()) }()
	go func() { x.serr <- x.sb.Run(t.Context()) }()
	time.Sleep(time.Second)
	if st := x.p.Stats(); !st.Protected || st.Epoch < 3 {
		t.Fatalf("after a second: %+v", st)
	}
	return x
}

func TestProtectAndEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, true)
		st := x.p.Stats()
		// A guest that says nothing is checkpointed at the longest interval only.
		if st.Epoch > 7 {
			t.Errorf("%d epochs in a second without output", st.Epoch)
		}
		if int(st.Epoch) != x.o.released || uint64(st.Epoch) != x.s.state {
			t.Errorf("epoch %d, released %d, standby has %d", st.Epoch, x.o.released, x.s.state)
		}
		x.p.End("enough")
		if err := <-x.perr; err != nil {
			t.Errorf("primary: %v", err)
		}
		if err := <-x.serr; err != nil {
			t.Errorf("standby: %v", err)
		}
		if !x.o.closed || !x.g.closed || !x.s.closed || x.g.destroyed || x.s.over {
			t.Errorf("left behind: output %+v guest %+v shadow over=%v", x.o.closed, x.g.closed, x.s.over)
		}
	})
}

func TestOutputTriggers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, true)
		before := x.p.Stats().Epoch
		for range 20 {
			x.o.held <- struct{}{}
			time.Sleep(30 * time.Millisecond)
		}
		if got := x.p.Stats().Epoch - before; got < 15 {
			t.Errorf("%d epochs for 20 outputs", got)
		}
		x.p.End("enough")
		<-x.perr
		<-x.serr
	})
}

func TestPowerCut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, true)
		x.link.silence(true) // towards the standby
		time.Sleep(timeout + 3*interval)
		st := x.sb.Stats()
		if st.State != migrate.Active || !x.s.over {
			t.Fatalf("standby: %+v", st)
		}
		if d := st.Failover.Detect; d < timeout || d > timeout+2*interval {
			t.Errorf("detected after %v", d)
		}
		// The primary lived: it was told, and must not let its output go.
		if err := <-x.perr; !errors.Is(err, migrate.ErrTakenOver) {
			t.Errorf("primary: %v", err)
		}
		if !x.g.destroyed {
			t.Error("two copies run")
		}
		if err := <-x.serr; err != nil {
			t.Errorf("standby: %v", err)
		}
	})
}

func TestSilenceWithoutPermission(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, false)
		x.link.silence(true)
		time.Sleep(5 * time.Second)
		if st := x.sb.Stats(); st.State != migrate.Ready || !st.Silent {
			t.Fatalf("standby: %+v", st)
		}
		if err := x.sb.Failover("told to"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if st := x.sb.Stats(); st.State != migrate.Active {
			t.Fatalf("standby: %+v", st)
		}
		x.standbyC.Close()
		<-x.perr
		<-x.serr
	})
}

// A closed connection is no power cut: the guest runs on at the primary.
func TestClosedConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, true)
		x.link.Conn.Close()
		if err := <-x.serr; !errors.Is(err, migrate.ErrPrimaryLost) {
			t.Errorf("standby: %v", err)
		}
		if err := <-x.perr; !errors.Is(err, migrate.ErrStandbyLost) {
			t.Errorf("primary: %v", err)
		}
		if x.s.over || !x.s.closed || x.g.destroyed || !x.o.closed {
			t.Error("the shadow took over, or the guest was ended")
		}
	})
}

func TestStandbyRefusesEpoch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, true)
		x.s.mu.Lock()
		x.s.stageErr = errors.New("restore has died")
		x.s.mu.Unlock()
		if err := <-x.perr; !errors.Is(err, migrate.ErrStandbyLost) {
			t.Errorf("primary: %v", err)
		}
		if err := <-x.serr; !errors.Is(err, migrate.ErrPrimaryLost) {
			t.Errorf("standby: %v", err)
		}
		if !x.o.closed || x.s.over || x.g.destroyed {
			t.Error("not ended in order")
		}
	})
}

func TestGuestGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		x := start(t, true)
		x.g.mu.Lock()
		x.g.err = migrate.ErrGuestGone
		x.g.mu.Unlock()
		if err := <-x.perr; !errors.Is(err, migrate.ErrGuestGone) {
			t.Errorf("primary: %v", err)
		}
		if err := <-x.serr; err != nil {
			t.Errorf("standby: %v", err)
		}
		if x.s.over || !x.s.closed {
			t.Error("the shadow of a guest that has ended must end")
		}
	})
}

// hostile plays a primary that does not keep to the protocol.
func TestHostilePrimary(t *testing.T) {
	data := func(e wire.Epoch, p string) *wire.Frame {
		return &wire.Frame{Type: wire.TypePages, Epoch: e, Payload: []byte(p)}
	}
	hello := &wire.Frame{Type: wire.TypeHello, Payload: wire.Hello{Lowest: 2, Highest: 2, Session: 1, UUID: [16]byte{1}, MemoryKiB: 4096}.Append(nil)}
	for name, frames := range map[string][]*wire.Frame{
		"no hello":        {data(1, "x")},
		"another guest":   {{Type: wire.TypeHello, Payload: wire.Hello{Lowest: 2, Highest: 2, Session: 1, MemoryKiB: 4096}.Append(nil)}},
		"skipped epoch":   {hello, data(2, "x")},
		"replayed hello":  {hello, hello},
		"end without sum": {hello, data(1, "12345678"), {Type: wire.TypeEpochEnd, Epoch: 1}},
		"wrong sum":       {hello, data(1, "12345678"), {Type: wire.TypeEpochEnd, Epoch: 1, Payload: wire.EpochEnd{Bytes: 8}.Append(nil)}},
		"says ack":        {hello, {Type: wire.TypeAck, Epoch: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a, b := net.Pipe()
				s := &shadow{}
				sb := migrate.NewStandby(migrate.StandbyConfig{UUID: [16]byte{1}, MemoryKiB: 4096, Generation: 3,
					Heartbeat: migrate.Heartbeat{Interval: interval, Timeout: timeout}, Automatic: true}, b, s, slog.New(slog.DiscardHandler))
				done := make(chan error, 1)
				go func() { done <- sb.Run(t.Context()) }()
				go io.Copy(io.Discard, a)
				for _, f := range frames {
					f.Generation = 3
					raw, err := f.Append(nil)
					if err != nil {
						t.Fatal(err)
					}
					if _, err := a.Write(raw); err != nil {
						break
					}
				}
				if err := <-done; err == nil {
					t.Error("accepted")
				}
				if s.over || !s.closed || sb.Stats().Epoch != 0 {
					t.Errorf("shadow over=%v closed=%v, epoch %d", s.over, s.closed, sb.Stats().Epoch)
				}
				a.Close()
			})
		})
	}
}
