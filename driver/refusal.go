package driver

import (
	"errors"
	"fmt"
	"strings"

	"kemari/driver/rpc"
	"kemari/xml"
)

// Refusal is why something was not done and what to do about it, in one line,
// since that is what virsh prints.
type Refusal struct {
	Code   rpc.Code
	Text   string
	Remedy string // may be empty
}

func (r *Refusal) Error() string {
	if r.Remedy == "" {
		return r.Text
	}
	return r.Text + "; " + r.Remedy
}

func refuse(code rpc.Code, text, remedy string) error {
	return &Refusal{Code: code, Text: text, Remedy: remedy}
}

// refuseAll is one Refusal with all the reasons, so that nobody has to find them
// one by one.
func refuseAll(rs []xml.Reason) error {
	if len(rs) == 0 {
		return nil
	}
	var b strings.Builder
	for i, r := range rs {
		if i > 0 {
			b.WriteString("; ")
		}
		if len(rs) > 1 {
			fmt.Fprintf(&b, "(%d) ", i+1)
		}
		b.WriteString(r.String())
	}
	return refuse(rpc.CodeConfigUnsupp, b.String(), "")
}

// rpcError is err as a client is told it.
func rpcError(err error) error {
	e := &rpc.Error{Code: rpc.CodeOperationFailed, From: rpc.FromDomain, Message: oneLine(err.Error())}
	var known *rpc.Error
	var r *Refusal
	switch {
	case errors.As(err, &r):
		e.Code = r.Code
	case errors.As(err, &known):
		e.Code, e.From = known.Code, known.From
	case errors.Is(err, errAborted):
		e.Code = rpc.CodeAborted
	case errors.Is(err, ErrNoGuest):
		e.Code = rpc.CodeNoDomain
	case errors.Is(err, rpc.ErrXDR):
		e.Code, e.From = rpc.CodeRPC, rpc.FromRPC
	}
	return e
}

func oneLine(s string) string {
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
}
