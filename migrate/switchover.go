package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"

	"kemari/migrate/wire"
)

// A switchover is a take-over that the primary asks for. It takes one more
// checkpoint, after which the guest is left standing, and has it committed. All that
// the guest has ever said belongs to an epoch that the standby has then, and leaves.
// Only after that the standby is asked to take over:
//
//	primary   suspend, seal, capture ─► send ─► ack ─► let all out ─► Handover ─► TakenOver ─► destroy
//	standby                              commit ─┘                       └─ take over ─┘
//
// Whatever keeps the standby from it, the guest goes on here: where it stands, and
// protected if the connection still is. It does not before it is known that the other
// copy does not run; see wire's FORMAT.md for what tells. What is not known either
// way is waited for: for as long as the standby shows life, and when it does not, for
// longer than other silences, handoverPatience and then what it takes to ask it over
// another connection. After that the guest goes on here, as it does when the standby
// is lost. If the standby runs it after all, and says so later, this copy is ended. A
// standby whose process is gone has handoverPatience for its copy to be cleaned up.

const (
	// handoverPatience is how long silence is borne that may mean that the standby has
	// taken over as it was asked to.
	handoverPatience = 2 * handoverStale
	// handoverStale is the silence after which a standby does not do what it finds on a
	// connection: it may have been asked long ago.
	handoverStale = 5 * time.Second
	// maxHandovers bounds the connections over which a standby is asked.
	maxHandovers = 3
)

// handover is a Switchover under way.
type handover struct {
	begun bool       // Primary.mu: the guest is being made to stand for it
	done  chan error // what became of it; has room for that
}

// Switchover has the standby take the guest over, and returns nil once it runs there
// and our copy has ended: Run then ends with ErrSwitchedOver. With any other error the
// guest goes on here, and protection does too unless Run ends.
//
// It may be called at any time. If ctx ends before the guest stands for it nothing is
// done; later it goes on, and an End waits for what becomes of it.
func (p *Primary) Switchover(ctx context.Context) error {
	h := &handover{done: make(chan error, 1)}
	if err := p.order(h); err != nil {
		return err
	}
	select {
	case err := <-h.done:
		return err
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case err := <-h.done:
		return err
	default:
	}
	if !h.begun {
		p.handover = nil
		return context.Cause(ctx)
	}
	return fmt.Errorf("%w; the switchover goes on", context.Cause(ctx))
}

// order lets h be picked up.
func (p *Primary) order(h *handover) (err error) {
	p.change(func() {
		switch {
		case p.canceled.Err() != nil:
			err = errors.New("protection has ended")
		case p.stats.Alone:
			err = errors.New("the standby is silent; it cannot take over until it is back")
		case !p.stats.Protected:
			err = errors.New("the first copy is not complete yet")
		case p.handover != nil:
			err = errors.New("it is being switched over already")
		default:
			p.handover = h
		}
	})
	return err
}

// pick returns the switchover that the next checkpoint is for, or nil.
func (p *Primary) pick() *handover {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.handover != nil {
		p.handover.begun = true
	}
	return p.handover
}

// settle says what became of the switchover, if there is one.
func (p *Primary) settle(err error) {
	p.change(func() {
		if p.handover != nil {
			p.handover.done <- err
		}
		p.handover, p.handing = nil, false
		if p.asked {
			p.cancel(errAsked)
		}
	})
}

// handOver asks the standby to take over from the epoch, which it has and since which
// the guest stands. It returns ErrTakenOver if it has, nil if the guest goes on here,
// and else why protection ends.
func (p *Primary) handOver(ctx context.Context, epoch wire.Epoch) error {
	// Whatever has come since the seal the guest had sent before it stood.
	if err := p.output.Pass(); err != nil {
		return fmt.Errorf("let the guest's output go: %w", err)
	}
	p.passing, p.sealed = true, false
	asked := false
	p.change(func() {
		if asked = p.asked; !asked {
			p.handing = true
		}
	})
	if asked {
		return errAsked
	}
	p.log.Info("handing the guest over to the standby", "epoch", uint64(epoch))
	var on *primaryLine
	for lines := 0; ; {
		p.mu.Lock()
		l, alone, changed := p.line, p.alone, p.changed
		p.mu.Unlock()
		if err := context.Cause(ctx); err != nil {
			if on != nil && errors.Is(err, errLine) {
				// Its process is gone, by no word of its own: who cleans up behind it may be
				// just ending a copy that has begun to run.
				time.Sleep(handoverPatience)
			}
			return err
		}
		switch {
		case l == nil && alone:
			return p.goOn(fmt.Errorf("%w: it does not say whether it has taken over", ErrStandbyLost))
		case l == nil || l == on:
		case lines == maxHandovers:
			return p.goOn(fmt.Errorf("the standby does not take over; the connection broke each of %d times", lines))
		default:
			on = l
			lines++
			p.life.sign() // its silence counts from here
			if err := l.send(wire.TypeHandover, epoch, nil); err != nil {
				p.hangUp(l)
			}
		}
		select {
		case <-ctx.Done():
		case <-changed:
		}
	}
}

// goOn lets the guest go on here that stands to be handed over: why is the reason.
func (p *Primary) goOn(why error) error {
	p.log.Error("the guest goes on here", "err", why)
	if p.passing {
		// From here on it says what the standby does not know.
		if err := errors.Join(p.output.Seal(), p.output.Release()); err != nil {
			return fmt.Errorf("hold the guest's output again: %w", err)
		}
		p.passing = false
	}
	p.held = false
	if err := p.guest.Resume(); err != nil {
		return err
	}
	p.settle(why)
	return nil
}
