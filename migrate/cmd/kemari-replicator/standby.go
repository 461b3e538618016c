package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"kemari/migrate"
	"kemari/migrate/control"
	"kemari/migrate/shadow"
	"kemari/migrate/wire"
	"kemari/migrate/xen"
	"kemari/systemd"
)

// Ports of the data connection, a range as libvirt has one for migrations, so that
// a firewall can be told. One is used by each guest whose standby this host is.
const firstPort, lastPort = 49300, 49363

// connectTimeout is how long a standby waits for its primary.
const connectTimeout = 30 * time.Second

func (e *env) standby(ctx context.Context, uuid string) error {
	paths := control.PathsFor(e.root, control.Standby, uuid)
	var cfg control.StandbyConfig
	if err := control.ReadConfig(paths, &cfg); err != nil {
		return err
	}
	id, err := parseUUID(cfg.UUID)
	if err != nil {
		return err
	}
	log := e.log.With("domain", cfg.Domain)
	me := &side{status: control.Status{
		Role: control.Standby, Domain: cfg.Domain, UUID: cfg.UUID, Peer: cfg.PrimaryHost, Generation: cfg.Generation,
		Phase: control.Starting, Since: time.Now(),
		Arbiter: cfg.Arbiter.Type, Automatic: cfg.Arbiter.Automatic, Risk: risk(cfg.Arbiter),
		HeartbeatIntervalMS: cfg.Heartbeat.Interval.Milliseconds(), HeartbeatTimeoutMS: cfg.Heartbeat.Timeout.Milliseconds(),
		CopyTotal: int64(cfg.MemoryKiB) << 10,
	}}
	var engine *migrate.Standby
	var mu sync.Mutex
	get := func() *migrate.Standby { mu.Lock(); defer mu.Unlock(); return engine }
	done := make(chan struct{})
	work, cancel := context.WithCancel(ctx)
	defer cancel()
	status := func() control.Status {
		s := me.get()
		if sb := get(); sb != nil {
			standbyStats(&s, sb.Stats())
		}
		return s
	}
	ask := func(ctx context.Context, req control.Request) error {
		sb := get()
		switch req.Op {
		case control.OpAbort:
			if sb != nil {
				sb.End("ended by the operator at the standby")
			}
			cancel()
			select {
			case <-done:
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		case control.OpFailover:
			if sb == nil {
				return errors.New("there is no committed epoch to take over from")
			}
			if err := sb.Failover("the operator asked for it"); err != nil {
				return err
			}
			return waitActive(ctx, done, sb)
		case control.OpCheckpoint:
			return errors.New("the primary takes the checkpoints; ask it on its host")
		default:
			return fmt.Errorf("unknown request %q", req.Op)
		}
	}
	return e.serve(work, paths, status, ask, func(ctx context.Context) error {
		defer close(done)
		l, err := listen()
		if err != nil {
			return err
		}
		defer l.Close()
		me.mu.Lock()
		me.status.Port = l.Addr().(*net.TCPAddr).Port
		me.mu.Unlock()
		me.phase(control.Waiting)
		if err := systemd.Ready(); err != nil {
			log.Warn("not told systemd", "err", err)
		}
		conns, stop, err := accepting(l, cfg)
		if err != nil {
			return err
		}
		defer stop()
		first, err := awaitPrimary(ctx, conns)
		if err != nil {
			return err
		}
		sh, err := shadow.Open(ctx, shadowConfig(e, paths, cfg), log)
		if err != nil {
			first.Close()
			return err
		}
		accept := func(ctx context.Context) (net.Conn, error) {
			if c := first; c != nil {
				first = nil
				return c, nil
			}
			select {
			case c := <-conns:
				return c, nil
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
		sb := migrate.NewStandby(migrate.StandbyConfig{
			UUID: id, MemoryKiB: cfg.MemoryKiB, Limit: shadow.Limit(cfg.MemoryKiB), Generation: wire.Generation(cfg.Generation),
			Heartbeat: migrate.Heartbeat{Interval: cfg.Heartbeat.Interval, Timeout: cfg.Heartbeat.Timeout},
			Automatic: cfg.Arbiter.Automatic,
		}, accept, sh, log)
		mu.Lock()
		engine = sb
		mu.Unlock()
		me.phase(control.Copying)
		return sb.Run(ctx)
	})
}

func shadowConfig(e *env, paths control.Paths, cfg control.StandbyConfig) shadow.Config {
	return shadow.Config{
		Name: cfg.Domain, UUID: cfg.UUID, DomainXML: cfg.DomainXML, MemoryKiB: cfg.MemoryKiB,
		PrimaryHost: cfg.PrimaryHost, Socket: e.socket, Mark: filepath.Join(paths.Dir, "shadow"),
		Memory: func(ctx context.Context) (shadow.Memory, error) {
			id, err := xen.FindDomain(ctx, cfg.UUID)
			if err != nil {
				return nil, err
			}
			return xen.OpenMemory(id)
		},
	}
}

func waitActive(ctx context.Context, done <-chan struct{}, sb *migrate.Standby) error {
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for sb.Stats().State != migrate.Active {
		select {
		case <-done:
			if sb.Stats().State != migrate.Active {
				return errors.New("the take-over did not succeed; see the journal of the kemari-standby unit")
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-t.C:
		}
	}
	return nil
}

func standbyStats(s *control.Status, st migrate.StandbyStats) {
	switch st.State {
	case migrate.Ready:
		s.Phase = control.Ready
	case migrate.TakingOver:
		s.Phase = control.TakingOver
	case migrate.Active:
		s.Phase = control.Active
	}
	s.CopyBytes, s.Bytes, s.BytesLast, s.Epoch = st.CopyBytes, st.Bytes, st.LastBytes, uint64(st.Epoch)
	s.PagesLast, s.Reconnects, s.Resyncs = st.LastPages, st.Reconnects, st.Refused
	if st.Silent {
		s.Error = "the primary is silent"
		s.Hint = "make sure that the primary's host is off, then: kemari failover " + s.Domain
	}
	if f := st.Failover; f != nil {
		s.Since = f.At
		s.Failover = &control.Failover{Reason: f.Reason, At: f.At, Detect: f.Detect.Microseconds(), Takeover: f.Takeover.Microseconds()}
	}
}

func listen() (net.Listener, error) {
	var last error
	for port := firstPort; port <= lastPort; port++ {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err == nil {
			return l, nil
		}
		last = err
	}
	return nil, fmt.Errorf("no free port from %d to %d: %w", firstPort, lastPort, last)
}

// accepting accepts connections of the one peer with the right certificate until
// stop is called. Whoever else connects is dropped, and can only hold up the
// time-out.
func accepting(l net.Listener, cfg control.StandbyConfig) (_ <-chan net.Conn, stop func(), err error) {
	tc, err := cfg.Identity.TLS(cfg.PeerFingerprint)
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	good := make(chan net.Conn)
	var wg sync.WaitGroup
	wg.Go(func() {
		slots := make(chan struct{}, 16) // handshakes at a time
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			slots <- struct{}{}
			wg.Go(func() {
				defer func() { <-slots }()
				hctx, cancel := context.WithTimeout(ctx, 10*time.Second)
				defer cancel()
				t, err := secure(hctx, c, tc, tls.Server)
				if err != nil {
					return
				}
				select {
				case good <- t:
				case <-ctx.Done():
					c.Close()
				}
			})
		}
	})
	return good, func() { cancel(); l.Close(); wg.Wait() }, nil
}

// awaitPrimary waits for the first connection.
func awaitPrimary(ctx context.Context, conns <-chan net.Conn) (net.Conn, error) {
	t := time.NewTimer(connectTimeout)
	defer t.Stop()
	select {
	case c := <-conns:
		return c, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-t.C:
		return nil, fmt.Errorf("%w: it did not connect within %v; does a firewall on this host close TCP %d to %d?", migrate.ErrPrimaryLost, connectTimeout, firstPort, lastPort)
	}
}

// cleanupStandby removes what a killed standby left.
func (e *env) cleanupStandby(ctx context.Context, uuid string) error {
	paths := control.PathsFor(e.root, control.Standby, uuid)
	var cfg control.StandbyConfig
	if err := control.ReadConfig(paths, &cfg); err != nil {
		if errors.Is(err, os.ErrNotExist) { // it ended by itself and tidied up
			return nil
		}
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	running, err := shadow.Cleanup(ctx, shadowConfig(e, paths, cfg))
	last := control.Status{
		Role: control.Standby, Domain: cfg.Domain, UUID: cfg.UUID, Peer: cfg.PrimaryHost, Generation: cfg.Generation,
		Phase: control.Ended, Since: time.Now(), Arbiter: cfg.Arbiter.Type, Automatic: cfg.Arbiter.Automatic,
		Error: "the standby's process was killed; the guest has no copy here",
		Hint:  "protect it again on its primary with virsh migrate --kemari",
	}
	if running {
		last.Phase, last.Error, last.Hint = control.Active, "", ""
	}
	return errors.Join(err, control.WriteLast(paths, last))
}
