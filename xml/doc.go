// Package xml is the element with which a domain asks for protection:
//
//	<metadata>
//	  <kemari xmlns='urn:kemari:domain:1.0' autostart='yes'>
//	    <standby uri='kemari+ssh://xen2/system'/>
//	    <transport type='tls'/>
//	    <checkpoint trigger='output' min='5' max='200' unit='ms' paused='30%'/>
//	    <heartbeat interval='100' timeout='500' unit='ms'/>
//	    <arbiter type='none' automatic='yes'/>
//	  </kemari>
//	</metadata>
//
// It stands in <metadata> because that is the one place where libvirt keeps what
// it does not know. People write and see it at the top level of the domain, without
// the namespace; Lower and Raise are the way from there and back. The driver takes
// every domain that way, so xen:///system has the one form and kemari:///system
// the other.
//
// kemari.rng, kemari-metadata.rng and kemari-domain.rng describe it to other
// programs; the package is stricter, since a schema cannot compare two attributes.
//
// Documents are changed by replacing spans of their bytes and are never printed
// anew: what is not ours, down to comments, quotes and white space, stays as it
// was.
package xml
