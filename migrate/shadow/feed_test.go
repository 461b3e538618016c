package shadow

import (
	"bytes"
	"errors"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"kemari/migrate"
	"kemari/migrate/page"
	"kemari/migrate/xen"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const limit = 1<<20 + 1<<10

// restore is a fake of libxl's: it takes pages out of the stream in its own time.
// It is the Memory of its domain as well.
type restore struct {
	conn net.Conn
	slow func() // between records

	mu    sync.Mutex
	mem   map[page.PFN][page.Size]byte
	taken int // pages out of the stream
	poked int
	err   error
}

func newRestore(t *testing.T, slow func()) (*restore, *feed) {
	ours, theirs := net.Pipe()
	r := &restore{conn: theirs, slow: slow, mem: make(map[page.PFN][page.Size]byte)}
	// A pipe has no buffer: what is written is under way, as in a socket's.
	queue := make(chan []byte, 10000)
	go func() {
		defer close(queue)
		for {
			b := make([]byte, 64<<10)
			n, err := theirs.Read(b)
			if err != nil {
				return
			}
			queue <- b[:n]
		}
	}()
	done := make(chan struct{})
	go func() {
		defer close(done)
		var buf []byte
		for b := range queue {
			buf = append(buf, b...)
			for {
				n := whole(buf)
				if n == 0 {
					break
				}
				if err := xen.Records(buf[:n], r.record); err != nil {
					r.mu.Lock()
					r.err = err
					r.mu.Unlock()
				}
				buf = buf[n:]
			}
		}
	}()
	f := newFeed(ours, limit)
	t.Cleanup(func() { f.Close(); theirs.Close(); <-done })
	return r, f
}

// whole is the length of the first record of b, or 0.
func whole(b []byte) int {
	if len(b) < 8 {
		return 0
	}
	n := 8 + int(uint32(b[4])|uint32(b[5])<<8|uint32(b[6])<<16|uint32(b[7])<<24)
	if len(b) < n {
		return 0
	}
	return n
}

func (r *restore) record(rec xen.Record) error {
	r.slow()
	n, err := xen.CheckPageData(rec.Body, limit)
	if err != nil || rec.Type != xen.RecordPageData {
		return errors.Join(err, errors.New("no pages"))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range n {
		var pfn page.PFN
		for j := range 8 {
			pfn |= page.PFN(rec.Body[8+8*i+j]) << (8 * j)
		}
		r.mem[pfn] = [page.Size]byte(rec.Body[8+8*n+i*page.Size:])
		r.taken++
	}
	return nil
}

var errNotThere = errors.New("not populated")

func (r *restore) ReadPage(pfn page.PFN, dst []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	p, ok := r.mem[pfn]
	if !ok {
		return errNotThere
	}
	copy(dst, p[:])
	return nil
}

func (r *restore) WritePages(pfns []page.PFN, data []byte) (missing []int, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, pfn := range pfns {
		if _, ok := r.mem[pfn]; !ok {
			missing = append(missing, i)
			continue
		}
		r.mem[pfn] = [page.Size]byte(data[i*page.Size:])
		r.poked++
	}
	return missing, nil
}

func (r *restore) Close() error { return nil }

// settled waits until the stream has run dry, and returns what the domain has.
func (r *restore) settled(t *testing.T) map[page.PFN][page.Size]byte {
	t.Helper()
	synctest.Wait()
	time.Sleep(time.Minute)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		t.Error(r.err)
	}
	return maps.Clone(r.mem)
}

// Whatever is applied in whatever order, and however late the restore takes it out
// of the stream, the domain ends up with the last content of each page; and what is
// read in between is that as well.
func TestFeed(t *testing.T) {
	for name, slow := range map[string]func(){
		"at once": func() {},
		"slow":    func() { time.Sleep(7 * time.Millisecond) },
		"stumbling": func() {
			if rand.IntN(5) == 0 {
				time.Sleep(300 * time.Millisecond)
			}
		},
	} {
		for _, mapped := range []bool{false, true} {
			t.Run(map[bool]string{false: "stream, ", true: "mapped, "}[mapped]+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r, f := newRestore(t, slow)
					if mapped {
						f.use(r)
					}
					rng := rand.New(rand.NewPCG(1, 2))
					want := make(map[page.PFN][page.Size]byte)
					for range 150 {
						var p migrate.Pages
						for range 1 + rng.IntN(20) {
							pfn := page.PFN(rng.IntN(200))
							if rng.IntN(2) == 0 {
								pfn += 1 << 20
							}
							var b [page.Size]byte // often the same as it was, or was before
							b[9] = byte(rng.IntN(3))
							p.Append(pfn, b[:])
							want[pfn] = b
						}
						if err := f.apply(&p); err != nil {
							t.Fatal(err)
						}
						for pfn, w := range want {
							if rng.IntN(100) > 0 {
								continue
							}
							got := make([]byte, page.Size)
							if err := f.read(pfn, got); err != nil || !bytes.Equal(got, w[:]) {
								t.Fatalf("page %v reads %d (%v), want %d", pfn, got[9], err, w[9])
							}
						}
					}
					if err := f.read(7000, make([]byte, page.Size)); !errors.Is(err, migrate.ErrNoPage) {
						t.Error("a page that never came was read")
					}
					if got := r.settled(t); !maps.Equal(got, want) {
						t.Errorf("the domain has other memory than was applied (%d pages, want %d)", len(got), len(want))
					}
					if mapped && r.poked < 1000 {
						t.Errorf("%d pages by mapping, %d by the stream", r.poked, r.taken)
					}
				})
			})
		}
	}
}

// A restore that does not take what it is fed is found out, and not waited for
// forever.
func TestFeedStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stuck := make(chan struct{})
		r, f := newRestore(t, func() { <-stuck })
		f.use(r)
		var p migrate.Pages
		p.Append(5, make([]byte, page.Size))
		if err := f.apply(&p); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if err := f.read(5, make([]byte, page.Size)); err == nil || errors.Is(err, migrate.ErrNoPage) || time.Since(began) > feedTimeout+time.Second {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		// What it was given last is the page's own content, should it go on yet.
		close(stuck)
		if got := r.settled(t)[5]; got != [page.Size]byte{} {
			t.Errorf("the page has content that never was its own")
		}
	})
}

func TestFeedEnds(t *testing.T) {
	r, f := newRestore(t, func() {})
	r.conn.Close()
	var p migrate.Pages
	p.Append(5, make([]byte, page.Size))
	if err := f.apply(&p); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("fed into nothing: %v", err)
	}
}
