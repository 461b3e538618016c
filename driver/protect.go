package driver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"kemari/driver/rpc"
	"kemari/migrate/control"
	"kemari/xml"
)

// connectTimeout bounds the way to the standby's first answer.
const connectTimeout = 60 * time.Second

// abortTimeout bounds the end of a protection on both hosts.
const abortTimeout = 60 * time.Second

var (
	errAborted     = errors.New("protection was ended on request")
	errNothingHere = errors.New("the guest is not protected here")
)

// attempt is a protection that is being set up.
type attempt struct {
	cancel context.CancelCauseFunc
	done   chan struct{}
}

// begin makes sure that one protection of a guest is set up at a time. The
// context it returns ends when somebody aborts the attempt.
func (d *Driver) begin(ctx context.Context, dom rpc.Domain) (context.Context, func(), error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.attempts[dom.UUID] != nil {
		return nil, nil, refuse(rpc.CodeOperationInvalid, "its protection is being set up already", "wait, or stop that with: virsh domjobabort "+dom.Name)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	a := &attempt{cancel: cancel, done: make(chan struct{})}
	d.attempts[dom.UUID] = a
	return ctx, func() {
		d.mu.Lock()
		delete(d.attempts, dom.UUID)
		d.mu.Unlock()
		cancel(nil)
		close(a.done)
	}, nil
}

// abort ends the protection of the guest, whichever side of it is here, and
// returns once that is done, or errNothingHere.
func (d *Driver) abort(ctx context.Context, dom rpc.Domain) error {
	ctx, cancel := context.WithTimeoutCause(ctx, abortTimeout, fmt.Errorf("protection had not ended after %v", abortTimeout))
	defer cancel()
	d.mu.Lock()
	a := d.attempts[dom.UUID]
	d.mu.Unlock()
	err := errNothingHere
	if a != nil {
		a.cancel(errAborted)
		select {
		case <-a.done:
			err = nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	// Also after an attempt: it may have succeeded at the last moment.
	for _, role := range []control.Role{control.Primary, control.Standby} {
		_, e := control.Ask(ctx, d.paths(role, dom.UUID).Socket, control.OpAbort)
		if errors.Is(e, control.ErrNotRunning) {
			continue
		}
		if errors.Is(e, control.ErrUnanswered) {
			// It was about to end by itself.
			if st, err := d.look(ctx, role, dom.UUID); err == nil && st.Phase == control.Ended {
				return nil
			}
		}
		if e != nil {
			return fmt.Errorf("end the protection of guest %q: %w", dom.Name, e)
		}
		return nil
	}
	return err
}

// protect makes the guest protected, and returns once the standby has committed
// its first checkpoint. If it returns an error, nothing is left behind and the
// guest runs as before.
func (d *Driver) protect(ctx context.Context, a *rpc.MigratePerformArgs) error {
	log := d.log.With("domain", a.Domain.Name, "uuid", a.Domain.UUID.String())
	err := d.tryProtect(ctx, log, a)
	if err != nil {
		log.Warn("guest is not protected", "error", err)
		return fmt.Errorf("cannot protect guest %q: %w", a.Domain.Name, err)
	}
	return nil
}

func (d *Driver) tryProtect(ctx context.Context, log *slog.Logger, a *rpc.MigratePerformArgs) (err error) {
	req, err := parseRequest(a)
	if err != nil {
		return err
	}
	ctx, leave, err := d.begin(ctx, req.domain)
	if err != nil {
		return err
	}
	defer leave()
	defer func() {
		// Whatever was cut short, this is the reason.
		if why := context.Cause(ctx); err != nil && why != nil && !errors.Is(err, why) {
			err = why
		}
	}()
	last, err := d.lastGeneration(ctx, req.domain)
	if err != nil {
		return err
	}
	host, err := d.cfg.Host()
	if err != nil {
		return err
	}
	guest, err := d.guest(ctx, req)
	if err != nil {
		return err
	}
	e, err := req.settings(guest.XML)
	if err != nil {
		return err
	}
	arb, err := arbiter(e)
	if err != nil {
		return err
	}
	base := guest.XML
	if req.destXML != "" {
		base = req.destXML
		if err := otherKind(guest.XML, base); err != nil {
			return err
		}
	}
	standbyXML, err := xml.ForStandby(base, vifScript)
	if err != nil {
		return fmt.Errorf("make the standby's XML: %w", err)
	}

	client, there, err := d.connectStandby(ctx, req, hvmRequestOf(guest, base))
	if err != nil {
		return err
	}
	defer client.Close()
	if err := verdict(guest, host, there); err != nil {
		return err
	}

	channel, mine, err := d.channel(control.Transport(e.Transport), control.Primary, guest.Name)
	if err != nil {
		return err
	}
	generation := max(uint64(time.Now().UnixMilli()), last+1, there.Generation+1)
	defer func() {
		if err != nil {
			err = d.takeBack(ctx, log, client, req, generation, err)
		}
	}()
	hb := control.Heartbeat{Interval: e.Heartbeat.Interval, Timeout: e.Heartbeat.Timeout}
	var ready prepareReply
	err = d.ask(ctx, client, req.target, prepareTimeout+connectTimeout, procPrepare, prepareRequest{
		Name: guest.Name, UUID: guest.UUID.String(), Generation: generation,
		DomainXML: standbyXML, MemoryKiB: guest.MemoryKiB, PrimaryHost: host.Name,
		Transport: channel.Transport, Credential: mine, Heartbeat: hb, Arbiter: arb,
	}, &ready)
	if err != nil {
		return err
	}
	if ready.Port < 1 || ready.Port > 65535 || !control.ValidCredential(ready.Credential) {
		return fmt.Errorf("standby %s: its answer makes no sense", req.target.Host)
	}
	addr, err := dataAddr(req.target, req.migrateURI, ready.Port)
	if err != nil {
		return err
	}
	channel.Peer = ready.Credential
	if channel.Transport == control.TransportPKI {
		channel.PeerName = req.target.Host
	}
	err = control.WriteConfig(d.paths(control.Primary, guest.UUID), control.PrimaryConfig{
		Domain: guest.Name, UUID: guest.UUID.String(), DomID: guest.ID,
		MemoryKiB: guest.MemoryKiB, Generation: generation,
		StandbyURI: req.target.URI, StandbyAddr: addr,
		Checkpoint: control.Checkpoint(e.Checkpoint), Heartbeat: hb, Arbiter: arb, Channel: channel,
	})
	if err != nil {
		return fmt.Errorf("write the replicator's settings: %w", err)
	}
	log.Info("guest is being copied to its standby", "peer", req.target.URI, "address", addr, "generation", generation, "standby_xen", there.Host.Xen.String(), "standby_libvirt", there.Libvirt)
	_, err = d.startAndWatch(ctx, control.Primary, guest.UUID, generation, unitName(unitReplicator, guest.UUID),
		func(st control.Status) bool { return st.Phase == control.Protected })
	if err != nil {
		return err
	}
	log.Info("guest is protected", "peer", req.target.URI, "generation", generation)
	return nil
}

// channel prepares a side of the connection between the hosts, and returns what the
// other side needs to know of it.
func (d *Driver) channel(t control.Transport, role control.Role, name string) (control.Channel, string, error) {
	c, err := control.NewChannel(t, role, name, d.cfg.PKI)
	switch {
	case errors.Is(err, control.ErrTransport):
		err = refuse(rpc.CodeConfigUnsupp, err.Error(), "run the same version of Kemari on both hosts")
	case err != nil && t == control.TransportPKI:
		err = refuse(rpc.CodeConfigUnsupp, err.Error(), "make them, see libvirt's documentation on TLS, or leave the transport out: then certificates are made for this protection")
	}
	if err != nil {
		return c, "", err
	}
	mine, err := c.Credential()
	return c, mine, err
}

// lastGeneration refuses a guest that takes part in a protection here already,
// and returns the generation of the last one that is over.
func (d *Driver) lastGeneration(ctx context.Context, dom rpc.Domain) (uint64, error) {
	var last uint64
	for _, role := range []control.Role{control.Primary, control.Standby} {
		st, err := d.look(ctx, role, dom.UUID)
		switch {
		case errors.Is(err, control.ErrNotRunning):
			continue
		case err != nil:
			return 0, refuse(rpc.CodeOperationInvalid, fmt.Sprintf("its %s process does not say how it is (%v)", role, err), "end it with: virsh domjobabort "+dom.Name)
		case role == control.Primary && st.Phase != control.Ended:
			return 0, refuse(rpc.CodeOperationInvalid, fmt.Sprintf("it has the standby %s already (%s)", st.Peer, st.Phase), "end that first with: virsh domjobabort "+dom.Name)
		case role == control.Standby && st.Phase != control.Ended && st.Phase != control.Active:
			return 0, refuse(rpc.CodeOperationInvalid, fmt.Sprintf("this host is its standby (%s); it runs on %s", st.Phase, st.Peer), "protect it there")
		}
		last = max(last, st.Generation)
	}
	return last, nil
}

// guest returns the guest as it stands, if it can be protected.
func (d *Driver) guest(ctx context.Context, req *request) (Guest, error) {
	l, err := d.cfg.Libvirt(ctx)
	if err != nil {
		return Guest{}, err
	}
	defer l.Close()
	g, err := l.Guest(req.domain.UUID)
	switch {
	case errors.Is(err, ErrNoGuest):
		return g, refuse(rpc.CodeOperationInvalid, "it is not running", "start it with: virsh start "+req.domain.Name)
	case err != nil:
		return g, err
	case g.Name != req.domain.Name:
		return g, refuse(rpc.CodeInvalidArg, fmt.Sprintf("the guest with this UUID is %q", g.Name), "look it up again")
	case req.domain.ID >= 0 && uint32(req.domain.ID) != g.ID:
		return g, refuse(rpc.CodeOperationInvalid, fmt.Sprintf("it has been started anew since it was looked up (%d is now %d)", req.domain.ID, g.ID), "look it up again")
	}
	// First what no waiting mends.
	if err := refuseAll(xml.Ineligible(g.XML)); err != nil {
		return g, err
	}
	switch {
	case !g.Running:
		return g, refuse(rpc.CodeOperationInvalid, "it is "+g.State, "a guest must run to be protected; resume or start it")
	case g.Job:
		return g, refuse(rpc.CodeOperationInvalid, "libvirt is saving, dumping or migrating it", "wait for that, or stop it with: virsh -c xen:///system domjobabort "+g.Name)
	}
	if xml.HasDeviceModel(g.XML) {
		g.DeviceModel = d.cfg.DeviceModel(g.ID)
	}
	return g, nil
}

// otherKind refuses a definition for the standby that would not take the guest, or let
// out what the guest's own does not.
func otherKind(guest, standby string) error {
	if err := refuseAll(xml.Ineligible(standby)); err != nil {
		return err
	}
	if xml.HasDeviceModel(guest) != xml.HasDeviceModel(standby) {
		return refuse(rpc.CodeConfigUnsupp, "the XML for the standby is not of the guest's type", "leave <os> as it is")
	}
	return nil
}

// connectStandby connects to the standby and asks what it is and knows, and what it has
// for an HVM guest.
func (d *Driver) connectStandby(ctx context.Context, req *request, hvm *hvmRequest) (*rpc.Client, *checkReply, error) {
	conn, err := d.cfg.Dial(ctx, req.target)
	if err != nil {
		return nil, nil, fmt.Errorf("standby %s: %w", req.target.Host, err)
	}
	client := rpc.NewClient(conn)
	var r checkReply
	err = d.ask(ctx, client, req.target, connectTimeout, procCheck,
		checkRequest{Name: req.domain.Name, UUID: req.domain.UUID.String(), HVM: hvm}, &r)
	if err == nil {
		return client, &r, nil
	}
	client.Close()
	var e *rpc.Error
	switch {
	case errors.As(err, &e) && e.Code == rpc.CodeRPC && e.From == rpc.FromRPC:
		// virt-ssh-helper falls back to libvirtd where our socket is missing, and
		// libvirtd does not know our program.
		err = refuse(rpc.CodeConfigUnsupp, fmt.Sprintf("Kemari is not installed on %s, or of another version (its libvirtd answered: %s)", req.target.Host, e.Message),
			"install the same version there and run: systemctl enable --now virtkemarid.socket")
	case errors.Is(err, rpc.ErrClosed) && !errors.Is(err, errSSH):
		err = refuse(rpc.CodeOperationFailed, fmt.Sprintf("standby %s closed the connection without an answer", req.target.Host), "see journalctl -u virtkemarid there")
	}
	return nil, nil, err
}

// ask makes one call to the standby.
func (d *Driver) ask(ctx context.Context, c *rpc.Client, t Target, timeout time.Duration, proc rpc.Procedure, req, reply any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("no answer within %v", timeout))
	defer cancel()
	err := callPeer(ctx, c, proc, req, reply)
	if err != nil {
		return fmt.Errorf("standby %s: %w", t.Host, err)
	}
	return nil
}

// takeBack undoes what a protection that failed with cause has done so far, and
// returns cause with what could not be undone.
func (d *Driver) takeBack(ctx context.Context, log *slog.Logger, c *rpc.Client, req *request, generation uint64, cause error) error {
	if ctx.Err() != nil {
		cause = context.Cause(ctx)
	}
	ctx = context.WithoutCancel(ctx)
	rctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	if err := d.removeReplicator(rctx, req.domain.UUID, generation); err != nil {
		log.Error("replicator cannot be stopped", "error", err)
		cause = fmt.Errorf("%w; moreover its replicator could not be stopped: %w", cause, err)
	}
	err := d.ask(ctx, c, req.target, cleanupTimeout, procDiscard,
		discardRequest{UUID: req.domain.UUID.String(), Generation: generation}, &discardReply{})
	if errors.Is(err, rpc.ErrClosed) {
		// The standby takes back what its primary never came for, and its own
		// process ends what its primary has left.
		log.Warn("standby cannot be told", "peer", req.target.URI, "error", err)
	} else if err != nil {
		log.Error("shadow cannot be removed", "peer", req.target.URI, "error", err)
		cause = fmt.Errorf("%w; moreover its shadow could not be removed: %w", cause, err)
	}
	return cause
}

// removeReplicator ends the replicator, if it was begun.
func (d *Driver) removeReplicator(ctx context.Context, id rpc.UUID, generation uint64) error {
	st, err := d.look(ctx, control.Primary, id)
	if err == nil && st.Generation != generation {
		return nil // ours was never written, let alone started
	}
	if errors.Is(err, control.ErrNotRunning) {
		if _, err := os.Stat(d.paths(control.Primary, id).Config); errors.Is(err, os.ErrNotExist) {
			return nil
		}
	}
	return d.endProcess(ctx, control.Primary, id, unitName(unitReplicator, id))
}
