package driver

import (
	"context"
	"errors"
	"fmt"
	"time"

	"kemari/driver/rpc"
	"kemari/migrate/control"
	"kemari/xml"
)

// After a switchover the roles swap: this host asks the one that has the guest now to
// protect it by this one, with the settings it had here. That host goes the way by
// which anyone protects a guest, and reaches this one by ssh with its own credentials,
// under the name that its standby was told. If that does not work the guest is where it
// was to go, and unprotected, which is said in the last status of its old primary.

// reprotectTimeout bounds the first copy back, too.
const reprotectTimeout = time.Hour

// reprotectRequest asks the host of a guest that it got from here to protect it by the
// host that it got it from, which it knows: no other can be named.
type reprotectRequest struct {
	Name       string             `json:"name"`
	UUID       string             `json:"uuid"`
	Generation uint64             `json:"generation"` // of the protection that ended by the switchover
	Checkpoint control.Checkpoint `json:"checkpoint"`
	Transport  control.Transport  `json:"transport"`
	Heartbeat  control.Heartbeat  `json:"heartbeat"`
	Arbiter    control.Arbiter    `json:"arbiter"`
}

type reprotectReply struct{}

// swapRoles has the guest protected by this host that was handed over, in the
// background. cfg is what its replicator was told here.
func (s *session) swapRoles(dom rpc.Domain, cfg control.PrimaryConfig) {
	serving := s.serving
	s.calls.Go(func() {
		ctx, cancel := context.WithTimeoutCause(serving, reprotectTimeout, fmt.Errorf("it was not protected within %v", reprotectTimeout))
		defer cancel()
		log := s.d.log.With("domain", dom.Name, "uuid", dom.UUID.String(), "peer", cfg.StandbyURI)
		err := s.d.askReprotect(ctx, dom, cfg)
		if err == nil {
			log.Info("guest that was handed over is protected by this host")
			return
		}
		log.Warn("guest that was handed over is not protected", "error", err)
		s.d.noteUnprotected(context.WithoutCancel(ctx), dom, cfg, err)
	})
}

func (d *Driver) askReprotect(ctx context.Context, dom rpc.Domain, cfg control.PrimaryConfig) error {
	t, err := ParseTarget(cfg.StandbyURI)
	if err != nil {
		return err
	}
	if err := d.settled(ctx, dom.UUID); err != nil {
		return err
	}
	conn, err := d.cfg.Dial(ctx, t)
	if err != nil {
		return fmt.Errorf("host %s: %w", t.Host, err)
	}
	client := rpc.NewClient(conn)
	defer client.Close()
	err = callPeer(ctx, client, procReprotect, reprotectRequest{
		Name: dom.Name, UUID: dom.UUID.String(), Generation: cfg.Generation,
		Transport: cfg.Channel.Transport, Checkpoint: cfg.Checkpoint, Heartbeat: cfg.Heartbeat, Arbiter: cfg.Arbiter,
	}, &reprotectReply{})
	if err != nil {
		return fmt.Errorf("host %s: %w", t.Host, err)
	}
	return nil
}

// idle waits until nobody sets up a protection of the guest: libvirt's hook may have
// seen it start here, and that attempt names the host it was protected by before.
func (d *Driver) idle(ctx context.Context, id rpc.UUID) error {
	for {
		d.mu.Lock()
		a := d.attempts[id]
		d.mu.Unlock()
		if a == nil {
			return nil
		}
		select {
		case <-a.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// settled waits until the replicator of a guest that was handed over has ended.
func (d *Driver) settled(ctx context.Context, id rpc.UUID) error {
	for end := time.Now().Add(goneAfter); ; {
		_, err := control.Ask(ctx, d.paths(control.Primary, id).Socket, control.OpStatus)
		switch {
		case errors.Is(err, control.ErrNotRunning):
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case time.Now().After(end):
			return errors.New("its replicator does not end")
		}
		select {
		case <-ctx.Done():
		case <-time.After(pollEvery):
		}
	}
}

// noteUnprotected adds to the last status what the operator can do about it.
func (d *Driver) noteUnprotected(ctx context.Context, dom rpc.Domain, cfg control.PrimaryConfig, why error) {
	st, err := d.look(ctx, control.Primary, dom.UUID)
	if err != nil || st.Generation != cfg.Generation || st.SwitchedOver == "" {
		return // another one has begun
	}
	here := "HOST"
	if h, err := d.cfg.Host(); err == nil {
		here = h.Name
	}
	st.Hint = oneLine(fmt.Sprintf("it is not protected there (%v); protect it with: virsh -c %s migrate --kemari --live %s kemari+ssh://%s/system", why, cfg.StandbyURI, dom.Name, here))
	if err := control.WriteLast(d.paths(control.Primary, dom.UUID), st); err != nil {
		d.log.Warn("not noted that a guest is unprotected", "domain", dom.Name, "error", err)
	}
}

// takenOver returns the last word of the standby that a guest was handed over to here.
func (d *Driver) takenOver(ctx context.Context, name, uuid string, generation uint64) (rpc.UUID, control.Status, error) {
	id, err := rpc.ParseUUID(uuid)
	if err != nil {
		return id, control.Status{}, fmt.Errorf("%w: uuid: %w", errBadRequest, err)
	}
	st, err := d.look(ctx, control.Standby, id)
	if err != nil || st.Phase != control.Active || st.Generation != generation || st.Domain != name {
		return id, st, refuse(rpc.CodeOperationInvalid, fmt.Sprintf("guest %q was not taken over here in generation %d", name, generation), "")
	}
	return id, st, nil
}

// protector is the host that a guest came from, as its standby.
func protector(st control.Status) *xml.Standby {
	return &xml.Standby{URI: "kemari+ssh://" + st.Peer + "/system"}
}

// reprotect protects a guest that was handed over to this host by the one it came from.
func (d *Driver) reprotect(ctx context.Context, req reprotectRequest) (*reprotectReply, error) {
	id, st, err := d.takenOver(ctx, req.Name, req.UUID, req.Generation)
	if err != nil {
		return nil, err
	}
	e := xml.Default()
	e.Standby = protector(st)
	e.Transport = string(req.Transport)
	e.Checkpoint = xml.Checkpoint(req.Checkpoint)
	e.Heartbeat = xml.Heartbeat{Interval: req.Heartbeat.Interval, Timeout: req.Heartbeat.Timeout}
	if req.Arbiter.Automatic {
		e.Arbiter = &xml.Arbiter{Type: req.Arbiter.Type, Automatic: true}
	}
	doc, err := d.domainXML(ctx, id, false)
	if err != nil {
		return nil, err
	}
	if own, err := xml.FromDomain(doc); err == nil && own != nil {
		e.Autostart = own.Autostart
	}
	if err := e.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", errBadRequest, err)
	}
	if doc, err = xml.SetInDomain(doc, e); err != nil {
		return nil, err
	}
	if err := d.idle(ctx, id); err != nil {
		return nil, err
	}
	return &reprotectReply{}, d.protect(ctx, &rpc.MigratePerformArgs{
		Domain: rpc.Domain{Name: req.Name, UUID: id, ID: -1}, URI: &e.Standby.URI,
		Params: []rpc.TypedParam{{Field: "destination_xml", Type: rpc.ParamString, String: doc}},
		Flags:  rpc.MigrateKemari | rpc.MigratePeer2Peer | rpc.MigrateLive,
	})
}
