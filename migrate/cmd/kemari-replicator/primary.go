package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sort"
	"sync"
	"syscall"
	"time"

	libvirt "github.com/digitalocean/go-libvirt"
	"github.com/digitalocean/go-libvirt/socket/dialers"

	"kemari/migrate"
	"kemari/migrate/control"
	"kemari/migrate/output"
	"kemari/migrate/wire"
	"kemari/migrate/xen"
	"kemari/systemd"
)

const riskNone = "no arbiter: two hosts that lose sight of each other may both run the guest"

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

func risk(a control.Arbiter) string {
	if a.Type == "none" && a.Automatic {
		return riskNone
	}
	return ""
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
		Arbiter: cfg.Arbiter.Type, Automatic: cfg.Arbiter.Automatic, Risk: risk(cfg.Arbiter),
		Trigger: cfg.Trigger, HeartbeatIntervalMS: cfg.Heartbeat.Interval.Milliseconds(), HeartbeatTimeoutMS: cfg.Heartbeat.Timeout.Milliseconds(),
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
		vifs, err := interfacesOf(cfg.DomID)
		if err != nil {
			return err
		}
		plug, err := output.Open(ctx, log, vifs)
		if err != nil {
			return fmt.Errorf("hold the guest's output: %w", err)
		}
		defer plug.Close()
		destroy := func(ctx context.Context) error { return e.destroy(ctx, id, paths, log) }
		guest, err := xen.OpenDomain(ctx, cfg.DomID, filepath.Join(paths.Dir, "mark"), destroy, log)
		if err != nil {
			return err
		}
		p := migrate.NewPrimary(migrate.PrimaryConfig{
			UUID: id, MemoryKiB: cfg.MemoryKiB, Generation: wire.Generation(cfg.Generation),
			Policy:    migrate.Policy{Trigger: migrate.Trigger(cfg.Trigger), Min: cfg.CheckpointMin, Max: cfg.CheckpointMax},
			Heartbeat: migrate.Heartbeat{Interval: cfg.Heartbeat.Interval, Timeout: cfg.Heartbeat.Timeout},
			Automatic: cfg.Arbiter.Automatic, Rejoin: rejoin, CachePages: cachePages,
			TakenOver: func() error { return markTakenOver(paths) },
		}, dial, guest, plug, log)
		mu.Lock()
		engine = p
		mu.Unlock()
		me.phase(control.Copying)
		log.Info("copying", "peer", cfg.StandbyURI, "interfaces", vifs, "memory_kib", cfg.MemoryKiB)
		if risk(cfg.Arbiter) != "" {
			log.Warn(riskNone)
		}
		return p.Run(ctx)
	})
}

// checkpoint changes when checkpoints are taken.
func (s *side) checkpoint(p *migrate.Primary, c control.Checkpoint, log *slog.Logger) error {
	if p == nil {
		return errors.New("the first copy has not begun yet; try again in a moment")
	}
	if err := p.SetPolicy(migrate.Policy{Trigger: migrate.Trigger(c.Trigger), Min: c.Min, Max: c.Max}); err != nil {
		return err
	}
	log.Info("checkpoints from now on", "trigger", c.Trigger, "min", c.Min, "max", c.Max)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status.Trigger = c.Trigger
	return nil
}

func primaryStats(s *control.Status, st migrate.PrimaryStats) {
	switch {
	case s.Phase != control.Copying:
	case st.Alone:
		s.Phase = control.Alone
		s.Error = "the standby is silent; the guest runs on, unprotected, until it is back"
		s.Hint = "look after the standby's host, or end protection with virsh domjobabort " + s.Domain
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
	tc, err := cfg.Identity.TLS(cfg.PeerFingerprint)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", cfg.StandbyAddr)
	if err == nil {
		var t *tlsConn
		if t, err = secure(ctx, c, tc, tls.Client); err == nil {
			return t, nil
		}
	}
	return nil, fmt.Errorf("connect to %s: %w", cfg.StandbyAddr, err)
}

// interfacesOf lists the guest's interfaces in dom0.
func interfacesOf(domid uint32) ([]string, error) {
	found, err := filepath.Glob(fmt.Sprintf("/sys/class/net/vif%d.*", domid))
	if err != nil {
		return nil, err
	}
	for i, f := range found {
		found[i] = filepath.Base(f)
	}
	sort.Strings(found)
	return found, nil
}

// destroy ends the domain through libvirt, which so learns of it. It retries as
// long as ctx lasts: the guest runs elsewhere, and nothing ours says may be heard.
func (e *env) destroy(ctx context.Context, id [16]byte, paths control.Paths, log *slog.Logger) error {
	for {
		err := destroyDomain(e.socket, id)
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

// markTakenOver leaves a file that tells cleanupPrimary, should we be killed, that
// the guest is the standby's.
func markTakenOver(paths control.Paths) error {
	return os.WriteFile(filepath.Join(paths.Dir, "taken-over"), nil, 0o600)
}

func destroyDomain(socket string, id [16]byte) error {
	v := libvirt.NewWithDialer(dialers.NewLocal(dialers.WithSocket(socket), dialers.WithLocalTimeout(5*time.Second)))
	if err := v.ConnectToURI("xen:///system"); err != nil {
		return err
	}
	defer v.Disconnect()
	dom, err := v.DomainLookupByUUID(libvirt.UUID(id))
	if libvirt.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if dom.ID < 0 { // not running
		return nil
	}
	return v.DomainDestroy(dom)
}

// cleanupTimeout is less than the units' TimeoutStopSec.
const cleanupTimeout = 40 * time.Second

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
	if _, err := os.Stat(filepath.Join(paths.Dir, "taken-over")); err == nil {
		ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
		defer cancel()
		if err := e.destroy(ctx, id, paths, e.log); err != nil {
			// Nothing it has sent may be let out, and it is not resumed: what is here is
			// kept for who starts this once more.
			return fmt.Errorf("the standby has taken over, and this copy of the guest could not be destroyed; its output stays held; destroy it with virsh destroy %s: %w", cfg.Domain, err)
		}
		last.Error, last.Hint = migrate.ErrTakenOver.Error(), hint(migrate.ErrTakenOver)
	}
	var errs []error
	vifs, err := interfacesOf(cfg.DomID)
	if err != nil {
		return err
	}
	// The network first: that is what somebody outside waits for.
	errs = append(errs, output.Cleanup(ctx, vifs), xen.CleanupDomain(ctx, cfg.DomID, filepath.Join(paths.Dir, "mark")))
	errs = append(errs, control.WriteLast(paths, last))
	return errors.Join(errs...)
}
