package control

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"time"
)

// Identity is a certificate that one side of one protection shows, and its key. Its
// fingerprint travels to the peer over the ssh-authenticated control connection,
// and the data connection accepts nothing else.
type Identity struct {
	Cert string `json:"cert"` // PEM
	Key  string `json:"key"`  // PEM; secret
}

// NewIdentity makes a self-signed certificate and its key. Name is for people who look at a
// capture; nothing checks it, nor the dates: the fingerprint is what counts.
func NewIdentity(name string) (Identity, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Identity{}, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return Identity{}, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Unix(0, 0),
		NotAfter:     time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), // RFC 5280, 4.1.2.5: no end
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return Identity{}, err
	}
	kb, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return Identity{}, err
	}
	enc := func(typ string, b []byte) string {
		return string(bytes.TrimSpace(pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: b}))) + "\n"
	}
	return Identity{Cert: enc("CERTIFICATE", der), Key: enc("PRIVATE KEY", kb)}, nil
}

// Fingerprint is the SHA-256 of the certificate, in hexadecimal.
func (id Identity) Fingerprint() (string, error) {
	der, err := leaf(id.Cert)
	if err != nil {
		return "", err
	}
	return fingerprint(der), nil
}

func fingerprint(der []byte) string {
	h := sha256.Sum256(der)
	return hex.EncodeToString(h[:])
}

// TLS returns a TLS 1.3 configuration, for either side, that shows this identity
// and accepts only the peer with the given fingerprint.
func (id Identity) TLS(peer string) (*tls.Config, error) {
	if len(peer) != 2*sha256.Size {
		return nil, fmt.Errorf("peer fingerprint of %d characters, want %d", len(peer), 2*sha256.Size)
	}
	cert, err := tls.X509KeyPair([]byte(id.Cert), []byte(id.Key))
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{cert},
		ClientAuth:   tls.RequireAnyClientCert,
		// Authority chains and names mean nothing here; VerifyConnection below is
		// the check, and crypto/tls calls it on both sides, resumed or not.
		InsecureSkipVerify:     true, //nolint:gosec // pinned in VerifyConnection
		SessionTicketsDisabled: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return errors.New("peer showed no certificate")
			}
			got := fingerprint(cs.PeerCertificates[0].Raw)
			if subtle.ConstantTimeCompare([]byte(got), []byte(peer)) != 1 {
				return errors.New("peer's certificate is not the one made for this protection")
			}
			return nil
		},
	}, nil
}
