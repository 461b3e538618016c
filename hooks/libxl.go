package hooks

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"time"

	"kemari/xml"
)

// maxDomain bounds what is read of a domain's XML.
const maxDomain = 1 << 20

// startTimeout bounds the call of systemctl: libvirtd waits for the hook, and the
// guest's start waits for libvirtd.
const startTimeout = 10 * time.Second

// AutostartUnit returns the unit that protects the guest: it runs
// kemari protect --autostart UUID.
func AutostartUnit(uuid string) string { return "kemari-autostart@" + uuid + ".service" }

// Libxl is libvirt's hook for Xen guests. It must never call libvirt, which holds
// the guest's lock while the hook runs, and never makes a guest's start fail.
type Libxl struct {
	// Start starts a unit and does not wait until it is up.
	Start func(ctx context.Context, unit string) error
	Log   *slog.Logger
}

// Run deals with one call: args are GUEST OPERATION SUBOPERATION EXTRA, in has the
// domain's XML.
//
// A cold start on the standby of a guest whose shadow stands there is not refused
// here. libvirt calls the hook with the same operations (prepare, start, started)
// and the same arguments for a cold start and for the shadow itself, so that the
// two cannot be told apart; and libvirt, which holds the shadow's job from its
// Prepare to its Finish, lets no other start through meanwhile.
func (h *Libxl) Run(ctx context.Context, args []string, in io.Reader) {
	// All of it is read whatever the call is about, so that libvirt does not
	// write into a closed pipe.
	b, err := io.ReadAll(io.LimitReader(in, maxDomain+1))
	if len(args) < 3 || args[1] != "started" || args[2] != "begin" {
		return
	}
	// Most guests don't ask, and a take-over waits for this hook: so look for the
	// attribute's name first, and parse only where it is.
	if err == nil && len(b) <= maxDomain && bytes.Contains(b, []byte("</domain>")) && !bytes.Contains(b, []byte("autostart")) {
		return
	}
	log := h.Log.With("domain", args[0])
	if err == nil && len(b) > maxDomain {
		err = fmt.Errorf("domain XML of more than %d bytes", maxDomain)
	}
	var e *xml.Element
	if err == nil {
		e, err = xml.FromDomain(string(b))
	}
	if err != nil {
		log.Error("guest not protected", "error", err)
		return
	}
	if e == nil || !e.Autostart {
		return
	}
	uuid, err := xml.UUID(string(b))
	if err != nil {
		log.Error("guest not protected", "error", err)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := h.Start(ctx, AutostartUnit(uuid)); err != nil {
		log.Error("guest not protected", "error", err)
	}
}
