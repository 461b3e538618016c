package xen

import (
	"bytes"
	"slices"
	"testing"

	"kemari/migrate/page"
)

func join(b ...[]byte) []byte { return slices.Concat(b...) }

func TestAppendPages(t *testing.T) {
	body := pageData(1, 0xf<<60|7, 3) // the second has no content
	body = body[:len(body)-PageSize]
	body[len(body)-1] = 9
	var pfns []page.PFN
	if err := appendPages(body, func(pfn page.PFN, data []byte) {
		pfns = append(pfns, pfn)
		if want := map[page.PFN]byte{3: 9}[pfn]; data[PageSize-1] != want {
			t.Errorf("page %v ends with %d", pfn, data[PageSize-1])
		}
	}); err != nil || !slices.Equal(pfns, []page.PFN{1, 3}) {
		t.Errorf("%v, %v", pfns, err)
	}
}

func FuzzRecords(f *testing.F) {
	f.Add(join(record(RecordHVMContext, []byte("c")), record(RecordHVMParams, []byte("p"))))
	f.Add(record(RecordPageData, pageData(1)))
	f.Fuzz(func(t *testing.T, b []byte) {
		var again []byte
		err := Records(b, func(r Record) error { again = append(again, r.Raw...); return nil })
		if err == nil && !bytes.Equal(again, b) {
			t.Errorf("%x became %x", b, again)
		}
		if CheckState(b, false) == nil && err != nil {
			t.Errorf("%x is a state, and yet no records: %v", b, err)
		}
	})
}
