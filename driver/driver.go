package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"kemari/driver/rpc"
	"kemari/migrate/control"
)

// Units starts and stops systemd units. Both methods block until it is done or
// ctx ends, and are safe for concurrent use. Start returns once the unit is
// ready; Stop of a unit that does not run succeeds.
type Units interface {
	Start(ctx context.Context, name string) error
	Stop(ctx context.Context, name string) error
}

// The defaults of Config.
const (
	DefaultUpstreamURI = "xen:///system"
	DefaultMaxClients  = 5000
)

// Config is what a Driver works with. Units must be set; what else is zero has
// a default.
type Config struct {
	// UpstreamURI is what libvirt's daemon is asked to open. UpstreamSocket is
	// where it listens; without it the sockets are tried that libvirt's own client
	// would choose. Readers go to UpstreamSocketRO, or with UpstreamSocket alone
	// there, as readers.
	UpstreamURI      string
	UpstreamSocket   string
	UpstreamSocketRO string

	// Authority decides about clients other than root, if there is one; see decide.
	// RequireAuthority makes it an error if it is not present.
	Authority        Authority
	RequireAuthority bool

	libvirtDir string // another than /run/libvirt

	MaxClients int    // a user other than root may have a quarter of them
	Root       string // of the run-time folders
	PKI        string // of libvirt's certificates; control.PKI without it
	Units      Units
	Log        *slog.Logger

	// Libvirt opens a connection of the driver's own to libvirtd.
	Libvirt func(ctx context.Context) (Libvirt, error)
	// Host tells about this host.
	Host func() (Host, error)
	// DeviceModel finds what runs for an HVM guest here, Version what a program that
	// could run says of itself.
	DeviceModel func(domid uint32) *DeviceModel
	Version     func(ctx context.Context, program string) (string, error)
	// Dial connects to the virtkemarid of a standby. The connection ends with
	// Close, which must make blocked Reads and Writes return.
	Dial func(ctx context.Context, t Target) (io.ReadWriteCloser, error)
}

// Driver serves clients. It is safe for concurrent use.
type Driver struct {
	cfg Config
	log *slog.Logger

	// Tests put other ones here.
	readPeerCred func(net.Conn) (*peerCred, error)
	lookupGroup  func(name string) (uint32, error)

	mu       sync.Mutex
	clients  int                   // of all users
	users    map[uint32]int        // clients of users other than root
	attempts map[rpc.UUID]*attempt // protections being set up here
	standbys map[rpc.UUID]*standbyLock

	hub  hub
	jobs sync.Mutex
	told map[rpc.UUID]uint64 // the ended protections, by generation, that were told of
}

// New returns a driver.
func New(cfg Config) (*Driver, error) {
	if cfg.Units == nil {
		return nil, errors.New("driver: no Units")
	}
	def := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	def(&cfg.UpstreamURI, DefaultUpstreamURI)
	def(&cfg.Root, control.Dir)
	def(&cfg.PKI, control.PKI)
	if cfg.MaxClients == 0 {
		cfg.MaxClients = DefaultMaxClients
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Libvirt == nil {
		cfg.Libvirt = func(ctx context.Context) (Libvirt, error) {
			return openLibvirt(ctx, cfg.upstreamSockets(false), cfg.UpstreamURI)
		}
	}
	if cfg.Host == nil {
		cfg.Host = ReadHost
	}
	if cfg.DeviceModel == nil {
		cfg.DeviceModel = runningDeviceModel
	}
	if cfg.Version == nil {
		cfg.Version = programVersion
	}
	if cfg.Dial == nil {
		cfg.Dial = DialSSH
	}
	return &Driver{
		cfg:          cfg,
		log:          cfg.Log,
		users:        make(map[uint32]int),
		readPeerCred: readPeerCred,
		lookupGroup:  lookupGroup,
		attempts:     make(map[rpc.UUID]*attempt),
		standbys:     make(map[rpc.UUID]*standbyLock),
	}, nil
}

// errStopping is why sessions end when the driver does.
var errStopping = errors.New("virtkemarid is stopping")

// Serve answers the clients of l, which are read-only if ro, until ctx ends. It
// then closes l and returns when the last session has cleaned up.
func (d *Driver) Serve(ctx context.Context, l net.Listener, ro bool) error {
	var sessions sync.WaitGroup
	defer sessions.Wait()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(errStopping)
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("accept: %w", err)
		}
		if err != nil {
			// Out of descriptors, most likely: those we have go on, and the next
			// client may have more luck.
			d.log.Warn("accept a client", "error", err)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		cred, err := d.readPeerCred(c)
		if err != nil {
			d.log.Warn("client", "error", err)
			c.Close()
			continue
		}
		if !d.enter(cred.uid) {
			d.log.Warn("client refused, too many are connected", "limit", d.cfg.MaxClients, "client", cred)
			c.Close()
			continue
		}
		sessions.Go(func() {
			defer d.leave(cred.uid)
			newSession(d, c, cred, ro).run(ctx)
		})
	}
}

// enter takes a place for a client of the user, if there is one. Anybody may open
// the sockets, so nobody but root gets more than a part of the places.
func (d *Driver) enter(uid uint32) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.clients >= d.cfg.MaxClients {
		return false
	}
	if uid != 0 {
		if d.users[uid] >= max(1, d.cfg.MaxClients/4) {
			return false
		}
		d.users[uid]++
	}
	d.clients++
	return true
}

func (d *Driver) leave(uid uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.clients--
	if uid != 0 {
		if d.users[uid]--; d.users[uid] == 0 {
			delete(d.users, uid)
		}
	}
}

func (d *Driver) paths(role control.Role, id rpc.UUID) control.Paths {
	return control.PathsFor(d.cfg.Root, role, id.String())
}

// lookTimeout bounds the wait for a replicator or standby to say how it is.
const lookTimeout = 5 * time.Second

// errSilent is returned by look of a process that does not say how it is.
var errSilent = errors.New("it does not answer")

// look is control.Look with a bound.
func (d *Driver) look(ctx context.Context, role control.Role, id rpc.UUID) (control.Status, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, lookTimeout, errSilent)
	defer cancel()
	return control.Look(ctx, d.paths(role, id))
}

// protected says whether the guest's state is being copied to a standby, or is
// about to be. A replicator that does not answer is taken to be at work.
func (d *Driver) protected(ctx context.Context, id rpc.UUID) bool {
	d.mu.Lock()
	_, starting := d.attempts[id]
	d.mu.Unlock()
	if starting {
		return true
	}
	st, err := d.look(ctx, control.Primary, id)
	if errors.Is(err, control.ErrNotRunning) {
		return false
	}
	return err != nil || st.Phase != control.Ended
}
