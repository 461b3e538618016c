package output

import (
	"testing"

	"pgregory.net/rapid"
)

// model is the kernel's side of a ring: bands, of which prio may serve any that is
// open, and frames that leave whenever they like.
type model struct {
	t      *rapid.T
	ring   ring
	queued [numBands][]int
	open   [numBands]bool
	sealed bool
	pass   bool
	sent   int // numbers of the frames
	limit  int // the first one that must not leave
	left   int // how many have
}

func (m *model) send() {
	for range rapid.IntRange(1, 5).Draw(m.t, "frames") {
		m.queued[m.ring.fill] = append(m.queued[m.ring.fill], m.sent)
		m.sent++
	}
	if m.pass {
		m.limit = m.sent
	}
}

// leave takes a frame out of any open band.
func (m *model) leave() {
	var from []int
	for band, frames := range m.queued {
		if m.open[band] && len(frames) > 0 {
			from = append(from, band)
		}
	}
	if len(from) == 0 {
		return
	}
	band := rapid.SampledFrom(from).Draw(m.t, "band")
	n := m.queued[band][0]
	m.queued[band] = m.queued[band][1:]
	if n != m.left {
		m.t.Fatalf("frame %d leaves, %d is the next", n, m.left)
	}
	if n >= m.limit {
		m.t.Fatalf("frame %d leaves before it may", n)
	}
	m.left++
}

func (m *model) step() {
	length := func(band int) uint32 { return uint32(len(m.queued[band])) }
	if open, shut, ok := m.ring.step(length); ok {
		m.open[open] = true
		for range rapid.IntRange(0, 3).Draw(m.t, "between two requests") {
			m.leave()
		}
		m.open[shut] = false
	}
}

// end is the number after the last frame that is before the band being filled.
func (m *model) end() int { return m.sent - len(m.queued[m.ring.fill]) }

// TestRing: whatever prio does with what is open, frames leave in the order they
// came in, none before its epoch is released, and every one of them in the end.
func TestRing(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := &model{t: t, pass: true}
		m.open[0] = true
		actions := map[string]func(*rapid.T){
			"send":  func(*rapid.T) { m.send() },
			"leave": func(*rapid.T) { m.leave() },
			"step":  func(*rapid.T) { m.step() },
			"seal": func(*rapid.T) {
				if m.sealed || m.ring.full() {
					return
				}
				if band, ok := m.ring.seal(); !ok || band != m.ring.fill || len(m.queued[band]) > 0 || m.open[band] {
					t.Fatalf("band %d (%v) to be filled: open %v, frames %v", band, ok, m.open[band], m.queued[band])
				}
				m.sealed, m.pass = true, false
			},
			"release": func(*rapid.T) {
				if !m.sealed {
					return
				}
				m.sealed = false
				m.ring.release()
				m.limit = m.end()
				m.step()
			},
			"pass": func(*rapid.T) {
				m.sealed, m.pass = false, true
				m.ring.pass()
				m.limit = m.sent
				m.step()
			},
			"": func(t *rapid.T) {
				if n := (m.ring.fill - m.ring.head + numBands) % numBands; n < (m.ring.allowed-m.ring.head+numBands)%numBands {
					t.Fatalf("%+v: allowed is beyond fill", m.ring)
				}
				for band, open := range m.open {
					if open != (band == m.ring.head) {
						t.Fatalf("%+v: band %d: open %v", m.ring, band, open)
					}
				}
			},
		}
		t.Repeat(actions)
		m.ring.pass()
		m.limit = m.sent
		for range numBands + m.sent {
			m.step()
			m.leave()
		}
		if m.left != m.sent {
			t.Fatalf("%d of %d frames have left", m.left, m.sent)
		}
		if m.ring.full() || m.ring.behind() {
			t.Fatalf("%+v: not settled", m.ring)
		}
	})
}

// TestRingFull: with nothing leaving there is room for as many epochs as there are
// bands, and the one that has no room is refused.
func TestRingFull(t *testing.T) {
	var r ring
	stuck := func(int) uint32 { return 1 }
	n := 0
	for ; ; n++ {
		if _, ok := r.seal(); !ok {
			break
		}
		r.release()
		if _, _, ok := r.step(stuck); ok {
			t.Fatal("opened behind a band that has frames")
		}
	}
	if n != numBands-1 {
		t.Errorf("%d epochs", n)
	}
	if open, shut, ok := r.step(func(int) uint32 { return 0 }); !ok || open != numBands-2 || shut != 0 {
		t.Errorf("opened %d, closed %d, %v", open, shut, ok)
	}
	if _, ok := r.seal(); !ok {
		t.Error("no room where there is")
	}
}
