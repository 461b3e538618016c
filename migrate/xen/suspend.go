package xen

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"kemari/migrate"
	"kemari/migrate/xen/internal/sys"
	"kemari/migrate/xen/xenstore"
)

const (
	// A guest that runs and has not suspended by then never will: Linux gives up
	// freezing its processes after 20 s.
	suspendTimeout = 25 * time.Second
	// How often we look whether the guest is still there and not paused.
	lookInterval = 250 * time.Millisecond
)

// ErrBusy: somebody else suspends or resumes the guest, as `virsh save` does.
var ErrBusy = errors.New("the guest is suspended or resumed by somebody else")

// standing is what a guest does, as far as a checkpoint cares.
type standing int

const (
	running standing = iota
	suspended
	gone // or going, for another reason than a suspend
)

func standingOf(i sys.Info) standing {
	switch {
	case i.Dying, i.Down && i.Reason != sys.ShutdownSuspend:
		return gone
	case i.Down:
		return suspended
	}
	return running
}

// suspender suspends and resumes one guest. Whatever it begins it brings to an end
// with the guest running, but for a guest that an operator has paused in the middle:
// that one stays as it is until settle.
type suspender struct {
	id     uint16
	xen    suspendControl
	store  *xenstore.Client
	dm     emulator        // nil: it has none
	events <-chan struct{} // the guest's suspend event channel; nil: none
	mark   *mark
	look   time.Duration // lookInterval
	limit  time.Duration // suspendTimeout
}

// suspendControl is what of the hypervisor a suspender needs.
type suspendControl interface {
	Info() (sys.Info, error)
	Resume(fresh bool) error
	Pause() error
	Unpause() error
}

func (s *suspender) state() (standing, sys.Info, error) {
	i, err := s.xen.Info()
	if errors.Is(err, sys.ErrNoDomain) {
		return gone, i, nil
	}
	return standingOf(i), i, err
}

func (s *suspender) node() string { return fmt.Sprintf("/local/domain/%d/control/shutdown", s.id) }

// suspend returns once the guest stands, and how it stands. After an error the guest
// runs, unless it is gone.
func (s *suspender) suspend(ctx context.Context) (sys.Info, error) {
	if ctx.Err() != nil {
		return sys.Info{}, context.Cause(ctx)
	}
	switch st, info, err := s.state(); {
	case err != nil:
		return info, err
	case st == gone:
		return info, migrate.ErrGuestGone
	case st == suspended:
		return info, ErrBusy
	}
	if err := s.mark.set(markSuspending); err != nil {
		return sys.Info{}, err
	}
	if err := s.ask(ctx); err != nil {
		// It may have been asked all the same.
		return sys.Info{}, errors.Join(fmt.Errorf("ask the guest to suspend: %w", err), s.unsuspend(ctx))
	}
	tick := time.NewTicker(s.look)
	defer tick.Stop()
	since := time.Now()
	for {
		select {
		case <-s.events:
		case <-tick.C:
		case <-ctx.Done():
			return sys.Info{}, errors.Join(context.Cause(ctx), s.unsuspend(ctx))
		}
		st, info, err := s.state()
		switch {
		case err != nil:
			return info, errors.Join(err, s.unsuspend(ctx))
		case st == gone:
			return info, migrate.ErrGuestGone
		case st == suspended:
			return info, nil
		}
		// A guest the operator has paused cannot answer, and changes nothing either:
		// that is no fault, and no reason to hurry.
		if info.Paused {
			since = time.Now()
		}
		if time.Since(since) > s.limit {
			err := ErrNoSuspend
			if v, rerr := s.store.Read(ctx, s.node()); rerr == nil && v == "suspend" {
				err = fmt.Errorf("%w; in %v it has not even read the request", err, s.limit)
			}
			return info, errors.Join(err, s.unsuspend(ctx))
		}
	}
}

// ask is not interrupted when ctx ends, or else nobody would know whether the guest
// has been asked.
func (s *suspender) ask(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.limit)
	defer cancel()
	return s.store.Write(ctx, s.node(), "suspend")
}

// resume lets the guest run that suspend has made stand, and its device model before:
// that one's failing is an error, but the guest is rather let run without. fresh: see
// sys.Domain.
func (s *suspender) resume(fresh bool) error {
	var dmErr error
	if s.dm != nil {
		if st, _, err := s.state(); err == nil && st == suspended {
			dmErr = s.dm.Continue()
		}
	}
	return errors.Join(s.resumeGuest(fresh), dmErr)
}

func (s *suspender) resumeGuest(fresh bool) error {
	var err error
	for try := range 5 {
		if try > 0 {
			time.Sleep(20 * time.Millisecond)
			fresh = false
		}
		var st standing
		switch st, _, err = s.state(); {
		case err != nil:
			continue
		case st == gone:
			return migrate.ErrGuestGone
		case st == running:
			s.mark.set(markRunning)
			return ErrBusy
		}
		if err = s.xen.Resume(fresh); err == nil {
			return s.mark.set(markRunning)
		}
	}
	return fmt.Errorf("%w: %w", ErrStands, err)
}

// leaveEmulator leaves the device model as if there had been no checkpoint. That of a
// guest that stands for somebody else is his: libxl ends the logging itself then, and
// one too many would abort QEMU.
func (s *suspender) leaveEmulator() error {
	if s.dm == nil {
		return nil
	}
	if st, _, err := s.state(); err != nil || st != running {
		return err
	}
	if err := s.dm.Continue(); err != nil {
		return err
	}
	return s.dm.Unlog()
}

// unsuspend ends a suspend that may be under way, with the guest running. It does so
// even when ctx has ended. A guest that has seen the request will suspend, and nobody
// but us would resume it: so it is let get there first.
func (s *suspender) unsuspend(ctx context.Context) error { return s.end(ctx, false) }

// ErrStands: a guest that was suspended could not be let go on.
var ErrStands = errors.New("the guest stands and cannot be resumed")

// settle is unsuspend for good. A guest that an operator has paused after it has seen
// the request would stand suspended once he lets it go on, and nobody would know. So
// it runs for the few milliseconds that it takes to get there, and is paused again, as
// often as it was, before it is resumed: then it is as he has left it. How often that was
// is known to this process only: if it is killed in these milliseconds the guest runs on.
func (s *suspender) settle(ctx context.Context) error { return s.end(ctx, true) }

func (s *suspender) end(ctx context.Context, settle bool) (err error) {
	unpaused := 0
	pause := func() {
		for ; unpaused > 0; unpaused-- {
			if perr := s.xen.Pause(); perr != nil && !errors.Is(perr, sys.ErrNoDomain) {
				err = errors.Join(err, fmt.Errorf("pause the guest again: %w", perr))
			}
		}
	}
	defer pause()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.limit)
	defer cancel()
	unseen, err := s.withdraw(ctx)
	if err != nil {
		err = fmt.Errorf("take the request to suspend back: %w", err)
	}
	for wait := time.Millisecond; ; wait = min(wait*2, s.look/5+time.Millisecond) {
		st, info, serr := s.state()
		switch {
		case serr != nil:
			return errors.Join(err, serr)
		case st == gone:
			return err
		case st == suspended:
			pause()
			if rerr := s.resume(false); rerr != nil && !errors.Is(rerr, ErrBusy) {
				err = errors.Join(err, rerr)
			}
			return err
		case unseen:
			return errors.Join(err, s.mark.set(markRunning))
		case info.Paused && !settle:
			return err // the mark stays
		case info.Paused && ctx.Err() == nil:
			if uerr := s.xen.Unpause(); uerr == nil {
				unpaused++
			} else if !errors.Is(uerr, syscall.EINVAL) { // the operator was sooner
				return errors.Join(err, fmt.Errorf("let the guest run until it has suspended: %w", uerr))
			}
			continue
		case ctx.Err() != nil:
			if err == nil { // it has seen the request, and given up by itself
				err = s.mark.set(markRunning)
			}
			return err
		}
		select {
		case <-s.events:
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
}

// withdraw takes the request back if the guest has not seen it yet. The guest reads
// and empties the node in a transaction too, so only one of us wins.
func (s *suspender) withdraw(ctx context.Context) (unseen bool, err error) {
	err = s.store.Transact(ctx, func(tx *xenstore.Tx) error {
		v, err := tx.Read(ctx, s.node())
		if errors.Is(err, os.ErrNotExist) {
			v, err = "", nil
		}
		if unseen = err == nil && v == "suspend"; unseen {
			err = tx.Write(ctx, s.node(), "")
		}
		return err
	})
	return unseen && err == nil, err
}

// Marks are the first byte of a mark file; see mark.
const (
	markSuspending = 's'
	markRunning    = 'r'
)

// mark is the file that tells CleanupDomain what a killed process left: whether a
// suspend is under way, and which event channel port it had in which domain, so that
// the next process uses that port again.
type mark struct{ f *os.File }

func openMark(path string) (*mark, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("mark file: %w", err)
	}
	return &mark{f}, nil
}

func (m *mark) set(state byte) error {
	if _, err := m.f.WriteAt([]byte{state}, 0); err != nil {
		return fmt.Errorf("mark file: %w", err)
	}
	return nil
}

// get returns what a process has left: 0 if nothing.
func (m *mark) get() (state byte, port uint32, handle string) {
	b := make([]byte, 256)
	n, _ := m.f.ReadAt(b, 0)
	if n == 0 {
		return 0, 0, ""
	}
	fmt.Sscanf(strings.TrimSpace(string(b[1:n])), "port %d of %s", &port, &handle)
	return b[0], port, handle
}

func (m *mark) setPort(port uint32, handle string) error {
	line := fmt.Sprintf("%c port %d of %s\n", markRunning, port, handle)
	if _, err := m.f.WriteAt([]byte(line), 0); err != nil {
		return fmt.Errorf("mark file: %w", err)
	}
	return nil
}

func (m *mark) Close() error { return m.f.Close() }

// offAlready is what disabling what is off returns.
func offAlready(err error) bool { return err == nil || errors.Is(err, syscall.EINVAL) }
