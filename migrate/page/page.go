package page

import (
	"encoding/binary"
	"errors"
	"strconv"

	"github.com/zeebo/xxh3"
)

// Size of a page in bytes.
const Size = 4096

// PFN is the number of a page of guest memory: its guest-physical address
// divided by Size.
type PFN uint64

// MaxPFN is the highest PFN a record can name.
const MaxPFN PFN = 1<<48 - 1

func (p PFN) String() string { return "0x" + strconv.FormatUint(uint64(p), 16) }

var (
	// ErrFormat: what was to be decoded is no sequence of whole page records of this
	// guest.
	ErrFormat = errors.New("not a page record of ours")
	// ErrBase: a record is well formed, but what results is not the page that was
	// encoded. The standby does not have what the primary believes it has.
	ErrBase = errors.New("the standby's copy of a page is not what the primary believes")
)

// kind is what a record says of its page. Zero is invalid, so that zeroed memory
// is no record.
type kind uint8

const (
	kindZero  kind = 1 // all bytes are zero; no payload
	kindDelta kind = 2 // what changed
	kindS2    kind = 3 // an S2 block
	kindRaw   kind = 4 // the page

	kindLast = kindRaw
)

// headerSize is the length of a record's header in bytes:
//
//	bits 63–61 of the first eight bytes: kind; 60–48: length of the payload; 47–0: pfn
//	four bytes: check of those eight bytes and of the page that results
const headerSize = 12

// MaxEncoded bounds what one Append adds, in bytes.
const MaxEncoded = headerSize + Size

// lineSize is what is looked at as one: a cache line of eight words.
const (
	lineSize = 64
	lines    = Size / lineSize
)

// check is the checksum of a record: of the first eight bytes of its header and of the
// page that results. XXH3 takes half the time of CRC32C on a processor that has an
// instruction for either, and a tenth where that is emulated. A bit that changes in
// the header changes the result: with this factor, whichever of the 64 it is.
func check(header uint64, page *[Size]byte) uint32 {
	return uint32((xxh3.Hash(page[:]) ^ header*0x9e3779b97f4a7c15) >> 32)
}

// word loads the i-th word of a line.
func word(l *[lineSize]byte, i int) uint64 {
	return binary.LittleEndian.Uint64(l[i*8:])
}

// zero is what a page of zeroes is compared with and copied from.
var zero [Size]byte

func isZero(p *[Size]byte) bool {
	for i := 0; i < Size; i += lineSize {
		l := (*[lineSize]byte)(p[i : i+lineSize])
		if word(l, 0)|word(l, 1)|word(l, 2)|word(l, 3)|word(l, 4)|word(l, 5)|word(l, 6)|word(l, 7) != 0 {
			return false
		}
	}
	return true
}
