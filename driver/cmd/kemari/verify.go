package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"kemari/migrate/control"
)

// Exit statuses of verify.
const (
	exitDiffers    = 1
	exitUnverified = 2
)

// verifyTimeout is longer than a replicator takes at most.
const verifyTimeout = 6 * time.Minute

// verified is what verify prints as JSON.
type verified struct {
	Domain string `json:"domain"`
	UUID   string `json:"uuid"`
	Equal  bool   `json:"equal"`
	*control.Verified
}

// unverified gives an error that has no exit status of its own that of a comparison
// that could not be made.
func unverified(err error) error {
	var e *exit
	if err == nil || errors.As(err, &e) {
		return err
	}
	return &exit{exitUnverified, err.Error()}
}

func (h *host) verifyCommand(c *cli.Context) error {
	name, err := oneDomain(c, 1)
	if err != nil {
		return err
	}
	s, err := h.onPrimary(c.Context, name)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.Context, verifyTimeout)
	defer cancel()
	after, err := control.Ask(ctx, control.PathsFor(h.root, control.Primary, s.UUID).Socket, control.OpVerify)
	if err != nil {
		return fmt.Errorf("verify domain '%s': %w", s.Domain, err)
	}
	v := after.Verified
	if v == nil {
		return fmt.Errorf("verify domain '%s': its replicator does not know how; it was started before Kemari was upgraded", s.Domain)
	}
	if c.Bool("json") {
		b, err := json.MarshalIndent(verified{s.Domain, s.UUID, v.Differ == 0, v}, "", "  ")
		if err != nil {
			return err
		}
		fmt.Fprintf(h.out, "%s\n", b)
	} else {
		h.showVerified(s.Domain, v)
	}
	if v.Differ > 0 {
		return &exit{code: exitDiffers}
	}
	return nil
}

func (h *host) showVerified(domain string, v *control.Verified) {
	verdict := "all equal"
	switch {
	case v.Differ > 0:
		verdict = fmt.Sprintf("%d differ", v.Differ)
	case v.Shared > 0:
		verdict = "all equal but for shared ones"
	}
	fmt.Fprintf(h.out, "%s: epoch %d: %d pages compared, %s (paused %.2f s)\n", domain, v.Epoch, v.Pages, verdict, float64(v.Pause)/1e6)
	line := func(n int64, what string, pages []string) {
		if n == 0 {
			return
		}
		if len(pages) > 0 {
			what += ": " + strings.Join(pages, ", ")
		}
		if int64(len(pages)) < n && len(pages) > 0 {
			what += ", …"
		}
		fmt.Fprintf(h.out, "  %d %s\n", n, what)
	}
	line(v.Differ, "differ", v.Differing)
	line(v.Missing, "of those that differ are not there at all", nil)
	var shared []string
	for _, p := range v.SharedPages {
		shared = append(shared, fmt.Sprintf("%s (%s)", p.Page, p.By))
	}
	line(v.Shared, "differ that others write to at any time, which is no fault", shared)
	line(v.Moved, "were written to by others while the guest stood, and compared as of the checkpoint", nil)
	line(v.Unread, "were left out: they could not be read, and no checkpoint has them", nil)
	if v.Note != "" {
		fmt.Fprintf(h.out, "  note: %s\n", v.Note)
	}
}
