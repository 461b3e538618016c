package sys

import (
	"encoding/binary"
	"fmt"
	"slices"
	"testing"
)

func TestEachGrant(t *testing.T) {
	le := binary.LittleEndian
	for version, want := range map[uint32][]string{
		0: {"0x8 to 0", "0xfeffc to 3"},
		1: {"0x8 to 0", "0xfeffc to 3"},
		2: {"0x8 to 0", "0xfeffc to 3"},
	} {
		var table []byte
		for _, g := range []struct {
			flags, to uint16
			pfn       uint32
		}{
			{0, 0, 1},              // none
			{1, 0, 8},              // to be written to
			{1 | 1<<2, 0, 9},       // to be read
			{2, 0, 10},             // to be given away
			{3, 0, 11},             // another domain's
			{1 | 1<<8, 0, 12},      // part of a page, which is only read
			{1 | 3<<3, 3, 0xfeffc}, // mapped for both
		} {
			e := le.AppendUint16(le.AppendUint16(nil, g.flags), g.to)
			if version == 2 {
				e = le.AppendUint32(e, 0xdeadbeef)
				e = le.AppendUint64(e, uint64(g.pfn))
			} else {
				e = le.AppendUint32(e, g.pfn)
			}
			table = append(table, e...)
		}
		var got []string
		eachGrant(append(table, make([]byte, 4096)...), version, func(pfn uint64, to uint16) { got = append(got, fmt.Sprintf("%#x to %d", pfn, to)) })
		if !slices.Equal(got, want) {
			t.Errorf("version %d: %q, want %q", version, got, want)
		}
	}
}
