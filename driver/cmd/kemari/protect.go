package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"

	"kemari/driver"
	"kemari/driver/virt"
	"kemari/migrate/control"
	"kemari/xml"
)

// hypervisor is a connection to libvirt, as virt.Conn is. Its methods block.
type hypervisor interface {
	Lookup(name string) (virt.Domain, error)
	List() ([]virt.Domain, error)
	XML(uuid string, secrets bool) (string, error)
	Protect(uuid string, p virt.Protection) error
	Switchover(uuid, uri string) error
	Abort(uuid string) error
	Close() error
}

// host is what the commands work with; tests put their own in.
type host struct {
	in                 io.Reader
	out, err           io.Writer
	inTTY, errTTY      bool
	getenv             func(string) string
	root               string // of the run-time folders
	name               string // of this host
	open               func(uri string, readonly bool) (hypervisor, error)
	examine            func(ctx context.Context, connect, domain, standby string) (*driver.Examination, error)
	now                func() time.Time
	poll, retry, limit time.Duration // between looks; between attempts and until they end
}

// defaultURI is where virtkemarid serves.
const defaultURI = "kemari:///system"

// kemariURI is the connection to virtkemarid that leads to the same host as the
// one asked for.
func (h *host) kemariURI(connect string) (string, error) {
	if connect == "" {
		connect = h.getenv("VIRSH_DEFAULT_CONNECT_URI")
	}
	if connect == "" {
		connect = h.getenv("LIBVIRT_DEFAULT_URI")
	}
	if connect == "" {
		return defaultURI, nil
	}
	scheme, rest, ok := strings.Cut(connect, ":")
	if !ok {
		return connect, nil // an alias from libvirt.conf
	}
	base, transport, _ := strings.Cut(scheme, "+")
	switch base {
	case "kemari":
		return connect, nil
	case "xen":
		if transport != "" {
			transport = "+" + transport
		}
		return "kemari" + transport + ":" + rest, nil
	}
	return "", fmt.Errorf("connection '%s' does not lead to Xen; use %s", connect, defaultURI)
}

// protection is a protection to begin.
type protection struct {
	connect  string // "" is the default
	readonly bool   // libvirt then refuses, in its own words
	domain   string
	uri      string // "" takes the one in the domain's element
	dataURI  string
	settings settings
	progress bool
	quiet    bool
	prefix   string // of the options, as the caller has them
}

// protect begins a protection and returns once the standby has the first epoch.
// If ctx ends before, protection is taken back.
func (h *host) protect(ctx context.Context, p protection) error {
	connect, err := h.kemariURI(p.connect)
	if err != nil {
		return err
	}
	hv, err := h.open(connect, p.readonly)
	if err != nil {
		return err
	}
	defer hv.Close()
	dom, err := hv.Lookup(p.domain)
	if err != nil {
		return err
	}
	domainXML, err := definition(hv, dom, !p.readonly)
	if err != nil {
		return err
	}
	e, err := element(domainXML, p)
	if err != nil {
		return fmt.Errorf("domain '%s': %w", dom.Name, err)
	}
	if err := h.begin(ctx, hv, connect, dom, domainXML, e, p); err != nil {
		return err
	}
	if !p.quiet {
		fmt.Fprintf(h.out, "Domain '%s' is protected by %s (%s)\n", dom.Name, hostOf(e.Standby.URI), e.Standby.URI)
	}
	h.warn(dom.Name, e, p.prefix)
	return nil
}

// definition is the domain with its element where the other functions look for it;
// virtkemarid shows it at the top level.
func definition(hv hypervisor, dom virt.Domain, secrets bool) (string, error) {
	shown, err := hv.XML(dom.UUID, secrets)
	if err != nil {
		return "", err
	}
	s, err := xml.Lower(shown)
	if err != nil {
		return "", fmt.Errorf("domain '%s': %w", dom.Name, err)
	}
	return s, nil
}

// element is the domain's own, or the default, with what p changes.
func element(domainXML string, p protection) (*xml.Element, error) {
	e, err := xml.FromDomain(domainXML)
	if err != nil {
		return nil, err
	}
	if e == nil {
		e = xml.Default()
	}
	if p.uri != "" {
		e.Standby = &xml.Standby{URI: p.uri}
	}
	if e.Standby == nil {
		return nil, errors.New("nothing says which host shall protect it; give its URI, such as kemari+ssh://xen2/system")
	}
	p.settings.apply(e)
	return e, e.Validate()
}

// begin is the call itself, with its progress and its interruption.
func (h *host) begin(ctx context.Context, hv hypervisor, connect string, dom virt.Domain, domainXML string, e *xml.Element, p protection) error {
	dest, err := xml.SetInDomain(domainXML, e)
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		done <- hv.Protect(dom.UUID, virt.Protection{URI: e.Standby.URI, XML: dest, DataURI: p.dataURI})
	}()
	var bar progress
	defer bar.finish()
	var look <-chan time.Time
	if p.progress && hostOf(connect) == "" { // what runs on another host cannot be watched from here
		tick := time.NewTicker(h.poll)
		defer tick.Stop()
		look = tick.C
	}
	for {
		select {
		case err := <-done:
			return err
		case <-look:
			bar.show(h.err, h.look(dom.UUID))
		case <-ctx.Done():
			bar.finish()
			fmt.Fprintf(h.err, "interrupted: ending the protection of '%s'\n", dom.Name)
			return h.abort(connect, dom, done)
		}
	}
}

// abort ends what done is waiting for. One attempt may come too early, before
// there is anything to abort.
func (h *host) abort(connect string, dom virt.Domain, done <-chan error) error {
	tick := time.NewTicker(h.poll)
	defer tick.Stop()
	var failed error
	for {
		err := h.abortOnce(connect, dom.UUID)
		if err == nil {
			<-done
			return fmt.Errorf("interrupted: domain '%s' is not protected", dom.Name)
		}
		if failed == nil || failed.Error() != err.Error() {
			fmt.Fprintf(h.err, "cannot end it yet: %v\n", err)
		}
		failed = err
		select {
		case err := <-done:
			if err != nil {
				return fmt.Errorf("interrupted: %w", err)
			}
			return fmt.Errorf("interrupted too late: domain '%s' is protected; end this with: virsh -c %s domjobabort %s", dom.Name, connect, dom.Name)
		case <-tick.C:
		}
	}
}

// abortOnce uses a connection of its own, since a call that is under way keeps
// its connection busy.
func (h *host) abortOnce(connect, uuid string) error {
	hv, err := h.open(connect, false)
	if err != nil {
		return err
	}
	defer hv.Close()
	return hv.Abort(uuid)
}

// look returns the status of the protection being begun; its phase is Ended if
// there is none to be seen.
func (h *host) look(uuid string) control.Status {
	ctx, cancel := context.WithTimeout(context.Background(), h.poll)
	defer cancel()
	s, err := control.Look(ctx, control.PathsFor(h.root, control.Primary, uuid))
	if err != nil {
		return control.Status{Phase: control.Ended}
	}
	return s
}

// warn says on the error stream what this protection does not give.
func (h *host) warn(domain string, e *xml.Element, prefix string) {
	switch {
	case e.Arbiter == nil || !e.Arbiter.Automatic:
		fmt.Fprintf(h.err, "note: no automatic failover: if this host is lost, '%s' stays down until 'kemari failover %s' is said on %s; %sarbiter none makes it automatic\n",
			domain, domain, hostOf(e.Standby.URI), prefix)
	case e.Arbiter.Type == xml.ArbiterNone:
		fmt.Fprintln(h.err, "warning: no arbiter: two hosts that lose sight of each other may both run the guest")
	}
	if e.Transport == xml.TransportTCP {
		fmt.Fprintln(h.err, "warning: transport tcp: whoever can read or change what passes between the hosts can read and change the guest")
	}
}

// hostOf returns the host a URI names, "" if it names none.
func hostOf(uri string) string {
	u, err := url.Parse(uri)
	if err != nil {
		return ""
	}
	return u.Hostname()
}

// progress is the line that shows the first copy.
type progress struct {
	bar *progressbar.ProgressBar
	w   io.Writer
}

func (p *progress) show(w io.Writer, s control.Status) {
	if s.Phase != control.Copying || s.CopyTotal <= 0 {
		return
	}
	if p.bar == nil {
		p.w = w
		p.bar = progressbar.NewOptions64(s.CopyTotal,
			progressbar.OptionSetWriter(w),
			progressbar.OptionSetDescription("First copy"),
			progressbar.OptionShowBytes(true),
			progressbar.OptionUseIECUnits(true),
			progressbar.OptionSetWidth(30),
			progressbar.OptionThrottle(0),
		)
	}
	// Pages that change meanwhile are sent again, so that more than the total
	// may have gone out.
	p.bar.ChangeMax64(s.CopyTotal)
	p.bar.Set64(min(s.CopyBytes, s.CopyTotal)) //nolint:errcheck // only a display
}

// finish leaves the line as it stands and goes to the next.
func (p *progress) finish() {
	if p.bar != nil {
		fmt.Fprintln(p.w)
		p.bar = nil
	}
}
