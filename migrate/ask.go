package migrate

import (
	"context"
	"errors"
	"log/slog"
)

// Ask asks the standby of a primary that was killed whether it has taken over, before
// the guest is let go on: ErrTakenOver if so, or once a take-over that is under way
// has succeeded. It is remembered (PrimaryConfig.TakenOver) and the standby told
// before Ask returns. Nil means that it has not and never will: it had nobody to go on
// with, and has dropped its copy before it said so. That ends a protection that is not
// over yet, too. Any other error means that it is not known.
// Of cfg it needs what Hello says, and the heartbeat. It ends soon after ctx.
func Ask(ctx context.Context, cfg PrimaryConfig, dial Dial, log *slog.Logger) error {
	p := NewPrimary(cfg, dial, nil, nil, log)
	l, err := p.connect(ctx)
	switch {
	case err == nil: // it had not heard of its primary before
		return l.conn.Close()
	case errors.Is(err, ErrEnded): // the session is another one, or there is no protection any more
		return nil
	}
	return err
}
