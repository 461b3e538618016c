package migrate

import (
	"errors"

	"kemari/migrate/page"
	"kemari/migrate/wire"
)

// errRefused: the standby has refused the epoch while it was being sent.
var errRefused = errors.New("refused meanwhile")

// maxFrame is the length of the longest frame, in bytes.
const maxFrame = wire.HeaderSize + wire.MaxPayload

// epochWriter encodes one epoch and sends it on one connection. Frames gather until
// there is no room for another: a write costs a slow host milliseconds, and an epoch is
// mostly small enough to leave in one.
type epochWriter struct {
	p      *Primary
	line   *primaryLine
	epoch  wire.Epoch
	whole  bool // pages may come several times: none may refer to what the standby has
	end    wire.EpochEnd
	frames []byte // not sent yet
	start  int    // in frames, of the one that is being filled
}

// finish sends the capture and what ends the epoch.
func (w *epochWriter) finish(c *Capture) error {
	if err := w.pages(&c.Pages); err != nil {
		return err
	}
	if err := w.bytes(wire.TypeState, c.State); err != nil {
		return err
	}
	if err := w.open(); err != nil {
		return err
	}
	w.frames = w.end.Append(w.frames)
	if err := w.close(wire.TypeEpochEnd); err != nil {
		return err
	}
	return w.flush()
}

// pages encodes pages into frames that are cut between records.
func (w *epochWriter) pages(b *Pages) error {
	if err := w.open(); err != nil {
		return err
	}
	for i, pfn := range b.PFNs {
		if len(w.frames)-w.start+page.MaxEncoded > maxFrame {
			if err := w.close(wire.TypePages); err != nil {
				return err
			}
			if err := w.open(); err != nil {
				return err
			}
		}
		if w.whole {
			w.p.enc.Forget(pfn)
		}
		n := len(w.frames)
		if w.frames = w.p.enc.Append(w.frames, pfn, b.Page(i)); len(w.frames) > n {
			w.end.Pages++
		}
	}
	if len(w.frames) == w.start+wire.HeaderSize {
		w.frames = w.frames[:w.start]
		return nil
	}
	return w.close(wire.TypePages)
}

// bytes adds opaque bytes in as many frames as it takes.
func (w *epochWriter) bytes(t wire.Type, b []byte) error {
	for {
		if err := w.open(); err != nil {
			return err
		}
		n := min(len(b), wire.MaxPayload)
		w.frames = append(w.frames, b[:n]...)
		if err := w.close(t); err != nil {
			return err
		}
		if b = b[n:]; len(b) == 0 {
			return nil
		}
	}
}

// open begins a frame, for which there is room then.
func (w *epochWriter) open() error {
	if len(w.frames) > cap(w.frames)-maxFrame {
		if err := w.flush(); err != nil {
			return err
		}
	}
	w.start = len(w.frames)
	w.frames = wire.Room(w.frames)
	return nil
}

func (w *epochWriter) close(t wire.Type) error {
	f := wire.Frame{Type: t, Generation: w.p.cfg.Generation, Epoch: w.epoch}
	if err := f.Fill(w.frames[w.start:]); err != nil {
		return err
	}
	if t != wire.TypeEpochEnd {
		w.end.Add(f)
	}
	return nil
}

func (w *epochWriter) flush() error {
	if len(w.line.refused) > 0 {
		return errRefused
	}
	err := w.line.write(w.frames)
	w.frames = w.frames[:0]
	return err
}
