package main

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"kemari/driver/virt"
	"kemari/migrate/control"
)

func TestSwitchover(t *testing.T) {
	const ran = "Domain 'g1' runs on xen2 now\n"
	for _, tt := range []struct {
		name, args string
		role       control.Role
		phase      control.Phase
		fails      error
		after      control.Status // of this host's side, then
		code       int
		out, err   string
		protected  bool
	}{
		{name: "roles swap", args: "g1", role: control.Primary, phase: control.Protected,
			after: control.Status{Role: control.Standby, Generation: 8, Phase: control.Copying},
			out:   ran + "It is being protected by this host\n", protected: true},
		{name: "by UUID", args: uuid1 + " -c xen:///system", role: control.Primary, phase: control.Protected,
			after: control.Status{Role: control.Standby, Generation: 8, Phase: control.Ready},
			out:   ran + "It is being protected by this host\n", protected: true},
		{name: "no way back", args: "g1", role: control.Primary, phase: control.Protected,
			after: control.Status{Role: control.Primary, Generation: 7, Phase: control.Ended, SwitchedOver: xen2, Hint: "it is not protected there (ssh: no)"},
			code:  3, out: ran, err: "warning: it is not protected there (ssh: no)\n"},
		{name: "silence", args: "g1", role: control.Primary, phase: control.Protected,
			after: control.Status{Role: control.Standby, Generation: 7, Phase: control.Ready}, // of old
			code:  3, out: ran, err: "warning: it is not protected there yet"},
		{name: "fails", args: "g1", role: control.Primary, phase: control.Protected, fails: &virt.Error{Message: "cannot hand over guest \"g1\": the standby is lost"},
			code: 1, err: "error: cannot hand over guest \"g1\": the standby is lost\n"},
		{name: "standby", args: "g1", role: control.Standby, phase: control.Ready, code: 1, err: "error: this host is the standby of domain 'g1'; say this on " + xen2 + ", where it runs\n"},
		{name: "active", args: "g1", role: control.Standby, phase: control.Active, code: 1, err: "error: domain 'g1' is not protected\n"},
		{name: "nobody", args: "g9", code: 1, err: "error: domain 'g9' is not protected\n"},
		{name: "no domain", code: 1, err: "no DOMAIN given"},
		{name: "two", args: "g1 g2", code: 1, err: "unexpected 'g2'"},
		{name: "elsewhere", args: "g1 -c qemu:///system", role: control.Primary, phase: control.Protected, code: 1, err: "does not lead to Xen"},
	} {
		for _, asJSON := range []bool{false, true} {
			t.Run(tt.name, func(t *testing.T) {
				h, l, out, errs := newHost(t)
				h.limit = 100 * time.Millisecond
				current := control.Status{Role: tt.role, Domain: "g1", UUID: uuid1, Phase: tt.phase, Peer: xen2, Generation: 7}
				if tt.role != "" {
					running(t, h, current, func(context.Context, control.Op) (control.Status, error) {
						if current.Phase == "" {
							return control.Status{}, errors.New("it has ended")
						}
						return current, nil
					})
				}
				asked := false
				l.hand = func(uuid, uri string) error {
					if asked = uuid == uuid1 && uri == xen2; !asked {
						t.Errorf("handed over %s to %s", uuid, uri)
					}
					if tt.fails == nil {
						tt.after.Domain, tt.after.UUID = "g1", uuid1
						if tt.after.Role == control.Primary {
							current = tt.after
						} else {
							current.Phase, current.SwitchedOver = control.Ended, xen2
							ended(t, h, tt.after)
						}
					}
					return tt.fails
				}
				args := append([]string{"switchover"}, strings.Fields(tt.args)...)
				if !asJSON {
					if code := kemari(t.Context(), h, args); code != tt.code || out.String() != tt.out || !strings.Contains(errs.String(), tt.err) || errs.Len() > 0 != (tt.err != "") {
						t.Errorf("exit status %d, output %q, errors %q; want %d, %q, %q", code, out, errs, tt.code, tt.out, tt.err)
					}
					return
				}
				code := kemari(t.Context(), h, append(args, "--json"))
				if code != tt.code {
					t.Errorf("exit status %d, want %d", code, tt.code)
				}
				if !asked || tt.fails != nil {
					return
				}
				var got switchedOver
				if err := json.Unmarshal(out.Bytes(), &got); err != nil || got.Domain != "g1" || got.UUID != uuid1 || got.Host != "xen2" || got.URI != xen2 ||
					got.Protected != tt.protected || (got.Warning == "") != tt.protected || errs.Len() > 0 {
					t.Errorf("%v, %s, errors %q", err, out, errs)
				}
			})
		}
	}
}

// What is left of a primary that was handed over says where the guest is.
func TestStatusSwitchedOver(t *testing.T) {
	h, _, out, _ := newHost(t)
	s := control.Status{Role: control.Primary, Domain: "g1", UUID: uuid1, Phase: control.Ended, Peer: xen2, SwitchedOver: xen2}
	ended(t, h, s)
	kemari(t.Context(), h, []string{"status"})
	if want := "g1 (primary): handed over; it runs on " + xen2 + " now\n"; !strings.Contains(out.String(), want) {
		t.Errorf("%q does not say %q", out, want)
	}
	out.Reset()
	s.Hint = "it is not protected there"
	ended(t, h, s)
	kemari(t.Context(), h, []string{"status"})
	if want := xen2 + " now; it is not protected there\n"; !strings.Contains(out.String(), want) {
		t.Errorf("%q does not say %q", out, want)
	}
}
