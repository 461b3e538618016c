package driver

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"sync"
	"time"

	"kemari/driver/rpc"
	"kemari/migrate/control"
	"kemari/xml"
)

const (
	// surveyEvery is how often the protections of this host are looked at while
	// somebody wants to hear of them.
	surveyEvery   = 250 * time.Millisecond
	surveyTimeout = time.Second
	// iterationEvery is the least time between two MIGRATION_ITERATION of a guest,
	// which may be checkpointed hundreds of times a second.
	iterationEvery = time.Second
	// settleTime is how long a client gets to be ready for events: one that comes
	// right behind the answer to its registration is lost in libvirt's client.
	settleTime = 100 * time.Millisecond
	// maxEvents bounds the events that wait for a client to read.
	maxEvents = 256
)

// virDomainEventType, with the details that belong to each.
const (
	eventStarted     = 2
	startedMigrated  = 1
	eventSuspended   = 3
	suspendMigrated  = 1
	eventResumed     = 4
	resumedUnpaused  = 0
	resumedMigrated  = 1
	eventStopped     = 5
	stoppedDestroyed = 1
	stoppedMigrated  = 3
	stoppedFailed    = 5
)

// event is what has happened to a domain.
type event struct {
	id        rpc.EventID
	dom       rpc.Domain
	what, why int32            // lifecycle
	iteration int32            // migration iteration
	params    []rpc.TypedParam // job completed
}

// packet is the event as the registration r wants it, nil if there is no such form.
func (e *event) packet(r registration) *rpc.Packet {
	if r.legacy() {
		if e.id != rpc.EventLifecycle {
			return nil // no client that old knows the others
		}
		return rpc.Event(rpc.ProcDomainEventLifecycle, (&rpc.LifecycleEvent{Domain: e.dom, Event: e.what, Detail: e.why}).AppendOld(nil))
	}
	switch e.id {
	case rpc.EventLifecycle:
		return rpc.Event(rpc.ProcDomainEventCallbackLifecycle, (&rpc.LifecycleEvent{Callback: r.callback, Domain: e.dom, Event: e.what, Detail: e.why}).Append(nil))
	case rpc.EventMigrationIteration:
		return rpc.Event(rpc.ProcDomainEventCallbackMigrationIteration, (&rpc.IterationEvent{Callback: r.callback, Domain: e.dom, Iteration: e.iteration}).Append(nil))
	case rpc.EventJobCompleted:
		return rpc.Event(rpc.ProcDomainEventCallbackJobCompleted, (&rpc.JobCompletedEvent{Callback: r.callback, Domain: e.dom, Params: e.params}).Append(nil))
	case rpc.EventMetadataChange:
		ns := xml.Namespace
		return rpc.Event(rpc.ProcDomainEventCallbackMetadataChange, (&rpc.MetadataEvent{Callback: r.callback, Domain: e.dom, Type: rpc.MetadataElement, Namespace: &ns}).Append(nil))
	}
	return nil
}

// registration is what a client has registered for.
type registration struct {
	by       rpc.Procedure // with which call
	event    rpc.EventID
	domain   *rpc.UUID // nil for all
	callback int32     // its number, unless legacy
	since    time.Time
}

func (r registration) legacy() bool { return r.by != rpc.ProcConnectDomainEventCallbackRegisterAny }

func (r registration) wants(e *event) bool {
	return r.event == e.id && (r.domain == nil || *r.domain == e.dom.UUID)
}

// subscriber is a session that has registered for events of ours.
type subscriber struct {
	mu    sync.Mutex
	regs  []registration
	queue chan *event
	full  bool // and that has been said
}

func (u *subscriber) add(r registration) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.regs = append(u.regs, r)
}

func (u *subscriber) remove(gone func(registration) bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.regs = slices.DeleteFunc(u.regs, gone)
}

func (u *subscriber) registrations() []registration {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.Clone(u.regs)
}

// register follows what the client registers for and takes back. libvirtd does so,
// too, and its callback numbers are what our events carry.
func (s *session) register(ctx context.Context, p *rpc.Packet) (bool, error) {
	r := registration{by: p.Procedure}
	switch p.Procedure {
	case rpc.ProcConnectDomainEventRegister:
		r.event = rpc.EventLifecycle
	case rpc.ProcConnectDomainEventRegisterAny:
		id, err := rpc.DecodeInt(p.Payload)
		if err != nil {
			return false, nil
		}
		r.event = rpc.EventID(*id)
	case rpc.ProcConnectDomainEventCallbackRegisterAny:
		a, err := rpc.DecodeEventRegisterArgs(p.Payload)
		if err != nil {
			return false, nil
		}
		r.event = a.Event
		if a.Domain != nil {
			r.domain = &a.Domain.UUID
		}
	}
	if !ourEvents[r.event] {
		return false, nil
	}
	s.onReply(p, func(a *rpc.Packet) *rpc.Packet {
		if a.Status != rpc.OK {
			return a
		}
		if !r.legacy() {
			n, err := rpc.DecodeInt(a.Payload)
			if err != nil {
				return a
			}
			r.callback = int32(*n)
		}
		s.query(ctx, func(ctx context.Context) {
			// Whatever happens once the client has its answer is an event for it.
			u := s.subscribe(ctx)
			r.since = time.Now()
			u.add(r)
			s.reply(a)
		})
		return nil
	})
	return false, nil
}

var ourEvents = map[rpc.EventID]bool{
	rpc.EventLifecycle: true, rpc.EventMigrationIteration: true, rpc.EventJobCompleted: true, rpc.EventMetadataChange: true,
}

// deregister ends what register began.
func (s *session) deregister(p *rpc.Packet) (bool, error) {
	s.inter.mu.Lock()
	u := s.inter.events
	s.inter.mu.Unlock()
	if u == nil {
		return false, nil
	}
	var gone func(registration) bool
	switch p.Procedure {
	case rpc.ProcConnectDomainEventDeregister:
		gone = func(r registration) bool { return r.by == rpc.ProcConnectDomainEventRegister }
	case rpc.ProcConnectDomainEventDeregisterAny:
		id, err := rpc.DecodeInt(p.Payload)
		if err != nil {
			return false, nil
		}
		gone = func(r registration) bool {
			return r.by == rpc.ProcConnectDomainEventRegisterAny && r.event == rpc.EventID(*id)
		}
	default:
		n, err := rpc.DecodeInt(p.Payload)
		if err != nil {
			return false, nil
		}
		gone = func(r registration) bool { return !r.legacy() && r.callback == int32(*n) }
	}
	s.onReply(p, func(a *rpc.Packet) *rpc.Packet {
		if a.Status == rpc.OK {
			u.remove(gone)
		}
		return a
	})
	return false, nil
}

// subscribe makes the session hear of what happens from now on.
func (s *session) subscribe(ctx context.Context) *subscriber {
	s.inter.mu.Lock()
	u := s.inter.events
	if u == nil {
		u = &subscriber{queue: make(chan *event, maxEvents)}
		s.inter.events = u
		s.d.hub.join(s.d, u)
		s.calls.Go(func() {
			defer s.d.hub.leave(u)
			s.deliver(ctx, u)
		})
	}
	s.inter.mu.Unlock()
	s.d.hub.wait(ctx)
	return u
}

func (s *session) deliver(ctx context.Context, u *subscriber) {
	for {
		var e *event
		select {
		case <-ctx.Done():
			return
		case e = <-u.queue:
		}
		for _, r := range u.registrations() {
			if !r.wants(e) {
				continue
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Until(r.since.Add(settleTime))):
			}
			if p := e.packet(r); p != nil && s.reply(p) != nil {
				return
			}
		}
	}
}

// hub watches the protections of this host for all sessions that have registered,
// as long as there are any.
type hub struct {
	mu    sync.Mutex
	subs  map[*subscriber]bool
	stop  context.CancelFunc
	done  chan struct{} // closed when the watch has ended
	ready chan struct{} // closed once it knows how things are
}

func (h *hub) join(d *Driver, u *subscriber) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.subs) > 0 {
		h.subs[u] = true
		return
	}
	h.subs = map[*subscriber]bool{u: true}
	var ctx context.Context
	ctx, h.stop = context.WithCancel(context.Background())
	done, ready := make(chan struct{}), make(chan struct{})
	h.done, h.ready = done, ready
	go func() {
		defer close(done)
		d.watch(ctx, ready, h.publish)
	}()
}

// leave takes a subscriber out; with the last one the watch ends.
func (h *hub) leave(u *subscriber) {
	h.mu.Lock()
	delete(h.subs, u)
	last := len(h.subs) == 0
	stop, done := h.stop, h.done
	h.mu.Unlock()
	if last {
		stop()
		<-done
	}
}

func (h *hub) wait(ctx context.Context) {
	h.mu.Lock()
	ready, done := h.ready, h.done
	h.mu.Unlock()
	select {
	case <-ready:
	case <-done:
	case <-ctx.Done():
	}
}

// publish hands an event to all. Who does not read loses events, and nobody waits.
func (h *hub) publish(d *Driver, e *event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for u := range h.subs {
		select {
		case u.queue <- e:
			u.full = false
		default:
			if !u.full {
				d.log.Warn("events are lost, since a client does not read them")
			}
			u.full = true
		}
	}
}

// part is one side of the protection of a guest.
type part struct {
	role control.Role
	id   rpc.UUID
}

// seen is what is known of a part.
type seen struct {
	st      control.Status
	dom     rpc.Domain
	alone   bool      // it was told last that the guest goes on without its standby
	told    time.Time // of the last iteration
	toldFor uint64
}

// watch looks at the protections of this host, closes ready when it has done so
// once, and publishes what changes from then on, until ctx ends.
func (d *Driver) watch(ctx context.Context, ready chan<- struct{}, publish func(*Driver, *event)) {
	known := make(map[part]*seen)
	d.survey(ctx, known, nil) // how things are is no event
	close(ready)
	t := time.NewTicker(surveyEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			d.survey(ctx, known, func(e *event) { publish(d, e) })
		}
	}
}

// survey brings known up to date.
func (d *Driver) survey(ctx context.Context, known map[part]*seen, emit func(*event)) {
	type found struct {
		part
		st  control.Status
		err error
	}
	// One that does not answer must not delay the events of the others.
	ctx, cancel := context.WithTimeout(ctx, surveyTimeout)
	defer cancel()
	var mu sync.Mutex
	var all []found
	var wg sync.WaitGroup
	for _, role := range []control.Role{control.Primary, control.Standby} {
		for _, id := range d.guests(role) {
			wg.Go(func() {
				st, err := d.look(ctx, role, id)
				mu.Lock()
				defer mu.Unlock()
				all = append(all, found{part{role, id}, st, err})
			})
		}
	}
	wg.Wait()
	for _, f := range all {
		k := known[f.part]
		if k == nil {
			if f.err != nil {
				continue
			}
			k = new(seen)
			known[f.part] = k
		}
		now := f.st
		switch {
		case errors.Is(f.err, control.ErrNotRunning):
			// It has left no last word.
			if now = k.st; now.Phase != control.Ended {
				now.Phase, now.Since, now.Error = control.Ended, time.Now(), "its process has ended and left no reason"
			}
		case f.err != nil:
			continue // it may be busy; the next look tells
		}
		before := k.st
		k.st = now
		if now.Generation != before.Generation || k.dom.Name == "" {
			k.dom = d.domainOf(f.part, now)
			k.toldFor = 0
		}
		if now.Epoch < before.Epoch {
			k.toldFor = 0 // it counts anew
		}
		if emit == nil {
			k.toldFor = now.Epoch
			continue
		}
		if now.Generation != before.Generation && before.Generation != 0 && !over(before) {
			end := before
			end.Phase, end.Since, end.Error = control.Ended, time.Now(), "another protection of the guest has begun"
			d.changed(k, before, end, emit)
		}
		if now.Generation != before.Generation {
			before = control.Status{}
		}
		d.changed(k, before, now, emit)
		if !over(now) && now.Epoch > k.toldFor && time.Since(k.told) >= iterationEvery {
			k.told, k.toldFor = time.Now(), now.Epoch
			emit(&event{id: rpc.EventMigrationIteration, dom: k.dom, iteration: int32(now.Epoch & 0x7fffffff)})
		}
	}
}

// over says whether a protection has ended, be it that the standby has taken over.
func over(st control.Status) bool { return st.Phase == control.Ended || st.Phase == control.Active }

// domainOf is the guest as libvirt names it. The number it has on the primary is in
// what the replicator was told.
func (d *Driver) domainOf(k part, st control.Status) rpc.Domain {
	dom := rpc.Domain{Name: st.Domain, UUID: k.id, ID: -1}
	var cfg struct {
		DomID *int32 `json:"domid"`
	}
	if b, err := os.ReadFile(d.paths(k.role, k.id).Config); err == nil && json.Unmarshal(b, &cfg) == nil && cfg.DomID != nil {
		dom.ID = *cfg.DomID
	}
	return dom
}

// changed emits what the step from one status to the next means:
//
//	               primary                       standby
//	protected      RESUMED/MIGRATED              STARTED/MIGRATED, SUSPENDED/MIGRATED
//	alone          RESUMED/UNPAUSED              (it is lost, or was told to end)
//	ended          RESUMED/UNPAUSED if it runs,  STOPPED/DESTROYED
//	               unless it was alone
//	lost           the same; STOPPED/FAILED if   STOPPED/FAILED
//	               the guest is gone
//	taken over                                   libvirtd's own RESUMED/MIGRATED
//	switched over  STOPPED/MIGRATED              the same
//
// Each change of the phase is a METADATA_CHANGE of our namespace, and every end a
// JOB_COMPLETED. One whose standby is silent, and looked for, has not ended.
func (d *Driver) changed(k *seen, before, now control.Status, emit func(*event)) {
	if before.Phase == now.Phase {
		return
	}
	dom, alone := k.dom, k.alone && before.Generation == now.Generation
	k.alone = now.Phase == control.Alone || alone && now.Phase != control.Protected
	lifecycle := func(what, why int32) { emit(&event{id: rpc.EventLifecycle, dom: dom, what: what, why: why}) }
	switch {
	case now.Phase == control.Protected && before.Phase == control.Switching:
		// It stood for a while, and nothing has become of that.
	case now.Phase == control.Protected:
		lifecycle(eventResumed, resumedMigrated)
	case now.Phase == control.Alone:
		if before.Phase == control.Protected || before.Phase == control.Switching {
			lifecycle(eventResumed, resumedUnpaused)
		}
	case now.Phase == control.Ready:
		lifecycle(eventStarted, startedMigrated)
		lifecycle(eventSuspended, suspendMigrated)
	case now.Phase == control.Ended && now.Role == control.Standby:
		if before.Phase == control.Ready || before.Phase == control.TakingOver || before.Phase == control.Ending && now.Epoch > 0 {
			why := int32(stoppedDestroyed)
			if now.Error != "" {
				why = stoppedFailed
			}
			lifecycle(eventStopped, why)
		}
	case now.Phase == control.Ended && now.SwitchedOver != "":
		lifecycle(eventStopped, stoppedMigrated)
	case now.Phase == control.Ended && (before.Phase == control.Protected || before.Phase == control.Switching || before.Phase == control.Alone || before.Phase == control.Ending && now.Epoch > 0):
		switch d.running(dom.UUID) {
		case stands:
			if !alone {
				lifecycle(eventResumed, resumedUnpaused)
			}
		case gone:
			if now.Error != "" {
				lifecycle(eventStopped, stoppedFailed)
			}
		}
	}
	if over(now) && !over(before) {
		emit(&event{id: rpc.EventJobCompleted, dom: dom, params: jobParams(now, time.Now())})
	}
	emit(&event{id: rpc.EventMetadataChange, dom: dom})
}

// whereabouts of a guest.
type whereabouts int

const (
	unknown whereabouts = iota
	stands              // it runs
	gone
)

func (d *Driver) running(id rpc.UUID) whereabouts {
	ctx, cancel := context.WithTimeout(context.Background(), lookTimeout)
	defer cancel()
	l, err := d.cfg.Libvirt(ctx)
	if err != nil {
		return unknown
	}
	defer l.Close()
	g, err := l.Guest(id)
	switch {
	case errors.Is(err, ErrNoGuest):
		return gone
	case err == nil && g.Running:
		return stands
	}
	return unknown
}
