package control_test

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kemari/migrate/control"
	"kemari/migrate/migratetest"
)

// channels makes both sides of one, each with its own /etc/pki.
func channels(t *testing.T, tr control.Transport, pkis [2]string) (p, s control.Channel) {
	t.Helper()
	var err error
	if p, err = control.NewChannel(tr, control.Primary, "g1", pkis[0]); err != nil {
		t.Fatal(err)
	}
	if s, err = control.NewChannel(tr, control.Standby, "g1", pkis[1]); err != nil {
		t.Fatal(err)
	}
	pc, perr := p.Credential()
	sc, serr := s.Credential()
	if err := errors.Join(perr, serr); err != nil || !control.ValidCredential(pc) || !control.ValidCredential(sc) || pc == sc {
		t.Fatalf("%q, %q, %v", pc, sc, err)
	}
	p.Peer, s.Peer = sc, pc
	return p, s
}

// shake has both sides meet, and returns what each makes of it.
func shake(t *testing.T, p, s control.Channel) (perr, serr error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	do := func(c control.Channel, conn net.Conn, role control.Role) error {
		if c.Transport == control.TransportTCP {
			return c.Greet(ctx, conn, role)
		}
		tc, err := c.TLS()
		if err != nil {
			return err
		}
		side := tls.Client
		if role == control.Standby {
			side = tls.Server
		}
		tconn := side(conn, tc)
		if err := tconn.HandshakeContext(ctx); err != nil {
			return err
		}
		if role == control.Standby {
			_, err = tconn.Write([]byte{1})
		} else {
			_, err = tconn.Read(make([]byte, 1)) // where TLS 1.3 tells the client
		}
		return err
	}
	done := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		if err == nil {
			err = do(s, conn, control.Standby)
			conn.Close()
		}
		done <- err
	}()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	perr = do(p, conn, control.Primary)
	conn.Close()
	return perr, <-done
}

func TestChannel(t *testing.T) {
	ca := migratetest.NewAuthority(t)
	pki := [2]string{ca.Host(t, "xen1"), ca.Host(t, "xen2")}
	for _, tr := range []control.Transport{control.TransportTLS, control.TransportPKI, control.TransportTCP} {
		t.Run(string(tr), func(t *testing.T) {
			p, s := channels(t, tr, pki)
			if tr == control.TransportPKI {
				p.PeerName = "xen2"
			}
			if perr, serr := shake(t, p, s); perr != nil || serr != nil {
				t.Errorf("primary %v, standby %v", perr, serr)
			}
			// Another protection's primary, and another's standby, even of the same hosts.
			q, r := channels(t, tr, [2]string{ca.Host(t, "xen1"), ca.Host(t, "xen2")})
			q.PeerName = p.PeerName
			if tr != control.TransportTCP {
				q.Peer, r.Peer = p.Peer, s.Peer
			}
			if _, serr := shake(t, q, s); serr == nil {
				t.Error("a stranger was let in")
			}
			if perr, _ := shake(t, p, r); perr == nil {
				t.Error("a strange standby was believed")
			}
		})
	}
}

// Beside being the one that was told of, a certificate of libvirt's must be good.
func TestPKI(t *testing.T) {
	ca, other := migratetest.NewAuthority(t), migratetest.NewAuthority(t)
	xen1, xen2 := ca.Host(t, "xen1"), ca.Host(t, "xen2")
	for name, c := range map[string]struct {
		pkis [2]string
		peer string
		say  string
	}{
		"another name":      {[2]string{xen1, xen2}, "xen3", "not xen3"},
		"another authority": {[2]string{xen1, other.Host(t, "xen2")}, "xen2", "unknown authority"},
	} {
		t.Run(name, func(t *testing.T) {
			p, s := channels(t, control.TransportPKI, c.pkis)
			p.PeerName = c.peer
			if perr, _ := shake(t, p, s); perr == nil || !strings.Contains(perr.Error(), c.say) {
				t.Errorf("%v", perr)
			}
		})
	}
	// A server's certificate is not a client's.
	p, s := channels(t, control.TransportPKI, [2]string{xen1, xen2})
	q, err := control.NewChannel(control.TransportPKI, control.Standby, "g1", xen1)
	if err != nil {
		t.Fatal(err)
	}
	p.Identity, p.PeerName = q.Identity, "xen2"
	if s.Peer, err = p.Credential(); err != nil {
		t.Fatal(err)
	}
	if _, serr := shake(t, p, s); serr == nil || !strings.Contains(serr.Error(), "usage") {
		t.Errorf("%v", serr)
	}

	for _, f := range []string{"CA/cacert.pem", "libvirt/clientcert.pem", "libvirt/private/clientkey.pem"} {
		pki := ca.Host(t, "xen1")
		if err := os.Remove(filepath.Join(pki, f)); err != nil {
			t.Fatal(err)
		}
		if _, err := control.NewChannel(control.TransportPKI, control.Primary, "g1", pki); err == nil || !strings.Contains(err.Error(), f) {
			t.Errorf("%s: %v", f, err)
		}
	}
	if _, err := control.NewChannel("udp", control.Primary, "g1", xen1); !errors.Is(err, control.ErrTransport) {
		t.Errorf("%v", err)
	}
}

// What the other side may try without TLS.
func TestGreetRefuses(t *testing.T) {
	_, s := channels(t, control.TransportTCP, [2]string{})
	for name, attack := range map[string]func(c net.Conn, nonce []byte){
		"says nothing": func(net.Conn, []byte) {},
		"hangs up":     func(c net.Conn, _ []byte) { c.Close() },
		"cut short":    func(c net.Conn, _ []byte) { c.Write(make([]byte, 40)); c.Close() },
		"guesses":      func(c net.Conn, _ []byte) { c.Write(make([]byte, 64)) },
		"sends it back": func(c net.Conn, nonce []byte) {
			c.Write(append(nonce, nonce...))
		},
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := net.Pipe()
			defer ours.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			go func() {
				nonce := make([]byte, 32)
				io.ReadFull(theirs, nonce)
				attack(theirs, nonce)
			}()
			if err := s.Greet(ctx, ours, control.Standby); err == nil {
				t.Error("let in")
			}
			theirs.Close()
		})
	}
	if err := (control.Channel{Transport: control.TransportTCP}).Greet(t.Context(), nil, control.Primary); err == nil {
		t.Error("without tokens")
	}
}
