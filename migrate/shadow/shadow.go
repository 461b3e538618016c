// Package shadow is the standby's copy of a guest: an incoming migration at the
// local libvirtd that is kept open for as long as protection lasts, fed with
// committed epochs, and finished at failover. libvirt then owns the domain and
// emits its own lifecycle events. It implements migrate.Shadow.
package shadow

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"time"

	libvirt "github.com/digitalocean/go-libvirt"

	"kemari/migrate"
	"kemari/migrate/daemon"
	"kemari/migrate/page"
	"kemari/migrate/xen"
)

// Config is which guest, and where.
type Config struct {
	Name, UUID  string
	DomainXML   string // as it shall run here
	MemoryKiB   uint64
	DeviceModel bool   // it is an HVM guest, whose device model's state comes along
	PrimaryHost string // for libvirt's logs
	Mark        string // file that tells Cleanup what a killed process left
	Cancel      bool   // Cleanup finishes nothing: the guest goes on elsewhere
	Socket      string // of libvirt's daemon; "" for the usual ones
	URI         string // "" for xen:///system
	// Memory opens the memory of the domain that is being restored, once it exists.
	// Nil, or an error: every page goes through the stream, and a second copy of the
	// guest is kept here.
	Memory func(ctx context.Context) (Memory, error)
	// End makes sure that no domain with the UUID runs here, whatever libvirt says.
	End func(ctx context.Context) error
}

// Limit is what every page of a guest of that size is below: memory below the
// 4 GiB hole and above it, and Xen's special pages.
func Limit(memoryKiB uint64) page.PFN { return page.PFN(memoryKiB/4 + 1<<20 + 1<<10) }

// memoryTimeout bounds the time until the domain exists.
const memoryTimeout = 10 * time.Second

// Shadow is one incoming migration. See migrate.Shadow for who may call what.
type Shadow struct {
	cfg  Config
	log  *slog.Logger
	virt *libvirt.Libvirt
	conn net.Conn // below virt
	feed *feed

	gone     chan struct{} // closed when libvirt has ended the restore, or our connection has
	limit    page.PFN
	asked    bool // for Memory
	over     bool // TakeOver has begun
	finished bool // libvirt's job on the domain has been ended
}

// Open begins the incoming migration. From then on libvirt holds a job on the
// domain, until TakeOver or Close.
func Open(ctx context.Context, cfg Config, log *slog.Logger) (*Shadow, error) {
	cfg = cfg.withDefaults()
	s := &Shadow{cfg: cfg, log: log, limit: Limit(cfg.MemoryKiB)}
	if err := s.connect(ctx); err != nil {
		return nil, err
	}
	if err := s.prepare(ctx); err != nil {
		s.disconnect()
		return nil, err
	}
	return s, nil
}

func (c Config) withDefaults() Config {
	if c.URI == "" {
		c.URI = "xen:///system"
	}
	return c
}

func (s *Shadow) connect(ctx context.Context) error {
	sockets := []string{s.cfg.Socket}
	if s.cfg.Socket == "" {
		sockets = daemon.Sockets(daemon.Dir, s.cfg.URI, false)
	}
	_, err := daemon.Enter(ctx, sockets, func(conn net.Conn) error { return s.connectOver(ctx, conn) })
	if err != nil {
		return fmt.Errorf("connect to libvirt: %w", err)
	}
	return nil
}

func (s *Shadow) connectOver(ctx context.Context, conn net.Conn) error {
	s.conn, s.virt = conn, libvirt.NewWithDialer(given{conn})
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := s.virt.ConnectToURI(libvirt.ConnectURI(s.cfg.URI)); err != nil {
		conn.Close()
		return err
	}
	return nil
}

// given is a dialer of a connection that is there: libvirt's own keeps it to itself,
// and a libvirtd that hangs answers its Disconnect no more than anything else.
type given struct{ net.Conn }

func (g given) Dial() (net.Conn, error) { return g.Conn, nil }

// goodbye bounds what libvirtd may take to say hello and goodbye.
const goodbye = 5 * time.Second

// disconnect ends the connection to libvirtd in good order if it lets us.
func (s *Shadow) disconnect() {
	t := time.AfterFunc(goodbye, func() { s.conn.Close() })
	defer t.Stop()
	s.virt.Disconnect()
	s.conn.Close()
}

// Marks are what the file Config.Mark holds while libvirt has a job of ours.
const (
	markOpen       = "open"
	markTakingOver = "taking over"
)

func (s *Shadow) mark(m string) error {
	if err := os.WriteFile(s.cfg.Mark, []byte(m), 0o600); err != nil {
		return fmt.Errorf("mark the shadow: %w", err)
	}
	return nil
}

func (s *Shadow) params() []libvirt.TypedParam {
	return []libvirt.TypedParam{{Field: "destination_name", Value: *libvirt.NewTypedParamValueString(s.cfg.Name)}}
}

// prepare opens the migration and connects to it at once: libvirt listens for one
// connection, in the clear, so on the loopback only.
func (s *Shadow) prepare(ctx context.Context) error {
	cookie, err := cookie(s.cfg)
	if err != nil {
		return err
	}
	if err := s.mark(markOpen); err != nil {
		return err
	}
	params := append(s.params(),
		libvirt.TypedParam{Field: "destination_xml", Value: *libvirt.NewTypedParamValueString(s.cfg.DomainXML)},
		libvirt.TypedParam{Field: "migrate_uri", Value: *libvirt.NewTypedParamValueString("tcp://127.0.0.1")})
	_, uri, err := s.virt.DomainMigratePrepare3Params(params, cookie, uint32(libvirt.MigrateLive))
	if err != nil {
		os.Remove(s.cfg.Mark)
		return fmt.Errorf("open an incoming migration: %w", err)
	}
	fail := func(err error) error {
		return errors.Join(fmt.Errorf("connect to the incoming migration: %w", err), s.finish(context.WithoutCancel(ctx), true))
	}
	if len(uri) != 1 {
		return fail(errors.New("libvirt named no address"))
	}
	u, err := url.Parse(uri[0])
	if err != nil {
		return fail(err)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", u.Host)
	if err != nil {
		return fail(err)
	}
	s.feed = newFeed(conn, s.limit)
	s.gone = make(chan struct{})
	go s.watch(conn)
	if err := s.feed.write(xen.LibxlHeader()); err != nil {
		s.feed.Close()
		return fail(err)
	}
	return nil
}

// cookie is what libxl's driver sends along: without one it takes the stream for
// that of an old libxl and fails.
func cookie(cfg Config) ([]byte, error) {
	type migration struct {
		XMLName xml.Name `xml:"libxl-migration"`
		Name    string   `xml:"name"`
		UUID    string   `xml:"uuid"`
		Host    string   `xml:"hostname"`
		Version int      `xml:"migration-stream-version"`
	}
	b, err := xml.Marshal(migration{Name: cfg.Name, UUID: cfg.UUID, Host: cfg.PrimaryHost, Version: 2})
	return append(b, 0), err // a C string
}

// Head implements migrate.Shadow.
func (s *Shadow) Head(b []byte) error {
	if err := xen.CheckHead(b); err != nil {
		return err
	}
	return s.feed.write(b)
}

// watch waits for the end of the restore. Libvirt says nothing on that connection, so
// whatever comes is its end. Without it nobody would notice: what the domain has is
// written by mapping, which works on the memory of a domain that is gone, too.
func (s *Shadow) watch(conn net.Conn) {
	defer close(s.gone)
	conn.Read(make([]byte, 1))
}

// Check implements migrate.Shadow.
func (s *Shadow) Check(state []byte) error {
	why := ""
	select {
	case <-s.gone:
		why = "libvirt's incoming migration has ended"
	case <-s.virt.Disconnected():
		why = "libvirtd has closed the connection; was it restarted?"
	default:
		return xen.CheckState(state, s.cfg.DeviceModel)
	}
	return fmt.Errorf("%w: %s", migrate.ErrShadowLost, why)
}

// Base implements migrate.Shadow.
func (s *Shadow) Base(pfn page.PFN, dst []byte) error {
	if pfn >= s.limit {
		return fmt.Errorf("page %v is outside the guest", pfn)
	}
	return s.feed.read(pfn, dst)
}

// Apply implements migrate.Shadow.
func (s *Shadow) Apply(p *migrate.Pages) error {
	if s.over {
		return errors.New("it has been let run")
	}
	for _, pfn := range p.PFNs {
		if pfn >= s.limit {
			return fmt.Errorf("page %v is outside the guest", pfn)
		}
	}
	if !s.asked {
		s.asked = true
		s.open()
	}
	return s.feed.apply(p)
}

// open opens the domain's memory. By then libxl has begun to restore it.
func (s *Shadow) open() {
	if s.cfg.Memory == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), memoryTimeout)
	defer cancel()
	mem, err := s.cfg.Memory(ctx)
	if err != nil {
		s.log.Warn("the copy's memory cannot be reached; a second one is kept", "err", err)
		return
	}
	s.feed.use(mem)
}

// TakeOver implements migrate.Shadow: processor state, end of stream, Finish3.
func (s *Shadow) TakeOver(ctx context.Context, state []byte) error {
	if err := xen.CheckState(state, s.cfg.DeviceModel); err != nil {
		return err
	}
	s.over = true
	if err := s.mark(markTakingOver); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { s.feed.conn.Close() })
	err := s.feed.write(xen.AppendTail(nil, state, s.cfg.DeviceModel))
	stop()
	if err != nil {
		return errors.Join(err, s.mark(markOpen)) // for Close to cancel, or who cleans up
	}
	if mem := s.feed.mem; mem != nil {
		if err := mem.Close(); err != nil { // it would keep the guest's memory from being freed
			s.log.Warn("the copy's memory stays mapped", "err", err)
		}
	}
	err = s.finish(ctx, false)
	if err == nil {
		return nil
	}
	// Libvirt may have let it run before it failed, or do so when it answers again.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endFor)
	defer cancel()
	if s.cfg.End == nil {
		return errors.Join(migrate.ErrMayRun, err)
	}
	if e := s.cfg.End(ctx); e != nil {
		return errors.Join(migrate.ErrMayRun, err, fmt.Errorf("end the copy: %w", e))
	}
	return err
}

// endFor bounds making sure that a copy does not run, after a take-over that failed.
const endFor = 8 * time.Second

// finish ends libvirt's job on the domain: it is let run, or cancelled.
func (s *Shadow) finish(ctx context.Context, cancel bool) error {
	if s.finished {
		return nil
	}
	s.finished = true
	// Libvirt joins its receiving thread here, which ends with the stream.
	stop := context.AfterFunc(ctx, func() { s.conn.Close() })
	defer stop()
	_, _, err := s.virt.DomainMigrateFinish3Params(s.params(), nil, uint32(libvirt.MigrateLive), map[bool]int32{true: 1}[cancel])
	os.Remove(s.cfg.Mark)
	if cancel {
		if ctx.Err() != nil {
			return fmt.Errorf("cancel the incoming migration: libvirtd does not answer: %w", context.Cause(ctx))
		}
		// Libvirt answers a cancelled migration with no domain, which is an error in
		// the protocol's terms and success in ours.
		return nil
	}
	if err != nil {
		return fmt.Errorf("finish the incoming migration: %w", err)
	}
	return nil
}

// Close implements migrate.Shadow. Ending the stream early makes libxl destroy the
// half-restored domain. A libvirtd that does not answer is given up.
func (s *Shadow) Close() error {
	s.feed.Close() // its memory first: what is mapped is not freed
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	err := s.finish(ctx, true)
	s.disconnect()
	return err
}

// Destroy ends a domain of this host through libvirt, which so learns of it: "" is the
// usual one. It ends with ctx. It is no error if the domain does not run.
func Destroy(ctx context.Context, socket string, uuid [16]byte) error {
	s := &Shadow{cfg: Config{Socket: socket}.withDefaults()}
	if err := s.connect(ctx); err != nil {
		return err
	}
	defer s.disconnect()
	stop := context.AfterFunc(ctx, func() { s.conn.Close() })
	defer stop()
	dom, err := s.virt.DomainLookupByUUID(libvirt.UUID(uuid))
	if err == nil && dom.ID >= 0 {
		err = s.virt.DomainDestroy(dom)
	}
	switch {
	case err == nil, libvirt.IsNotFound(err):
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("libvirtd does not answer: %w", context.Cause(ctx))
	}
	return err
}

// Cleanup puts in order what a process left that was killed. Its stream has ended
// with it, but libvirt still holds the job on the domain. A take-over that had
// begun is finished, unless cfg.Cancel says that the guest goes on elsewhere;
// everything else is cancelled. Running tells which it was.
// Without the mark of an open shadow it touches nothing: to cancel a migration
// that has been finished would destroy the guest.
func Cleanup(ctx context.Context, cfg Config) (running bool, err error) {
	mark, err := os.ReadFile(cfg.Mark)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	s := &Shadow{cfg: cfg.withDefaults()}
	if err := s.connect(ctx); err != nil {
		return false, err
	}
	defer s.disconnect()
	over := string(mark) == markTakingOver && !cfg.Cancel
	if err := s.finish(ctx, !over); err != nil {
		return false, err
	}
	return over, nil
}
