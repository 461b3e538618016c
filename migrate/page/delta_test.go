package page

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"

	"pgregory.net/rapid"
)

// A delta is what turns one page into the other, or is given up; either way base
// becomes the page.
func TestDelta(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 0))
		var was, is, buf [Size]byte
		for range rapid.IntRange(0, 4).Draw(t, "before") {
			scribble(r, &was)
		}
		is = was
		for range rapid.IntRange(0, 4).Draw(t, "after") {
			scribble(r, &is)
		}
		base := was
		n := diff(buf[:], &base, &is)
		if base != is {
			t.Fatal("base is not the page")
		}
		switch {
		case n == 0:
			if was != is {
				t.Fatal("a change was not seen")
			}
		case n <= maxDelta:
			if !patch(&was, buf[:n]) || was != is {
				t.Fatal("the delta does not lead to the page")
			}
		}
	})
}

// What is no delta is refused, though its checksum might fit.
func TestDeltaRefused(t *testing.T) {
	line := func(lengths uint32, bytes ...byte) []byte {
		b := []byte{1, 0, 0, 0, 0, 0, 0, 0, byte(lengths), byte(lengths >> 8), byte(lengths >> 16), byte(lengths >> 24)}
		return append(b, bytes...)
	}
	for name, b := range map[string][]byte{
		"nothing":        nil,
		"short":          make([]byte, 7),
		"no line":        make([]byte, 8),
		"line missing":   line(0)[:8],
		"lengths short":  line(1, 1)[:11],
		"no word":        line(0),
		"long word":      line(9, make([]byte, 9)...),
		"longest word":   line(0xf0000000, make([]byte, 15)...),
		"word missing":   line(2, 1),
		"word too many":  line(1, 1, 2),
		"all lines gone": bytes.Repeat([]byte{0xff}, 8),
	} {
		var p [Size]byte
		if patch(&p, b) {
			t.Errorf("%s: %x is taken for a delta", name, b)
		}
	}
	var p [Size]byte
	if !patch(&p, line(1, 1)) || p[0] != 1 {
		t.Error("a good one is refused")
	}
}

func changed(words int) (was, is [Size]byte) {
	r := rand.New(rand.NewPCG(1, 2))
	random(r, &was)
	is = was
	for range words {
		is[r.IntN(Size/8)*8] ^= byte(1 + r.IntN(255))
	}
	return was, is
}

func BenchmarkDiff(b *testing.B) {
	for _, words := range []int{0, 4, 25, 300} {
		b.Run(fmt.Sprint(words, "-words"), func(b *testing.B) {
			was, is := changed(words)
			pages := [2]*[Size]byte{&is, &was}
			base, dst, i := was, make([]byte, Size), 0
			b.SetBytes(Size)
			for b.Loop() {
				diff(dst, &base, pages[i&1])
				i++
			}
		})
	}
}

func BenchmarkPatch(b *testing.B) {
	for _, words := range []int{4, 25, 300} {
		b.Run(fmt.Sprint(words, "-words"), func(b *testing.B) {
			was, is := changed(words)
			dst := make([]byte, Size)
			n := diff(dst, &was, &is)
			b.SetBytes(Size)
			for b.Loop() {
				patch(&was, dst[:n])
			}
		})
	}
}
