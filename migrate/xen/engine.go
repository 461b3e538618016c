package xen

import (
	"context"
	"time"

	"kemari/migrate/page"
)

// What the engine and a Guest speak of, until package migrate has them.
type (
	// Pages is a batch of guest pages: Data[i*page.Size:(i+1)*page.Size] is that of
	// PFNs[i].
	Pages struct {
		PFNs []page.PFN
		Data []byte
	}
	// Capture is one checkpoint, in buffers that are reused.
	Capture struct {
		Pages
		State                 []byte // TSC_INFO, HVM_CONTEXT, HVM_PARAMS records of the libxc stream
		Suspend, Copy, Resume time.Duration
	}
)

type engineGuest interface {
	Begin(ctx context.Context) (head []byte, err error)
	Round(ctx context.Context, send func(*Pages) error) (pages int, err error)
	Checkpoint(ctx context.Context, seal func() error, c *Capture) error
	Destroy(ctx context.Context) error
	Close() error
}

var _ engineGuest = (*Domain)(nil)
