package rpc

import "encoding/binary"

// Layout says how a message is laid out, a letter for each field, as far as the
// driver changes the XML in it:
//
//	d  a domain           u  32 bits    x  XML
//	s  a string           U  64 bits    X  XML, or nothing
//	S  one, or nothing    o  opaque     p  typed parameters, some of them XML
type Layout string

// xmlParams are the typed parameters that hold a domain's XML.
var xmlParams = map[string]bool{
	"destination_xml": true, "persistent_xml": true, // of a migration
	"xml": true, // of a save or a restore
}

// MapXML returns the message b with f applied to each XML in it. It returns an
// error of f as it is.
func (l Layout) MapXML(b []byte, f func(string) (string, error)) ([]byte, error) {
	d := decoder{b: b}
	out := make([]byte, 0, len(b)+1024)
	var failed error
	apply := func(s string) string {
		if d.err != nil || failed != nil {
			return s
		}
		s, failed = f(s)
		return s
	}
	for _, c := range l {
		switch c {
		case 'd':
			out = appendDomain(out, d.domain())
		case 's':
			out = appendString(out, d.string(stringMax))
		case 'S':
			out = appendOptString(out, d.optString(stringMax))
		case 'u':
			out = appendUint32(out, d.uint32())
		case 'U':
			out = appendUint64(out, d.uint64())
		case 'o':
			out = appendOpaque(out, d.opaque(cookieMax))
		case 'x':
			out = appendString(out, apply(d.string(stringMax)))
		case 'X':
			s := d.optString(stringMax)
			if s != nil {
				*s = apply(*s)
			}
			out = appendOptString(out, s)
		case 'p':
			ps := d.params(migrateParamsMax)
			for i := range ps {
				if xmlParams[ps[i].Field] && ps[i].Type == ParamString {
					ps[i].String = apply(ps[i].String)
				}
			}
			out = appendParams(out, ps)
		default:
			panic("layout " + string(l)) // a constant of ours
		}
	}
	if err := d.done(); err != nil {
		return nil, err
	}
	if failed != nil {
		return nil, failed
	}
	return out, nil
}

// LastFlags returns the 32 bits that a message ends with, which are its flags if
// it has any.
func LastFlags(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return binary.BigEndian.Uint32(b[len(b)-4:])
}
