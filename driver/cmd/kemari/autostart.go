package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"kemari/driver/virt"
	"kemari/migrate/control"
	"kemari/xml"
)

// autostart protects a guest that has just started, as its element asks. It is
// run by kemari-autostart@UUID.service, which the libxl hook starts. A standby
// that cannot be reached is tried again until h.limit has passed: when both hosts
// boot, one is the first.
func (h *host) autostart(ctx context.Context, connect, uuid string) error {
	log := slog.New(slog.NewTextHandler(h.err, nil)).With("domain", uuid)
	connect, err := h.kemariURI(connect)
	if err != nil {
		return err
	}
	end := h.now().Add(h.limit)
	for {
		err := h.autostartOnce(ctx, log, connect, uuid)
		if err == nil || ctx.Err() != nil || !errors.Is(err, virt.ErrTemporary) {
			return err
		}
		if !h.now().Before(end) {
			return fmt.Errorf("given up after %v: %w", h.limit, err)
		}
		log.Warn("not protected yet, trying again", "error", err)
		select {
		case <-time.After(h.retry):
		case <-ctx.Done():
			return err
		}
	}
}

func (h *host) autostartOnce(ctx context.Context, log *slog.Logger, connect, uuid string) error {
	if h.standsHere(ctx, uuid) {
		log.Info("not protected, since the guest's shadow stands on this host")
		return nil
	}
	hv, err := h.open(connect, false)
	if err != nil {
		return err
	}
	defer hv.Close()
	dom, err := hv.Lookup(uuid)
	if err != nil {
		return err
	}
	domainXML, err := definition(hv, dom, true)
	if err != nil {
		return err
	}
	e, err := xml.FromDomain(domainXML)
	switch {
	case err != nil:
		return err
	case e == nil || !e.Autostart:
		return fmt.Errorf("domain '%s' does not ask for protection: its <metadata> has no <kemari autostart='yes'>", dom.Name)
	case sameHost(hostOf(e.Standby.URI), h.name):
		// After a failover the guest starts on the host its element names.
		log.Info("not protected, since this host is the guest's own standby", "name", dom.Name, "standby", e.Standby.URI)
		return nil
	}
	switch s := h.look(dom.UUID); s.Phase {
	case control.Starting, control.Copying, control.Protected, control.Alone:
		log.Info("protected already", "name", dom.Name, "phase", s.Phase)
		return nil
	}
	log.Info("protecting", "name", dom.Name, "standby", e.Standby.URI)
	if err := h.begin(ctx, hv, connect, dom, domainXML, e, protection{}); err != nil {
		return err
	}
	log.Info("protected", "name", dom.Name, "standby", e.Standby.URI)
	h.warn(dom.Name, e, "--")
	return nil
}

// standsHere says whether the standby process of the guest runs on this host. It
// is there for as long as a take-over lasts, and that is when libvirt tells the
// hook that the guest has started.
func (h *host) standsHere(ctx context.Context, uuid string) bool {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	_, err := control.Ask(ctx, control.PathsFor(h.root, control.Standby, uuid).Socket, control.OpStatus)
	return !errors.Is(err, control.ErrNotRunning)
}

// sameHost compares two names of hosts, either of which may lack its domain.
func sameHost(a, b string) bool {
	if !strings.Contains(a, ".") || !strings.Contains(b, ".") {
		a, _, _ = strings.Cut(a, ".")
		b, _, _ = strings.Cut(b, ".")
	}
	return a != "" && strings.EqualFold(a, b)
}
