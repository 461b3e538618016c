package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"kemari/migrate"
	"kemari/migrate/control"
	"kemari/migrate/shadow"
	"kemari/migrate/wire"
	"kemari/migrate/xen"
	"kemari/systemd"
	"kemari/xml"
)

// Ports of the data connection, a range as libvirt has one for migrations, so that
// a firewall can be told. One is used by each guest whose standby this host is.
const firstPort, lastPort = 49300, 49363

// connectTimeout is how long a standby waits for its primary, whose unit has yet to
// be started: on a busy emulated host that has taken 40 seconds.
const connectTimeout = 2 * time.Minute

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
		Arbiter: cfg.Arbiter.Type, Automatic: cfg.Arbiter.Automatic, Risk: risk(cfg.Arbiter, cfg.Channel),
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
		case control.OpVerify:
			return errors.New("the primary has the memory verified; ask it on its host")
		case control.OpSwitchover:
			return errors.New("the primary hands its guest over; ask it on its host")
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
		conns, stop, err := accepting(l, cfg, log)
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
			Automatic: cfg.Arbiter.Automatic, HandedOver: func() error { return setMark(handedOverMark(paths), cfg.Generation) },
		}, accept, sh, log)
		mu.Lock()
		engine = sb
		mu.Unlock()
		me.phase(control.Copying)
		return sb.Run(ctx)
	})
}

// handedOverMark is the file that tells cleanupStandby that the primary has asked for
// the take-over under way, and goes on by itself if it does not hear that it was done.
func handedOverMark(paths control.Paths) string { return filepath.Join(paths.Dir, "handed-over") }

func shadowConfig(e *env, paths control.Paths, cfg control.StandbyConfig) shadow.Config {
	return shadow.Config{
		Name: cfg.Domain, UUID: cfg.UUID, DomainXML: cfg.DomainXML, MemoryKiB: cfg.MemoryKiB,
		DeviceModel: xml.HasDeviceModel(cfg.DomainXML),
		PrimaryHost: cfg.PrimaryHost, Socket: e.socket, Mark: filepath.Join(paths.Dir, "shadow"),
		End: func(ctx context.Context) error { return e.end(ctx, cfg.UUID) },
		Memory: func(ctx context.Context) (shadow.Memory, error) {
			id, err := xen.FindDomain(ctx, cfg.UUID)
			if err != nil {
				return nil, err
			}
			return xen.OpenMemory(id)
		},
	}
}

// askLibvirtFor is what libvirt has of the time there is to end a domain.
const askLibvirtFor = 4 * time.Second

// end makes sure that the domain does not run here: through libvirt, if it can still be
// asked, and by the hypervisor, which alone knows.
func (e *env) end(ctx context.Context, uuid string) error {
	id, err := parseUUID(uuid)
	if err != nil {
		return err
	}
	soon, cancel := context.WithTimeout(ctx, askLibvirtFor)
	defer cancel()
	if err := shadow.Destroy(soon, e.socket, id); err != nil {
		e.log.Warn("libvirt does not end the copy; the hypervisor does", "err", err)
	}
	return xen.EndDomain(ctx, id)
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
// stop is called. Whoever else connects is dropped, and holds up nobody: see
// strangers.
func accepting(l net.Listener, cfg control.StandbyConfig, log *slog.Logger) (_ <-chan net.Conn, stop func(), err error) {
	secure, err := securer(cfg.Channel, control.Standby)
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	good := make(chan net.Conn)
	var wg sync.WaitGroup
	wg.Go(func() {
		var waiting strangers
		var once sync.Once
		for {
			c, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil { // of descriptors, say, there may be enough again
				once.Do(func() { log.Warn("the primary cannot connect for the moment; trying on", "err", err) })
				time.Sleep(10 * time.Millisecond)
				continue
			}
			waiting.add(c)
			wg.Go(func() {
				hctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
				defer cancel()
				t, err := secure(hctx, c)
				waiting.remove(c)
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

// handshakeTimeout is how long either side gives a connection until both know whose it
// is. A busy emulated host needs seconds of processor time for it.
const handshakeTimeout = 20 * time.Second

// maxStrangers bounds the connections that have not shown their certificate yet.
const maxStrangers = 16

// strangers are the connections that have not shown their certificate yet, oldest
// first. The zero value has none.
type strangers struct {
	mu    sync.Mutex
	conns []net.Conn
}

// add takes a connection in. If that makes too many, the oldest one goes of the host
// that has the most: whoever connects and says nothing gets into his own way first, and
// it takes many hosts, each with as many connections as the primary's, to get into that
// of the primary that is to connect within the heartbeat's time-out.
func (s *strangers) add(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conns = append(s.conns, c); len(s.conns) <= maxStrangers {
		return
	}
	has, most := make(map[string]int), 0
	for _, c := range s.conns {
		h := remoteHost(c)
		has[h]++
		most = max(most, has[h])
	}
	i := slices.IndexFunc(s.conns, func(c net.Conn) bool { return has[remoteHost(c)] == most })
	s.conns[i].Close() // and so its handshake ends
	s.conns = slices.Delete(s.conns, i, i+1)
}

func (s *strangers) remove(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns = slices.DeleteFunc(s.conns, func(o net.Conn) bool { return o == c })
}

func remoteHost(c net.Conn) string {
	h, _, _ := net.SplitHostPort(c.RemoteAddr().String())
	return h
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
	sc := shadowConfig(e, paths, cfg)
	sc.Cancel = hasMark(handedOverMark(paths), cfg.Generation)
	running, err := shadow.Cleanup(ctx, sc)
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
