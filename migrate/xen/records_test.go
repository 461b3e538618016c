package xen

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"kemari/migrate/page"
)

func join(b ...[]byte) []byte { return slices.Concat(b...) }

func TestCheckHead(t *testing.T) {
	cpuid, msr, end := record(RecordCPUIDPolicy, []byte("12345678")), record(RecordMSRPolicy, []byte("123")), record(RecordStaticDataEnd, nil)
	for _, c := range []struct {
		name string
		b    []byte
		ok   bool
	}{
		{"whole", join(headers(), cpuid, msr, end), true},
		{"without policies", join(headers(), end), true},
		{"no end", join(headers(), cpuid, msr), false},
		{"headers only", headers(), false},
		{"nothing", nil, false},
		{"twice", join(headers(), cpuid, cpuid, end), false},
		{"another order", join(headers(), msr, cpuid, end), false},
		{"pages", join(headers(), record(RecordPageData, pageData(1)), end), false},
		{"more", join(headers(), end, cpuid), false},
		{"a byte more", join(headers(), end, []byte{0}), false},
	} {
		if err := CheckHead(c.b); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	whole := join(headers(), cpuid, msr, end)
	for n := range whole {
		if err := CheckHead(whole[:n]); !errors.Is(err, ErrStream) {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
	}
}

func TestCheckState(t *testing.T) {
	tsc, context, params := record(RecordTSCInfo, make([]byte, 24)), record(RecordHVMContext, []byte("context")), record(RecordHVMParams, make([]byte, 24))
	for _, c := range []struct {
		name string
		b    []byte
		ok   bool
	}{
		{"whole", join(tsc, context, params), true},
		{"without TSC_INFO", join(context, params), true},
		{"no context", join(tsc, params), false},
		{"no params", join(tsc, context), false},
		{"empty context", join(record(RecordHVMContext, nil), params), false},
		{"nothing", nil, false},
		{"twice", join(tsc, context, context, params), false},
		{"another order", join(params, context), false},
		{"pages", join(record(RecordPageData, pageData(1)), context, params), false},
		{"end", join(context, params, record(RecordEnd, nil)), false},
	} {
		if err := CheckState(c.b); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	whole := join(tsc, context, params)
	for n := range whole {
		if err := CheckState(whole[:n]); !errors.Is(err, ErrStream) {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
	}
}

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
		if CheckState(b) == nil && err != nil {
			t.Errorf("%x is a state, and yet no records: %v", b, err)
		}
	})
}
