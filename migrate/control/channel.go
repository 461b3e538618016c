package control

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"
)

// Transport is what the connection between the hosts is made of.
type Transport string

const (
	TransportTLS Transport = "tls" // certificates made for this one protection
	TransportPKI Transport = "pki" // TLS with the certificates libvirt has
	TransportTCP Transport = "tcp" // in the clear; who connects is made sure of all the same
)

// PKI is where libvirt looks for its certificates.
const PKI = "/etc/pki"

// Channel is what one side of a protection knows about the connection: how to show
// itself, and whom to accept. Whatever the transport, each side tells the other its
// Credential over the ssh-authenticated control connection.
type Channel struct {
	Transport Transport `json:"transport"`
	// Peer is the other side's credential.
	Peer string `json:"peer"`

	Identity Identity `json:"identity,omitzero"` // with TLS
	// CA has the authorities whom libvirt trusts, PEM. PeerName is what the standby's
	// certificate must be for; it is empty on the standby, which knows the primary by
	// its certificate alone.
	CA       string `json:"ca,omitempty"`
	PeerName string `json:"peer_name,omitempty"`
	// Token is ours, of 32 random bytes, in hexadecimal; secret. Without TLS.
	Token string `json:"token,omitempty"`
}

// CredentialSize is that of a credential: 32 bytes in hexadecimal.
const CredentialSize = 2 * sha256.Size

// ErrTransport is returned for a transport that is not known.
var ErrTransport = errors.New("unknown transport")

// NewChannel prepares a channel for a side, and lacks only the peer's credential. pki
// is PKI, name for people who look at a capture.
func NewChannel(t Transport, role Role, name, pki string) (c Channel, err error) {
	c.Transport = t
	switch t {
	case TransportTLS:
		c.Identity, err = NewIdentity(name)
	case TransportPKI:
		c.Identity, c.CA, err = libvirtIdentity(pki, role)
	case TransportTCP:
		b := make([]byte, sha256.Size)
		_, err = rand.Read(b)
		c.Token = hex.EncodeToString(b)
	default:
		err = fmt.Errorf("%w %q", ErrTransport, t)
	}
	return c, err
}

// libvirtIdentity reads what libvirt's own TLS connections use: the standby is who
// listens.
func libvirtIdentity(pki string, role Role) (id Identity, ca string, err error) {
	kind := map[Role]string{Primary: "client", Standby: "server"}[role]
	for _, f := range []struct {
		to   *string
		path string
	}{
		{&ca, "CA/cacert.pem"},
		{&id.Cert, "libvirt/" + kind + "cert.pem"},
		{&id.Key, "libvirt/private/" + kind + "key.pem"},
	} {
		b, err := os.ReadFile(filepath.Join(pki, f.path))
		if err != nil {
			return Identity{}, "", fmt.Errorf("libvirt's certificates: %w", err)
		}
		*f.to = string(b)
	}
	if _, err := tls.X509KeyPair([]byte(id.Cert), []byte(id.Key)); err != nil {
		return Identity{}, "", fmt.Errorf("libvirt's %s certificate in %s: %w", kind, pki, err)
	}
	return id, ca, nil
}

// Credential is what the other side needs to know to accept this one, 32 bytes in
// hexadecimal: the SHA-256 of the certificate, or the token, which is secret.
func (c Channel) Credential() (string, error) {
	if c.Transport == TransportTCP {
		return c.Token, nil
	}
	return c.Identity.Fingerprint()
}

// ValidCredential says whether s can be one.
func ValidCredential(s string) bool {
	_, err := hex.DecodeString(s)
	return err == nil && len(s) == CredentialSize
}

// TLS returns the configuration of a channel with TLS.
func (c Channel) TLS() (*tls.Config, error) {
	tc, err := c.Identity.TLS(c.Peer)
	if err != nil || c.Transport != TransportPKI {
		return tc, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(c.CA)) {
		return nil, errors.New("libvirt's authority has no certificate that can be read")
	}
	pinned := tc.VerifyConnection
	tc.VerifyConnection = func(cs tls.ConnectionState) error {
		if err := pinned(cs); err != nil {
			return err
		}
		usage := x509.ExtKeyUsageClientAuth
		if c.PeerName != "" {
			usage = x509.ExtKeyUsageServerAuth
		}
		between := x509.NewCertPool()
		for _, ic := range cs.PeerCertificates[1:] {
			between.AddCert(ic)
		}
		_, err := cs.PeerCertificates[0].Verify(x509.VerifyOptions{
			Roots: roots, Intermediates: between, DNSName: c.PeerName, KeyUsages: []x509.ExtKeyUsage{usage},
		})
		return err
	}
	return tc, nil
}

// Who answers a challenge, so that no answer can be sent back to who gave it.
const (
	byPrimary = "kemari primary"
	byStandby = "kemari standby"
)

// Greet makes sure over a connection in the clear that the other side has the tokens
// of both, and shows that we have them: each answers the other's nonce with a keyed
// hash (RFC 2104). It says nothing about what comes after on that connection. It ends
// when ctx does, and the connection is then good for nothing.
func (c Channel) Greet(ctx context.Context, conn net.Conn, role Role) (err error) {
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() {
			err = errors.Join(context.Cause(ctx), err)
		}
	}()
	if !ValidCredential(c.Token) || !ValidCredential(c.Peer) {
		return errors.New("a token is missing")
	}
	us, them, key := byPrimary, byStandby, c.Token+c.Peer
	if role == Standby {
		us, them, key = byStandby, byPrimary, c.Peer+c.Token
	}
	answer := func(who string, asked, own []byte) []byte {
		h := hmac.New(sha256.New, []byte(key))
		h.Write([]byte(who))
		h.Write(asked)
		h.Write(own)
		return h.Sum(nil)
	}
	ours, theirs := make([]byte, sha256.Size), make([]byte, sha256.Size)
	if _, err := rand.Read(ours); err != nil {
		return err
	}
	if _, err := conn.Write(ours); err != nil {
		return err
	}
	if _, err := io.ReadFull(conn, theirs); err != nil {
		return err
	}
	show := func() error {
		_, err := conn.Write(answer(us, theirs, ours))
		return err
	}
	see := func() error {
		got := make([]byte, sha256.Size)
		if _, err := io.ReadFull(conn, got); err != nil {
			return err
		}
		if subtle.ConstantTimeCompare(got, answer(them, ours, theirs)) != 1 {
			return errors.New("peer does not have the tokens made for this protection")
		}
		return nil
	}
	// The standby, whom anybody may call, shows nothing to who has shown nothing.
	if role == Primary {
		return errors.Join(show(), see())
	}
	if err := see(); err != nil {
		return err
	}
	return show()
}

// leaf returns the first certificate of a PEM text, DER.
func leaf(text string) ([]byte, error) {
	b, _ := pem.Decode([]byte(text))
	if b == nil {
		return nil, errors.New("no certificate in the identity")
	}
	return b.Bytes, nil
}
