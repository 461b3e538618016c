package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/renameio/v2"

	"kemari/migrate"
	"kemari/migrate/control"
	"kemari/migrate/output"
	"kemari/migrate/shadow"
	"kemari/migrate/wire"
	"kemari/migrate/xen"
	"kemari/systemd"
)

const (
	riskNone = "no arbiter: two hosts that lose sight of each other may both run the guest"
	riskTCP  = "transport tcp: whoever can read or change what passes between the hosts can read and change the guest"
)

// side is what both roles tell of themselves.
type side struct {
	mu     sync.Mutex
	status control.Status // but for what the engine counts
}

func (s *side) phase(p control.Phase) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.status.Phase != p {
		s.status.Phase, s.status.Since = p, time.Now()
	}
}

func (s *side) get() control.Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status
}

func risk(a control.Arbiter, c control.Channel) string {
	var risks []string
	if a.Type == "none" && a.Automatic {
		risks = append(risks, riskNone)
	}
	if c.Transport == control.TransportTCP {
		risks = append(risks, riskTCP)
	}
	return strings.Join(risks, "; ")
}

func (e *env) primary(ctx context.Context, uuid string) error {
	paths := control.PathsFor(e.root, control.Primary, uuid)
	var cfg control.PrimaryConfig
	if err := control.ReadConfig(paths, &cfg); err != nil {
		return err
	}
	id, err := parseUUID(cfg.UUID)
	if err != nil {
		return err
	}
	log := e.log.With("domain", cfg.Domain)
	me := &side{status: control.Status{
		Role: control.Primary, Domain: cfg.Domain, UUID: cfg.UUID, Peer: cfg.StandbyURI, Generation: cfg.Generation,
		Phase: control.Starting, Since: time.Now(),
		Arbiter: cfg.Arbiter.Type, Automatic: cfg.Arbiter.Automatic, Risk: risk(cfg.Arbiter, cfg.Channel),
		Trigger: cfg.Checkpoint.Trigger, HeartbeatIntervalMS: cfg.Heartbeat.Interval.Milliseconds(), HeartbeatTimeoutMS: cfg.Heartbeat.Timeout.Milliseconds(),
		CopyTotal: int64(cfg.MemoryKiB) << 10,
	}}
	var engine *migrate.Primary // set before anyone can ask
	var mu sync.Mutex
	get := func() *migrate.Primary { mu.Lock(); defer mu.Unlock(); return engine }
	done := make(chan struct{})
	work, cancel := context.WithCancel(ctx)
	defer cancel()
	ask := func(ctx context.Context, req control.Request) error {
		p := get()
		switch {
		case req.Op == control.OpCheckpoint && req.Checkpoint != nil:
			return me.checkpoint(p, *req.Checkpoint, log)
		case req.Op == control.OpVerify:
			return me.verify(ctx, p, log)
		case req.Op == control.OpSwitchover:
			return me.switchover(ctx, p)
		case req.Op != control.OpAbort:
			return fmt.Errorf("%s is for the standby", req.Op)
		}
		if p != nil {
			p.End("ended by the operator")
		} else {
			cancel()
		}
		select {
		case <-done:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	status := func() control.Status {
		s := me.get()
		if p := get(); p != nil {
			primaryStats(&s, p.Stats())
		}
		return s
	}
	return e.serve(work, paths, status, ask, func(ctx context.Context) error {
		defer close(done)
		if err := systemd.Ready(); err != nil {
			log.Warn("not told systemd", "err", err)
		}
		dial, hangUp, err := dialer(ctx, cfg)
		if err != nil {
			return err
		}
		defer hangUp()
		vifs, err := e.interfacesOf(cfg.DomID)
		if err != nil {
			return err
		}
		plug, err := output.Open(ctx, log, vifs)
		if err != nil {
			return fmt.Errorf("hold the guest's output: %w", err)
		}
		defer plug.Close()
		destroy := func(ctx context.Context) error { return e.destroy(ctx, id, cfg.DomID, log) }
		guest, err := xen.OpenDomain(ctx, cfg.DomID, filepath.Join(paths.Dir, "mark"), destroy, log)
		if err != nil {
			return err
		}
		debug.SetGCPercent(garbage)
		p := migrate.NewPrimary(migrate.PrimaryConfig{
			UUID: id, MemoryKiB: cfg.MemoryKiB, Generation: wire.Generation(cfg.Generation),
			Policy:    policy(cfg.Checkpoint),
			Heartbeat: migrate.Heartbeat{Interval: cfg.Heartbeat.Interval, Timeout: cfg.Heartbeat.Timeout},
			Automatic: cfg.Arbiter.Automatic, Rejoin: rejoin, CachePages: cachePages,
			TakenOver: func() error { return setMark(takenOverMark(paths), cfg.Generation) },
		}, dial, guest, plug, log)
		mu.Lock()
		engine = p
		mu.Unlock()
		me.phase(control.Copying)
		log.Info("copying", "peer", cfg.StandbyURI, "interfaces", vifs, "memory_kib", cfg.MemoryKiB)
		if r := risk(cfg.Arbiter, cfg.Channel); r != "" {
			log.Warn(r)
		}
		err = p.Run(ctx)
		if errors.Is(err, migrate.ErrSwitchedOver) { // as it was asked to
			me.switchedOver()
			log.Info("the guest was handed over", "peer", cfg.StandbyURI)
			return nil
		}
		return err
	})
}

// switchover hands the guest over to the standby.
func (s *side) switchover(ctx context.Context, p *migrate.Primary) error {
	if p == nil {
		return errors.New("the first copy has not begun yet; try again in a moment")
	}
	if err := p.Switchover(ctx); err != nil {
		return err
	}
	s.switchedOver()
	return nil
}

func (s *side) switchedOver() {
	s.phase(control.Ended)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status.SwitchedOver = s.status.Peer
}

func policy(c control.Checkpoint) migrate.Policy {
	return migrate.Policy{Trigger: migrate.Trigger(c.Trigger), Min: c.Min, Max: c.Max, Share: float64(c.Paused) / 100}
}

// checkpoint changes when checkpoints are taken.
func (s *side) checkpoint(p *migrate.Primary, c control.Checkpoint, log *slog.Logger) error {
	if p == nil {
		return errors.New("the first copy has not begun yet; try again in a moment")
	}
	if err := p.SetPolicy(policy(c)); err != nil {
		return err
	}
	log.Info("checkpoints from now on", "trigger", c.Trigger, "min", c.Min, "max", c.Max, "paused", c.Paused)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status.Trigger = c.Trigger
	return nil
}

// verify compares the standby's memory with the guest's.
func (s *side) verify(ctx context.Context, p *migrate.Primary, log *slog.Logger) error {
	if p == nil {
		return errors.New("the first copy has not begun yet; try again in a moment")
	}
	v, err := p.Verify(ctx)
	if err != nil {
		return err
	}
	log.Info("memory verified", "epoch", uint64(v.Epoch), "pages", v.Pages, "differ", v.Differ, "shared_differ", v.Shared, "pause", v.Pause)
	out := &control.Verified{
		At: time.Now(), Epoch: uint64(v.Epoch), Pause: v.Pause.Microseconds(),
		Pages: int64(v.Pages), Differ: int64(v.Differ), Missing: int64(v.Missing),
		Shared: int64(v.Shared), Moved: int64(v.Moved), Unread: int64(v.Unread), Note: v.Note,
	}
	for _, pfn := range v.Differing {
		out.Differing = append(out.Differing, pfn.String())
	}
	for _, p := range v.SharedPages {
		out.SharedPages = append(out.SharedPages, control.SharedPage{Page: p.PFN.String(), By: p.By})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status.Verified = out
	return nil
}

func primaryStats(s *control.Status, st migrate.PrimaryStats) {
	switch {
	case s.Phase != control.Copying:
	case st.Alone:
		s.Phase = control.Alone
		s.Error = "the standby is silent; the guest runs on, unprotected, until it is back"
		s.Hint = "look after the standby's host, or end protection with virsh domjobabort " + s.Domain
	case st.Switching:
		s.Phase = control.Switching
	case st.Protected:
		s.Phase = control.Protected
	}
	s.CopyBytes, s.Bytes, s.BytesLast = st.CopyBytes, st.Bytes, st.LastBytes
	s.Epoch, s.PagesLast = uint64(st.Epoch), st.Last.Pages
	s.PauseLast, s.PauseMax, s.PauseSum = st.Last.Pause().Microseconds(), st.PauseMax.Microseconds(), st.PauseSum.Microseconds()
	s.SuspendLast, s.CopyLast, s.ResumeLast = st.Last.Suspend.Microseconds(), st.Last.Copy.Microseconds(), st.Last.Resume.Microseconds()
	s.CommitLag = st.Lag.Microseconds()
	s.Reconnects, s.Resyncs = st.Reconnects, st.Resyncs
}

// rejoin is how long a silent standby is looked for that may not take over by
// itself, while the guest goes on alone.
const rejoin = 10 * time.Minute

// cachePages is how many pages are kept of what the standby has: 32 MiB.
const cachePages = 8192

// garbage is how much of it may gather, in percent of what is used. That is nearly all
// cache and buffers, which cost a collection nothing; as much again is what Go would
// wait for, which looks like a leak for many minutes.
const garbage = 10

// dialer makes the first connection, so that one that cannot be made is noticed
// before anything is touched, and returns what makes it and the further ones. The
// first one is closed by hangUp if nobody has asked for it.
func dialer(ctx context.Context, cfg control.PrimaryConfig) (_ migrate.Dial, hangUp func(), err error) {
	first, err := dial(ctx, cfg)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", migrate.ErrStandbyLost, err)
	}
	firsts := make(chan net.Conn, 1)
	firsts <- first
	return func(ctx context.Context) (net.Conn, error) {
			select {
			case c := <-firsts:
				return c, nil
			default:
			}
			c, err := dial(ctx, cfg)
			if errors.Is(err, syscall.ECONNREFUSED) {
				err = fmt.Errorf("%w: its process is gone: %w", migrate.ErrStandbyLost, err)
			}
			return c, err
		}, func() {
			select {
			case c := <-firsts:
				c.Close()
			default:
			}
		}, nil
}

func dial(ctx context.Context, cfg control.PrimaryConfig) (net.Conn, error) {
	secure, err := securer(cfg.Channel, control.Primary)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", cfg.StandbyAddr)
	if err == nil {
		if c, err = secure(ctx, c); err == nil {
			return c, nil
		}
	}
	return nil, fmt.Errorf("connect to %s: %w", cfg.StandbyAddr, err)
}

// interfacesOf lists the guest's interfaces in dom0, by whatever name: <target dev>
// may have given them another one than vif3.0.
func (e *env) interfacesOf(domid uint32) ([]string, error) {
	var names []string
	for _, pattern := range []string{"bus/xen-backend/devices/vif-%d-*/net/*", "class/net/vif%d.*"} {
		found, err := filepath.Glob(filepath.Join(e.sys, fmt.Sprintf(pattern, domid)))
		if err != nil {
			return nil, err
		}
		for _, f := range found {
			names = append(names, filepath.Base(f))
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// destroy ends the domain through libvirt, which so learns of it, and waits for its
// interfaces to go: as long as they are there, what they have sent would find its
// way from the plugs. It retries as long as ctx lasts: the guest runs elsewhere, and
// nothing ours says may be heard.
func (e *env) destroy(ctx context.Context, id [16]byte, domid uint32, log *slog.Logger) error {
	for {
		err := e.destroyOnce(ctx, id)
		if err == nil {
			err = e.awaitGone(ctx, domid)
		}
		if err == nil {
			return nil
		}
		log.Error("this copy of the guest could not be destroyed; its output stays held; trying again", "err", err)
		select {
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		case <-time.After(time.Second):
		}
	}
}

// awaitGone gives the kernel the moment it needs to remove the interfaces of a guest
// that is gone.
func (e *env) awaitGone(ctx context.Context, domid uint32) error {
	for deadline := time.Now().Add(2 * time.Second); ; {
		vifs, err := e.interfacesOf(domid)
		if len(vifs) == 0 || err != nil {
			return err
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return fmt.Errorf("its interfaces are still there: %s", strings.Join(vifs, ", "))
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// takenOverMark is the file that tells cleanupPrimary, should we be killed, that the
// guest is the standby's.
func takenOverMark(paths control.Paths) string { return filepath.Join(paths.Dir, "taken-over") }

// setMark leaves a mark that is of this protection alone: a later one of the same guest
// has the same folder.
func setMark(path string, generation uint64) error {
	return renameio.WriteFile(path, strconv.AppendUint(nil, generation, 10), 0o600)
}

func hasMark(path string, generation uint64) bool {
	b, err := os.ReadFile(path)
	return err == nil && string(b) == strconv.FormatUint(generation, 10)
}

// destroyFor bounds one try: where libvirt has something else to do with the domain, it
// waits half a minute for that.
const destroyFor = 40 * time.Second

func (e *env) destroyOnce(ctx context.Context, id [16]byte) error {
	ctx, cancel := context.WithTimeout(ctx, destroyFor)
	defer cancel()
	return shadow.Destroy(ctx, e.socket, id)
}

// Bounds of asking the standby, while the guest stands and its output is held: it has
// that long to let us in, and a take-over that is under way as long to end.
const reachTimeout, askTimeout = 3 * time.Second, 3*time.Second + migrate.AnswerTimeout

// takenOver asks the standby whether it has taken over from a primary that was killed
// before that one could hear of it, and remembers if so. Where it cannot be asked the
// guest goes on, as it does when the standby is lost: nobody arbitrates.
func (e *env) takenOver(ctx context.Context, cfg control.PrimaryConfig, id [16]byte, paths control.Paths) bool {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	log := e.log.With("domain", cfg.Domain, "peer", cfg.StandbyURI)
	err := migrate.Ask(ctx, migrate.PrimaryConfig{
		UUID: id, MemoryKiB: cfg.MemoryKiB, Generation: wire.Generation(cfg.Generation),
		Heartbeat: migrate.Heartbeat{Interval: cfg.Heartbeat.Interval, Timeout: cfg.Heartbeat.Timeout},
		TakenOver: func() error { return setMark(takenOverMark(paths), cfg.Generation) },
	}, func(ctx context.Context) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, max(reachTimeout, cfg.Heartbeat.Timeout))
		defer cancel()
		return dial(ctx, cfg)
	}, log)
	if err != nil && !errors.Is(err, migrate.ErrTakenOver) {
		log.Warn("it is not known whether the standby has taken over; the guest goes on", "err", err)
	}
	return errors.Is(err, migrate.ErrTakenOver)
}

// cleanupTimeout bounds asking the standby and destroying what the guest was, together:
// it is less than the unit's TimeoutStopSec, and what is left is put back soon.
const cleanupTimeout = 80 * time.Second

// cleanupPrimary puts back what a killed primary left.
func (e *env) cleanupPrimary(ctx context.Context, uuid string) error {
	paths := control.PathsFor(e.root, control.Primary, uuid)
	var cfg control.PrimaryConfig
	if err := control.ReadConfig(paths, &cfg); err != nil {
		if errors.Is(err, os.ErrNotExist) { // it ended by itself and tidied up
			return output.Cleanup(ctx, nil)
		}
		return err
	}
	id, err := parseUUID(cfg.UUID)
	if err != nil {
		return err
	}
	last := control.Status{
		Role: control.Primary, Domain: cfg.Domain, UUID: cfg.UUID, Peer: cfg.StandbyURI, Generation: cfg.Generation,
		Phase: control.Ended, Since: time.Now(), Arbiter: cfg.Arbiter.Type, Automatic: cfg.Arbiter.Automatic,
		Error: "the replicator was killed; the guest runs on, unprotected",
		Hint:  "protect it again with virsh migrate --kemari",
	}
	bounded, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	if hasMark(takenOverMark(paths), cfg.Generation) || e.takenOver(bounded, cfg, id, paths) {
		if err := e.destroy(bounded, id, cfg.DomID, e.log); err != nil {
			// Nothing it has sent may be let out, and it is not resumed: what is here is
			// kept for who starts this once more.
			return fmt.Errorf("the standby has taken over, and this copy of the guest could not be destroyed; its output stays held; destroy it with virsh destroy %s: %w", cfg.Domain, err)
		}
		last.Error, last.Hint = migrate.ErrTakenOver.Error(), hint(migrate.ErrTakenOver)
	}
	var errs []error
	vifs, err := e.interfacesOf(cfg.DomID)
	if err != nil {
		return err
	}
	// The network first: that is what somebody outside waits for.
	errs = append(errs, output.Cleanup(ctx, vifs), xen.CleanupDomain(ctx, cfg.DomID, filepath.Join(paths.Dir, "mark")))
	errs = append(errs, control.WriteLast(paths, last))
	return errors.Join(errs...)
}
