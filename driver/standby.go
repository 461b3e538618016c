package driver

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"kemari/driver/rpc"
	"kemari/migrate/control"
)

const (
	// prepareTimeout bounds the start of a shadow; Xen builds an empty domain in
	// a second or two.
	prepareTimeout = 60 * time.Second
	// cleanupTimeout bounds what is done when the one who asked has gone. The
	// units have a minute to stop.
	cleanupTimeout = 90 * time.Second
)

// standbyLock lets one call at a time change the shadow of a guest. A discard
// cancels the prepare of its own generation that is under way, instead of waiting
// for it; one of an older generation, which may come late, leaves it alone.
type standbyLock struct {
	held       chan struct{} // has one place
	cancel     context.CancelCauseFunc
	generation uint64 // of what cancel ends
	users      int
}

var errDiscarded = errors.New("the primary has taken its request back")

// lockStandby waits for the lock of the guest. The context it returns ends when
// a discard wants the lock.
func (d *Driver) lockStandby(ctx context.Context, id rpc.UUID, generation uint64, discard bool) (context.Context, func(), error) {
	d.mu.Lock()
	l := d.standbys[id]
	if l == nil {
		l = &standbyLock{held: make(chan struct{}, 1)}
		d.standbys[id] = l
	}
	l.users++
	if discard && l.cancel != nil && l.generation == generation {
		l.cancel(errDiscarded)
	}
	d.mu.Unlock()

	leave := func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(d.standbys, id)
		}
	}
	select {
	case l.held <- struct{}{}:
	case <-ctx.Done():
		leave()
		return nil, nil, context.Cause(ctx)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	if !discard {
		d.mu.Lock()
		l.cancel, l.generation = cancel, generation
		d.mu.Unlock()
	}
	return ctx, func() {
		d.mu.Lock()
		l.cancel = nil
		d.mu.Unlock()
		cancel(nil)
		<-l.held
		leave()
	}, nil
}

// check says what this host is and knows.
func (d *Driver) check(ctx context.Context, req checkRequest) (*checkReply, error) {
	id, err := rpc.ParseUUID(req.UUID)
	if err != nil {
		return nil, fmt.Errorf("%w: uuid: %w", errBadRequest, err)
	}
	host, err := d.cfg.Host()
	if err != nil {
		return nil, err
	}
	l, err := d.cfg.Libvirt(ctx)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	r := &checkReply{Host: host}
	node, err := l.Node()
	if err != nil {
		return nil, err
	}
	r.Libvirt, r.FreeMemoryKiB = node.Version, node.FreeMemoryKiB
	if req.HVM != nil {
		r.DeviceModel, r.Missing = d.hvm(ctx, req.HVM)
	}
	names, err := l.Names()
	if err != nil {
		return nil, err
	}
	for name, k := range names {
		switch {
		case name == req.Name && k.UUID != id:
			r.NameTaken = k.UUID.String()
		case k.UUID == id && name != req.Name:
			r.UUIDTaken = name
		}
		if k.UUID == id && k.Active {
			r.Active = true
		}
	}
	for _, role := range []control.Role{control.Primary, control.Standby} {
		st, err := d.look(ctx, role, id)
		if errors.Is(err, control.ErrNotRunning) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("ask the %s process of %s: %w", role, req.Name, err)
		}
		r.Generation = max(r.Generation, st.Generation)
		if st.Phase == control.Ended || st.Phase == control.Active {
			continue // and if Active, libvirt knows the guest
		}
		if role == control.Primary {
			r.Primary = st.Phase
		} else {
			r.Shadow, r.ShadowOf = st.Phase, st.Peer
		}
	}
	return r, nil
}

func (req *prepareRequest) validate() (rpc.UUID, error) {
	id, err := rpc.ParseUUID(req.UUID)
	switch {
	case err != nil:
		return id, fmt.Errorf("%w: uuid: %w", errBadRequest, err)
	case req.Name == "" || len(req.Name) > maxName:
		return id, fmt.Errorf("%w: a name of %d bytes", errBadRequest, len(req.Name))
	case req.Generation == 0 || req.MemoryKiB == 0 || req.DomainXML == "":
		return id, fmt.Errorf("%w: generation, memory or XML is missing", errBadRequest)
	case req.Heartbeat.Interval <= 0 || req.Heartbeat.Timeout <= 0:
		return id, fmt.Errorf("%w: heartbeat", errBadRequest)
	}
	if !control.ValidCredential(req.Credential) {
		return id, fmt.Errorf("%w: credential", errBadRequest)
	}
	if req.Arbiter.Type != arbiterNone {
		return id, refuse(rpc.CodeConfigUnsupp, fmt.Sprintf("the standby does not know the arbiter %q", req.Arbiter.Type), "run the same version of Kemari on both hosts")
	}
	return id, checkIdentity(req.DomainXML, req.Name, id)
}

// prepare makes a shadow stand here, listening for its primary.
func (s *session) prepare(ctx context.Context, req prepareRequest) (*prepareReply, error) {
	id, err := req.validate()
	if err != nil {
		return nil, err
	}
	d := s.d
	ctx, unlock, err := d.lockStandby(ctx, id, req.Generation, false)
	if err != nil {
		return nil, err
	}
	defer unlock()

	// What check said may have changed since.
	state, err := d.check(ctx, checkRequest{Name: req.Name, UUID: req.UUID})
	if err != nil {
		return nil, err
	}
	if err := state.conflict(req.Name, state.Host.Name); err != nil {
		return nil, err
	}
	if req.Generation <= state.Generation {
		return nil, refuse(rpc.CodeOperationInvalid, fmt.Sprintf("generation %d is not newer than %d, which was seen here", req.Generation, state.Generation), "protect the guest again")
	}
	channel, mine, err := d.channel(req.Transport, control.Standby, req.Name)
	if err != nil {
		return nil, fmt.Errorf("on %s: %w", state.Host.Name, err)
	}
	channel.Peer = req.Credential
	paths := d.paths(control.Standby, id)
	err = control.WriteConfig(paths, control.StandbyConfig{
		Domain: req.Name, UUID: req.UUID, DomainXML: req.DomainXML,
		MemoryKiB: req.MemoryKiB, Generation: req.Generation, PrimaryHost: req.PrimaryHost,
		Heartbeat: req.Heartbeat, Arbiter: req.Arbiter,
		Channel: channel,
	})
	if err != nil {
		return nil, fmt.Errorf("write the shadow's settings: %w", err)
	}
	port, err := d.startShadow(ctx, id, req.Generation)
	if err != nil {
		cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
		defer cancel()
		if e := d.endProcess(cctx, control.Standby, id, unitName(unitStandby, id)); e != nil {
			s.log.Warn("shadow that did not start cannot be removed", "domain", req.Name, "error", e)
		}
		return nil, err
	}
	s.mu.Lock()
	s.prepared[id] = req.Generation
	s.mu.Unlock()
	s.log.Info("shadow waits for its primary", "domain", req.Name, "peer", req.PrimaryHost, "generation", req.Generation)
	return &prepareReply{Port: port, Credential: mine}, nil
}

// startShadow starts the unit and waits until it listens.
func (d *Driver) startShadow(ctx context.Context, id rpc.UUID, generation uint64) (int, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, prepareTimeout, fmt.Errorf("the shadow was not ready after %v", prepareTimeout))
	defer cancel()
	unit := unitName(unitStandby, id)
	st, err := d.startAndWatch(ctx, control.Standby, id, generation, unit, func(st control.Status) bool {
		return st.Phase == control.Waiting && st.Port > 0
	})
	return st.Port, err
}

// discard takes a shadow back. It does nothing if there is none of this
// generation.
func (s *session) discard(ctx context.Context, req discardRequest) (*discardReply, error) {
	id, err := rpc.ParseUUID(req.UUID)
	if err != nil {
		return nil, fmt.Errorf("%w: uuid: %w", errBadRequest, err)
	}
	return &discardReply{}, s.d.discard(ctx, id, req.Generation, false)
}

func (d *Driver) discard(ctx context.Context, id rpc.UUID, generation uint64, onlyWaiting bool) error {
	ctx, unlock, err := d.lockStandby(ctx, id, generation, true)
	if err != nil {
		return err
	}
	defer unlock()
	st, err := d.look(ctx, control.Standby, id)
	switch {
	case errors.Is(err, control.ErrNotRunning):
		// It may have a unit that has not got so far, or that died at once.
		if _, e := os.Stat(d.paths(control.Standby, id).Config); e != nil {
			return nil
		}
	case err != nil:
		return err
	case st.Generation != generation || st.Phase == control.Ended:
		return nil
	case st.Phase == control.TakingOver || st.Phase == control.Active:
		return refuse(rpc.CodeOperationInvalid, fmt.Sprintf("guest %q has been taken over by the standby and runs there", st.Domain), "")
	case onlyWaiting && st.Phase != control.Starting && st.Phase != control.Waiting:
		return nil
	}
	return d.endProcess(ctx, control.Standby, id, unitName(unitStandby, id))
}

// dropShadows takes back the shadows that were made for this client and that
// their primary never came for: if it could, the client would have said so.
func (s *session) dropShadows() {
	s.mu.Lock()
	prepared := s.prepared
	s.prepared = nil
	s.mu.Unlock()
	if len(prepared) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
	defer cancel()
	for id, generation := range prepared {
		if err := s.d.discard(ctx, id, generation, true); err != nil {
			s.log.Warn("shadow without a primary cannot be removed", "uuid", id, "error", err)
		}
	}
}
