package driver

import (
	"context"
	"errors"

	"kemari/driver/rpc"
)

var errNoFDs = &rpc.Error{
	Code: rpc.CodeUnsupported, From: rpc.FromRPC,
	Message: "file descriptors cannot be passed through " + uri + "; use a connection to xen:///system for this",
}

const useP2P = "use virDomainMigrateToURI3 with VIR_MIGRATE_PEER2PEER, that is virsh migrate --p2p"

// intercept deals with a call of libvirt's own program that is not simply passed
// on, and says whether it did. An error ends the session.
func (s *session) intercept(ctx context.Context, p *rpc.Packet) (bool, error) {
	switch p.Procedure {
	case rpc.ProcConnectOpen:
		return s.open(ctx, p)
	case rpc.ProcConnectGetURI:
		ret := rpc.ConnectGetURIRet{URI: s.name}
		return true, s.answer(p, ret.Append(nil))
	case rpc.ProcConnectSupportsFeature:
		return s.feature(ctx, p)
	case rpc.ProcDomainOpenGraphicsFD:
		return true, s.fail(p, errNoFDs)
	}
	if done, err := s.interpose(ctx, p); done || err != nil {
		return done, err
	}
	if s.ro {
		return false, nil // libvirtd refuses whatever changes anything
	}
	switch p.Procedure {
	case rpc.ProcDomainMigratePerform3Params:
		a, err := rpc.DecodeMigratePerformArgs(p.Payload)
		if err != nil {
			return true, s.fail(p, err)
		}
		if a.Flags&rpc.MigrateKemari != 0 {
			s.long(ctx, p, func(ctx context.Context) ([]byte, error) {
				err := s.d.protect(ctx, a)
				return rpc.Opaque(nil).Append(nil), err // no cookie
			})
			return true, nil
		}
	case rpc.ProcDomainMigrateBegin3Params:
		a, err := rpc.DecodeMigrateBeginArgs(p.Payload)
		if err != nil {
			return true, s.fail(p, err)
		}
		if a.Flags&rpc.MigrateKemari != 0 {
			return true, s.fail(p, errManaged)
		}
	case rpc.ProcDomainMigrateBegin3:
		a, err := rpc.DecodeMigrateBegin3Args(p.Payload)
		if err != nil {
			return true, s.fail(p, err)
		}
		if a.Flags&rpc.MigrateKemari != 0 {
			return true, s.fail(p, errManaged)
		}
	case rpc.ProcDomainAbortJob, rpc.ProcDomainAbortJobFlags:
		return s.abortJob(ctx, p)
	}
	if done, err := s.switchOthers(ctx, p); done || err != nil {
		return done, err
	}
	if g, ok := guarded[p.Procedure]; ok {
		return s.guard(ctx, p, g)
	}
	return false, nil
}

var errManaged = refuse(rpc.CodeArgumentUnsupp, "protection is not a migration that the client manages", useP2P)

// open replaces the name that the client has for us by libvirtd's.
func (s *session) open(ctx context.Context, p *rpc.Packet) (bool, error) {
	a, err := rpc.DecodeConnectOpenArgs(p.Payload)
	if err != nil {
		return true, s.fail(p, err)
	}
	if a.Name != nil && *a.Name != "" {
		if s.name, err = checkName(*a.Name); err != nil {
			return true, s.fail(p, err)
		}
		if _, s.inter.protect, err = asksKemari(*a.Name); err != nil {
			return true, s.fail(p, err)
		}
	}
	a.Name = &s.d.cfg.UpstreamURI
	if s.socketRO {
		a.Flags |= rpc.ConnectRO
	}
	s.ro = s.ro || a.Flags&rpc.ConnectRO != 0
	p.Payload = a.Append(nil)
	if s.foreign() {
		return true, s.openAs(ctx, p)
	}
	return false, nil
}

func (s *session) feature(ctx context.Context, p *rpc.Packet) (bool, error) {
	f, err := rpc.DecodeInt(p.Payload)
	if err != nil {
		return true, s.fail(p, err)
	}
	switch *f {
	case rpc.FeatureFDPassing:
		return true, s.answer(p, rpc.Int(0).Append(nil))
	case rpc.FeatureProgramKeepalive:
		// As in libvirtd the question starts the pings. libvirtd itself is not
		// asked: it would ping us, which proves nothing about the client.
		if !s.keepalive {
			s.keepalive = true
			s.calls.Go(func() { s.ping(ctx) })
		}
		return true, s.answer(p, rpc.Int(1).Append(nil))
	}
	return false, nil
}

// abortJob ends a protection if there is one here, on either side; else the job
// is libvirtd's.
func (s *session) abortJob(ctx context.Context, p *rpc.Packet) (bool, error) {
	a, err := rpc.DecodeAbortJobArgs(p.Payload, p.Procedure == rpc.ProcDomainAbortJobFlags)
	if err != nil {
		return true, s.fail(p, err)
	}
	s.async(ctx, p, func(ctx context.Context) {
		err := s.d.abort(ctx, a.Domain)
		switch {
		case errors.Is(err, errNothingHere):
			s.forward(ctx, p)
		case err != nil:
			s.fail(p, err)
		default:
			s.answer(p, nil)
		}
	})
	return true, nil
}
