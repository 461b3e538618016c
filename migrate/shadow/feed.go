package shadow

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"time"

	"kemari/migrate"
	"kemari/migrate/page"
	"kemari/migrate/xen"
)

// Memory is the memory of the domain that is being restored, written and read from
// outside while the restore goes on. Its methods are called by one goroutine.
type Memory interface {
	// ReadPage copies a page to dst. It returns an error for one that the restore has
	// not populated yet.
	ReadPage(pfn page.PFN, dst []byte) error
	// WritePages copies the i-th page of data to pfns[i], for all i. Those that are not
	// populated are left out: missing are their indexes.
	WritePages(pfns []page.PFN, data []byte) (missing []int, err error)
	Close() error
}

// feed brings pages into the domain that libxl restores. A page that the domain
// does not have yet goes through the stream, which makes memory for it; one that it
// has is written by mapping.
//
// What the stream was given is taken out of it by libxl's helper some time later. A
// page written by mapping in the meantime would be overwritten with what is still
// under way, so that is not done before the stream is known to have run dry:
//
//	unknown ─stream→ fed ─drained→ had, from then on by mapping only
//
// Whether it has run dry is found out by a page of random content, which was never
// there before, and which is therefore the last that went in once it can be read
// back; see drain.
type feed struct {
	conn net.Conn
	mem  Memory // nil: everything goes through the stream, and base is kept
	base *base

	fed, had bitmap
	dry      bool // fed equals had
	last     page.PFN
	content  [page.Size]byte // of last
	buf      []byte
	batch    migrate.Pages
}

// feedTimeout bounds one write into libvirt's restore, and the time that what was
// written takes to arrive: it only copies memory.
const feedTimeout = 30 * time.Second

func newFeed(conn net.Conn, limit page.PFN) *feed {
	return &feed{conn: conn, base: newBase(limit), fed: newBitmap(limit), had: newBitmap(limit), dry: true}
}

// use has mem used from now on, which is to be before the first page.
func (f *feed) use(mem Memory) { f.mem, f.base = mem, nil }

func (f *feed) write(b []byte) error {
	f.conn.SetWriteDeadline(time.Now().Add(feedTimeout))
	if _, err := f.conn.Write(b); err != nil {
		return fmt.Errorf("libvirt's incoming migration has ended (was libvirtd restarted?): %w", err)
	}
	return nil
}

// maxBatch is how many pages a PAGE_DATA record may have.
const maxBatch = 1024

// stream feeds pages through the stream.
func (f *feed) stream(p *migrate.Pages) error {
	for i := 0; i < len(p.PFNs); i += maxBatch {
		n := min(maxBatch, len(p.PFNs)-i)
		b := binary.LittleEndian.AppendUint32(f.buf[:0], uint32(xen.RecordPageData))
		b = binary.LittleEndian.AppendUint32(b, uint32(8+n*(8+page.Size)))
		b = binary.LittleEndian.AppendUint64(b, uint64(n))
		for _, pfn := range p.PFNs[i : i+n] {
			b = binary.LittleEndian.AppendUint64(b, uint64(pfn)) // type 0: an ordinary page
			f.fed.set(pfn)
		}
		f.buf = append(b, p.Data[i*page.Size:(i+n)*page.Size]...)
		if err := f.write(f.buf); err != nil {
			return err
		}
	}
	if n := len(p.PFNs); n > 0 {
		f.dry, f.last = false, p.PFNs[n-1]
		copy(f.content[:], p.Page(n-1))
	}
	return nil
}

// apply brings pages in.
func (f *feed) apply(p *migrate.Pages) error {
	for _, pfn := range p.PFNs {
		if !f.fed.has(pfn) || f.had.has(pfn) || f.mem == nil {
			continue
		}
		if err := f.drain(); err != nil {
			return err
		}
		break
	}
	if f.mem == nil {
		for i, pfn := range p.PFNs {
			f.base.put(pfn, p.Page(i))
		}
		return f.stream(p)
	}
	if f.all(p.PFNs, true) {
		return f.poke(p)
	}
	if f.all(p.PFNs, false) {
		return f.stream(p)
	}
	for _, had := range []bool{true, false} {
		f.batch.Reset()
		for i, pfn := range p.PFNs {
			if f.had.has(pfn) == had {
				f.batch.Append(pfn, p.Page(i))
			}
		}
		way := f.stream
		if had {
			way = f.poke
		}
		if err := way(&f.batch); err != nil {
			return err
		}
	}
	return nil
}

func (f *feed) all(pfns []page.PFN, had bool) bool {
	for _, pfn := range pfns {
		if f.had.has(pfn) != had {
			return false
		}
	}
	return true
}

// poke writes pages by mapping.
func (f *feed) poke(p *migrate.Pages) error {
	missing, err := f.mem.WritePages(p.PFNs, p.Data)
	if err == nil && len(missing) > 0 {
		err = fmt.Errorf("%d pages that it had are gone, page %v first", len(missing), p.PFNs[missing[0]])
	}
	if err != nil {
		return fmt.Errorf("write the copy's memory: %w", err)
	}
	return nil
}

// read copies what the domain has, or will have, of a page.
func (f *feed) read(pfn page.PFN, dst []byte) error {
	if !f.fed.has(pfn) {
		return migrate.ErrNoPage
	}
	if f.mem == nil {
		return f.base.get(pfn, dst)
	}
	if !f.had.has(pfn) {
		if err := f.drain(); err != nil {
			return err
		}
	}
	return f.mem.ReadPage(pfn, dst)
}

// drain waits until all that was fed has arrived. The page that was fed last is
// fed once more, with content that was never anywhere; when it reads back so, what
// went before it, in order, has arrived too, and nothing is under way that could
// overwrite what is written by mapping from then on. Then it gets its own content
// back. Should that fail there is no way to go on, but to let the stream put it
// right in case that the copy is to take over nevertheless.
func (f *feed) drain() (err error) {
	if f.dry {
		return nil
	}
	restored := migrate.Pages{PFNs: []page.PFN{f.last}, Data: bytes.Clone(f.content[:])}
	nonce := make([]byte, page.Size)
	rand.Read(nonce)
	if err := f.stream(&migrate.Pages{PFNs: restored.PFNs, Data: nonce}); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.stream(&restored))
		}
	}()
	deadline := time.Now().Add(feedTimeout)
	got := make([]byte, page.Size)
	for pause := 100 * time.Microsecond; ; pause = min(2*pause, 5*time.Millisecond) {
		err := f.mem.ReadPage(f.last, got)
		if err == nil && bytes.Equal(got, nonce) {
			break
		}
		if time.Now().After(deadline) {
			return errors.Join(fmt.Errorf("libvirt's incoming migration does not take what it is fed: page %v has not arrived within %v", f.last, feedTimeout), err)
		}
		time.Sleep(pause)
	}
	if err := f.poke(&restored); err != nil {
		return err
	}
	f.content = [page.Size]byte(restored.Data)
	copy(f.had, f.fed)
	f.dry = true
	return nil
}

func (f *feed) Close() error {
	var err error
	if f.mem != nil {
		err = f.mem.Close()
	}
	return errors.Join(err, f.conn.Close())
}

// bitmap has a bit for each page.
type bitmap []uint64

func newBitmap(limit page.PFN) bitmap  { return make(bitmap, (limit+63)/64) }
func (b bitmap) has(pfn page.PFN) bool { return b[pfn/64]>>(pfn%64)&1 != 0 }
func (b bitmap) set(pfn page.PFN)      { b[pfn/64] |= 1 << (pfn % 64) }

// base is a second copy of the guest's memory, for where the domain's own cannot be
// read.
type base struct{ slabs []*[slabPages][page.Size]byte }

const slabPages = 512

func newBase(limit page.PFN) *base {
	return &base{slabs: make([]*[slabPages][page.Size]byte, (limit+slabPages-1)/slabPages)}
}

func (b *base) put(pfn page.PFN, data []byte) {
	s := &b.slabs[pfn/slabPages]
	if *s == nil {
		*s = new([slabPages][page.Size]byte)
	}
	copy((*s)[pfn%slabPages][:], data)
}

// get is for pages that have been put.
func (b *base) get(pfn page.PFN, dst []byte) error {
	copy(dst, b.slabs[pfn/slabPages][pfn%slabPages][:])
	return nil
}
