package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"kemari/migrate/control"
)

// exitUnprotected is the exit status when a domain that was named is not
// protected.
const exitUnprotected = 3

// phaseUnknown is that of a process that cannot be asked.
const phaseUnknown control.Phase = "unknown"

// lookTimeout bounds the wait for a process that does not answer.
const lookTimeout = 3 * time.Second

// statuses returns those of all protections on this host, or of the domains
// called names, by name or UUID.
func (h *host) statuses(ctx context.Context, names []string) ([]control.Status, error) {
	var all []control.Status
	for _, role := range []control.Role{control.Primary, control.Standby} {
		dir := filepath.Join(h.root, string(role))
		entries, err := os.ReadDir(dir)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%w; are you root, or in the group libvirt?", err)
		}
		for _, e := range entries {
			s, ok := h.lookAt(ctx, role, e.Name())
			if ok && (len(names) == 0 || slices.Contains(names, s.Domain) || slices.Contains(names, s.UUID)) {
				all = append(all, s)
			}
		}
	}
	slices.SortStableFunc(all, func(a, b control.Status) int { return strings.Compare(a.Domain, b.Domain) })
	return all, nil
}

// lookAt returns what one protection says of itself, or what its folder tells if
// it says nothing.
func (h *host) lookAt(ctx context.Context, role control.Role, uuid string) (control.Status, bool) {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	p := control.PathsFor(h.root, role, uuid)
	s, err := control.Look(ctx, p)
	if err == nil {
		return s, true
	}
	// From here on only what was written down for the process is known.
	s = control.Status{Role: role, UUID: uuid, Phase: control.Ended}
	if b, e := os.ReadFile(p.Config); e == nil {
		var c struct{ Domain string }
		if json.Unmarshal(b, &c) == nil {
			s.Domain = c.Domain
		}
	} else if errors.Is(e, os.ErrNotExist) && errors.Is(err, control.ErrNotRunning) {
		return s, false // nothing was ever begun
	}
	unit := "kemari-replicator@"
	if role == control.Standby {
		unit = "kemari-standby@"
	}
	s.Hint = "see journalctl -u " + unit + uuid
	if errors.Is(err, control.ErrNotRunning) {
		s.Error = "its process does not run, or not yet"
	} else {
		s.Phase, s.Error = phaseUnknown, err.Error()
	}
	return s, true
}

// safe says whether a status is that of a guest that would survive this moment's
// loss of a host.
func safe(s control.Status) bool { return s.Phase == control.Protected || s.Phase == control.Ready }

// status prints the protections on this host.
func (h *host) status(ctx context.Context, names []string, asJSON bool) error {
	all, err := h.statuses(ctx, names)
	if err != nil {
		return err
	}
	if asJSON {
		if all == nil {
			all = []control.Status{}
		}
		b, err := json.MarshalIndent(all, "", "  ")
		if err != nil {
			return err
		}
		fmt.Fprintf(h.out, "%s\n", b)
	} else {
		h.table(all)
	}
	for _, n := range names {
		if !slices.ContainsFunc(all, func(s control.Status) bool { return (s.Domain == n || s.UUID == n) && safe(s) }) {
			text := fmt.Sprintf("domain '%s' is not protected", n)
			if asJSON {
				text = ""
			}
			return &exit{exitUnprotected, text}
		}
	}
	return nil
}

func (h *host) table(all []control.Status) {
	if len(all) == 0 {
		fmt.Fprintln(h.out, "No domain is protected by or on this host.")
		return
	}
	w := tabwriter.NewWriter(h.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "DOMAIN\tROLE\tPHASE\tPEER\tEPOCH\tPAUSE\tAVERAGE\tPAGES\tLAG\tARBITER")
	for _, s := range all {
		fmt.Fprintln(w, strings.Join([]string{
			orDash(s.Domain), string(s.Role), phase(s), orDash(s.Peer), count(int64(s.Epoch)),
			ms(s.PauseLast), ms(average(s)), count(s.PagesLast), ms(s.CommitLag), arbiter(s),
		}, "\t"))
	}
	w.Flush()
	for _, s := range all {
		who := s.Domain
		if who == "" {
			who = s.UUID
		}
		if s.Error != "" {
			fmt.Fprintf(h.out, "\n%s (%s): %s", who, s.Role, s.Error)
			if s.Hint != "" {
				fmt.Fprintf(h.out, "; %s", s.Hint)
			}
			fmt.Fprintln(h.out)
		}
		if s.SwitchedOver != "" {
			fmt.Fprintf(h.out, "\n%s (%s): handed over; it runs on %s now", who, s.Role, s.SwitchedOver)
			if s.Hint != "" && s.Error == "" {
				fmt.Fprintf(h.out, "; %s", s.Hint)
			}
			fmt.Fprintln(h.out)
		}
		if f := s.Failover; f != nil {
			fmt.Fprintf(h.out, "\n%s (%s): took over at %s: %s; noticed after %s, running again after another %s\n",
				who, s.Role, f.At.Local().Format(time.DateTime), f.Reason, ms(f.Detect), ms(f.Takeover))
		}
		// It is that of a protection: the guest that was taken over has none yet.
		if s.Risk != "" && s.Phase != control.Ended && s.Phase != control.Active {
			fmt.Fprintf(h.out, "\n%s (%s): risk: %s\n", who, s.Role, s.Risk)
		}
	}
}

func phase(s control.Status) string {
	if s.Phase == control.Copying && s.CopyTotal > 0 {
		return fmt.Sprintf("%s %d%%", s.Phase, min(100, s.CopyBytes*100/s.CopyTotal))
	}
	return string(s.Phase)
}

func arbiter(s control.Status) string {
	switch {
	case s.Arbiter == "" && !s.Automatic:
		return "-"
	case s.Automatic:
		return orDash(s.Arbiter) + ", automatic"
	}
	return s.Arbiter + ", manual"
}

// average is the mean pause: there is one for each epoch.
func average(s control.Status) int64 {
	if s.Epoch == 0 {
		return 0
	}
	return s.PauseSum / int64(min(s.Epoch, 1<<62))
}

// ms shows microseconds.
func ms(us int64) string {
	if us == 0 {
		return "-"
	}
	return fmt.Sprintf("%.1f ms", float64(us)/1000)
}

func count(n int64) string {
	if n == 0 {
		return "-"
	}
	return fmt.Sprint(n)
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
