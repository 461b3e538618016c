package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"kemari/xml"
)

// kind is how virsh reads an option.
type kind int

const (
	boolean  kind = iota
	text          // takes the next word, or one that stands without a name
	number        // as text, but a number
	nameOnly      // takes the next word, but never one without a name
)

// option is one of migrate's. Where refused is set it cannot go with --kemari,
// for that reason.
type option struct {
	name    string
	kind    kind
	refused string
	help    string // of our own options only, as is
	arg     string // what the option takes
}

const (
	whyTuning  = "checkpoints have settings of their own, see --kemari-…"
	whyDisks   = "the replication of disks is not supported yet"
	whyStays   = "the guest stays here; it goes on over there only if this host is lost"
	whySame    = "the standby's copy is the guest as it runs here"
	whyTimeout = "the guest need not be stopped for the first copy to end"
	whyTLS     = "the stream is always encrypted, with certificates made for it"
)

// options is virsh's table for migrate, in its order, since words without a name
// go to the first option that still lacks one; then ours.
var options = []option{
	{name: "domain", kind: text},
	{name: "desturi", kind: text},
	{name: "live"},
	{name: "offline", refused: "a guest that does not run needs no protection"},
	{name: "p2p"},
	{name: "direct", refused: "the two hosts always speak to each other"},
	{name: "tunnelled", refused: "checkpoints have a connection of their own, which is always encrypted"},
	{name: "persistent", refused: whyStays},
	{name: "undefinesource", refused: whyStays},
	{name: "suspend", refused: whyStays},
	{name: "copy-storage-all", refused: whyDisks},
	{name: "copy-storage-inc", refused: whyDisks},
	{name: "copy-storage-synchronous-writes", refused: whyDisks},
	{name: "change-protection", refused: "a protected guest's configuration is always guarded"},
	{name: "unsafe", refused: "what is unsafe is refused"},
	{name: "verbose"},
	{name: "compressed", refused: whyTuning},
	{name: "auto-converge", refused: whyTuning},
	{name: "rdma-pin-all", refused: whyTuning},
	{name: "abort-on-error", refused: whyDisks},
	{name: "postcopy", refused: "the standby must have all of the guest, not fetch it later"},
	{name: "postcopy-after-precopy", refused: "the standby must have all of the guest, not fetch it later"},
	{name: "postcopy-resume", refused: "the standby must have all of the guest, not fetch it later"},
	{name: "zerocopy", refused: whyTuning},
	{name: "migrateuri", kind: text},
	{name: "graphicsuri", kind: text, refused: whyStays},
	{name: "listen-address", kind: text, refused: "the standby chooses it; --migrateuri says how to reach it"},
	{name: "dname", kind: text, refused: whySame},
	{name: "timeout", kind: number, refused: whyTimeout},
	{name: "timeout-suspend", refused: whyTimeout},
	{name: "timeout-postcopy", refused: whyTimeout},
	{name: "xml", kind: text, refused: whySame},
	{name: "migrate-disks", kind: text, refused: whyDisks},
	{name: "disks-port", kind: number, refused: whyDisks},
	{name: "disks-uri", kind: text, refused: whyDisks},
	{name: "comp-methods", kind: text, refused: whyTuning},
	{name: "comp-mt-level", kind: number, refused: whyTuning},
	{name: "comp-mt-threads", kind: number, refused: whyTuning},
	{name: "comp-mt-dthreads", kind: number, refused: whyTuning},
	{name: "comp-xbzrle-cache", kind: number, refused: whyTuning},
	{name: "auto-converge-initial", kind: number, refused: whyTuning},
	{name: "auto-converge-increment", kind: number, refused: whyTuning},
	{name: "persistent-xml", kind: text, refused: whySame},
	{name: "tls", refused: whyTLS},
	{name: "postcopy-bandwidth", kind: number, refused: whyTuning},
	{name: "parallel", refused: whyTuning},
	{name: "parallel-connections", kind: number, refused: whyTuning},
	{name: "bandwidth", kind: number, refused: whyTuning},
	{name: "tls-destination", kind: text, refused: whyTLS},

	{name: "kemari", help: "protect the guest: let the destination take over when this host is lost"},
	{name: "kemari-transport", kind: nameOnly, arg: "string", help: "what connects the hosts: tls (default), pki (TLS with libvirt's certificates) or tcp (in the clear)"},
	{name: "kemari-trigger", kind: nameOnly, arg: "string", help: "what triggers a checkpoint: output (default) or interval"},
	{name: "kemari-min", kind: nameOnly, arg: "number", help: "shortest time between two checkpoints, in ms"},
	{name: "kemari-max", kind: nameOnly, arg: "number", help: "longest time between two checkpoints, in ms"},
	{name: "kemari-paused", kind: nameOnly, arg: "number", help: "percent of its time that the guest stands still for checkpoints at most"},
	{name: "kemari-heartbeat", kind: nameOnly, arg: "number", help: "how often the hosts show that they live, in ms"},
	{name: "kemari-timeout", kind: nameOnly, arg: "number", help: "how long silence is borne, in ms"},
	{name: "kemari-arbiter", kind: nameOnly, arg: "string", help: "none: let silence alone decide that this host is lost"},
}

// migrateOptions is what a migrate with --kemari asks for.
type migrateOptions struct {
	help        bool
	domain, uri string
	dataURI     string
	verbose     bool
	settings    settings
}

// parseMigrate reads the words after migrate as virsh does. It reports whether
// --kemari is among them even if they are wrong, in the way err says.
func parseMigrate(words []string) (o migrateOptions, kemari bool, err error) {
	fail := func(format string, a ...any) {
		if err == nil {
			err = fmt.Errorf(format, a...)
		}
	}
	seen := map[string]bool{}
	values := map[string]string{}
	dataOnly := false
	for len(words) > 0 {
		w := words[0]
		words = words[1:]
		if !dataOnly && w == "--" {
			dataOnly = true
			continue
		}
		if dataOnly || !isOption(w) {
			if n := nextData(seen); n != "" {
				seen[n], values[n] = true, w
			} else {
				fail("unexpected data '%s'", w)
			}
			continue
		}
		name, value, hasValue := strings.Cut(w[2:], "=")
		if name == "help" {
			o.help = true
			continue
		}
		if name == "tunneled" { // virsh's alias
			name = "tunnelled"
		}
		opt := find(name)
		if opt == nil {
			fail("command 'migrate' doesn't support option --%s", name)
			continue
		}
		if seen[name] {
			fail("option --%s already seen", name)
		}
		seen[name] = true
		if opt.kind == boolean {
			if hasValue {
				fail("invalid '=' after option --%s", name)
			}
			continue
		}
		if !hasValue {
			if len(words) == 0 {
				what := "string"
				if opt.kind == number {
					what = "number"
				}
				fail("expected syntax: --%s <%s>", name, what)
				break
			}
			value, words = words[0], words[1:]
		}
		values[name] = value
	}
	for _, n := range []string{"domain", "desturi"} {
		if !seen[n] {
			fail("command 'migrate' requires <%s> option", n)
		}
	}
	for _, opt := range options {
		if seen[opt.name] && opt.refused != "" {
			fail("--%s cannot go with --kemari: %s", opt.name, opt.refused)
		}
	}
	o.domain, o.uri, o.dataURI, o.verbose = values["domain"], values["desturi"], values["migrateuri"], seen["verbose"]
	if e := o.settings.parse("--kemari-", values); e != nil {
		fail("%w", e)
	}
	return o, seen["kemari"], err
}

// isOption is virsh's idea of it: everything else that begins with a dash is data.
func isOption(w string) bool {
	if len(w) < 3 || w[:2] != "--" {
		return false
	}
	c := w[2]
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

func find(name string) *option {
	for i := range options {
		if options[i].name == name {
			return &options[i]
		}
	}
	return nil
}

// nextData is the option that a word without a name belongs to.
func nextData(seen map[string]bool) string {
	for _, o := range options {
		if (o.kind == text || o.kind == number) && !seen[o.name] {
			return o.name
		}
	}
	return ""
}

// settings change single parts of the element; nil leaves them alone.
type settings struct {
	transport, trigger           *string
	min, max, heartbeat, timeout *time.Duration
	paused                       *int // percent
	arbiterNone                  bool
}

// parse reads the settings from named values; prefix is what the names are shown
// with, and what virsh's have of it is in the keys.
func (s *settings) parse(prefix string, values map[string]string) error {
	key := strings.TrimPrefix(prefix, "--")
	for _, f := range []struct {
		name string
		to   **time.Duration
	}{{"min", &s.min}, {"max", &s.max}, {"heartbeat", &s.heartbeat}, {"timeout", &s.timeout}} {
		v, ok := values[key+f.name]
		if !ok {
			continue
		}
		// 31 bits, so that no product overflows; the element knows the real bounds.
		n, err := strconv.ParseUint(v, 10, 31)
		if err != nil {
			return fmt.Errorf("numeric value '%s' for <%s%s> option is malformed or out of range", v, key, f.name)
		}
		ms := time.Duration(n) * time.Millisecond
		*f.to = &ms
	}
	if v, ok := values[key+"paused"]; ok {
		n, err := strconv.ParseUint(v, 10, 31)
		if err != nil {
			return fmt.Errorf("numeric value '%s' for <%spaused> option is malformed or out of range", v, key)
		}
		percent := int(n)
		s.paused = &percent
	}
	if v, ok := values[key+"transport"]; ok {
		if !slices.Contains(xml.Transports, v) {
			return fmt.Errorf("%stransport '%s' is unknown; allowed: %s", prefix, v, strings.Join(xml.Transports, ", "))
		}
		s.transport = &v
	}
	if v, ok := values[key+"trigger"]; ok {
		if v != xml.TriggerOutput && v != xml.TriggerInterval {
			return fmt.Errorf("%strigger '%s' is unknown; allowed: output, interval", prefix, v)
		}
		s.trigger = &v
	}
	if v, ok := values[key+"arbiter"]; ok {
		if v != xml.ArbiterNone {
			return fmt.Errorf("%sarbiter '%s' is not supported yet; allowed: none", prefix, v)
		}
		s.arbiterNone = true
	}
	return nil
}

// apply changes e.
func (s *settings) apply(e *xml.Element) {
	if s.transport != nil {
		e.Transport = *s.transport
	}
	if s.trigger != nil {
		e.Checkpoint.Trigger = *s.trigger
	}
	for _, c := range []struct{ from, to *time.Duration }{
		{s.min, &e.Checkpoint.Min}, {s.max, &e.Checkpoint.Max},
		{s.heartbeat, &e.Heartbeat.Interval}, {s.timeout, &e.Heartbeat.Timeout},
	} {
		if c.from != nil {
			*c.to = *c.from
		}
	}
	if s.paused != nil {
		e.Checkpoint.Paused = *s.paused
	}
	if s.arbiterNone {
		e.Arbiter = &xml.Arbiter{Type: xml.ArbiterNone, Automatic: true}
	}
}
