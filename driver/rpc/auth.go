package rpc

// The procedures by which a client proves who it is; they and no others come
// before that.
const (
	ProcAuthSASLInit  Procedure = 67
	ProcAuthSASLStart Procedure = 68
	ProcAuthSASLStep  Procedure = 69
	ProcAuthPolkit    Procedure = 70 // its result is an Int, 1 for done
)

// AuthType is a number of remote_auth_type.
type AuthType int32

// The ways of authentication.
const (
	AuthNone   AuthType = 0
	AuthPolkit AuthType = 2
)

// AuthListRet is the result of ProcAuthList: what the client has to go through.
type AuthListRet []AuthType

// DecodeAuthListRet decodes the result.
func DecodeAuthListRet(b []byte) (*AuthListRet, error) {
	d := decoder{b: b}
	n := d.count(authTypesMax, 4)
	v := make(AuthListRet, 0, n)
	for range n {
		v = append(v, AuthType(d.uint32()))
	}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded result.
func (v *AuthListRet) Append(b []byte) []byte {
	b = appendUint32(b, uint32(len(*v)))
	for _, t := range *v {
		b = appendUint32(b, uint32(t))
	}
	return b
}

// ProcConnectSetIdentity tells libvirtd for whom the caller speaks. Its access
// rules go by that from then on.
const ProcConnectSetIdentity Procedure = 419

// SetIdentityArgs are the arguments of ProcConnectSetIdentity.
type SetIdentityArgs struct {
	Params []TypedParam
	Flags  uint32
}

// DecodeSetIdentityArgs decodes the arguments.
func DecodeSetIdentityArgs(b []byte) (*SetIdentityArgs, error) {
	d := decoder{b: b}
	v := SetIdentityArgs{Params: d.params(identityMax), Flags: d.uint32()}
	if err := d.done(); err != nil {
		return nil, err
	}
	return &v, nil
}

// Append appends the encoded arguments.
func (v *SetIdentityArgs) Append(b []byte) []byte {
	return appendUint32(appendParams(b, v.Params), v.Flags)
}
