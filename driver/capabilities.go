package driver

import (
	"kemari/driver/rpc"
	"kemari/xml"
)

// announce adds what Kemari can do to the capabilities that libvirtd answers with.
func (s *session) announce(p *rpc.Packet) (bool, error) {
	add := xml.Announce
	if p.Procedure == rpc.ProcConnectGetDomainCapabilities {
		add = xml.AnnounceDomain
	}
	s.onSuccess(p, func(b []byte) ([]byte, error) {
		return rpc.Layout("x").MapXML(b, func(doc string) (string, error) { return add(doc), nil })
	})
	return false, nil
}
