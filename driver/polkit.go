package driver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"

	"kemari/driver/rpc"
)

const (
	polkitName  = "org.freedesktop.PolicyKit1"
	polkitPath  = "/org/freedesktop/PolicyKit1/Authority"
	polkitIface = "org.freedesktop.PolicyKit1.Authority"
)

// Polkit is the Authority on the system's D-Bus. The zero value is ready; it
// connects when it is first asked, and again when the connection was lost. All
// questions share the connection: the bus gives one user only so many.
type Polkit struct {
	mu     sync.Mutex
	conn   *dbus.Conn
	closed bool
	serial uint64

	timeout time.Duration // another than busTimeout
}

// Close ends the connection. Who still waits for an answer gets none.
func (p *Polkit) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	if p.conn == nil {
		return nil
	}
	return p.conn.Close()
}

// bus returns the connection and a name for one question.
func (p *Polkit) bus() (*dbus.Conn, string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, "", dbus.ErrClosed
	}
	if p.conn == nil || !p.conn.Connected() {
		ctx, cancel := context.WithCancel(context.Background())
		late := time.AfterFunc(cmp.Or(p.timeout, busTimeout), cancel)
		c, err := dbus.ConnectSystemBus(dbus.WithContext(ctx))
		if !late.Stop() && err == nil {
			err = context.DeadlineExceeded // and c is being closed
		}
		if err != nil {
			cancel()
			return nil, "", err
		}
		p.conn = c
	}
	p.serial++
	return p.conn, fmt.Sprintf("virtkemarid-%d", p.serial), nil
}

// busTimeout bounds the wait for the bus itself.
const busTimeout = 5 * time.Second

// Present says whether polkit runs or would be started. If the bus does not say,
// it is taken to be there, so that a failure does not open a way around it.
func (p *Polkit) Present(ctx context.Context) bool {
	conn, _, err := p.bus()
	if errors.Is(err, os.ErrNotExist) {
		return false // this host has no bus
	}
	if err != nil {
		return true
	}
	ctx, cancel := context.WithTimeout(ctx, busTimeout)
	defer cancel()
	var running bool
	if err := conn.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.NameHasOwner", 0, polkitName).Store(&running); err != nil || running {
		return true
	}
	var startable []string
	if err := conn.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.ListActivatableNames", 0).Store(&startable); err != nil {
		return true
	}
	for _, n := range startable {
		if n == polkitName {
			return true
		}
	}
	return false
}

// Check implements Authority. Its errors are those of libvirtd, by which virsh
// knows when to offer an agent that asks for the password.
func (p *Polkit) Check(ctx context.Context, s Subject, action string) error {
	conn, question, err := p.bus()
	if err != nil {
		return authFailed("polkit cannot be asked: %v", err)
	}
	// Rules may look at the details. Only from root does polkit take any.
	details := map[string]string{}
	if os.Geteuid() == 0 {
		details["connect_driver"] = "kemari"
	}
	subject := struct {
		Kind    string
		Details map[string]dbus.Variant
	}{"unix-process", map[string]dbus.Variant{
		"pid":        dbus.MakeVariant(s.PID),
		"start-time": dbus.MakeVariant(s.Start),
		"uid":        dbus.MakeVariant(int32(s.UID)),
	}}
	const mayAskUser = uint32(1)
	var result struct {
		Authorized, Challenge bool
		Details               map[string]string
	}
	authority := conn.Object(polkitName, polkitPath)
	err = authority.CallWithContext(ctx, polkitIface+".CheckAuthorization", 0, subject, action, details, mayAskUser, question).Store(&result)
	switch {
	case ctx.Err() != nil:
		// The client has gone: take the window from its screen.
		authority.Call(polkitIface+".CancelCheckAuthorization", dbus.FlagNoReplyExpected, question)
		return context.Cause(ctx)
	case err != nil:
		return authFailed("polkit does not answer: %v", err)
	case result.Authorized:
		return nil
	case result.Details["polkit.dismissed"] == "true":
		return &rpc.Error{
			Code: rpc.CodeAuthCancelled, From: rpc.FromPolkit,
			Message: "authentication cancelled: user cancelled authentication process",
		}
	case result.Challenge:
		return &rpc.Error{
			Code: rpc.CodeAuthUnavailable, From: rpc.FromPolkit,
			Message: fmt.Sprintf("authentication unavailable: no polkit agent available to authenticate action '%s'", action),
		}
	}
	return authFailed("access denied by policy")
}
