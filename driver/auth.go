package driver

import (
	"context"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"

	"kemari/driver/rpc"
)

// Subject is a process that asks for something.
type Subject struct {
	PID   uint32
	Start uint64 // as in /proc/PID/stat
	UID   uint32
}

// Authority says what processes may do. Both methods block until ctx ends and are
// safe for concurrent use.
type Authority interface {
	// Present says whether there is one on this host that can be asked.
	Present(ctx context.Context) bool
	// Check returns nil if s may do what action stands for. It may have to ask the
	// user for a password first. An *rpc.Error is passed on as it is.
	Check(ctx context.Context, s Subject, action string) error
}

// The actions that an Authority is asked about, which are libvirt's own: who may
// use xen:///system may use kemari:///system.
const (
	actionManage  = "org.libvirt.unix.manage"
	actionMonitor = "org.libvirt.unix.monitor"
)

// Group is whose members may do everything where there is no Authority.
const Group = "libvirt"

// access is how far a client has come.
type access int

const (
	undecided access = iota
	denied
	mustAuthenticate // nothing but authentication is answered
	authenticating   // nor that
	granted
)

var errMustAuthenticate = &rpc.Error{Code: rpc.CodeRPC, From: rpc.FromRPC, Message: "authentication required"}

func authFailed(format string, a ...any) *rpc.Error {
	return &rpc.Error{
		Code: rpc.CodeAuthFailed, From: rpc.FromPolkit,
		Message: "authentication failed: " + fmt.Sprintf(format, a...),
	}
}

// decide says what a client may do, before anything of it is looked at:
//
//   - Root may do everything, and so may who runs the driver as another user.
//   - With an Authority, others must authenticate there, readers too.
//   - Without one, everybody may read, and members of the group may do the rest.
//
// It does not rely on the socket's mode, which an administrator may widen.
func (d *Driver) decide(ctx context.Context, c *peerCred, ro bool) (access, error) {
	switch {
	case c == nil:
		return denied, authFailed("%v", errNoCred)
	case c.uid == 0 || c.uid == uint32(os.Geteuid()):
		return granted, nil
	case d.cfg.Authority != nil && (d.cfg.RequireAuthority || d.cfg.Authority.Present(ctx)):
		return mustAuthenticate, nil
	case ro || d.inGroup(c):
		return granted, nil
	}
	return denied, authFailed("there is no polkit to ask, and user %d is not a member of the group %s", c.uid, Group)
}

// inGroup goes by the groups the client had when it connected.
func (d *Driver) inGroup(c *peerCred) bool {
	g, err := d.lookupGroup(Group)
	return err == nil && (c.gid == g || slices.Contains(c.groups, g))
}

func lookupGroup(name string) (uint32, error) {
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(g.Gid, 10, 32)
	return uint32(n), err
}

// admit says whether the frame p of the client may go on. If not, it has been
// answered. Nobody but the reader of the client calls it.
func (s *session) admit(ctx context.Context, p *rpc.Packet) (bool, error) {
	acc, why := s.access(ctx)
	isCall := p.Type == rpc.Call
	if isCall && p.Program == rpc.ProgramRemote && p.Version == 1 {
		switch p.Procedure {
		case rpc.ProcAuthList:
			return false, s.authList(p, acc, why)
		case rpc.ProcAuthPolkit:
			return false, s.authPolkit(ctx, p, acc, why)
		case rpc.ProcAuthSASLInit, rpc.ProcAuthSASLStart, rpc.ProcAuthSASLStep:
			return false, s.fail(p, authFailed("SASL is not offered here"))
		}
	}
	var refusal error
	switch {
	case acc == denied:
		refusal = why
	case acc != granted:
		refusal = errMustAuthenticate
	case s.ro && forLibvirt(p.Program) && !rpc.ReadOnly(p):
		refusal = &rpc.Error{
			Code: rpc.CodeOperationDenied, From: rpc.FromRPC,
			Message: "operation forbidden: read only access prevents " + rpc.CallName(p),
		}
	default:
		return true, nil
	}
	if isCall {
		return false, s.fail(p, refusal)
	}
	return false, nil // a part of a call that was refused
}

// forLibvirt says whether what is of the program may be passed on.
func forLibvirt(p rpc.Program) bool {
	return p == rpc.ProgramRemote || p == rpc.ProgramQEMU || p == rpc.ProgramLXC
}

// access returns how far the client has come; the first time it finds out.
func (s *session) access(ctx context.Context) (access, error) {
	s.mu.Lock()
	acc, why := s.acc, s.denied
	s.mu.Unlock()
	if acc != undecided {
		return acc, why
	}
	acc, why = s.d.decide(ctx, s.cred, s.socketRO)
	s.grant(acc, why)
	if why != nil {
		s.log.Info("client refused", "error", why)
	}
	return acc, why
}

func (s *session) grant(acc access, why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.acc, s.denied = acc, why
}

// authList says what the client has to go through.
func (s *session) authList(p *rpc.Packet, acc access, why error) error {
	switch acc {
	case denied:
		return s.fail(p, why)
	case mustAuthenticate, authenticating:
		return s.answer(p, (&rpc.AuthListRet{rpc.AuthPolkit}).Append(nil))
	}
	return s.answer(p, (&rpc.AuthListRet{rpc.AuthNone}).Append(nil))
}

// authPolkit asks the authority about the client. Asking may include asking the
// user, so it takes its time.
func (s *session) authPolkit(ctx context.Context, p *rpc.Packet, acc access, why error) error {
	switch acc {
	case denied:
		return s.fail(p, why)
	case granted:
		return s.answer(p, rpc.Int(1).Append(nil))
	case authenticating:
		return s.fail(p, authFailed("it has begun already"))
	}
	action := actionManage
	if s.socketRO {
		action = actionMonitor
	}
	c := s.cred
	if c.start == 0 {
		return s.fail(p, authFailed("process %d has ended", c.pid))
	}
	s.grant(authenticating, nil)
	s.calls.Go(func() {
		err := s.d.cfg.Authority.Check(ctx, Subject{PID: uint32(c.pid), Start: c.start, UID: c.uid}, action)
		if err != nil {
			s.log.Info("client refused", "action", action, "error", err)
			s.grant(mustAuthenticate, nil)
			s.fail(p, err)
			return
		}
		s.log.Debug("client authorised", "action", action)
		s.grant(granted, nil)
		s.answer(p, rpc.Int(1).Append(nil))
	})
	return nil
}
