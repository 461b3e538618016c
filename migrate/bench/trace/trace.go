package trace

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/klauspost/compress/zstd"

	"kemari/migrate/page"
)

const magic = "kemari trace 1\n\x00"

// MaxPages bounds an epoch: 4 GiB of pages.
const MaxPages = 1 << 20

// maxWindow bounds the memory of the decompressor.
const maxWindow = 32 << 20

// ErrFormat means that a file is no trace.
var ErrFormat = errors.New("not a trace")

// Epoch is the pages of one checkpoint: page i of Data is that of PFNs[i].
type Epoch struct {
	PFNs []page.PFN
	Data []byte
}

// Page returns the content of the i-th page.
func (e *Epoch) Page(i int) []byte { return e.Data[i*page.Size:][:page.Size] }

// Add adds a page. data is copied.
func (e *Epoch) Add(pfn page.PFN, data []byte) {
	e.PFNs, e.Data = append(e.PFNs, pfn), append(e.Data, data[:page.Size]...)
}

// Trace is a whole one.
type Trace struct {
	About  string
	Epochs []Epoch
}

// Write writes t to w.
func (t *Trace) Write(w io.Writer) error {
	if len(t.About) > math.MaxUint16 {
		return fmt.Errorf("description of %d bytes", len(t.About))
	}
	// The long window finds what a page was an epoch ago.
	z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithWindowSize(maxWindow), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return err
	}
	b := binary.BigEndian.AppendUint16([]byte(magic), uint16(len(t.About)))
	if _, err := z.Write(append(b, t.About...)); err != nil {
		return err
	}
	for i := range t.Epochs {
		e := &t.Epochs[i]
		if len(e.PFNs) > MaxPages || len(e.Data) != len(e.PFNs)*page.Size {
			return fmt.Errorf("epoch %d: %d pages in %d bytes", i, len(e.PFNs), len(e.Data))
		}
		b := binary.BigEndian.AppendUint32(nil, uint32(len(e.PFNs)))
		for j, pfn := range e.PFNs {
			b = append(binary.BigEndian.AppendUint64(b, uint64(pfn)), e.Page(j)...)
			if _, err := z.Write(b); err != nil {
				return err
			}
			b = b[:0]
		}
		if _, err := z.Write(b); err != nil { // an epoch without pages
			return err
		}
	}
	return z.Close()
}

// Read reads a trace of at most limit bytes of pages. What it allocates grows
// with what it has read, whatever the counts say.
func Read(r io.Reader, limit int64) (*Trace, error) {
	z, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(64<<20), zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, err
	}
	defer z.Close()
	t, err := read(bufio.NewReaderSize(z, 64<<10), limit)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	return t, nil
}

func read(r io.Reader, limit int64) (*Trace, error) {
	head := make([]byte, len(magic)+2)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, err
	}
	if string(head[:len(magic)]) != magic {
		return nil, errors.New("another magic or version")
	}
	about := make([]byte, binary.BigEndian.Uint16(head[len(magic):]))
	if _, err := io.ReadFull(r, about); err != nil {
		return nil, whole(err)
	}
	t := &Trace{About: string(about)}
	b := make([]byte, 8+page.Size)
	for {
		if _, err := io.ReadFull(r, b[:4]); err == io.EOF {
			return t, nil
		} else if err != nil {
			return nil, err
		}
		n := binary.BigEndian.Uint32(b)
		if n > MaxPages || len(t.Epochs) >= MaxPages {
			return nil, fmt.Errorf("%d pages in epoch %d", n, len(t.Epochs))
		}
		var e Epoch
		for range n {
			if limit -= page.Size; limit < 0 {
				return nil, errors.New("too large")
			}
			if _, err := io.ReadFull(r, b); err != nil {
				return nil, whole(err)
			}
			pfn := page.PFN(binary.BigEndian.Uint64(b))
			if pfn > page.MaxPFN {
				return nil, fmt.Errorf("page %v", pfn)
			}
			e.Add(pfn, b[8:])
		}
		t.Epochs = append(t.Epochs, e)
	}
}

// whole says that an end came where more was due.
func whole(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
