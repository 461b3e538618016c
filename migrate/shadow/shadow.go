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
	"github.com/digitalocean/go-libvirt/socket/dialers"

	"kemari/migrate/xen"
)

// Config is which guest, and where.
type Config struct {
	Name, UUID  string
	DomainXML   string // as it shall run here
	MemoryKiB   uint64
	PrimaryHost string // for libvirt's logs
	Mark        string // file that tells Cleanup what a killed process left
	Socket      string // libvirtd's; "" for the usual one
	URI         string // "" for xen:///system
}

// feedTimeout bounds one write into libvirt's restore: it only copies memory.
const feedTimeout = 30 * time.Second

// Shadow is one incoming migration. See migrate.Shadow for who may call what.
type Shadow struct {
	cfg  Config
	log  *slog.Logger
	virt *libvirt.Libvirt
	feed net.Conn

	split    xen.Splitter
	first    bool                      // the first epoch is being staged: its pages go straight in
	pages    []byte                    // staged page records of later epochs
	staged   map[xen.RecordType][]byte // tail of the epoch being staged
	tail     map[xen.RecordType][]byte // tail of the last sealed epoch
	unfed    bool                      // the sealed epoch's pages are still to be fed
	limit    int                       // of pages, in bytes
	maxPFN   uint64                    // exclusive
	over     bool                      // TakeOver has begun
	finished bool                      // libvirt's job on the domain has been ended
}

// tailRecords are what resumes the processors, in the order of the stream. The
// last one of each wins, so they are kept back until failover.
var tailRecords = []xen.RecordType{xen.RecordTSCInfo, xen.RecordHVMContext, xen.RecordHVMParams}

// Open begins the incoming migration. From then on libvirt holds a job on the
// domain, until TakeOver or Close.
func Open(ctx context.Context, cfg Config, log *slog.Logger) (*Shadow, error) {
	cfg = cfg.withDefaults()
	s := &Shadow{
		cfg: cfg, log: log, first: true,
		staged: make(map[xen.RecordType][]byte), tail: make(map[xen.RecordType][]byte),
		// A checkpoint has each page at most once; the rest is record headers.
		limit: int(cfg.MemoryKiB)<<10/64*65 + 64<<20,
		// Memory below the 4 GiB hole and above it, and Xen's special pages.
		maxPFN: cfg.MemoryKiB/4 + 1<<20 + 1<<10,
	}
	s.split = xen.Splitter{Headers: s.headers, Record: s.record}
	if err := s.connect(); err != nil {
		return nil, err
	}
	if err := s.prepare(ctx); err != nil {
		s.virt.Disconnect()
		return nil, err
	}
	return s, nil
}

func (c Config) withDefaults() Config {
	if c.Socket == "" {
		c.Socket = "/run/libvirt/libvirt-sock"
	}
	if c.URI == "" {
		c.URI = "xen:///system"
	}
	return c
}

func (s *Shadow) connect() error {
	s.virt = libvirt.NewWithDialer(dialers.NewLocal(dialers.WithSocket(s.cfg.Socket), dialers.WithLocalTimeout(5*time.Second)))
	if err := s.virt.ConnectToURI(libvirt.ConnectURI(s.cfg.URI)); err != nil {
		return fmt.Errorf("connect to libvirt at %s: %w", s.cfg.Socket, err)
	}
	return nil
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
	if s.feed, err = d.DialContext(ctx, "tcp", u.Host); err != nil {
		return fail(err)
	}
	if err := s.write(xen.LibxlHeader()); err != nil {
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

func (s *Shadow) write(b []byte) error {
	s.feed.SetWriteDeadline(time.Now().Add(feedTimeout))
	if _, err := s.feed.Write(b); err != nil {
		return fmt.Errorf("libvirt's incoming migration has ended (was libvirtd restarted?): %w", err)
	}
	return nil
}

func (s *Shadow) headers(b []byte) error { return s.write(b) }

func (s *Shadow) record(r xen.Record) error {
	switch r.Type {
	case xen.RecordPageData:
		if _, err := xen.CheckPageData(r.Body, s.maxPFN); err != nil {
			return err
		}
		if s.first {
			return s.write(r.Raw)
		}
		if len(s.pages)+len(r.Raw) > s.limit {
			return fmt.Errorf("an epoch of more than %d bytes for a guest of %d KiB", s.limit, s.cfg.MemoryKiB)
		}
		s.pages = append(s.pages, r.Raw...)
		return nil
	case xen.RecordTSCInfo, xen.RecordHVMContext, xen.RecordHVMParams:
		s.staged[r.Type] = append(s.staged[r.Type][:0], r.Raw...)
		return nil
	case xen.RecordCPUIDPolicy, xen.RecordMSRPolicy, xen.RecordStaticDataEnd:
		if !s.first {
			return fmt.Errorf("%w: static record %#x in a later epoch", xen.ErrStream, uint32(r.Type))
		}
		return s.write(r.Raw)
	default:
		return fmt.Errorf("%w: record of type %#x", xen.ErrStream, uint32(r.Type))
	}
}

// Stage implements migrate.Shadow. The first epoch's pages are fed at once: until
// it is sealed there is nothing to take over from anyway.
func (s *Shadow) Stage(p []byte) error {
	if s.unfed || s.over {
		return errors.New("staged before the last epoch was applied")
	}
	return s.split.Push(p)
}

// Seal implements migrate.Shadow.
func (s *Shadow) Seal() error {
	if s.split.Partial() {
		return fmt.Errorf("%w: cut in the middle of a record", xen.ErrStream)
	}
	for _, t := range tailRecords[1:] { // TSC_INFO is not sent for every guest
		if len(s.staged[t]) == 0 {
			return fmt.Errorf("%w: record %#x is missing", xen.ErrStream, uint32(t))
		}
	}
	s.staged, s.tail = s.tail, s.staged
	for t := range s.staged {
		s.staged[t] = s.staged[t][:0]
	}
	s.first, s.unfed = false, true
	return nil
}

// Apply implements migrate.Shadow.
func (s *Shadow) Apply() error {
	if !s.unfed {
		return nil
	}
	s.unfed = false
	if len(s.pages) == 0 {
		return nil
	}
	err := s.write(s.pages)
	s.pages = s.pages[:0]
	return err
}

// TakeOver implements migrate.Shadow: processor state, end of stream, Finish3.
func (s *Shadow) TakeOver(ctx context.Context) error {
	if s.first {
		return errors.New("nothing committed to take over from")
	}
	s.over = true
	if s.unfed {
		if err := s.Apply(); err != nil {
			return err
		}
	}
	var b []byte
	for _, t := range tailRecords {
		b = append(b, s.tail[t]...)
	}
	if err := s.mark(markTakingOver); err != nil {
		return err
	}
	if err := s.write(append(b, xen.End()...)); err != nil {
		return err
	}
	return s.finish(ctx, false)
}

// finish ends libvirt's job on the domain: it is let run, or cancelled.
func (s *Shadow) finish(ctx context.Context, cancel bool) error {
	if s.finished {
		return nil
	}
	s.finished = true
	// Libvirt joins its receiving thread here, which ends with the stream.
	stop := context.AfterFunc(ctx, func() { s.virt.Disconnect() })
	defer stop()
	_, _, err := s.virt.DomainMigrateFinish3Params(s.params(), nil, uint32(libvirt.MigrateLive), map[bool]int32{true: 1}[cancel])
	os.Remove(s.cfg.Mark)
	if cancel {
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
// half-restored domain.
func (s *Shadow) Close() error {
	s.feed.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	err := s.finish(ctx, true)
	s.virt.Disconnect()
	return err
}

// Cleanup puts in order what a process left that was killed. Its stream has ended
// with it, but libvirt still holds the job on the domain. A take-over that had
// begun is finished, everything else is cancelled; running tells which it was.
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
	if err := s.connect(); err != nil {
		return false, err
	}
	defer s.virt.Disconnect()
	over := string(mark) == markTakingOver
	if err := s.finish(ctx, !over); err != nil {
		return false, err
	}
	return over, nil
}
