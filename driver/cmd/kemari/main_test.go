package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"

	"kemari/driver"
	"kemari/driver/virt"
	"kemari/migrate/control"
	"kemari/xml"
)

// leakChecked is a test run that fails if goroutines are left behind.
type leakChecked struct{ *testing.M }

func (m leakChecked) Run() int {
	code := m.M.Run()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	return code
}

func TestMain(m *testing.M) {
	testscript.Main(leakChecked{m}, map[string]func(){"kemari": main, "virsh": main})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			// Behind the folder with this program as virsh, and before the
			// machine's own, comes one of the script's.
			own, rest, _ := strings.Cut(env.Getenv("PATH"), ":")
			env.Setenv("PATH", own+":"+filepath.Join(env.WorkDir, "real")+":"+rest)
			return nil
		},
	})
}

const (
	uuid1 = "00000000-0000-4000-8000-0000000000a1"
	uuid2 = "00000000-0000-4000-8000-0000000000a2"
	xen2  = "kemari+ssh://xen2/system"
	plain = "<domain type='xen' id='1'>\n  <name>g1</name>\n  <uuid>" + uuid1 + "</uuid>\n  <memory>131072</memory>\n" +
		"  <os>\n    <type machine='xenpvh'>xenpvh</type>\n  </os>\n</domain>\n"
)

// libvirt is a host's libvirt with the guest g1.
type libvirt struct {
	xml     string
	openErr error
	protect func(virt.Protection) error
	abort   func() error
	hand    func(uuid, uri string) error

	examination *driver.Examination
	examineErr  error
	examined    []string // connection, domain and standby

	mu       sync.Mutex
	uris     []string          // opened
	open     int               // connections
	asked    []virt.Protection // for
	readonly bool
}

func (l *libvirt) connect(uri string, readonly bool) (hypervisor, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.uris = append(l.uris, uri)
	l.readonly = readonly
	if l.openErr != nil {
		return nil, l.openErr
	}
	l.open++
	return l, nil
}

func (l *libvirt) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open--
	return nil
}

func (l *libvirt) Lookup(name string) (virt.Domain, error) {
	if name != "g1" && name != uuid1 && name != "1" {
		return virt.Domain{}, &virt.Error{Code: 42, Message: "Domain not found: no domain with matching name '" + name + "'"}
	}
	return virt.Domain{Name: "g1", UUID: uuid1}, nil
}

func (l *libvirt) List() ([]virt.Domain, error) {
	d, err := l.Lookup("g1")
	return []virt.Domain{d}, err
}

func (l *libvirt) XML(string, bool) (string, error) { return l.xml, nil }

func (l *libvirt) Protect(_ string, p virt.Protection) error {
	l.mu.Lock()
	l.asked = append(l.asked, p)
	l.mu.Unlock()
	if l.protect == nil {
		return nil
	}
	return l.protect(p)
}

func (l *libvirt) Switchover(uuid, uri string) error { return l.hand(uuid, uri) }

func (l *libvirt) Abort(string) error {
	if l.abort == nil {
		return nil
	}
	return l.abort()
}

// newHost returns a host named xen1 with g1 on it, and what the commands print.
func newHost(t *testing.T) (h *host, l *libvirt, out, err *bytes.Buffer) {
	l = &libvirt{xml: plain}
	out, err = new(bytes.Buffer), new(bytes.Buffer)
	h = &host{
		in: strings.NewReader(""), out: out, err: err,
		getenv: func(string) string { return "" },
		root:   t.TempDir(),
		name:   "xen1",
		open:   l.connect,
		examine: func(_ context.Context, connect, domain, standby string) (*driver.Examination, error) {
			l.examined = append(l.examined, connect+" "+domain+" "+standby)
			return l.examination, l.examineErr
		},
		now:   time.Now,
		poll:  time.Millisecond,
		retry: 2 * time.Second,
		limit: time.Minute,
	}
	t.Cleanup(func() {
		if l.open != 0 {
			t.Errorf("%d connections left open", l.open)
		}
	})
	return h, l, out, err
}

// withElement is the domain g1 with an element.
func withElement(t *testing.T, change func(*xml.Element)) string {
	t.Helper()
	e := xml.Default()
	e.Standby = &xml.Standby{URI: xen2}
	change(e)
	s, err := xml.SetInDomain(plain, e)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// running lets a protection with this status run under h's root.
func running(t *testing.T, h *host, s control.Status, handler control.Handler) {
	t.Helper()
	p := control.PathsFor(h.root, s.Role, s.UUID)
	if err := os.MkdirAll(p.Dir, 0o750); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", p.Socket)
	if err != nil {
		t.Fatal(err)
	}
	if handler == nil {
		handler = func(context.Context, control.Op) (control.Status, error) { return s, nil }
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- control.Serve(ctx, l, handler) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// ended leaves the last status of a protection under h's root.
func ended(t *testing.T, h *host, s control.Status) {
	t.Helper()
	p := control.PathsFor(h.root, s.Role, s.UUID)
	b, err := json.Marshal(s)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(p.Last), 0o750)
	}
	if err == nil {
		err = os.WriteFile(p.Last, b, 0o640)
	}
	if err != nil {
		t.Fatal(err)
	}
}
