package driver

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kemari/driver/rpc"
	"kemari/migrate/control"
	"kemari/xml"
)

// listener is a client that registers for events and remembers those it gets.
type listener struct {
	t      *testing.T
	c      net.Conn
	serial rpc.Serial
	events []string
}

func newListener(t *testing.T, path string) *listener { return &listener{t: t, c: dial(t, path)} }

// call makes a call and returns its reply; events that come before are kept.
func (l *listener) call(proc rpc.Procedure, payload []byte) *rpc.Packet {
	l.t.Helper()
	l.serial++
	err := rpc.WritePacket(l.c, &rpc.Packet{Header: rpc.Header{Program: rpc.ProgramRemote, Version: 1, Procedure: proc, Serial: l.serial}, Payload: payload})
	if err != nil {
		l.t.Fatal(err)
	}
	for {
		p, err := rpc.ReadPacket(l.c)
		if err != nil {
			l.t.Fatal(err)
		}
		if p.Type == rpc.Reply {
			return p
		}
		l.keep(p)
	}
}

func (l *listener) register(id rpc.EventID, dom *rpc.Domain) {
	l.t.Helper()
	if r := l.call(rpc.ProcConnectDomainEventCallbackRegisterAny, (&rpc.EventRegisterArgs{Event: id, Domain: dom}).Append(nil)); r.Status != rpc.OK {
		l.t.Fatalf("%+v", r)
	}
}

// keep writes an event as its callback number, kind, guest and content.
func (l *listener) keep(p *rpc.Packet) {
	s := fmt.Sprintf("procedure %d", p.Procedure)
	switch p.Procedure {
	case rpc.ProcDomainEventLifecycle:
		// As with a callback number, and without it.
		if e, err := rpc.DecodeLifecycleEvent(append([]byte{0, 0, 0, 0}, p.Payload...)); err == nil {
			s = fmt.Sprintf("legacy lifecycle %s#%d %d/%d", e.Domain.Name, e.Domain.ID, e.Event, e.Detail)
		}
	case rpc.ProcDomainEventCallbackLifecycle:
		if e, err := rpc.DecodeLifecycleEvent(p.Payload); err == nil {
			s = fmt.Sprintf("%d lifecycle %s#%d %d/%d", e.Callback, e.Domain.Name, e.Domain.ID, e.Event, e.Detail)
		}
	case rpc.ProcDomainEventCallbackMigrationIteration:
		if e, err := rpc.DecodeIterationEvent(p.Payload); err == nil {
			s = fmt.Sprintf("%d iteration %s %d", e.Callback, e.Domain.Name, e.Iteration)
		}
	case rpc.ProcDomainEventCallbackJobCompleted:
		if e, err := rpc.DecodeJobCompletedEvent(p.Payload); err == nil {
			v := values(l.t, e.Params)
			s = fmt.Sprintf("%d completed %s %v %v", e.Callback, e.Domain.Name, v["success"], v["errmsg"])
		}
	case rpc.ProcDomainEventCallbackMetadataChange:
		if e, err := rpc.DecodeMetadataEvent(p.Payload); err == nil && *e.Namespace == xml.Namespace && e.Type == rpc.MetadataElement {
			s = fmt.Sprintf("%d metadata %s", e.Callback, e.Domain.Name)
		}
	}
	l.events = append(l.events, s)
}

// want waits for these events, in this order and with no other between them.
func (l *listener) want(want ...string) {
	l.t.Helper()
	for len(l.events) < len(want) {
		p, err := rpc.ReadPacket(l.c)
		if err != nil {
			l.t.Fatalf("%v; got %q, want %q", err, l.events, want)
		}
		l.keep(p)
	}
	if !slices.Equal(l.events, want) {
		l.t.Errorf("got %q, want %q", l.events, want)
	}
	l.events = nil
}

// quiet wants no event for a while.
func (l *listener) quiet() {
	l.t.Helper()
	time.Sleep(3 * surveyEvery)
	l.call(4, nil)
	l.want()
}

// numbering is a libvirtd that gives callbacks numbers, from 10 on, and answers
// else with nothing.
func numbering(t *testing.T) *fakeLibvirtd {
	var n atomic.Int32
	n.Store(9)
	return newLibvirtd(t, func(_ net.Conn, p *rpc.Packet) *rpc.Packet {
		var b []byte
		switch p.Procedure {
		case rpc.ProcConnectDomainEventCallbackRegisterAny:
			b = rpc.Int(n.Add(1)).Append(nil)
		case rpc.ProcConnectDomainEventRegister:
			b = rpc.Int(1).Append(nil)
		}
		return &rpc.Packet{Header: p.Reply(rpc.OK), Payload: b}
	})
}

func TestEventsOfPrimary(t *testing.T) {
	h := newHost(t, "xen1", numbering(t).path)
	l := newListener(t, h.ro)
	for _, id := range []rpc.EventID{rpc.EventLifecycle, rpc.EventMigrationIteration, rpc.EventJobCompleted, rpc.EventMetadataChange, 5} {
		l.register(id, nil)
	}
	l.want()
	p := protectedGuest(t, h, control.Primary, control.Starting)
	l.want("13 metadata g1")
	p.phase(control.Copying)
	l.want("13 metadata g1")
	p.tell(func(st *control.Status) { st.Phase, st.Epoch = control.Protected, 1 })
	l.want("10 lifecycle g1#0 4/1", "13 metadata g1", "11 iteration g1 1")
	// However many epochs, one event a second.
	began := time.Now()
	for time.Since(began) < 1500*time.Millisecond {
		p.tell(func(st *control.Status) { st.Epoch++ })
		time.Sleep(5 * time.Millisecond)
	}
	l.call(4, nil)
	if len(l.events) < 1 || len(l.events) > 2 || !strings.HasPrefix(l.events[0], "11 iteration g1 ") {
		t.Errorf("in 1.5 s: %q", l.events)
	}
	l.events = nil
	l.c.SetReadDeadline(time.Now().Add(20 * time.Second))
	time.Sleep(iterationEvery + 2*surveyEvery)
	l.call(4, nil)
	l.events = nil // the rest of them
	p.exit("")
	l.want("10 lifecycle g1#0 4/0", "12 completed g1 1 <nil>", "13 metadata g1")
	l.quiet()

	// A second protection, which is lost, with the guest.
	h.libvirt.err = ErrNoGuest
	p = protectedGuest(t, h, control.Primary, control.Copying)
	l.want("13 metadata g1")
	p.tell(func(st *control.Status) { st.Phase, st.Epoch = control.Protected, 1 })
	l.want("10 lifecycle g1#0 4/1", "13 metadata g1", "11 iteration g1 1")
	p.exit("the standby was lost")
	l.want("10 lifecycle g1#0 5/5", "12 completed g1 0 the standby was lost", "13 metadata g1")
	// One whose guest was handed over.
	p = protectedGuest(t, h, control.Primary, control.Protected)
	l.want("10 lifecycle g1#0 4/1", "13 metadata g1")
	p.phase(control.Switching)
	l.want("13 metadata g1")
	p.phase(control.Protected)
	l.want("13 metadata g1")
	p.tell(func(st *control.Status) { st.SwitchedOver = st.Peer })
	p.exit("")
	l.want("10 lifecycle g1#0 5/3", "12 completed g1 1 <nil>", "13 metadata g1")
	// One whose standby is silent, comes back, and is silent again when it is to end.
	h.libvirt.err = nil
	p = protectedGuest(t, h, control.Primary, control.Protected)
	l.want("10 lifecycle g1#0 4/1", "13 metadata g1")
	alone := func(st *control.Status) {
		st.Phase, st.Error, st.Hint = control.Alone, "the standby is silent", "look after it"
	}
	p.tell(alone)
	l.want("10 lifecycle g1#0 4/0", "13 metadata g1")
	p.tell(func(st *control.Status) { st.Phase, st.Error, st.Hint = control.Protected, "", "" })
	l.want("10 lifecycle g1#0 4/1", "13 metadata g1")
	p.tell(alone)
	l.want("10 lifecycle g1#0 4/0", "13 metadata g1")
	p.phase(control.Ending)
	l.want("13 metadata g1")
	p.exit("")
	l.want("12 completed g1 1 <nil>", "13 metadata g1")
	// And one that is lost with its guest.
	p = protectedGuest(t, h, control.Primary, control.Protected)
	l.want("10 lifecycle g1#0 4/1", "13 metadata g1")
	p.tell(alone)
	l.want("10 lifecycle g1#0 4/0", "13 metadata g1")
	h.libvirt.err = ErrNoGuest
	p.exit("the guest has ended")
	l.want("10 lifecycle g1#0 5/5", "12 completed g1 0 the guest has ended", "13 metadata g1")
	// And one that ended before it was complete says nothing of the guest's life.
	p = protectedGuest(t, h, control.Primary, control.Copying)
	l.want("13 metadata g1")
	p.exit("the standby is full")
	l.want("12 completed g1 0 the standby is full", "13 metadata g1")
}

func TestEventsOfStandby(t *testing.T) {
	h := newHost(t, "xen2", numbering(t).path)
	l := newListener(t, h.rw)
	for _, id := range []rpc.EventID{rpc.EventLifecycle, rpc.EventJobCompleted} {
		l.register(id, nil)
	}
	p := protectedGuest(t, h, control.Standby, control.Ready)
	l.want("10 lifecycle g1#-1 2/1", "10 lifecycle g1#-1 3/1")
	p.exit("")
	l.want("10 lifecycle g1#-1 5/1", "11 completed g1 1 <nil>")
	p = protectedGuest(t, h, control.Standby, control.Ready)
	l.want("10 lifecycle g1#-1 2/1", "10 lifecycle g1#-1 3/1")
	p.exit("torn")
	l.want("10 lifecycle g1#-1 5/5", "11 completed g1 0 torn")
	// A failover is libvirtd's to tell, but for the end of the job.
	p = protectedGuest(t, h, control.Standby, control.Ready)
	l.want("10 lifecycle g1#-1 2/1", "10 lifecycle g1#-1 3/1")
	p.phase(control.TakingOver)
	p.phase(control.Active)
	l.want("11 completed g1 1 <nil>")
	p.exit("")
	l.quiet()
}

// TestEventsOnlyAsRegistered: each client gets what it registered for, under the
// number libvirtd gave it, and nothing after it took that back.
func TestEventsOnlyAsRegistered(t *testing.T) {
	h := newHost(t, "xen1", numbering(t).path)
	g, other := g1(t), rpc.Domain{Name: "other", UUID: rpc.UUID{1}, ID: 3}
	none, old, two := newListener(t, h.rw), newListener(t, h.rw), newListener(t, h.rw)
	none.register(rpc.EventLifecycle, &other)
	none.register(7, nil)
	old.call(rpc.ProcConnectDomainEventRegister, nil)
	old.call(rpc.ProcConnectDomainEventRegisterAny, rpc.Int(rpc.EventLifecycle).Append(nil))
	old.call(rpc.ProcConnectDomainEventRegisterAny, rpc.Int(rpc.EventMetadataChange).Append(nil))
	two.register(rpc.EventMetadataChange, &g)
	two.register(rpc.EventLifecycle, &g)
	p := protectedGuest(t, h, control.Primary, control.Protected)
	two.want("13 lifecycle g1#0 4/1", "12 metadata g1")
	old.want("legacy lifecycle g1#0 4/1", "legacy lifecycle g1#0 4/1")
	none.quiet()
	two.call(rpc.ProcConnectDomainEventCallbackDeregisterAny, rpc.Int(13).Append(nil))
	old.call(rpc.ProcConnectDomainEventDeregister, nil)
	p.exit("")
	two.want("12 metadata g1")
	old.want("legacy lifecycle g1#0 4/0")
	old.call(rpc.ProcConnectDomainEventDeregisterAny, rpc.Int(rpc.EventLifecycle).Append(nil))
	two.call(rpc.ProcConnectDomainEventCallbackDeregisterAny, rpc.Int(12).Append(nil))
	protectedGuest(t, h, control.Primary, control.Protected)
	two.quiet()
	old.quiet()
}

// TestEventsBaseline: what was so before somebody registered is no event, and a
// registration that libvirtd refuses is none.
func TestEventsBaseline(t *testing.T) {
	h := newHost(t, "xen1", numbering(t).path)
	p := protectedGuest(t, h, control.Primary, control.Protected)
	l := newListener(t, h.rw)
	l.register(rpc.EventLifecycle, nil)
	l.register(rpc.EventJobCompleted, nil)
	l.quiet()
	// The process dies without a last word.
	p.cancel()
	<-p.served
	l.want("10 lifecycle g1#0 4/0", "11 completed g1 0 its process has ended and left no reason")

	refusing := newHost(t, "xen1", answering(t, map[rpc.Procedure]any{rpc.ProcConnectDomainEventCallbackRegisterAny: noDomain}).path)
	r := newListener(t, refusing.rw)
	if a := r.call(rpc.ProcConnectDomainEventCallbackRegisterAny, (&rpc.EventRegisterArgs{}).Append(nil)); a.Status != rpc.Failed {
		t.Errorf("%+v", a)
	}
	protectedGuest(t, refusing, control.Primary, control.Protected)
	r.quiet()
}

// TestEventsUnread: a client that does not read holds up nobody.
func TestEventsUnread(t *testing.T) {
	h := newHost(t, "xen1", numbering(t).path)
	u := &subscriber{queue: make(chan *event, maxEvents)}
	h.d.hub.join(h.d, u)
	for range 3 * maxEvents {
		h.d.hub.publish(h.d, &event{id: rpc.EventMetadataChange, dom: g1(t)})
	}
	if len(u.queue) != maxEvents {
		t.Errorf("%d wait", len(u.queue))
	}
	h.d.hub.leave(u)
	h.d.hub.mu.Lock()
	defer h.d.hub.mu.Unlock()
	select {
	case <-h.d.hub.done:
	default:
		t.Error("the watch goes on for nobody")
	}
}

// TestEventsNextGeneration: a protection that began anew between two looks has
// ended before.
func TestEventsNextGeneration(t *testing.T) {
	h := newHost(t, "xen1", numbering(t).path)
	l := newListener(t, h.rw)
	l.register(rpc.EventLifecycle, nil)
	l.register(rpc.EventJobCompleted, nil)
	p := protectedGuest(t, h, control.Primary, control.Protected)
	l.want("10 lifecycle g1#0 4/1")
	p.tell(func(st *control.Status) { st.Generation++ })
	l.want("10 lifecycle g1#0 4/0", "11 completed g1 0 another protection of the guest has begun", "10 lifecycle g1#0 4/1")
}
