package driver

import (
	"context"

	"kemari/driver/rpc"
	"kemari/migrate/control"
)

// The groups of virDomainStatsTypes that are answered for a driver that has none of
// them, as libxl's, and ours beside them.
const (
	statsState   = 1 << 0
	statsCPU     = 1 << 1
	statsBalloon = 1 << 2
	statsVCPU    = 1 << 3
	statsKemari  = 1 << 30

	statsEnforce = 1 << 31   // of the flags: no group may be missing
	listFilters  = 1<<16 - 1 // of the flags: those of virConnectListAllDomains
)

// domainStats adds a protection's statistics to those of libvirtd. They come if all
// groups are asked for, or their own is.
func (s *session) domainStats(ctx context.Context, p *rpc.Packet) (bool, error) {
	a, err := rpc.DecodeDomainStatsArgs(p.Payload)
	if err != nil {
		return false, nil
	}
	asked := *a
	if a.Stats&statsKemari != 0 {
		if a.Stats &^= statsKemari; a.Stats == 0 {
			a.Stats = statsState // 0 would be all
		}
		p.Payload = a.Append(nil)
	}
	s.onReply(p, func(r *rpc.Packet) *rpc.Packet {
		if r.Status != rpc.OK {
			if e, err := rpc.DecodeError(r.Payload); err != nil || e.Code != rpc.CodeNoSupport {
				return r
			}
			s.query(ctx, func(ctx context.Context) {
				ret, err := s.d.basicStats(ctx, &asked)
				if err != nil {
					s.fail(p, err)
					return
				}
				s.d.addStats(ctx, ret, asked.Stats)
				s.answer(p, ret.Append(nil))
			})
			return nil
		}
		if !s.d.anyInvolved() {
			return r
		}
		ret, err := rpc.DecodeDomainStatsRet(r.Payload)
		if err != nil {
			return r
		}
		s.query(ctx, func(ctx context.Context) {
			s.d.addStats(ctx, *ret, asked.Stats)
			r.Payload = ret.Append(nil)
			s.reply(r)
		})
		return nil
	})
	return false, nil
}

// addStats completes what is known of each domain.
func (d *Driver) addStats(ctx context.Context, ret rpc.DomainStatsRet, asked uint32) {
	for i := range ret {
		id := ret[i].Domain.UUID
		if !d.involved(id) {
			continue
		}
		st, running, err := d.protection(ctx, id)
		if err != nil || !running {
			continue
		}
		if st.Role == control.Standby {
			for j, p := range ret[i].Params {
				switch p.Field {
				case "state.state":
					ret[i].Params[j].Number = statePaused
				case "state.reason":
					ret[i].Params[j].Number = pausedMigration
				}
			}
		}
		if asked == 0 || asked&statsKemari != 0 {
			ret[i].Params = append(ret[i].Params, kemariParams(st)...)
		}
	}
}

// basicStats stands in for a driver that has no statistics of all domains.
func (d *Driver) basicStats(ctx context.Context, a *rpc.DomainStatsArgs) (rpc.DomainStatsRet, error) {
	const known = statsState | statsCPU | statsBalloon | statsVCPU | statsKemari
	if a.Flags&statsEnforce != 0 && a.Stats&^known != 0 {
		return nil, refuse(rpc.CodeArgumentUnsupp, "not all of these statistics are supported for Xen", "leave out --enforce")
	}
	l, err := d.cfg.Libvirt(ctx)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	doms := a.Domains
	if len(doms) == 0 {
		if doms, err = l.Domains(a.Flags & listFilters); err != nil {
			return nil, err
		}
		if doms, err = d.listed(ctx, doms, a.Flags&listFilters); err != nil {
			return nil, err
		}
	}
	ret := rpc.DomainStatsRet{}
	for _, dom := range doms {
		info, err := l.Info(dom)
		if err != nil {
			continue // it has gone meanwhile
		}
		group := func(g uint32) bool { return a.Stats == 0 || a.Stats&g != 0 }
		var ps params
		if group(statsState) {
			ps.int("state.state", int32(info.State))
			ps.int("state.reason", 0)
		}
		if group(statsCPU) {
			ps.number("cpu.time", int64(info.CPUTime))
		}
		if group(statsBalloon) {
			ps.number("balloon.current", int64(info.Memory))
			ps.number("balloon.maximum", int64(info.MaxMem))
		}
		if group(statsVCPU) {
			ps = append(ps, rpc.TypedParam{Field: "vcpu.current", Type: rpc.ParamUInt, Number: uint64(info.VCPUs)})
		}
		ret = append(ret, rpc.DomainStats{Domain: dom, Params: ps})
	}
	return ret, nil
}
