package xml

import (
	"encoding/xml"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Namespace is the element's.
const Namespace = "urn:kemari:domain:1.0"

// MaxSize bounds the element's text.
const MaxSize = 64 << 10

// Element is <kemari>.
type Element struct {
	Autostart  bool // every start of the guest protects it
	Standby    *Standby
	Transport  string
	Checkpoint Checkpoint
	Heartbeat  Heartbeat
	Arbiter    *Arbiter // nil: nobody decides, so there is no automatic failover
}

// Standby is the host that takes over.
type Standby struct{ URI string }

// The transports.
const (
	TransportTLS = "tls" // TLS with certificates made for each protection
	TransportPKI = "pki" // TLS with libvirt's own certificates
	TransportTCP = "tcp" // in the clear
)

// Transports are those that are known.
var Transports = []string{TransportTLS, TransportPKI, TransportTCP}

// The triggers of a checkpoint.
const (
	TriggerOutput   = "output"   // the first output the guest makes in the epoch
	TriggerInterval = "interval" // time alone
)

// Checkpoint says when checkpoints are taken: by the trigger, but not sooner than
// Min and not later than Max after the last one; and later than that where the guest
// would stand still for more than Paused percent of the time. 100 is no bound.
type Checkpoint struct {
	Trigger  string
	Min, Max time.Duration
	Paused   int
}

const defaultPaused = 30

// Heartbeat is how often the hosts show that they live, and how long silence is
// borne.
type Heartbeat struct{ Interval, Timeout time.Duration }

// ArbiterNone is the arbiter that trusts in silence alone.
const ArbiterNone = "none"

// Arbiter decides which host may go on when they lose sight of each other.
type Arbiter struct {
	Type      string
	Automatic bool // take over without being asked
}

// The sane ranges. A heartbeat's timeout is at least heartbeatMisses intervals,
// so that one lost or late message is no failure.
const (
	minCheckpoint, maxCheckpoint = time.Millisecond, 10 * time.Second
	minHeartbeat, maxHeartbeat   = 10 * time.Millisecond, 10 * time.Second
	maxTimeout                   = 60 * time.Second
	heartbeatMisses              = 3
)

// Default is what holds where the element says nothing.
func Default() *Element {
	return &Element{
		Transport:  TransportTLS,
		Checkpoint: Checkpoint{Trigger: TriggerOutput, Min: 5 * time.Millisecond, Max: 200 * time.Millisecond, Paused: defaultPaused},
		Heartbeat:  Heartbeat{Interval: 100 * time.Millisecond, Timeout: 500 * time.Millisecond},
	}
}

// Validate says what is wrong with e: all of it, in one line.
func (e *Element) Validate() error {
	var wrong []string // one line in all, as virsh prints errors
	bad := func(place, format string, a ...any) {
		wrong = append(wrong, place+": "+fmt.Sprintf(format, a...))
	}
	between := func(place string, d, low, high time.Duration) {
		if d%time.Millisecond != 0 {
			bad(place, "%v is not a whole number of milliseconds", d)
		} else if d < low || d > high {
			bad(place, "%d is out of range; allowed: %d to %d ms", d.Milliseconds(), low.Milliseconds(), high.Milliseconds())
		}
	}

	if e.Standby != nil {
		if err := checkURI(e.Standby.URI); err != nil {
			bad("kemari/standby/@uri", "%v", err)
		}
	} else if e.Autostart {
		bad("kemari/@autostart", "'yes' needs a <standby uri='kemari+ssh://HOST/system'/> that says where to")
	}

	if !slices.Contains(Transports, e.Transport) {
		bad("kemari/transport/@type", "unknown value '%s'; allowed: %s", e.Transport, strings.Join(Transports, ", "))
	}

	c := e.Checkpoint
	if c.Trigger != TriggerOutput && c.Trigger != TriggerInterval {
		bad("kemari/checkpoint/@trigger", "unknown value '%s'; allowed: output, interval", c.Trigger)
	}
	between("kemari/checkpoint/@min", c.Min, minCheckpoint, maxCheckpoint)
	between("kemari/checkpoint/@max", c.Max, minCheckpoint, maxCheckpoint)
	if c.Min > c.Max {
		bad("kemari/checkpoint", "min %d is more than max %d", c.Min.Milliseconds(), c.Max.Milliseconds())
	}

	if c.Paused < 1 || c.Paused > 100 {
		bad("kemari/checkpoint/@paused", "%d%% is out of range; allowed: 1%% to 100%%", c.Paused)
	}

	h := e.Heartbeat
	between("kemari/heartbeat/@interval", h.Interval, minHeartbeat, maxHeartbeat)
	between("kemari/heartbeat/@timeout", h.Timeout, heartbeatMisses*minHeartbeat, maxTimeout)
	if h.Timeout < heartbeatMisses*h.Interval {
		bad("kemari/heartbeat", "timeout %d is less than %d times the interval %d", h.Timeout.Milliseconds(), heartbeatMisses, h.Interval.Milliseconds())
	}

	if e.Arbiter != nil {
		if err := checkArbiter(e.Arbiter.Type); err != nil {
			bad("kemari/arbiter/@type", "%v", err)
		}
	}
	if wrong == nil {
		return nil
	}
	return errors.New(strings.Join(wrong, "; "))
}

// checkURI accepts what leads to another host's virtkemarid.
func checkURI(s string) error {
	const want = "allowed: kemari+ssh://[USER@]HOST[:PORT]/system"
	if s == "" {
		return errors.New("empty; " + want)
	}
	u, err := url.Parse(s)
	if err != nil {
		return fmt.Errorf("not a URI: %w", err)
	}
	switch {
	case u.Scheme != "kemari+ssh":
		return fmt.Errorf("scheme '%s' cannot carry protection; %s", u.Scheme, want)
	case u.Hostname() == "":
		return fmt.Errorf("'%s' names no host; %s", s, want)
	case strings.HasPrefix(u.Hostname(), "localhost"):
		// libvirt's client library refuses every host that begins so.
		return fmt.Errorf("'%s' is this host; the standby must be another one", s)
	case u.Path != "/system":
		return fmt.Errorf("path '%s'; %s", u.Path, want)
	}
	if _, set := u.User.Password(); set {
		return errors.New("a password does not belong there; use ssh keys")
	}
	return nil
}

func checkArbiter(typ string) error {
	switch typ {
	case ArbiterNone:
		return nil
	case "etcd", "disk", "fence", "manual":
		return fmt.Errorf("arbiter '%s' is not supported yet; allowed: none", typ)
	}
	return fmt.Errorf("unknown value '%s'; allowed: none", typ)
}

// Parse reads the element alone. It may stand in Namespace or in none at all, as
// libvirt hands metadata out. What is not said has its default; what is not known
// is refused with its place, the reason and what is allowed.
func Parse(b []byte) (*Element, error) {
	if len(b) > MaxSize {
		return nil, fmt.Errorf("kemari: %d bytes, allowed are %d", len(b), MaxSize)
	}
	d, err := parseDocument(b)
	if err != nil {
		return nil, fmt.Errorf("kemari: %w", err)
	}
	if s := d.root.name.Space; d.root.name.Local != "kemari" || s != Namespace && s != "" {
		return nil, fmt.Errorf("element <%s> in namespace '%s'; allowed: <kemari xmlns='%s'>", d.root.name.Local, s, Namespace)
	}
	return parseElement(d.root)
}

func parseElement(n *node) (*Element, error) {
	e := Default()
	r := reader{space: n.name.Space}
	attrs := r.attrs(n, "kemari", "autostart")
	e.Autostart = r.yesNo("kemari", attrs, "autostart")
	seen := map[string]bool{}
	for _, c := range n.children {
		name := c.name.Local
		place := "kemari/" + name
		if c.name.Space != n.name.Space {
			r.fail(place, "element of namespace '%s' does not belong there", c.name.Space)
			continue
		}
		if seen[name] {
			r.fail(place, "stands there twice")
		}
		seen[name] = true
		switch name {
		case "standby":
			a := r.attrs(c, place, "uri")
			e.Standby = &Standby{URI: a["uri"]}
		case "transport":
			e.Transport = r.attrs(c, place, "type")["type"]
		case "checkpoint":
			a := r.attrs(c, place, "trigger", "min", "max", "unit", "paused")
			if t, ok := a["trigger"]; ok {
				e.Checkpoint.Trigger = t
			}
			r.ms(place, a, "min", &e.Checkpoint.Min)
			r.ms(place, a, "max", &e.Checkpoint.Max)
			r.unit(place, a)
			r.percent(place, a, "paused", &e.Checkpoint.Paused)
		case "heartbeat":
			a := r.attrs(c, place, "interval", "timeout", "unit")
			r.ms(place, a, "interval", &e.Heartbeat.Interval)
			r.ms(place, a, "timeout", &e.Heartbeat.Timeout)
			r.unit(place, a)
		case "arbiter":
			// The type first: what else stands there depends on it.
			if err := checkArbiter(c.attr("type")); err != nil {
				r.fail(place+"/@type", "%v", err)
				continue
			}
			a := r.attrs(c, place, "type", "automatic")
			e.Arbiter = &Arbiter{Type: a["type"], Automatic: r.yesNo(place, a, "automatic")}
		case "disk":
			r.fail(place, "the replication of disks is not supported yet; allowed: standby, transport, checkpoint, heartbeat, arbiter")
			continue
		default:
			r.fail(place, "unknown element; allowed: standby, transport, checkpoint, heartbeat, arbiter")
			continue
		}
		if len(c.children) > 0 {
			r.fail(place+"/"+c.children[0].name.Local, "unknown element; <%s> is empty", name)
		}
	}
	if r.err != nil {
		return nil, r.err
	}
	if err := e.Validate(); err != nil {
		return nil, err
	}
	return e, nil
}

// reader keeps the first error, so that parseElement reads in one go.
type reader struct {
	space string
	err   error
}

func (r *reader) fail(place, format string, a ...any) {
	if r.err == nil {
		r.err = fmt.Errorf("%s: %s", place, fmt.Sprintf(format, a...))
	}
}

// attrs returns the attributes of an element that holds no text.
func (r *reader) attrs(n *node, place string, allowed ...string) map[string]string {
	m := map[string]string{}
	for _, a := range n.attrs {
		if a.Name.Space == "xmlns" || a.Name == (xml.Name{Local: "xmlns"}) {
			continue
		}
		name := a.Name.Local
		if a.Name.Space != "" || !slices.Contains(allowed, name) {
			r.fail(place+"/@"+name, "unknown attribute; allowed: %s", strings.Join(allowed, ", "))
		}
		if _, twice := m[name]; twice {
			r.fail(place+"/@"+name, "stands there twice")
		}
		m[name] = a.Value
	}
	if t := n.trimmed(); t != "" {
		r.fail(place, "text does not belong there")
	}
	return m
}

func (r *reader) yesNo(place string, a map[string]string, name string) bool {
	v, ok := a[name]
	if ok && v != "yes" && v != "no" {
		r.fail(place+"/@"+name, "unknown value '%s'; allowed: yes, no", v)
	}
	return v == "yes"
}

func (r *reader) ms(place string, a map[string]string, name string, d *time.Duration) {
	v, ok := a[name]
	if !ok {
		return
	}
	// 31 bits, so that no product overflows; Validate knows the real bounds.
	n, err := strconv.ParseUint(v, 10, 31)
	if err != nil {
		r.fail(place+"/@"+name, "'%s' is not a number; allowed: whole milliseconds", v)
		return
	}
	*d = time.Duration(n) * time.Millisecond
}

func (r *reader) percent(place string, a map[string]string, name string, to *int) {
	v, ok := a[name]
	if !ok {
		return
	}
	digits, percent := strings.CutSuffix(v, "%")
	n, err := strconv.ParseUint(digits, 10, 31) // Validate knows the real bounds
	if err != nil || !percent {
		r.fail(place+"/@"+name, "'%s' is not a percentage; allowed: 1%% to 100%%", v)
		return
	}
	*to = int(n)
}

func (r *reader) unit(place string, a map[string]string) {
	if v, ok := a["unit"]; ok && v != "ms" {
		r.fail(place+"/@unit", "unknown value '%s'; allowed: ms", v)
	}
}

// Format is the element's text, without a newline at its end. It fails if
// Validate does, so that what is written can always be read.
func (e *Element) Format() ([]byte, error) {
	if err := e.Validate(); err != nil {
		return nil, err
	}
	yesNo := func(b bool) string {
		if b {
			return "'yes'"
		}
		return "'no'"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "<kemari xmlns='%s' autostart=%s>\n", Namespace, yesNo(e.Autostart))
	if e.Standby != nil {
		fmt.Fprintf(&b, "  <standby uri=%s/>\n", quote(e.Standby.URI))
	}
	if e.Transport != TransportTLS {
		fmt.Fprintf(&b, "  <transport type='%s'/>\n", e.Transport)
	}
	c, h := e.Checkpoint, e.Heartbeat
	fmt.Fprintf(&b, "  <checkpoint trigger='%s' min='%d' max='%d' unit='ms'", c.Trigger, c.Min.Milliseconds(), c.Max.Milliseconds())
	if c.Paused != defaultPaused {
		fmt.Fprintf(&b, " paused='%d%%'", c.Paused)
	}
	b.WriteString("/>\n")
	fmt.Fprintf(&b, "  <heartbeat interval='%d' timeout='%d' unit='ms'/>\n", h.Interval.Milliseconds(), h.Timeout.Milliseconds())
	if e.Arbiter != nil {
		fmt.Fprintf(&b, "  <arbiter type='%s' automatic=%s/>\n", e.Arbiter.Type, yesNo(e.Arbiter.Automatic))
	}
	b.WriteString("</kemari>")
	return []byte(b.String()), nil
}
