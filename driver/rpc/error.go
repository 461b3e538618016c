package rpc

import "errors"

// Code is a number of virErrorNumber.
type Code int32

// The codes that the driver uses or tells apart.
const (
	CodeInternal         Code = 1  // VIR_ERR_INTERNAL_ERROR
	CodeNoConnect        Code = 5  // VIR_ERR_NO_CONNECT
	CodeInvalidArg       Code = 8  // VIR_ERR_INVALID_ARG
	CodeOperationFailed  Code = 9  // VIR_ERR_OPERATION_FAILED
	CodeOperationDenied  Code = 29 // VIR_ERR_OPERATION_DENIED
	CodeRPC              Code = 39 // VIR_ERR_RPC
	CodeNoDomain         Code = 42 // VIR_ERR_NO_DOMAIN
	CodeAuthFailed       Code = 45 // VIR_ERR_AUTH_FAILED
	CodeOperationInvalid Code = 55 // VIR_ERR_OPERATION_INVALID
	CodeConfigUnsupp     Code = 67 // VIR_ERR_CONFIG_UNSUPPORTED
	CodeTimeout          Code = 68 // VIR_ERR_OPERATION_TIMEOUT
	CodeArgumentUnsupp   Code = 74 // VIR_ERR_ARGUMENT_UNSUPPORTED
	CodeAborted          Code = 78 // VIR_ERR_OPERATION_ABORTED
	CodeAuthCancelled    Code = 79 // VIR_ERR_AUTH_CANCELLED
	CodeUnsupported      Code = 84 // VIR_ERR_OPERATION_UNSUPPORTED
	CodeAuthUnavailable  Code = 94 // VIR_ERR_AUTH_UNAVAILABLE
)

// From is a number of virErrorDomain: which part of libvirt an error is from.
type From int32

// The parts that the driver's errors are from.
const (
	FromDomain From = 6  // VIR_FROM_DOM: an operation on a guest
	FromRPC    From = 7  // VIR_FROM_RPC
	FromPolkit From = 60 // VIR_FROM_POLKIT
)

const levelError = 2 // VIR_ERR_ERROR

// Error is remote_error, the parts of it that mean something. It is what a
// client's virGetLastError shows.
type Error struct {
	Code    Code
	From    From
	Message string
}

func (e *Error) Error() string { return e.Message }

// DecodeError decodes remote_error.
func DecodeError(b []byte) (*Error, error) {
	d := decoder{b: b}
	e := &Error{Code: Code(d.uint32()), From: From(d.uint32())}
	if s := d.optString(stringMax); s != nil {
		e.Message = *s
	}
	d.uint32() // level
	if d.bool() {
		d.domain()
	}
	for range 3 {
		d.optString(stringMax)
	}
	d.uint32() // int1
	d.uint32() // int2
	if d.bool() {
		d.string(stringMax)
		d.fixed(16)
	}
	if err := d.done(); err != nil {
		return nil, err
	}
	if e.Message == "" {
		e.Message = "libvirt gave no reason"
	}
	return e, nil
}

// Append appends e as remote_error. libvirt itself sends a format in str1 and
// the detail in str2; clients show only the message.
func (e *Error) Append(b []byte) []byte {
	msg, format := e.Message, "%s"
	if len(msg) > stringMax {
		msg = msg[:stringMax]
	}
	b = appendUint32(b, uint32(e.Code))
	b = appendUint32(b, uint32(e.From))
	b = appendOptString(b, &msg)
	b = appendUint32(b, levelError)
	b = appendBool(b, false) // dom
	b = appendOptString(b, &format)
	b = appendOptString(b, &msg)
	b = appendOptString(b, nil)
	b = appendUint32(b, 0)
	b = appendUint32(b, 0)
	return appendBool(b, false) // net
}

// ErrorReply returns the reply to the call h that says err. An error that is
// not an *Error becomes a failed operation.
func ErrorReply(h Header, err error) *Packet {
	var e *Error
	if !errors.As(err, &e) {
		e = &Error{Code: CodeOperationFailed, From: FromDomain, Message: err.Error()}
	}
	return &Packet{Header: h.Reply(Failed), Payload: e.Append(nil)}
}
