package driver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"kemari/driver/rpc"
	"kemari/migrate/control"
)

// The program that two virtkemarids speak: each call and each reply is one
// opaque of JSON.
const (
	peerVersion            = 1
	procCheck              = rpc.Procedure(1)
	procPrepare            = rpc.Procedure(2)
	procDiscard            = rpc.Procedure(3)
	procExamine            = rpc.Procedure(4) // asked by a client of ours, not by a host
	procReprotect          = rpc.Procedure(5)
	procKeep               = rpc.Procedure(6)
	vifScript              = "/usr/libexec/kemari/vif-kemari"
	unitReplicator         = "kemari-replicator@%s.service"
	unitStandby            = "kemari-standby@%s.service"
	arbiterNone            = "none"
	maxName                = 255
	memoryMarginKiB uint64 = 32 << 10
)

func unitName(format string, id rpc.UUID) string { return fmt.Sprintf(format, id) }

// checkRequest asks a host whether it could be the standby of a guest.
type checkRequest struct {
	Name string      `json:"name"`
	UUID string      `json:"uuid"`
	HVM  *hvmRequest `json:"hvm,omitempty"` // of an HVM guest
}

// hvmRequest asks for what a host must have to take an HVM guest over.
type hvmRequest struct {
	Program string   `json:"program,omitempty"` // of the device model, if it is known
	Files   []string `json:"files,omitempty"`   // that it opens
}

// checkReply is what the host knows; the primary draws the conclusions.
type checkReply struct {
	Host          Host         `json:"host"`
	Libvirt       uint64       `json:"libvirt"`
	FreeMemoryKiB uint64       `json:"free_memory_kib"`
	DeviceModel   *DeviceModel `json:"device_model,omitempty"` // if asked for
	Missing       []string     `json:"missing,omitempty"`      // of the files asked for

	NameTaken  string        `json:"name_taken,omitempty"` // UUID of another domain of that name
	UUIDTaken  string        `json:"uuid_taken,omitempty"` // name of the domain of that UUID, if not the guest's
	Active     bool          `json:"active"`               // the guest itself runs there
	Primary    control.Phase `json:"primary,omitempty"`    // the guest is being protected from there
	Shadow     control.Phase `json:"shadow,omitempty"`     // a shadow stands there, for
	ShadowOf   string        `json:"shadow_of,omitempty"`  // this primary
	Generation uint64        `json:"generation,omitempty"` // the last one that was seen there
}

// prepareRequest asks for a shadow.
type prepareRequest struct {
	Name        string            `json:"name"`
	UUID        string            `json:"uuid"`
	Generation  uint64            `json:"generation"`
	DomainXML   string            `json:"domain_xml"`
	MemoryKiB   uint64            `json:"memory_kib"`
	PrimaryHost string            `json:"primary_host"`
	Transport   control.Transport `json:"transport"`
	Credential  string            `json:"credential"`
	Heartbeat   control.Heartbeat `json:"heartbeat"`
	Arbiter     control.Arbiter   `json:"arbiter"`
}

type prepareReply struct {
	Port       int    `json:"port"`
	Credential string `json:"credential"`
}

// discardRequest takes the shadow of one generation away.
type discardRequest struct {
	UUID       string `json:"uuid"`
	Generation uint64 `json:"generation"`
}

type discardReply struct{}

// callPeer makes one call to another virtkemarid.
func callPeer(ctx context.Context, c *rpc.Client, proc rpc.Procedure, req, reply any) error {
	b, err := json.Marshal(req)
	if err != nil {
		return err
	}
	if len(b) > rpc.MaxOpaque {
		return fmt.Errorf("%d bytes are more than a call can carry", len(b))
	}
	b, err = c.Call(ctx, rpc.ProgramKemari, peerVersion, proc, rpc.Opaque(b).Append(nil))
	if err != nil {
		return err
	}
	return decodePeer(b, reply)
}

func decodePeer(payload []byte, v any) error {
	b, err := rpc.DecodeOpaque(payload)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%w: %w", rpc.ErrXDR, err)
	}
	return nil
}

// peerCall answers a call of another virtkemarid.
func (s *session) peerCall(ctx context.Context, p *rpc.Packet) ([]byte, error) {
	var reply any
	var err error
	switch p.Procedure {
	case procCheck:
		var req checkRequest
		if err = decodePeer(p.Payload, &req); err == nil {
			reply, err = s.d.check(ctx, req)
		}
	case procPrepare:
		var req prepareRequest
		if err = decodePeer(p.Payload, &req); err == nil {
			reply, err = s.prepare(ctx, req)
		}
	case procDiscard:
		var req discardRequest
		if err = decodePeer(p.Payload, &req); err == nil {
			reply, err = s.discard(ctx, req)
		}
	case procReprotect:
		var req reprotectRequest
		if err = decodePeer(p.Payload, &req); err == nil {
			reply, err = s.d.reprotect(ctx, req)
		}
	case procKeep:
		var req keepRequest
		if err = decodePeer(p.Payload, &req); err == nil {
			reply, err = s.d.keep(ctx, req)
		}
	case procExamine:
		var req examineRequest
		if err = decodePeer(p.Payload, &req); err == nil {
			reply, err = s.d.examine(ctx, req)
		}
	default:
		err = &rpc.Error{Code: rpc.CodeRPC, From: rpc.FromRPC, Message: fmt.Sprintf("unknown procedure: %d", p.Procedure)}
	}
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(reply)
	if err != nil {
		return nil, err
	}
	return rpc.Opaque(b).Append(nil), nil
}

var errBadRequest = errors.New("the other host's request is malformed")
