package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"time"

	"kemari/driver/rpc"
	"kemari/migrate/daemon"
)

// The names that a client may have for us; it is told the one it used.
const (
	uri = "kemari:///system"
	// Some clients, virt-manager among them, treat a connection as one to Xen only
	// if its scheme begins with xen.
	uriXen = "xenkemari:///system"
)

// checkName accepts every way to say kemari:///system, and returns the plain one.
// What stands before the path, and the query, was for the client to find us.
func checkName(name string) (string, error) {
	bad := func(why string) error {
		return refuse(rpc.CodeInvalidArg, fmt.Sprintf("%q is not a connection of the kemari driver: %s", name, why), "use "+uri)
	}
	u, err := url.Parse(name)
	if err != nil {
		return uri, bad("it is not a URI")
	}
	scheme, _, _ := strings.Cut(u.Scheme, "+")
	plain := map[string]string{"kemari": uri, "xenkemari": uriXen}[scheme]
	switch {
	case plain == "":
		return uri, bad("the scheme is not kemari")
	case u.Path != "/system":
		return uri, bad("the path is not /system")
	}
	return plain, nil
}

// upstreamSockets returns where libvirt's daemon may listen, the best choice first.
func (c *Config) upstreamSockets(ro bool) []string {
	set := c.UpstreamSocket
	if ro && c.UpstreamSocketRO != "" {
		set = c.UpstreamSocketRO
	}
	if set != "" {
		return []string{set}
	}
	return daemon.Sockets(cmp.Or(c.libvirtDir, daemon.Dir), c.UpstreamURI, ro)
}

// enterUpstream connects to libvirt's daemon and goes through its authentication. A
// daemon that has polkit decide lets root in only after root has asked how to
// authenticate, and refuses everything before.
func (c *Config) enterUpstream(ctx context.Context, ro bool) (net.Conn, error) {
	conn, err := daemon.Enter(ctx, c.upstreamSockets(ro), func(conn net.Conn) error {
		stop := context.AfterFunc(ctx, func() { conn.Close() })
		defer stop()
		conn.SetDeadline(time.Now().Add(openTimeout))
		return authenticate(conn)
	})
	var nobody *daemon.DialError
	switch {
	case errors.As(err, &nobody):
		return nil, &rpc.Error{
			Code: rpc.CodeNoConnect, From: rpc.FromRPC,
			Message: fmt.Sprintf("libvirtd cannot be reached: %s; see systemctl status libvirtd", oneLine(err.Error())),
		}
	case err != nil:
		return nil, err
	}
	conn.SetDeadline(time.Time{})
	return conn, nil
}

func authenticate(conn net.Conn) error {
	b, err := callUpstream(conn, rpc.ProcAuthList, nil)
	if err != nil {
		return err
	}
	ways, err := rpc.DecodeAuthListRet(b)
	if err != nil {
		return err
	}
	switch {
	case len(*ways) == 0 || slices.Contains(*ways, rpc.AuthNone):
		return nil
	case slices.Contains(*ways, rpc.AuthPolkit): // we are not root
		_, err := callUpstream(conn, rpc.ProcAuthPolkit, nil)
		return err
	}
	return &rpc.Error{
		Code: rpc.CodeAuthFailed, From: rpc.FromRPC,
		Message: "authentication failed: libvirtd wants a password on its local socket, and there is nobody to ask; set auth_unix_rw to polkit or none in libvirtd.conf",
	}
}

var errNotOpen = &rpc.Error{Code: rpc.CodeInternal, From: rpc.FromRPC, Message: "connection not open"}

// foreign says whether the client is of another user than libvirtd takes us for.
func (s *session) foreign() bool {
	return s.cred != nil && s.cred.uid != 0 && s.cred.uid != uint32(os.Geteuid())
}

// openTimeout bounds the wait for libvirtd to open a connection. Drivers do it in
// no time.
const openTimeout = 30 * time.Second

// openAs opens the connection to libvirtd for a client that is not root, by the
// call p, and tells libvirtd who the client is, so that its access rules and its
// audit see the client and not us. Nothing of the client goes there before that.
func (s *session) openAs(ctx context.Context, p *rpc.Packet) error {
	s.connecting.Lock()
	if s.upstream != nil {
		s.connecting.Unlock()
		return s.forward(ctx, p) // libvirtd will not have a second
	}
	defer s.connecting.Unlock()
	c, err := s.d.cfg.enterUpstream(ctx, s.socketRO)
	if err != nil {
		return s.fail(p, err)
	}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	c.SetDeadline(time.Now().Add(openTimeout))
	b, err := callUpstream(c, rpc.ProcConnectOpen, p.Payload)
	if err == nil {
		_, err = callUpstream(c, rpc.ProcConnectSetIdentity, s.cred.identity().Append(nil))
	}
	if err != nil {
		c.Close()
		return s.fail(p, err)
	}
	c.SetDeadline(time.Time{})
	s.adopt(ctx, c)
	return s.answer(p, b)
}

// callUpstream makes a call on a connection that nobody else uses yet.
func callUpstream(c net.Conn, proc rpc.Procedure, args []byte) ([]byte, error) {
	gone := func(err error) error {
		return &rpc.Error{Code: rpc.CodeRPC, From: rpc.FromRPC, Message: fmt.Sprintf("%v while it was being opened: %v", errUpstreamGone, err)}
	}
	h := rpc.Header{Program: rpc.ProgramRemote, Version: 1, Procedure: proc, Type: rpc.Call, Serial: 1}
	if err := rpc.WritePacket(c, &rpc.Packet{Header: h, Payload: args}); err != nil {
		return nil, gone(err)
	}
	r, err := rpc.ReadPacket(c)
	if err != nil {
		return nil, gone(err)
	}
	if r.Header == h.Reply(rpc.OK) {
		return r.Payload, nil
	}
	if r.Header != h.Reply(rpc.Failed) {
		return nil, gone(fmt.Errorf("%w: no reply", rpc.ErrFrame))
	}
	e, err := rpc.DecodeError(r.Payload)
	if err != nil {
		return nil, gone(err)
	}
	return nil, e
}

// identity is the process in libvirt's terms.
func (p *peerCred) identity() *rpc.SetIdentityArgs {
	number := func(field string, typ rpc.ParamType, n uint64) rpc.TypedParam {
		return rpc.TypedParam{Field: field, Type: typ, Number: n}
	}
	a := &rpc.SetIdentityArgs{Params: []rpc.TypedParam{
		number("unix-user-id", rpc.ParamULLong, uint64(p.uid)),
		number("unix-group-id", rpc.ParamULLong, uint64(p.gid)),
		number("process-id", rpc.ParamLLong, uint64(p.pid)),
		number("process-time", rpc.ParamULLong, p.start),
	}}
	if u, err := user.LookupId(strconv.FormatUint(uint64(p.uid), 10)); err == nil {
		a.Params = append(a.Params, rpc.TypedParam{Field: "user-name", Type: rpc.ParamString, String: u.Username})
	}
	return a
}
