package xen

import (
	"context"
	"errors"
	"fmt"

	"kemari/migrate"
)

// Helper is a Guest by the helper process as the engine has it, as an oracle for
// whoever takes checkpoints without that process. It implements migrate.Guest.
//
// The helper decides by itself when its rounds end and the guest is suspended, so
// the first call of Checkpoint finds it standing already.
type Helper struct {
	g     *Guest
	first bool
	live  firstCheckpoint
}

// firstCheckpoint is one call of Guest.Checkpoint that the engine sees as three.
type firstCheckpoint struct {
	head     []byte
	state    []byte
	begun    chan struct{}       // closed when head is whole
	pages    chan *migrate.Pages // live, to be handed over
	taken    chan error          // what became of them
	standing chan struct{}       // closed when the guest stands
	seal     chan func() error
	done     chan struct{} // closed when it has returned; cost and err are valid then
	cost     migrate.Checkpoint
	err      error
}

// NewHelper makes g what the engine wants.
func NewHelper(g *Guest) *Helper {
	return &Helper{g: g, first: true, live: firstCheckpoint{
		begun: make(chan struct{}), pages: make(chan *migrate.Pages), taken: make(chan error),
		standing: make(chan struct{}), seal: make(chan func() error, 1), done: make(chan struct{}),
	}}
}

// Begin implements migrate.Guest.
func (h *Helper) Begin(ctx context.Context) ([]byte, error) {
	l := &h.live
	var batch migrate.Pages
	split := Splitter{
		Headers: func(b []byte) error { l.head = append(l.head, b...); return nil },
		Record: func(r Record) error {
			switch r.Type {
			case RecordPageData:
				batch.Reset()
				if err := appendPages(r.Body, batch.Append); err != nil {
					return err
				}
				select {
				case l.pages <- &batch:
					return <-l.taken
				case <-ctx.Done():
					return context.Cause(ctx)
				}
			case RecordTSCInfo, RecordHVMContext, RecordHVMParams:
				l.state = append(l.state, r.Raw...)
				return nil
			}
			l.head = append(l.head, r.Raw...)
			if r.Type == RecordStaticDataEnd {
				close(l.begun)
			}
			return nil
		},
	}
	seal := func() error {
		close(l.standing)
		select {
		case seal := <-l.seal:
			return seal()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	go func() {
		defer close(l.done)
		l.cost, l.err = h.g.Checkpoint(ctx, seal, split.Push)
	}()
	select {
	case <-l.begun:
		return l.head, nil
	case <-l.done:
		return nil, l.ended()
	}
}

func (l *firstCheckpoint) ended() error {
	if l.err == nil {
		return errors.New("the checkpoint helper was sooner than asked")
	}
	return l.err
}

// Round implements migrate.Guest.
func (h *Helper) Round(ctx context.Context, send func(*migrate.Pages) error) (n int, err error) {
	l := &h.live
	for {
		select {
		case p := <-l.pages:
			n += len(p.PFNs)
			err := send(p)
			l.taken <- err
			if err != nil {
				<-l.done
				return n, err
			}
		case <-l.standing:
			return 0, nil // so that no further round is asked for
		case <-l.done:
			return n, l.ended()
		}
	}
}

// Again implements migrate.Guest: the helper's stream has a beginning only once.
func (h *Helper) Again() error {
	return errors.New("the checkpoint helper cannot send all memory again")
}

var errHelperHold = errors.New("the checkpoint helper cannot leave the guest standing")

// Resume implements migrate.Guest.
func (h *Helper) Resume() error { return errHelperHold }

// Checkpoint implements migrate.Guest.
func (h *Helper) Checkpoint(ctx context.Context, seal func() error, c *migrate.Capture) error {
	if c.Hold {
		return errHelperHold
	}
	c.Reset()
	c.State = c.State[:0]
	if c.SumsTook = 0; c.Sums != nil {
		c.Sums.Reset()
		c.Sums.Err = errors.New("the helper process cannot do that")
	}
	var cost migrate.Checkpoint
	var err error
	if h.first {
		h.first = false
		cost, err = h.live.rest(seal, c)
	} else {
		cost, err = h.g.Checkpoint(ctx, seal, func(b []byte) error {
			return Records(b, func(r Record) error {
				switch r.Type {
				case RecordPageData:
					return appendPages(r.Body, c.Append)
				case RecordTSCInfo, RecordHVMContext, RecordHVMParams:
					c.State = append(c.State, r.Raw...)
					return nil
				}
				return fmt.Errorf("%w: record %#x in a checkpoint", ErrStream, uint32(r.Type))
			})
		})
	}
	c.Suspend, c.Copy, c.Resume = cost.Suspend, cost.Copy, cost.Resume
	return err
}

// rest finishes the first one: what still comes is captured.
func (l *firstCheckpoint) rest(seal func() error, c *migrate.Capture) (migrate.Checkpoint, error) {
	l.seal <- seal
	for {
		select {
		case p := <-l.pages:
			for i, pfn := range p.PFNs {
				c.Append(pfn, p.Page(i))
			}
			l.taken <- nil
		case <-l.done:
			c.State = append(c.State, l.state...)
			return l.cost, l.err
		}
	}
}

// Ended implements migrate.Guest: the helper says so by its end.
func (h *Helper) Ended() bool {
	select {
	case <-h.g.exited:
		return errors.Is(h.g.err, migrate.ErrGuestGone)
	default:
		return false
	}
}

// Destroy implements migrate.Guest.
func (h *Helper) Destroy(ctx context.Context) error { return h.g.Destroy(ctx) }

// Close implements migrate.Guest.
func (h *Helper) Close() error { return h.g.Close() }

var _ migrate.Guest = (*Helper)(nil)
