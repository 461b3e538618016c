package bench

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"time"

	"golang.org/x/sys/unix"

	"kemari/migrate/bench/trace"
	"kemari/migrate/page"
)

// codec is a trace made ready for measuring. Its pages are renumbered by first
// appearance, and the first appearance of each is put into an epoch of its own:
// what is measured is the work on pages whose former content is known.
type codec struct {
	first, rest []trace.Epoch
	size        int // of rest's pages, in bytes
	memory      []byte
}

func newCodec(t *trace.Trace) (*codec, error) {
	c := &codec{first: make([]trace.Epoch, 1)}
	number := make(map[page.PFN]page.PFN)
	for i := range t.Epochs {
		var e trace.Epoch
		for j, pfn := range t.Epochs[i].PFNs {
			n, ok := number[pfn]
			if !ok {
				n = page.PFN(len(number))
				number[pfn] = n
				c.first[0].Add(n, t.Epochs[i].Page(j))
				continue
			}
			e.Add(n, t.Epochs[i].Page(j))
		}
		c.size += len(e.Data)
		c.rest = append(c.rest, e)
	}
	if c.size == 0 {
		return nil, errors.New("no page of the trace comes twice")
	}
	c.memory = make([]byte, len(number)*page.Size)
	return c, nil
}

// never is a link so fast that compression never pays.
const never = math.MaxInt64

func (c *codec) encoder(link int64) *page.Encoder {
	e := page.NewEncoder(len(c.memory) / page.Size)
	e.SetLink(link)
	return e
}

// encode encodes epochs as the primary would, into buffers of 256 KiB, and hands
// them to out.
func (c *codec) encode(e *page.Encoder, epochs []trace.Epoch, buf []byte, out func([]byte)) {
	for i := range epochs {
		for j, pfn := range epochs[i].PFNs {
			if cap(buf)-len(buf) < page.MaxEncoded {
				out(buf)
				buf = buf[:0]
			}
			buf = e.Append(buf, pfn, epochs[i].Page(j))
		}
		out(buf)
		buf = buf[:0]
	}
}

func (c *codec) at(pfn page.PFN) []byte { return c.memory[int(pfn)*page.Size:][:page.Size] }

func (c *codec) base(pfn page.PFN, dst []byte) error {
	copy(dst, c.at(pfn))
	return nil
}

func (c *codec) apply(pfn page.PFN, data []byte) error {
	copy(c.at(pfn), data)
	return nil
}

// CodecFigures is what page encoding costs on a trace, in GB/s of pages (not of
// records) on one core. All but First is the work on pages whose former content is
// known.
type CodecFigures struct {
	Size, Distinct            int     // bytes of pages measured; pages they are of
	Encode, Decode            float64 // without compression
	FirstPacked, EncodePacked float64 // with compression
	Applied, Whole            float64 // decoded into guest memory: straight; by way of a buffer
	Memcpy                    float64 // the pages themselves, to the same places
	AppliedRatio, WholeRatio  float64 // to Memcpy
	PerPage, PerPagePacked    float64 // bytes
}

// Codec measures page encoding on a trace, and checks that all pages come out as
// they went in.
func Codec(t *trace.Trace, rounds int) (*CodecFigures, error) {
	c, err := newCodec(t)
	if err != nil {
		return nil, err
	}
	// Once with every result looked at. What is a record set here, as much as fits a
	// buffer, is at most one epoch.
	var records [][]byte
	keep := func(b []byte) { records = append(records, bytes.Clone(b)) }
	buf := make([]byte, 0, 256<<10)
	e := c.encoder(never)
	c.encode(e, c.first, buf, keep)
	begin := len(records)
	c.encode(e, c.rest, buf, keep)
	dec := page.NewDecoder(page.PFN(len(c.memory)/page.Size), c.base)
	total := 0
	for i, r := range records {
		if i >= begin {
			total += len(r)
		}
		if err := dec.Decode(r, c.apply); err != nil {
			return nil, err
		}
	}
	if err := c.compare(); err != nil {
		return nil, err
	}

	drop := func([]byte) {}
	decode := func(records [][]byte, out func(page.PFN, []byte) error) {
		for _, r := range records {
			if err := dec.Decode(r, out); err != nil {
				panic(err) // it did not fail a moment ago
			}
		}
	}
	plain, packing := c.encoder(never), c.encoder(0)
	packed := 0
	var staged trace.Epoch
	costs := Interleave(rounds,
		func(k *Clock) {
			k.Without(func() { plain.Reset(); c.encode(plain, c.first, buf, drop) })
			c.encode(plain, c.rest, buf, drop)
		},
		func(k *Clock) {
			k.Without(packing.Reset)
			c.encode(packing, c.first, buf, drop)
		},
		func(*Clock) { packed = 0; c.encode(packing, c.rest, buf, func(b []byte) { packed += len(b) }) },
		func(k *Clock) { // what is decoded is not applied within the time
			k.Without(func() { decode(records[:begin], c.apply) })
			for i := range records[begin:] {
				r := records[begin+i : begin+i+1]
				decode(r, func(page.PFN, []byte) error { return nil })
				k.Without(func() { decode(r, c.apply) })
			}
		},
		func(k *Clock) {
			k.Without(func() { decode(records[:begin], c.apply) })
			decode(records[begin:], c.apply)
		},
		func(k *Clock) { // staged and applied
			k.Without(func() { decode(records[:begin], c.apply) })
			for _, r := range records[begin:] {
				staged.PFNs, staged.Data, err = dec.AppendPages(staged.PFNs[:0], staged.Data[:0], r)
				if err != nil {
					panic(err)
				}
				c.write(&staged)
			}
		},
		func(*Clock) {
			for i := range c.rest {
				c.write(&c.rest[i])
			}
		},
	)
	return &CodecFigures{
		Size: c.size, Distinct: len(c.memory) / page.Size,
		Encode: costs[0].Speed(c.size), FirstPacked: costs[1].Speed(len(c.first[0].Data)), EncodePacked: costs[2].Speed(c.size),
		Decode: costs[3].Speed(c.size), Applied: costs[4].Speed(c.size), Whole: costs[5].Speed(c.size),
		Memcpy: costs[6].Speed(c.size), AppliedRatio: costs[4].Ratio(costs[6]), WholeRatio: costs[5].Ratio(costs[6]),
		PerPage: float64(total) / float64(c.size/page.Size), PerPagePacked: float64(packed) / float64(c.size/page.Size),
	}, nil
}

// write copies an epoch's pages into memory.
func (c *codec) write(e *trace.Epoch) {
	for i, pfn := range e.PFNs {
		copy(c.at(pfn), e.Page(i))
	}
}

// compare tells whether memory holds what each page was last.
func (c *codec) compare() error {
	last := make(map[page.PFN]string)
	for _, epochs := range [][]trace.Epoch{c.first, c.rest} {
		for i := range epochs {
			for j, pfn := range epochs[i].PFNs {
				last[pfn] = string(epochs[i].Page(j))
			}
		}
	}
	for pfn, want := range last {
		if string(c.at(pfn)) != want {
			return fmt.Errorf("page %v did not come out as it went in", pfn)
		}
	}
	return nil
}

// guestMemory is as a guest's is when its pages are mapped one by one: no huge
// pages, all of it touched.
func guestMemory(size int) ([]byte, error) {
	m, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("guest memory: %w", err)
	}
	if err := unix.Madvise(m, unix.MADV_NOHUGEPAGE); err != nil && err != unix.EINVAL {
		return nil, fmt.Errorf("guest memory: %w", err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	for i := 0; i < len(m); i += 512 {
		m[i] = byte(r.Uint32())
	}
	return m, nil
}

// Capture measures copying dirty pages of a guest of size bytes into a buffer, from
// the bitmap on, against copying the same pages when their numbers are known: the
// ratio of speeds, 1 if the bitmap costs nothing. Each round takes other pages, so
// they are cold where size is beyond the caches.
func Capture(size, dirty, rounds int) (ratio, memcpy float64, err error) {
	m, err := guestMemory(size)
	if err != nil {
		return 0, 0, err
	}
	defer unix.Munmap(m)
	const sets = 8
	var bitmaps [sets][]uint64
	var known [sets][]page.PFN
	r := rand.New(rand.NewPCG(3, 4))
	all := []page.Run{{N: uint64(size / page.Size)}}
	for i := range sets {
		b := make([]uint64, size/page.Size/64)
		for n := 0; n < dirty; {
			// Dirty pages come in short runs.
			at := r.IntN(size/page.Size - 8)
			for range 1 + r.IntN(4) {
				if b[at/64]>>(at%64)&1 == 0 && n < dirty {
					b[at/64] |= 1 << (at % 64)
					n++
				}
				at++
			}
		}
		bitmaps[i], known[i] = b, page.AppendPFNs(nil, page.AppendRuns(nil, b, all))
	}
	var runs []page.Run
	var pfns []page.PFN
	buf := make([]byte, dirty*page.Size)
	turn := 0
	costs := Interleave(rounds,
		func(*Clock) {
			runs = page.AppendRuns(runs[:0], bitmaps[turn%sets], all)
			pfns = page.AppendPFNs(pfns[:0], runs)
			to := buf
			for _, r := range runs {
				to = to[copy(to, m[int(r.First)*page.Size:][:int(r.N)*page.Size]):]
			}
			turn++
		},
		func(*Clock) {
			for i, pfn := range known[turn%sets] {
				copy(buf[i*page.Size:][:page.Size], m[int(pfn)*page.Size:])
			}
			turn++
		},
	)
	return costs[0].Ratio(costs[1]), costs[1].Speed(len(buf)), nil
}

// Bitmap measures the scan of a guest's dirty bitmap that the hypervisor has just
// copied out, and of one that is in no cache.
func Bitmap(size uint64, dirty, rounds int) (warm, cold time.Duration) {
	const copies = 32 // beyond the caches, together
	words := int(size / page.Size / 64)
	from, to := make([]uint64, words), make([]uint64, words*copies)
	for i := range dirty {
		w := i * words / dirty
		from[w] |= 1 << (i % 64)
	}
	for i := range copies {
		copy(to[i*words:], from)
	}
	var runs []page.Run
	all := []page.Run{{N: size / page.Size}}
	turn := 0
	costs := Interleave(rounds,
		func(k *Clock) {
			k.Without(func() { copy(to[:words], from) })
			runs = page.AppendRuns(runs[:0], to[:words], all)
		},
		func(*Clock) {
			turn = turn%(copies-1) + 1
			runs = page.AppendRuns(runs[:0], to[turn*words:][:words], all)
		},
	)
	return costs[0].Least, costs[1].Least
}
