package output

// numBands is how many the prio qdisc has, the most there can be; see doc.go.
const numBands = 16

// nextBand is the one to fill after the given one.
func nextBand(band int) int { return (band + 1) % numBands }

// ring decides which bands of one interface are open. It makes the order of
// frames a matter of construction: no two bands that have frames are ever open,
// so that it does not matter which of them prio serves first, nor when.
//
//	     head       allowed   fill
//	      │            │       │
//	··───[n]──[n+1]──[n+2]──[n+3]───·· free: closed and empty
//	     open  released      held
//
// head is the only open band. The bands after it, up to allowed, are released;
// each is opened once those before it have been seen empty. An empty band other
// than fill stays so, since only fill gets frames.
type ring struct{ head, allowed, fill int }

// seal turns new frames to the next band, and says which. It says no, having done
// nothing, where there is no free one.
func (r *ring) seal() (band int, ok bool) {
	if r.full() {
		return 0, false
	}
	r.fill = nextBand(r.fill)
	return r.fill, true
}

// full tells whether the next seal has to wait for frames to leave.
func (r *ring) full() bool { return nextBand(r.fill) == r.head }

// release allows the bands before fill to be opened, pass that one too.
func (r *ring) release() { r.allowed = (r.fill + numBands - 1) % numBands }
func (r *ring) pass()    { r.allowed = r.fill }

// behind tells whether there are released bands that are not open yet.
func (r *ring) behind() bool { return r.head != r.allowed }

// step moves head to the next band that may be opened, and returns it and the one
// that is to be closed. It says no while that one has frames, and where there is
// nothing to be done. length is how many frames a band has, or had at any moment
// after the last step.
func (r *ring) step(length func(band int) uint32) (open, shut int, ok bool) {
	if !r.behind() || length(r.head) > 0 {
		return 0, 0, false
	}
	shut = r.head
	for r.head = nextBand(r.head); r.head != r.allowed && length(r.head) == 0; {
		r.head = nextBand(r.head)
	}
	return r.head, shut, true
}
