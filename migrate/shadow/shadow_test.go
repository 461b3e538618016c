package shadow

import (
	"encoding/binary"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"
)

// libvirtd is a fake one that answers the first so many calls, each with zeros, and
// then hangs: it reads what it is sent, or does not even do that.
func libvirtd(conn net.Conn, answers int, reads bool) {
	for n := 0; ; n++ {
		if n >= answers && !reads {
			return
		}
		var b [28]byte
		if _, err := io.ReadFull(conn, b[:]); err != nil {
			return
		}
		if _, err := io.CopyN(io.Discard, conn, int64(binary.BigEndian.Uint32(b[:]))-28); err != nil {
			return
		}
		if n < answers {
			binary.BigEndian.PutUint32(b[:], 32)
			binary.BigEndian.PutUint32(b[16:], 1) // a reply
			if _, err := conn.Write(append(b[:], 0, 0, 0, 0)); err != nil {
				return
			}
		}
	}
}

// A libvirtd that does not answer any more holds nobody up for good.
func TestLibvirtdHangs(t *testing.T) {
	const hello = 2 // calls
	for _, c := range []struct {
		what    string
		answers int
		reads   bool
		most    time.Duration
	}{
		{"cancel", hello, true, time.Minute + goodbye},
		{"cancel, and does not read", hello, false, time.Minute + goodbye},
		{"goodbye", hello + 1, true, goodbye},
		{"goodbye, and does not read", hello + 1, false, goodbye},
		{"nothing", hello + 2, true, 0},
	} {
		t.Run(c.what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ours, theirs := net.Pipe()
				defer theirs.Close()
				done := make(chan struct{})
				go func() { defer close(done); libvirtd(theirs, c.answers, c.reads) }()
				s := &Shadow{cfg: Config{Mark: filepath.Join(t.TempDir(), "mark")}}
				if err := s.connectOver(t.Context(), ours); err != nil {
					t.Fatal(err)
				}
				stream, sink := net.Pipe()
				defer sink.Close()
				s.feed = newFeed(stream, limit)
				began := time.Now()
				err := s.Close()
				if d := time.Since(began); d > c.most+time.Second {
					t.Errorf("closed after %v", d)
				}
				if cancelled := c.answers > hello; (err == nil) != cancelled {
					t.Errorf("cancelled: %v, and Close says %v", cancelled, err)
				}
				theirs.Close()
				<-done
			})
		})
	}
}

// A take-over that a killed process had begun is finished, unless the guest goes on
// elsewhere.
func TestCleanup(t *testing.T) {
	for _, c := range []struct {
		mark            string
		cancel, running bool
	}{{markTakingOver, false, true}, {markTakingOver, true, false}, {markOpen, false, false}, {markOpen, true, false}} {
		dir := t.TempDir()
		cfg := Config{Name: "g1", Mark: filepath.Join(dir, "mark"), Socket: filepath.Join(dir, "sock"), Cancel: c.cancel}
		if err := os.WriteFile(cfg.Mark, []byte(c.mark), 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("unix", cfg.Socket)
		if err != nil {
			t.Fatal(err)
		}
		finished := make(chan uint32, 1) // what cancelled was
		go func() {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			for {
				var b [28]byte
				if _, err := io.ReadFull(conn, b[:]); err != nil {
					return
				}
				args := make([]byte, binary.BigEndian.Uint32(b[:])-28)
				if _, err := io.ReadFull(conn, args); err != nil {
					return
				}
				reply := make([]byte, 4)
				if binary.BigEndian.Uint32(b[12:]) == 306 { // DOMAIN_MIGRATE_FINISH3_PARAMS
					finished <- binary.BigEndian.Uint32(args[len(args)-4:])
					reply = make([]byte, 4+16+4+4) // a domain without a name, and no cookie
				}
				binary.BigEndian.PutUint32(b[:], uint32(28+len(reply)))
				binary.BigEndian.PutUint32(b[16:], 1)
				conn.Write(append(b[:], reply...))
			}
		}()
		running, err := Cleanup(t.Context(), cfg)
		l.Close()
		if cancelled := <-finished == 1; err != nil || running != c.running || cancelled == running {
			t.Errorf("%q, cancel %v: runs %v, cancelled %v, %v", c.mark, c.cancel, running, cancelled, err)
		}
		if running, err := Cleanup(t.Context(), cfg); running || err != nil {
			t.Errorf("and once more: %v, %v", running, err)
		}
	}
}
