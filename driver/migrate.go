package driver

import (
	"context"
	"fmt"
	"net/url"
	"strings"

	"kemari/driver/rpc"
)

// A client that cannot set VIR_MIGRATE_KEMARI asks for it in the destination's URI:
// kemari+ssh://HOST/system?kemari=1. Its scheme may then be Xen's own.

// asksKemari returns the URI without kemari=1, and whether it was there.
func asksKemari(s string) (string, bool, error) {
	if !strings.Contains(s, "kemari=") {
		return s, false, nil
	}
	u, err := url.Parse(s)
	if err != nil {
		return s, false, nil // whoever needs it says so
	}
	q := u.Query()
	v, ok := q["kemari"]
	if !ok {
		return s, false, nil
	}
	if len(v) != 1 || v[0] != "0" && v[0] != "1" {
		return "", false, refuse(rpc.CodeInvalidArg, fmt.Sprintf("%q asks for kemari=%s", s, strings.Join(v, ",")), "say kemari=1 to protect the guest, or leave it out")
	}
	q.Del("kemari")
	u.RawQuery = q.Encode()
	if scheme, transport, ok := strings.Cut(u.Scheme, "+"); ok && (scheme == "xen" || scheme == "xenkemari") {
		u.Scheme = "kemari+" + transport
	}
	return u.String(), v[0] == "1", nil
}

// migrate turns every way to ask for protection into the one that intercept knows,
// and refuses what would be a migration that the client manages.
func (s *session) migrate(ctx context.Context, p *rpc.Packet) (bool, error) {
	switch p.Procedure {
	case rpc.ProcDomainMigratePerform3Params:
		a, err := rpc.DecodeMigratePerformArgs(p.Payload)
		if err != nil || a.URI == nil {
			return false, nil
		}
		uri, ask, err := asksKemari(*a.URI)
		if err != nil {
			return true, s.fail(p, err)
		}
		if uri != *a.URI {
			a.URI = &uri
			if ask {
				a.Flags |= rpc.MigrateKemari
			}
			p.Payload = a.Append(nil)
		}
	case rpc.ProcDomainMigratePerform3:
		a, err := rpc.DecodeMigratePerform3Args(p.Payload)
		if err != nil {
			return false, nil
		}
		uri, ask := "", false
		if a.ConnURI != nil {
			if uri, ask, err = asksKemari(*a.ConnURI); err != nil {
				return true, s.fail(p, err)
			}
			a.ConnURI = &uri
		}
		if !ask && a.Flags&rpc.MigrateKemari == 0 {
			p.Payload = a.Append(nil)
			return false, nil
		}
		if a.Flags>>32 != 0 {
			return true, s.fail(p, refuse(rpc.CodeArgumentUnsupp, fmt.Sprintf("flags %#x are not known", a.Flags), "leave them out"))
		}
		args := performArgsOf(a)
		s.long(ctx, p, func(ctx context.Context) ([]byte, error) {
			return rpc.Opaque(nil).Append(nil), s.d.protect(ctx, args)
		})
		return true, nil
	case rpc.ProcDomainMigratePrepare2, rpc.ProcDomainMigratePrepare3, rpc.ProcDomainMigratePrepare3Params, rpc.ProcDomainMigratePrepareTunnel3Params:
		// The client has opened us as the destination of a migration it manages.
		if s.inter.protect {
			return true, s.fail(p, errManaged)
		}
	}
	return false, nil
}

// performArgsOf are the arguments of the older form in the newer one.
func performArgsOf(a *rpc.MigratePerform3Args) *rpc.MigratePerformArgs {
	n := &rpc.MigratePerformArgs{Domain: a.Domain, URI: a.ConnURI, Flags: uint32(a.Flags) | rpc.MigrateKemari}
	for _, f := range []struct {
		name string
		v    *string
	}{{"destination_xml", a.XML}, {"migrate_uri", a.URI}, {"destination_name", a.Name}} {
		if f.v != nil {
			n.Params = append(n.Params, rpc.TypedParam{Field: f.name, Type: rpc.ParamString, String: *f.v})
		}
	}
	return n
}
