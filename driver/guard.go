package driver

import (
	"context"
	"fmt"

	"kemari/driver/rpc"
)

// guardRule is why a call may not be made on a protected guest.
type guardRule struct {
	what     string // what the call does
	harm     string // what it would do to the protection
	snapshot bool   // the first argument is a snapshot of the domain
	impact   bool   // it may change the next start alone, which does no harm
}

// The harm. On stock Xen whatever saves or migrates a guest turns the logging of
// dirty pages off and on again, and pages are missed without anybody noticing.
const (
	losesPages = "it would lose track of the pages the guest changes"
	changes    = "the standby's copy would not have the change"
	unplugs    = "it would let out what the guest sends before the standby has what it did"
	sleeps     = "a guest that sleeps cannot be checkpointed"
)

// guarded holds all that is refused while a guest is protected. Whatever ends or
// pauses the guest itself (destroy, shutdown, reboot, suspend, resume) passes:
// the replicator sees it happen.
var guarded = map[rpc.Procedure]guardRule{
	rpc.ProcDomainSave:                   {what: "saving", harm: losesPages},
	rpc.ProcDomainSaveFlags:              {what: "saving", harm: losesPages},
	rpc.ProcDomainSaveParams:             {what: "saving", harm: losesPages},
	rpc.ProcDomainManagedSave:            {what: "saving", harm: losesPages},
	rpc.ProcDomainCoreDump:               {what: "dumping", harm: losesPages},
	rpc.ProcDomainCoreDumpWithFormat:     {what: "dumping", harm: losesPages},
	rpc.ProcDomainMigrateBegin3:          {what: "migrating", harm: losesPages},
	rpc.ProcDomainMigrateBegin3Params:    {what: "migrating", harm: losesPages},
	rpc.ProcDomainMigratePerform:         {what: "migrating", harm: losesPages},
	rpc.ProcDomainMigratePerform3:        {what: "migrating", harm: losesPages},
	rpc.ProcDomainMigratePerform3Params:  {what: "migrating", harm: losesPages}, // but to its standby, see switches
	rpc.ProcDomainSnapshotCreateXML:      {what: "taking a snapshot of", harm: losesPages},
	rpc.ProcDomainRevertToSnapshot:       {what: "reverting", harm: changes, snapshot: true},
	rpc.ProcDomainCheckpointCreateXML:    {what: "making a disk checkpoint of", harm: losesPages},
	rpc.ProcDomainBackupBegin:            {what: "backing up", harm: losesPages},
	rpc.ProcDomainStartDirtyRateCalc:     {what: "measuring", harm: losesPages},
	rpc.ProcDomainSetMemory:              {what: "changing the memory of", harm: changes},
	rpc.ProcDomainSetMemoryFlags:         {what: "changing the memory of", harm: changes, impact: true},
	rpc.ProcDomainSetMaxMemory:           {what: "changing the memory of", harm: changes},
	rpc.ProcDomainSetVcpus:               {what: "changing the processors of", harm: changes},
	rpc.ProcDomainSetVcpusFlags:          {what: "changing the processors of", harm: changes, impact: true},
	rpc.ProcDomainSetGuestVcpus:          {what: "changing the processors of", harm: changes},
	rpc.ProcDomainSetVcpu:                {what: "changing the processors of", harm: changes, impact: true},
	rpc.ProcDomainAttachDevice:           {what: "attaching a device to", harm: changes},
	rpc.ProcDomainAttachDeviceFlags:      {what: "attaching a device to", harm: changes, impact: true},
	rpc.ProcDomainDetachDevice:           {what: "detaching a device from", harm: changes},
	rpc.ProcDomainDetachDeviceFlags:      {what: "detaching a device from", harm: changes, impact: true},
	rpc.ProcDomainDetachDeviceAlias:      {what: "detaching a device from", harm: changes, impact: true},
	rpc.ProcDomainBlockResize:            {what: "resizing a disk of", harm: changes},
	rpc.ProcDomainSetInterfaceParameters: {what: "limiting an interface of", harm: unplugs, impact: true},
	rpc.ProcDomainPMSuspendForDuration:   {what: "putting to sleep", harm: sleeps},
	rpc.ProcDomainUpdateDeviceFlags:      {what: "changing a device of", harm: changes, impact: true},
}

// guard passes a guarded call on if its guest is not protected, nor a shadow.
func (s *session) guard(ctx context.Context, p *rpc.Packet, g guardRule) (bool, error) {
	decode := rpc.DecodeDomainPrefix
	if g.snapshot {
		decode = rpc.DecodeSnapshotPrefix
	}
	dom, err := decode(p.Payload)
	if err != nil {
		return true, s.fail(p, err)
	}
	if !s.d.involved(dom.UUID) {
		return false, nil
	}
	// A replicator may take its time to answer; other calls go on meanwhile.
	s.async(ctx, p, func(ctx context.Context) {
		if st, ok := s.d.shadow(ctx, dom.UUID); ok {
			s.fail(p, errShadow(named(st, dom.Name), g.what+" it"))
			return
		}
		if done := s.switchPrimary(ctx, p, *dom); done {
			return
		}
		next := g.impact && rpc.LastFlags(p.Payload)&(affectLive|affectConfig) == affectConfig
		if !next && s.d.protected(ctx, dom.UUID) {
			s.fail(p, refuse(rpc.CodeOperationInvalid,
				fmt.Sprintf("%s guest %q is refused while Kemari protects it, since %s", g.what, dom.Name, g.harm),
				fmt.Sprintf("end protection first with: virsh domjobabort %s", dom.Name)))
			return
		}
		s.forward(ctx, p)
	})
	return true, nil
}
