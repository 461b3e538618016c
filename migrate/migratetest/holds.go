package migratetest

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"testing"
	"time"
)

// Holds is what a process holds.
type Holds struct {
	Heap        uint64 // bytes that are in use
	Goroutines  int
	Descriptors int
	Mappings    int
}

// Measure says what this process holds, and of what comes and goes the least that is
// seen within some milliseconds.
func Measure(t testing.TB) Holds {
	t.Helper()
	runtime.GC()
	runtime.GC() // what had a finalizer goes only now
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	h := Holds{Heap: m.HeapAlloc, Goroutines: 1 << 30, Descriptors: 1 << 30}
	for range 20 {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		h.Goroutines = min(h.Goroutines, runtime.NumGoroutine())
		h.Descriptors = min(h.Descriptors, len(fds))
		time.Sleep(time.Millisecond)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	h.Mappings = bytes.Count(maps, []byte("\n"))
	return h
}

// Grown says in what h is more than before, or nothing. Of memory 1 MiB counts as
// nothing, and of mappings, of which the Go runtime makes some itself, a few.
func (h Holds) Grown(before Holds) error {
	if h.Heap > before.Heap+1<<20 || h.Goroutines > before.Goroutines || h.Descriptors > before.Descriptors || h.Mappings > before.Mappings+10 {
		return fmt.Errorf("from %v to %v", before, h)
	}
	return nil
}

func (h Holds) String() string {
	return fmt.Sprintf("%d KiB, %d goroutines, %d descriptors, %d mappings", h.Heap>>10, h.Goroutines, h.Descriptors, h.Mappings)
}
