package driver

import (
	"context"
	"errors"
	"math"
	"time"

	"kemari/driver/rpc"
	"kemari/migrate/control"
)

// A protection is the guest's job, of the kind that has no end of its own.

// virDomainJobType and virDomainJobOperation.
const (
	jobUnbounded = 2
	jobCompleted = 3
	jobFailed    = 4

	operationMigrationIn  = 4
	operationMigrationOut = 5
)

// The flags of virDomainGetJobStats.
const (
	jobStatsCompleted     = 1 << 0
	jobStatsKeepCompleted = 1 << 1
)

// jobInfo answers for a guest that is protected, or a shadow, and leaves every other
// to libvirtd.
func (s *session) jobInfo(ctx context.Context, p *rpc.Packet) (bool, error) {
	dom, err := rpc.DecodeDomainPrefix(p.Payload)
	if err != nil || !s.d.involved(dom.UUID) {
		return false, nil
	}
	var flags uint32
	if p.Procedure == rpc.ProcDomainGetJobStats {
		flags = rpc.LastFlags(p.Payload)
	}
	s.query(ctx, func(ctx context.Context) {
		st, running, err := s.d.protection(ctx, dom.UUID)
		switch {
		case errors.Is(err, control.ErrNotRunning):
			s.forward(ctx, p)
		case err != nil:
			s.fail(p, refuse(rpc.CodeOperationFailed, "the guest's protection does not say how it is: "+err.Error(), ""))
		case flags&jobStatsCompleted == 0 && running:
			s.answerJob(p, st, jobUnbounded)
		case flags&jobStatsCompleted != 0 && !running && s.d.unread(dom.UUID, st, flags&jobStatsKeepCompleted != 0):
			s.answerJob(p, st, completedType(st))
		default:
			s.forward(ctx, p)
		}
	})
	return true, nil
}

// completedType is how a protection has ended. One that its standby has taken over
// has done what it was for.
func completedType(st control.Status) int32 {
	if st.Error != "" {
		return jobFailed
	}
	return jobCompleted
}

// unread says whether nobody has asked for the last word of the protection yet, and
// notes that somebody has, unless keep. libvirt, too, tells it once.
func (d *Driver) unread(id rpc.UUID, st control.Status, keep bool) bool {
	d.jobs.Lock()
	defer d.jobs.Unlock()
	if d.told[id] == st.Generation {
		return false
	}
	if !keep {
		if d.told == nil {
			d.told = make(map[rpc.UUID]uint64)
		}
		d.told[id] = st.Generation
	}
	return true
}

func (s *session) answerJob(p *rpc.Packet, st control.Status, typ int32) {
	if p.Procedure == rpc.ProcDomainGetJobStats {
		s.answer(p, (&rpc.JobStatsRet{Type: typ, Params: jobParams(st, time.Now())}).Append(nil))
		return
	}
	remaining := uint64(max(0, st.CopyTotal-st.CopyBytes))
	v := rpc.JobInfo{
		Type: typ, TimeElapsed: elapsed(st, time.Now()),
		DataTotal: uint64(st.CopyTotal), DataProcessed: uint64(st.Bytes), DataRemaining: remaining,
		MemTotal: uint64(st.CopyTotal), MemProcessed: uint64(st.Bytes), MemRemaining: remaining,
	}
	s.answer(p, v.Append(nil))
}

// elapsed is how long a protection has lasted, in ms. A generation is the time it
// began, in ms too, as a rule.
func elapsed(st control.Status, now time.Time) uint64 {
	if st.Phase == control.Ended || st.Phase == control.Active {
		now = st.Since
	}
	if began := int64(st.Generation); st.Generation < math.MaxInt64 && began < now.UnixMilli() {
		return uint64(now.UnixMilli() - began)
	}
	return 0
}

// jobParams are the statistics of a protection: as many as fit in libvirt's own
// names, and all of them under kemari.
func jobParams(st control.Status, now time.Time) []rpc.TypedParam {
	var ps params
	if st.Role == control.Standby {
		ps.int("operation", operationMigrationIn)
	} else {
		ps.int("operation", operationMigrationOut)
	}
	remaining := max(0, st.CopyTotal-st.CopyBytes)
	ms := elapsed(st, now)
	ps.number("time_elapsed", int64(ms))
	for _, of := range []string{"data_", "memory_"} {
		ps.number(of+"total", st.CopyTotal)
		ps.number(of+"processed", st.Bytes)
		ps.number(of+"remaining", remaining)
	}
	if ms > 0 {
		ps.number("memory_bps", int64(float64(st.Bytes)*1000/float64(ms)))
	}
	ps.number("memory_page_size", 4096)
	ps.number("memory_iteration", int64(min(st.Epoch, math.MaxInt64)))
	ended := st.Phase == control.Ended || st.Phase == control.Active
	if ended {
		ps.number("downtime", (st.PauseSum+999)/1000)
		ps.bool("success", st.Error == "")
		if st.Error != "" {
			ps.string("errmsg", st.Error)
		}
	} else {
		ps.number("downtime", (st.PauseLast+999)/1000)
	}
	return append(ps, kemariParams(st)...)
}

// kemariParams are a protection's own statistics. Times are in microseconds.
func kemariParams(st control.Status) []rpc.TypedParam {
	var ps params
	ps.string("kemari.role", string(st.Role))
	ps.string("kemari.phase", string(st.Phase))
	ps.string("kemari.peer", st.Peer)
	ps.number("kemari.generation", int64(min(st.Generation, math.MaxInt64)))
	ps.number("kemari.epoch", int64(min(st.Epoch, math.MaxInt64)))
	ps.number("kemari.pages.last", st.PagesLast)
	ps.number("kemari.bytes.last", st.BytesLast)
	ps.number("kemari.bytes.total", st.Bytes)
	ps.number("kemari.pause.last", st.PauseLast)
	ps.number("kemari.pause.max", st.PauseMax)
	ps.number("kemari.pause.sum", st.PauseSum)
	ps.number("kemari.suspend.last", st.SuspendLast)
	ps.number("kemari.copy.last", st.CopyLast)
	ps.number("kemari.resume.last", st.ResumeLast)
	ps.number("kemari.lag.last", st.CommitLag)
	ps.string("kemari.arbiter", st.Arbiter)
	ps.bool("kemari.automatic", st.Automatic)
	risk := st.Risk
	if st.Phase == control.Ended || st.Phase == control.Active {
		risk = "" // it was that of the protection
	}
	for _, t := range []struct{ name, v string }{
		{"kemari.trigger", st.Trigger}, {"kemari.risk", risk}, {"kemari.error", st.Error}, {"kemari.hint", st.Hint},
	} {
		if t.v != "" {
			ps.string(t.name, t.v)
		}
	}
	if f := st.Failover; f != nil {
		ps.string("kemari.failover.reason", f.Reason)
		ps.number("kemari.failover.detect", f.Detect)
		ps.number("kemari.failover.takeover", f.Takeover)
	}
	return ps
}

type params []rpc.TypedParam

func (ps *params) int(name string, v int32) {
	*ps = append(*ps, rpc.TypedParam{Field: name, Type: rpc.ParamInt, Number: uint64(uint32(v))})
}

func (ps *params) number(name string, v int64) {
	*ps = append(*ps, rpc.TypedParam{Field: name, Type: rpc.ParamULLong, Number: uint64(max(0, v))})
}

func (ps *params) bool(name string, v bool) {
	n := uint64(0)
	if v {
		n = 1
	}
	*ps = append(*ps, rpc.TypedParam{Field: name, Type: rpc.ParamBoolean, Number: n})
}

func (ps *params) string(name, v string) {
	*ps = append(*ps, rpc.TypedParam{Field: name, Type: rpc.ParamString, String: v})
}
