package driver

import (
	"context"
	"sync"

	"kemari/driver/rpc"
)

// maxQueries bounds the questions of one client that wait for something else than
// libvirtd. Beyond it the client is read no further, as it would be by libvirtd.
const maxQueries = 64

// interposed is what a session does to answers of libvirtd. The zero value works.
type interposed struct {
	mu      sync.Mutex
	replies map[rpc.Serial]replyHook
	queries chan struct{}
	events  *subscriber // made with the first registration
	protect bool        // opened with kemari=1; the reader of the client alone uses it
}

// replyHook gets libvirtd's answer to a call before the client does. It runs where
// libvirtd is read and must not block; nil says that it answers by itself.
type replyHook func(*rpc.Packet) *rpc.Packet

// onReply sets what is done with the answer to p, which is about to be forwarded.
func (s *session) onReply(p *rpc.Packet, f replyHook) {
	s.inter.mu.Lock()
	defer s.inter.mu.Unlock()
	if s.inter.replies == nil {
		s.inter.replies = make(map[rpc.Serial]replyHook)
	}
	s.inter.replies[p.Serial] = f
}

// replied is called with every reply of libvirtd. It returns what the client gets,
// nil if it gets that later.
func (s *session) replied(p *rpc.Packet) *rpc.Packet {
	s.inter.mu.Lock()
	f := s.inter.replies[p.Serial]
	delete(s.inter.replies, p.Serial)
	s.inter.mu.Unlock()
	if f == nil {
		return p
	}
	return f(p)
}

// onSuccess is onReply for a hook that only changes the payload of an answer that
// is no error. If it cannot, the client gets the answer as it is: it has nothing of
// ours in it then, which is better than no answer.
func (s *session) onSuccess(p *rpc.Packet, f func(payload []byte) ([]byte, error)) {
	s.onReply(p, func(r *rpc.Packet) *rpc.Packet {
		if r.Status != rpc.OK {
			return r
		}
		b, err := f(r.Payload)
		if err != nil || len(b) > rpc.MaxPayload {
			s.log.Warn("libvirtd's answer is passed on as it is", "procedure", r.Procedure, "error", err)
			return r
		}
		r.Payload = b
		return r
	})
}

// interpose deals with what a protection changes for libvirt's clients in calls that
// are there without it. Like intercept it says whether the call has been answered.
func (s *session) interpose(ctx context.Context, p *rpc.Packet) (bool, error) {
	// What is only read comes first, and is the same for read-only clients.
	switch p.Procedure {
	case rpc.ProcDomainGetState, rpc.ProcDomainGetInfo, rpc.ProcDomainIsActive:
		return s.shadowState(ctx, p)
	case rpc.ProcConnectListAllDomains:
		return s.listDomains(ctx, p)
	case rpc.ProcDomainGetJobInfo, rpc.ProcDomainGetJobStats:
		return s.jobInfo(ctx, p)
	case rpc.ProcConnectGetAllDomainStats:
		return s.domainStats(ctx, p)
	case rpc.ProcConnectGetCapabilities, rpc.ProcConnectGetDomainCapabilities:
		return s.announce(p)
	case rpc.ProcConnectDomainEventRegister, rpc.ProcConnectDomainEventRegisterAny, rpc.ProcConnectDomainEventCallbackRegisterAny:
		return s.register(ctx, p)
	case rpc.ProcConnectDomainEventDeregister, rpc.ProcConnectDomainEventDeregisterAny, rpc.ProcConnectDomainEventCallbackDeregisterAny:
		return s.deregister(p)
	}
	if done, err := s.moveElement(p); done || err != nil || s.ro {
		return done, err
	}
	switch p.Procedure {
	case rpc.ProcDomainDefineXML, rpc.ProcDomainDefineXMLFlags:
		return s.define(ctx, p)
	case rpc.ProcDomainSetMetadata:
		return s.setMetadata(ctx, p)
	case rpc.ProcDomainCreateXML:
		return s.create(ctx, p)
	case rpc.ProcDomainDestroy, rpc.ProcDomainDestroyFlags, rpc.ProcDomainUndefine, rpc.ProcDomainUndefineFlags:
		return s.endShadow(ctx, p)
	}
	if what, ok := shadowRefused[p.Procedure]; ok {
		return s.guardShadow(ctx, p, what)
	}
	return s.migrate(ctx, p)
}

// query runs f beside the session, which goes on. Unlike async it never refuses: it
// is for calls that libvirtd would answer however many there are.
func (s *session) query(ctx context.Context, f func(context.Context)) {
	s.inter.mu.Lock()
	if s.inter.queries == nil {
		s.inter.queries = make(chan struct{}, maxQueries)
	}
	slots := s.inter.queries
	s.inter.mu.Unlock()
	select {
	case slots <- struct{}{}:
	case <-ctx.Done():
		return
	}
	s.calls.Go(func() {
		defer func() { <-slots }()
		f(ctx)
	})
}
