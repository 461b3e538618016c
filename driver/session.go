package driver

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"kemari/driver/rpc"
)

const (
	// pingEvery and silence are libvirtd's keepalive_interval, and that times
	// keepalive_count and one more.
	pingEvery = 5 * time.Second
	silence   = 30 * time.Second
	// maxCalls bounds the calls of one client that we are at work on ourselves.
	maxCalls = 16
)

// The causes of a session's end.
var (
	errClientGone   = errors.New("the client has disconnected")
	errClientSilent = errors.New("the client does not answer any more")
	errUpstreamGone = errors.New("libvirtd has closed the connection")
)

// session is one client and its connection to libvirtd. One goroutine reads the
// client, one libvirtd, and each call that we answer ourselves and that may take
// time has its own. Whoever writes holds the side's lock for one frame, so a
// client that does not read blocks its own session and no other.
type session struct {
	d      *Driver
	log    *slog.Logger
	client net.Conn
	end    context.CancelCauseFunc // ends the session
	// serving lasts longer: what goes on for a guest when its client has gone.
	serving context.Context

	cred *peerCred // nil if the kernel does not say

	// The reader of the client alone uses these.
	ro        bool // nothing may be changed
	socketRO  bool
	keepalive bool
	name      string // what the client calls its connection
	calls     sync.WaitGroup
	slots     chan struct{}

	toClient sync.Mutex

	connecting sync.Mutex
	upstream   net.Conn // written with connecting and mu held
	toUpstream sync.Mutex

	inter interposed

	mu       sync.Mutex
	acc      access
	denied   error                     // why acc is denied
	waiting  map[rpc.Serial]rpc.Header // calls that libvirtd has not answered yet
	prepared map[rpc.UUID]uint64       // shadows made for this client, by generation
	// switching are the guests whose switchover the client manages, having begun it here.
	switching map[rpc.UUID]bool
	// expected are those that the client prepares to come here, by name.
	expected map[string]switchCookie
}

func newSession(d *Driver, c net.Conn, cred *peerCred, ro bool) *session {
	return &session{
		d: d, client: c, cred: cred, ro: ro, socketRO: ro, name: uri,
		log:      d.log.With("client", cred),
		slots:    make(chan struct{}, maxCalls),
		waiting:  make(map[rpc.Serial]rpc.Header),
		prepared: make(map[rpc.UUID]uint64),
	}
}

// run serves the client until either side or ctx ends, and returns when all that
// belongs to the session has ended.
func (s *session) run(ctx context.Context) {
	s.serving = ctx
	ctx, s.end = context.WithCancelCause(ctx)
	stop := context.AfterFunc(ctx, s.closeConns)
	err := s.readClient(ctx)
	s.end(err)
	stop()
	s.closeConns()
	s.calls.Wait()
	s.dropShadows()
	level := slog.LevelInfo
	if why := context.Cause(ctx); errors.Is(why, errClientGone) || why == errUpstreamGone {
		level = slog.LevelDebug // that is how every session ends
	}
	s.log.Log(ctx, level, "client disconnected", "cause", context.Cause(ctx))
}

func (s *session) closeConns() {
	s.client.Close()
	// Not under toUpstream, which a blocked write holds; s.mu guards the field.
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.upstream != nil {
		s.upstream.Close()
	}
}

// Read reads the client, not longer than it may be silent.
func (s *session) Read(b []byte) (int, error) {
	if s.keepalive {
		s.client.SetReadDeadline(time.Now().Add(silence))
	}
	return s.client.Read(b)
}

func (s *session) readClient(ctx context.Context) error {
	r := bufio.NewReader(s) // so that a short frame is one system call
	for {
		p, err := rpc.ReadPacket(r)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return errClientSilent
		case errors.Is(err, rpc.ErrFrame):
			return err
		case err != nil:
			return errClientGone
		}
		if err := s.fromClient(ctx, p); err != nil {
			return err
		}
	}
}

// fromClient deals with one frame. An error ends the session.
func (s *session) fromClient(ctx context.Context, p *rpc.Packet) error {
	if p.Program == rpc.ProgramKeepalive {
		if p.Procedure == rpc.KeepalivePing {
			return s.reply(rpc.Keepalive(rpc.KeepalivePong))
		}
		return nil
	}
	if p.Type == rpc.CallWithFDs {
		// Bytes that carry the descriptors follow the frame, so after it nothing
		// more can be understood.
		s.reply(rpc.ErrorReply(p.Header, errNoFDs))
		return errNoFDs
	}
	if ok, err := s.admit(ctx, p); !ok {
		return err
	}
	switch p.Program {
	case rpc.ProgramRemote:
		if p.Version == 1 && p.Type == rpc.Call {
			if done, err := s.intercept(ctx, p); done || err != nil {
				return err
			}
		}
		return s.forward(ctx, p)
	case rpc.ProgramQEMU, rpc.ProgramLXC:
		return s.forward(ctx, p)
	case rpc.ProgramKemari:
		if !s.ro && p.Version == peerVersion && p.Type == rpc.Call {
			s.long(ctx, p, func(ctx context.Context) ([]byte, error) { return s.peerCall(ctx, p) })
			return nil
		}
	}
	if p.Type != rpc.Call {
		return nil
	}
	return s.fail(p, &rpc.Error{
		Code: rpc.CodeRPC, From: rpc.FromRPC,
		Message: fmt.Sprintf("Cannot find program %d version %d", uint32(p.Program), p.Version),
	})
}

// long answers the call p with what f returns, while the session goes on.
func (s *session) long(ctx context.Context, p *rpc.Packet, f func(context.Context) ([]byte, error)) {
	s.async(ctx, p, func(ctx context.Context) {
		payload, err := f(ctx)
		if err != nil {
			s.fail(p, err)
			return
		}
		s.answer(p, payload)
	})
}

func (s *session) async(ctx context.Context, p *rpc.Packet, f func(context.Context)) {
	select {
	case s.slots <- struct{}{}:
	default:
		s.fail(p, refuse(rpc.CodeOperationFailed, fmt.Sprintf("%d calls of this client are still at work", maxCalls), "wait for them to end"))
		return
	}
	s.calls.Go(func() {
		defer func() { <-s.slots }()
		f(ctx)
	})
}

func (s *session) answer(p *rpc.Packet, payload []byte) error {
	return s.reply(&rpc.Packet{Header: p.Reply(rpc.OK), Payload: payload})
}

func (s *session) fail(p *rpc.Packet, err error) error {
	return s.reply(rpc.ErrorReply(p.Header, rpcError(err)))
}

// reply sends one frame to the client.
func (s *session) reply(p *rpc.Packet) error {
	s.toClient.Lock()
	defer s.toClient.Unlock()
	if err := rpc.WritePacket(s.client, p); err != nil {
		// Half a frame may be out. The reader sees the end and says so.
		s.client.Close()
		return errClientGone
	}
	return nil
}

// forward sends one frame to libvirtd.
func (s *session) forward(ctx context.Context, p *rpc.Packet) error {
	if err := s.connect(ctx); err != nil {
		if p.Type == rpc.Call {
			return s.fail(p, err)
		}
		return err
	}
	if p.Type == rpc.Call {
		s.mu.Lock()
		s.waiting[p.Serial] = p.Header
		s.mu.Unlock()
	}
	s.toUpstream.Lock()
	defer s.toUpstream.Unlock()
	if err := rpc.WritePacket(s.upstream, p); err != nil {
		// The reader of libvirtd tells the client.
		s.upstream.Close()
	}
	return nil
}

// connect connects to libvirtd if that has not been done. What is ours works
// without libvirtd, so it waits until something is for it.
func (s *session) connect(ctx context.Context) error {
	s.connecting.Lock()
	defer s.connecting.Unlock()
	if s.upstream != nil {
		return nil
	}
	if s.foreign() {
		return errNotOpen // openAs has to come first
	}
	c, err := s.d.cfg.enterUpstream(ctx, s.socketRO)
	if err != nil {
		return err
	}
	s.adopt(ctx, c)
	return nil
}

// adopt makes c the session's connection to libvirtd. The caller holds
// s.connecting.
func (s *session) adopt(ctx context.Context, c net.Conn) {
	s.mu.Lock()
	s.upstream = c
	s.mu.Unlock()
	if ctx.Err() != nil {
		c.Close() // closeConns may have run before the field was set
	}
	s.calls.Go(func() {
		err := s.readUpstream(c)
		s.failWaiting(err)
		s.end(err)
	})
}

func (s *session) readUpstream(c net.Conn) error {
	r := bufio.NewReader(c)
	for {
		p, err := rpc.ReadPacket(r)
		switch {
		case err == io.EOF:
			return errUpstreamGone
		case err != nil:
			return fmt.Errorf("%w: %w", errUpstreamGone, err)
		}
		if p.Program == rpc.ProgramKeepalive {
			if p.Procedure == rpc.KeepalivePing {
				s.toUpstream.Lock()
				err = rpc.WritePacket(c, rpc.Keepalive(rpc.KeepalivePong))
				s.toUpstream.Unlock()
				if err != nil {
					return fmt.Errorf("%w: %w", errUpstreamGone, err)
				}
			}
			continue
		}
		if p.Type == rpc.ReplyWithFDs {
			// Comes only for what no driver of Xen can do: no other call that asks for
			// descriptors is passed on.
			return fmt.Errorf("%w: it sent file descriptors", errUpstreamGone)
		}
		if p.Type == rpc.Reply {
			s.mu.Lock()
			delete(s.waiting, p.Serial)
			s.mu.Unlock()
			if p = s.replied(p); p == nil {
				continue
			}
		}
		if err := s.reply(p); err != nil {
			return err
		}
	}
}

// failWaiting answers the calls that libvirtd will not answer any more.
func (s *session) failWaiting(why error) {
	s.mu.Lock()
	waiting := s.waiting
	s.waiting = make(map[rpc.Serial]rpc.Header)
	s.mu.Unlock()
	for _, h := range waiting {
		e := &rpc.Error{
			Code: rpc.CodeRPC, From: rpc.FromRPC,
			Message: oneLine(why.Error()) + "; connect again once it runs, see systemctl status libvirtd",
		}
		if s.reply(rpc.ErrorReply(h, e)) != nil {
			return
		}
	}
}

// ping shows a client that asked for it that we live, and makes it show that it
// does: a host that has lost its network closes no connection.
func (s *session) ping(ctx context.Context) {
	t := time.NewTicker(pingEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if s.reply(rpc.Keepalive(rpc.KeepalivePing)) != nil {
				return
			}
		}
	}
}
