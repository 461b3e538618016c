package rpc

// EventID is a number of virDomainEventID: a kind of event.
type EventID int32

// The kinds of events that the driver sends itself.
const (
	EventLifecycle          EventID = 0
	EventMigrationIteration EventID = 20
	EventJobCompleted       EventID = 21
	EventMetadataChange     EventID = 23
)

// The procedures by which a client registers for events and by which it is told
// of them. The first three are of clients older than libvirt 1.2, whose events
// have no callback number.
const (
	ProcConnectDomainEventRegister              Procedure = 105
	ProcConnectDomainEventDeregister            Procedure = 106
	ProcConnectDomainEventRegisterAny           Procedure = 167
	ProcConnectDomainEventDeregisterAny         Procedure = 168
	ProcConnectDomainEventCallbackRegisterAny   Procedure = 316
	ProcConnectDomainEventCallbackDeregisterAny Procedure = 317

	ProcDomainEventLifecycle                  Procedure = 107
	ProcDomainEventCallbackLifecycle          Procedure = 318
	ProcDomainEventCallbackMigrationIteration Procedure = 359
	ProcDomainEventCallbackJobCompleted       Procedure = 363
	ProcDomainEventCallbackMetadataChange     Procedure = 379
)

// Event returns the frame that tells a client of an event.
func Event(proc Procedure, payload []byte) *Packet {
	return &Packet{
		Header:  Header{Program: ProgramRemote, Version: 1, Procedure: proc, Type: Message},
		Payload: payload,
	}
}

// EventRegisterArgs are the arguments of ProcConnectDomainEventCallbackRegisterAny.
// Its result is an Int, the callback's number; that number is the argument of
// ProcConnectDomainEventCallbackDeregisterAny.
type EventRegisterArgs struct {
	Event  EventID
	Domain *Domain // nil for those of every domain
}

// DecodeEventRegisterArgs decodes the arguments.
func DecodeEventRegisterArgs(b []byte) (*EventRegisterArgs, error) {
	d := decoder{b: b}
	v := EventRegisterArgs{Event: EventID(d.uint32())}
	if d.bool() && d.err == nil {
		dom := d.domain()
		v.Domain = &dom
	}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded arguments.
func (v *EventRegisterArgs) Append(b []byte) []byte {
	b = appendBool(appendUint32(b, uint32(v.Event)), v.Domain != nil)
	if v.Domain != nil {
		b = appendDomain(b, *v.Domain)
	}
	return b
}

// LifecycleEvent is the message of ProcDomainEventCallbackLifecycle, and without
// its callback number of ProcDomainEventLifecycle.
type LifecycleEvent struct {
	Callback int32
	Domain   Domain
	Event    int32 // virDomainEventType
	Detail   int32 // of the enumeration that belongs to Event
}

// DecodeLifecycleEvent decodes the message with a callback number.
func DecodeLifecycleEvent(b []byte) (*LifecycleEvent, error) {
	d := decoder{b: b}
	v := LifecycleEvent{
		Callback: int32(d.uint32()), Domain: d.domain(),
		Event: int32(d.uint32()), Detail: int32(d.uint32()),
	}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded message.
func (v *LifecycleEvent) Append(b []byte) []byte {
	return v.AppendOld(appendUint32(b, uint32(v.Callback)))
}

// AppendOld appends the encoded message without the callback number.
func (v *LifecycleEvent) AppendOld(b []byte) []byte {
	return appendUint32(appendUint32(appendDomain(b, v.Domain), uint32(v.Event)), uint32(v.Detail))
}

// IterationEvent is the message of ProcDomainEventCallbackMigrationIteration.
type IterationEvent struct {
	Callback  int32
	Domain    Domain
	Iteration int32
}

// DecodeIterationEvent decodes the message.
func DecodeIterationEvent(b []byte) (*IterationEvent, error) {
	d := decoder{b: b}
	v := IterationEvent{Callback: int32(d.uint32()), Domain: d.domain(), Iteration: int32(d.uint32())}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded message.
func (v *IterationEvent) Append(b []byte) []byte {
	return appendUint32(appendDomain(appendUint32(b, uint32(v.Callback)), v.Domain), uint32(v.Iteration))
}

// JobCompletedEvent is the message of ProcDomainEventCallbackJobCompleted.
type JobCompletedEvent struct {
	Callback int32
	Domain   Domain
	Params   []TypedParam
}

// DecodeJobCompletedEvent decodes the message.
func DecodeJobCompletedEvent(b []byte) (*JobCompletedEvent, error) {
	d := decoder{b: b}
	v := JobCompletedEvent{Callback: int32(d.uint32()), Domain: d.domain(), Params: d.params(jobStatsMax)}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded message.
func (v *JobCompletedEvent) Append(b []byte) []byte {
	return appendParams(appendDomain(appendUint32(b, uint32(v.Callback)), v.Domain), v.Params)
}

// MetadataEvent is the message of ProcDomainEventCallbackMetadataChange.
type MetadataEvent struct {
	Callback  int32
	Domain    Domain
	Type      int32   // virDomainMetadataType; 2 for an element
	Namespace *string // of the element
}

// DecodeMetadataEvent decodes the message.
func DecodeMetadataEvent(b []byte) (*MetadataEvent, error) {
	d := decoder{b: b}
	v := MetadataEvent{
		Callback: int32(d.uint32()), Domain: d.domain(),
		Type: int32(d.uint32()), Namespace: d.optString(stringMax),
	}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded message.
func (v *MetadataEvent) Append(b []byte) []byte {
	b = appendDomain(appendUint32(b, uint32(v.Callback)), v.Domain)
	return appendOptString(appendUint32(b, uint32(v.Type)), v.Namespace)
}
