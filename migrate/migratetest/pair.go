package migratetest

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"kemari/migrate"
)

// Interval and Timeout are the heartbeat of a Pair.
const Interval, Timeout = 100 * time.Millisecond, 500 * time.Millisecond

// Pair is a primary and a standby in one process, on a Network.
type Pair struct {
	Net     *Network
	Points  *Points
	Guest   *Guest
	Output  *Output
	Shadow  *Shadow
	Primary *migrate.Primary
	Standby *migrate.Standby

	PrimaryErr, StandbyErr chan error // what Run returned
	stop                   context.CancelFunc
}

// Options are of a Pair.
type Options struct {
	Pages     int // 64 if 0
	Seed      uint64
	Automatic bool
	Rejoin    time.Duration
	Cache     int // pages; 32 if 0
	Policy    migrate.Policy
	Log       *slog.Logger
	Dial      func(migrate.Dial) migrate.Dial // changes what the primary dials
	Primary   func(*migrate.PrimaryConfig)
	Standby   func(*migrate.StandbyConfig)
	Guest     func(migrate.Guest) migrate.Guest // puts something around it
}

// NewPair makes a pair; Start runs it.
func NewPair(o Options) *Pair {
	if o.Pages == 0 {
		o.Pages = 64
	}
	if o.Cache == 0 {
		o.Cache = 32
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Policy == (migrate.Policy{}) {
		o.Policy = migrate.Policy{Trigger: migrate.TriggerOutput, Min: 5 * time.Millisecond, Max: 200 * time.Millisecond}
	}
	p := &Pair{
		Net: NewNetwork(), Points: new(Points), Guest: NewGuest(o.Pages, o.Seed), Output: NewOutput(), Shadow: NewShadow(),
		PrimaryErr: make(chan error, 1), StandbyErr: make(chan error, 1),
	}
	p.Guest.Points, p.Output.Points, p.Shadow.Points, p.Guest.Output = p.Points, p.Points, p.Points, p.Output
	p.Output.gone = p.Guest.Destroyed
	hb := migrate.Heartbeat{Interval: Interval, Timeout: Timeout}
	memory := uint64(o.Pages) * 4
	pc := migrate.PrimaryConfig{
		UUID: [16]byte{1}, MemoryKiB: memory, Generation: 3, Policy: o.Policy, Heartbeat: hb,
		Automatic: o.Automatic, Rejoin: o.Rejoin, CachePages: o.Cache,
	}
	sc := migrate.StandbyConfig{
		UUID: [16]byte{1}, MemoryKiB: memory, Limit: Limit, Generation: 3, Heartbeat: hb, Automatic: o.Automatic,
	}
	if o.Primary != nil {
		o.Primary(&pc)
	}
	if o.Standby != nil {
		o.Standby(&sc)
	}
	dial, guest := migrate.Dial(p.Net.Dial), migrate.Guest(p.Guest)
	if o.Dial != nil {
		dial = o.Dial(dial)
	}
	if o.Guest != nil {
		guest = o.Guest(guest)
	}
	p.Primary = migrate.NewPrimary(pc, dial, guest, p.Output, o.Log.With("side", "primary"))
	p.Standby = migrate.NewStandby(sc, p.Net.Accept, p.Shadow, o.Log.With("side", "standby"))
	return p
}

// Start runs both sides until they end by themselves or the test does.
func (p *Pair) Start(t testing.TB) {
	ctx, cancel := context.WithCancel(context.Background())
	p.stop = cancel
	go func() { p.PrimaryErr <- p.Primary.Run(ctx) }()
	go func() { p.StandbyErr <- p.Standby.Run(ctx) }()
	t.Cleanup(cancel)
}

// Stop ends both sides, as systemd does.
func (p *Pair) Stop() { p.stop() }

// Work has the guest do n pieces of work, d apart.
func (p *Pair) Work(n int, d time.Duration) {
	for range n {
		p.Guest.Work()
		time.Sleep(d)
	}
}
