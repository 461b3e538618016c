package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"kemari/migrate/control"
)

// switchedOver is what switchover prints as JSON.
type switchedOver struct {
	Domain    string `json:"domain"`
	UUID      string `json:"uuid"`
	Host      string `json:"host"` // where it runs now
	URI       string `json:"uri"`
	Took      int64  `json:"took_us"`
	Protected bool   `json:"protected"` // by this host, or about to be
	Warning   string `json:"warning,omitempty"`
}

// onPrimary returns the status of a domain that is protected from here, with the
// reason why not.
func (h *host) onPrimary(ctx context.Context, name string) (control.Status, error) {
	all, err := h.statuses(ctx, []string{name})
	if err != nil {
		return control.Status{}, err
	}
	all = slices.DeleteFunc(all, func(s control.Status) bool { return s.Phase == control.Ended })
	i := slices.IndexFunc(all, func(s control.Status) bool { return s.Role == control.Primary })
	switch {
	case i < 0 && len(all) > 0 && all[0].Phase != control.Active:
		return control.Status{}, fmt.Errorf("this host is the standby of domain '%s'; say this on %s, where it runs", name, orDash(all[0].Peer))
	case i < 0:
		return control.Status{}, fmt.Errorf("domain '%s' is not protected", name)
	}
	return all[i], nil
}

func (h *host) switchoverCommand(c *cli.Context) error {
	name, err := oneDomain(c, 1)
	if err != nil {
		return err
	}
	s, err := h.onPrimary(c.Context, name)
	if err != nil {
		return err
	}
	connect, err := h.kemariURI(c.String("connect"))
	if err != nil {
		return err
	}
	hv, err := h.open(connect, false)
	if err != nil {
		return err
	}
	defer hv.Close()
	began := h.now()
	if err := hv.Switchover(s.UUID, s.Peer); err != nil {
		return err
	}
	done := switchedOver{Domain: s.Domain, UUID: s.UUID, Host: hostOf(s.Peer), URI: s.Peer, Took: h.now().Sub(began).Microseconds()}
	if !c.Bool("json") {
		fmt.Fprintf(h.out, "Domain '%s' runs on %s now\n", done.Domain, done.Host)
	}
	done.Warning = h.awaitSwap(c.Context, s)
	done.Protected = done.Warning == ""
	if c.Bool("json") {
		b, err := json.MarshalIndent(done, "", "  ")
		if err != nil {
			return err
		}
		fmt.Fprintf(h.out, "%s\n", b)
	} else if done.Protected {
		fmt.Fprintln(h.out, "It is being protected by this host")
	} else {
		fmt.Fprintf(h.err, "warning: %s\n", done.Warning)
	}
	if !done.Protected {
		return &exit{code: exitUnprotected}
	}
	return nil
}

// swapLimits is how many limits awaitSwap waits, five minutes.
const swapLimits = 5

// awaitSwap waits until this host is the standby of the domain that was handed over,
// and says why it is not.
func (h *host) awaitSwap(ctx context.Context, before control.Status) string {
	// What goes wrong is said as soon as it does, and a busy host may take minutes to
	// reach the other one and set a standby up.
	ctx, cancel := context.WithTimeout(ctx, swapLimits*h.limit)
	defer cancel()
	tick := time.NewTicker(h.poll)
	defer tick.Stop()
	for {
		s, ok := h.lookAt(ctx, control.Standby, before.UUID)
		if ok && s.Generation > before.Generation && (s.Phase == control.Copying || s.Phase == control.Ready) {
			return ""
		}
		s, ok = h.lookAt(ctx, control.Primary, before.UUID)
		if ok && s.Generation == before.Generation && s.SwitchedOver != "" && s.Hint != "" {
			return s.Hint
		}
		select {
		case <-ctx.Done():
			return fmt.Sprintf("it is not protected there yet, and nothing says why; see kemari status %s, here and on %s", before.Domain, hostOf(before.Peer))
		case <-tick.C:
		}
	}
}
