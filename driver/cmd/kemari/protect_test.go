package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"kemari/driver/virt"
	"kemari/migrate/control"
	"kemari/xml"
)

const (
	protectedLine = "Domain 'g1' is protected by xen2 (kemari+ssh://xen2/system)\n"
	tcpLine       = "warning: transport tcp: whoever can read or change what passes between the hosts can read and change the guest\n"
	riskLine      = "warning: no arbiter: two hosts that lose sight of each other may both run the guest\n"
)

func TestProtect(t *testing.T) {
	automatic := func(e *xml.Element) { e.Arbiter = &xml.Arbiter{Type: "none", Automatic: true} }
	note := func(prefix string) string {
		return "note: no automatic failover: if this host is lost, 'g1' stays down until 'kemari failover g1' is said on xen2; " + prefix + "arbiter none makes it automatic\n"
	}
	for _, tt := range []struct {
		name     string
		xml      string // "" is without an element
		virsh    string // what follows virsh
		kemari   string // or kemari
		connect  string
		want     func(*xml.Element) // asked for
		dataURI  string
		out, err string
	}{
		{
			name:  "default",
			virsh: "migrate --kemari --live g1 " + xen2,
			want:  func(*xml.Element) {}, out: protectedLine, err: note("--kemari-"),
		},
		{
			name:   "the other face",
			kemari: "protect g1 " + xen2,
			want:   func(*xml.Element) {}, out: protectedLine, err: note("--"),
		},
		{
			name:    "all options",
			virsh:   "-c xen:///system migrate --kemari g1 " + xen2 + " --kemari-transport pki --kemari-trigger interval --kemari-min 10 --kemari-max 20 --kemari-paused 40 --kemari-heartbeat 30 --kemari-timeout 3000 --kemari-arbiter none --migrateuri tcp://10.0.0.2",
			connect: defaultURI,
			want: func(e *xml.Element) {
				e.Transport = xml.TransportPKI
				e.Checkpoint = xml.Checkpoint{Trigger: "interval", Min: 10 * time.Millisecond, Max: 20 * time.Millisecond, Paused: 40}
				e.Heartbeat = xml.Heartbeat{Interval: 30 * time.Millisecond, Timeout: 3 * time.Second}
				automatic(e)
			},
			dataURI: "tcp://10.0.0.2", out: protectedLine, err: riskLine,
		},
		{
			name:   "options of the other face, after the words",
			kemari: "protect g1 " + xen2 + " --trigger interval --min=10 --max 20 --transport tcp --arbiter none --migrateuri tcp://10.0.0.2 -c xen+ssh://xen1/system",
			want: func(e *xml.Element) {
				e.Transport = xml.TransportTCP
				e.Checkpoint = xml.Checkpoint{Trigger: "interval", Min: 10 * time.Millisecond, Max: 20 * time.Millisecond, Paused: 30}
				automatic(e)
			},
			connect: "kemari+ssh://xen1/system", dataURI: "tcp://10.0.0.2", out: protectedLine, err: riskLine + tcpLine,
		},
		{
			name: "changes to the domain's own",
			xml: withElement(t, func(e *xml.Element) {
				automatic(e)
				e.Checkpoint.Max = time.Second
				e.Autostart = true
				e.Standby.URI = "kemari+ssh://xen9/system"
			}),
			virsh: "migrate --kemari g1 " + xen2 + " --kemari-min 7",
			want: func(e *xml.Element) {
				automatic(e)
				e.Checkpoint.Max = time.Second
				e.Autostart = true
				e.Checkpoint.Min = 7 * time.Millisecond
			},
			out: protectedLine, err: riskLine,
		},
		{
			name:   "the domain's own standby",
			xml:    withElement(t, automatic),
			kemari: "protect g1",
			want:   automatic, out: protectedLine, err: riskLine,
		},
		{
			name:  "quiet",
			xml:   withElement(t, automatic),
			virsh: "-q migrate --kemari g1 " + xen2,
			want:  automatic, err: riskLine,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, l, out, errs := newHost(t)
			if tt.xml != "" {
				l.xml = tt.xml
			}
			code := 0
			if tt.virsh != "" {
				code = virsh(t.Context(), h, strings.Fields(tt.virsh))
			} else {
				code = kemari(t.Context(), h, strings.Fields(tt.kemari))
			}
			if d := cmp.Diff([]string{tt.out, tt.err}, []string{out.String(), errs.String()}); code != 0 || d != "" {
				t.Errorf("exit status %d (-want +got)\n%s", code, d)
			}
			if tt.connect == "" {
				tt.connect = defaultURI
			}
			want := virt.Protection{URI: xen2, XML: withElement(t, tt.want), DataURI: tt.dataURI}
			if d := cmp.Diff([]virt.Protection{want}, l.asked); d != "" {
				t.Errorf("asked for (-want +got)\n%s", d)
			}
			if d := cmp.Diff([]string{tt.connect}, l.uris); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestProtectRefused(t *testing.T) {
	for _, tt := range []struct {
		name, xml, args string
		change          func(*libvirt)
		err             string
	}{
		{name: "no such domain", args: "migrate --kemari g7 " + xen2, err: "error: Domain not found: no domain with matching name 'g7'\n"},
		{name: "not Xen", args: "-c qemu:///system migrate --kemari g1 " + xen2, err: "error: connection 'qemu:///system' does not lead to Xen; use kemari:///system\n"},
		{name: "bad options", args: "migrate --kemari g1 " + xen2 + " --kemari-min 300", err: "error: domain 'g1': kemari/checkpoint: min 300 is more than max 200\n"},
		{name: "bad URI", args: "migrate --kemari g1 xen+ssh://xen2/system", err: "error: domain 'g1': kemari/standby/@uri: scheme 'xen+ssh' cannot carry protection; allowed: kemari+ssh://[USER@]HOST[:PORT]/system\n"},
		{name: "bad element", xml: strings.Replace(withElement(t, func(*xml.Element) {}), "output", "moon", 1), args: "migrate --kemari g1 " + xen2, err: "error: domain 'g1': kemari/checkpoint/@trigger: unknown value 'moon'; allowed: output, interval\n"},
		{name: "no connection", args: "migrate --kemari g1 " + xen2, change: func(l *libvirt) { l.openErr = &virt.Error{Message: "Failed to connect"} }, err: "error: Failed to connect\n"},
		{
			name: "the driver refuses", args: "migrate --kemari g1 " + xen2,
			change: func(l *libvirt) {
				l.protect = func(virt.Protection) error { return &virt.Error{Message: "it is a PV guest; use PVH"} }
			},
			err: "error: it is a PV guest; use PVH\n",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, l, out, errs := newHost(t)
			if tt.xml != "" {
				l.xml = tt.xml
			}
			if tt.change != nil {
				tt.change(l)
			}
			if code := virsh(t.Context(), h, strings.Fields(tt.args)); code != 1 || errs.String() != tt.err || out.Len() > 0 {
				t.Errorf("exit status %d, output %q, errors %q, want %q", code, out, errs, tt.err)
			}
		})
	}
}

func TestKemariURI(t *testing.T) {
	for _, tt := range []struct{ connect, virsh, libvirt, want string }{
		{want: defaultURI},
		{connect: "xen:///system", libvirt: "qemu:///system", want: defaultURI},
		{connect: "xen:///", want: "kemari:///"},
		{connect: "kemari+ssh://xen1/system", want: "kemari+ssh://xen1/system"},
		{connect: "xen+ssh://root@xen1/system?a=b", want: "kemari+ssh://root@xen1/system?a=b"},
		{connect: "production", want: "production"},
		{virsh: "xen:///system", libvirt: "qemu:///system", want: defaultURI},
		{libvirt: "xen:///system", want: defaultURI},
		{libvirt: "qemu:///system"},
		{connect: "xenon:///system"},
	} {
		h := &host{getenv: func(k string) string {
			return map[string]string{"VIRSH_DEFAULT_CONNECT_URI": tt.virsh, "LIBVIRT_DEFAULT_URI": tt.libvirt}[k]
		}}
		if got, err := h.kemariURI(tt.connect); got != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("%+v: %q, %v", tt, got, err)
		}
	}
}

func TestProgress(t *testing.T) {
	h, l, _, errs := newHost(t)
	asked := make(chan struct{}, 64)
	s := control.Status{Role: control.Primary, UUID: uuid1, Domain: "g1", Phase: control.Copying, CopyBytes: 32 << 20, CopyTotal: 128 << 20}
	running(t, h, s, func(context.Context, control.Op) (control.Status, error) {
		asked <- struct{}{}
		return s, nil
	})
	h.poll = 50 * time.Millisecond
	l.protect = func(virt.Protection) error {
		<-asked
		<-asked // the first answer has been shown
		return nil
	}
	if code := virsh(t.Context(), h, strings.Fields("migrate --kemari --verbose g1 "+xen2)); code != 0 {
		t.Fatalf("exit status %d: %s", code, errs)
	}
	if !strings.Contains(errs.String(), "First copy  25%") || !strings.Contains(errs.String(), "\nnote:") {
		t.Errorf("errors %q", errs)
	}
}

func TestInterrupted(t *testing.T) {
	for _, tt := range []struct {
		name  string
		abort []error // what the calls of abort return, before nil
		fails error   // what the call that was under way returns then
		late  bool    // it had succeeded before
		err   string
		also  string
	}{
		{name: "plainly", fails: errors.New("operation aborted"), err: "error: interrupted: domain 'g1' is not protected\n"},
		{name: "too early at first", abort: []error{errors.New("no job"), errors.New("no job")}, fails: errors.New("aborted"), err: "error: interrupted: domain 'g1' is not protected\n", also: "cannot end it yet: no job\n"},
		{name: "protected the moment before", err: "error: interrupted: domain 'g1' is not protected\n"},
		{name: "too late", abort: []error{errors.New("no connection")}, late: true, err: "error: interrupted too late: domain 'g1' is protected; end this with: virsh -c kemari:///system domjobabort g1\n"},
		{name: "failed anyway", abort: []error{errors.New("no job")}, late: true, fails: errors.New("standby is full"), err: "error: interrupted: standby is full\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, l, out, errs := newHost(t)
			ctx, cancel := context.WithCancel(t.Context())
			aborted := make(chan struct{})
			l.protect = func(virt.Protection) error {
				cancel()
				<-aborted
				return tt.fails
			}
			l.abort = func() error {
				if len(tt.abort) == 0 {
					close(aborted)
					return nil
				}
				err := tt.abort[0]
				tt.abort = tt.abort[1:]
				if tt.late {
					close(aborted)
					h.poll = time.Hour
				}
				return err
			}
			if tt.late {
				h.poll = time.Minute // no second attempt
			}
			code := virsh(ctx, h, strings.Fields("migrate --kemari g1 "+xen2))
			got := errs.String()
			if code != 1 || out.Len() > 0 || !strings.HasPrefix(got, "interrupted: ending the protection of 'g1'\n") ||
				!strings.HasSuffix(got, tt.err) || strings.Count(got, tt.also) != 1 && tt.also != "" {
				t.Errorf("exit status %d, output %q, errors %q", code, out, got)
			}
		})
	}
}

func TestAutostart(t *testing.T) {
	asking := withElement(t, func(e *xml.Element) { e.Autostart = true })
	unreachable := &virt.Error{Code: 38, Message: "no route to host"}
	for _, tt := range []struct {
		name, xml, host string
		fails           []error // of the calls, before nil
		shadow          bool
		phase           control.Phase // of a protection that is there already
		asked           int
		took            time.Duration
		err, log        string
	}{
		{name: "at once", xml: asking, asked: 1, log: "msg=protected domain=" + uuid1 + " name=g1"},
		{name: "the third time", xml: asking, fails: []error{unreachable, unreachable}, asked: 3, took: 4 * time.Second, log: "trying again"},
		{name: "never", xml: asking, fails: repeat(unreachable, 40), asked: 31, took: time.Minute, err: "given up after 1m0s: no route to host"},
		{name: "refused", xml: asking, fails: []error{&virt.Error{Code: 67, Message: "PV guest"}}, asked: 1, err: "PV guest"},
		{name: "does not ask", xml: withElement(t, func(*xml.Element) {}), err: "does not ask for protection"},
		{name: "no element", xml: plain, err: "does not ask for protection"},
		{name: "bad element", xml: strings.Replace(asking, "output", "moon", 1), err: "unknown value 'moon'"},
		{name: "on its standby", xml: asking, host: "XEN2.example.org", log: "this host is the guest's own standby"},
		{name: "while taking over", xml: asking, shadow: true, log: "shadow stands on this host"},
		{name: "already", xml: asking, phase: control.Copying, log: "protected already"},
		{name: "ended", xml: asking, phase: control.Ended, asked: 1, log: "msg=protected"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, l, _, errs := newHost(t)
			l.xml = tt.xml
			if tt.host != "" {
				h.name = tt.host
			}
			if tt.phase != "" {
				ended(t, h, control.Status{Role: control.Primary, UUID: uuid1, Phase: tt.phase})
			}
			if tt.shadow {
				running(t, h, control.Status{Role: control.Standby, UUID: uuid1, Phase: control.TakingOver}, nil)
			}
			l.protect = func(virt.Protection) error {
				if len(tt.fails) == 0 {
					return nil
				}
				err := tt.fails[0]
				tt.fails = tt.fails[1:]
				return err
			}
			var took time.Duration
			run := func(*testing.T) {
				start := time.Now()
				code := kemari(context.Background(), h, []string{"protect", "--autostart", uuid1})
				took = time.Since(start)
				if (code == 0) != (tt.err == "") || !strings.Contains(errs.String(), tt.err) || !strings.Contains(errs.String(), tt.log) {
					t.Errorf("exit status %d, errors %q; want %q and %q", code, errs, tt.err, tt.log)
				}
			}
			if tt.shadow {
				run(t) // a socket does not go with a bubble's time
				return
			}
			synctest.Test(t, run)
			if len(l.asked) != tt.asked || took != tt.took {
				t.Errorf("asked %d times in %v, want %d in %v", len(l.asked), took, tt.asked, tt.took)
			}
		})
	}
}

func repeat(err error, n int) (r []error) {
	for range n {
		r = append(r, err)
	}
	return r
}

func TestSameHost(t *testing.T) {
	for pair, want := range map[string]bool{
		"xen2 xen2": true, "xen2 XEN2.example.org": true, "xen2.example.org xen2": true,
		"xen2.a.org xen2.b.org": false, "xen1 xen2": false, "10.0.0.1 10.0.0.2": false,
	} {
		a, b, _ := strings.Cut(pair, " ")
		if got := sameHost(a, b); got != want {
			t.Errorf("%s: %v", pair, got)
		}
	}
	if sameHost("", "") {
		t.Error("nobody is a host")
	}
}
