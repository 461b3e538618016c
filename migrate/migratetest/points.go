package migratetest

import (
	"maps"
	"sync"
)

// Points are labelled places in the fakes at which a test can have something
// happen, such as a power cut. A nil *Points is fine and does nothing.
type Points struct {
	mu   sync.Mutex
	hits map[string]int
	at   string
	nth  int
	do   func()
}

// At has do called, once, by whoever comes to label for the nth time from now on.
func (p *Points) At(label string, nth int, do func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.at, p.nth, p.do = label, nth, do
}

// Hit is called by the fakes.
func (p *Points) Hit(label string) {
	if p == nil {
		return
	}
	p.mu.Lock()
	if p.hits == nil {
		p.hits = make(map[string]int)
	}
	p.hits[label]++
	var do func()
	if p.do != nil && label == p.at {
		if p.nth--; p.nth <= 0 {
			do, p.do = p.do, nil
		}
	}
	p.mu.Unlock()
	if do != nil {
		do()
	}
}

// Hits returns all labels that have been come to, and how often.
func (p *Points) Hits() map[string]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.hits)
}
