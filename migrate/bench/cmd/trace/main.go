// Trace records which pages a guest dirties, and what they become, for the
// benchmarks of page encoding.
//
//	trace [--sample N] [--skip N] [--epochs N] [--about TEXT] --domain ID [--every D] [--running] FILE
//	trace [--sample N] [--skip N] [--epochs N] [--about TEXT] FILE <STREAM
//	trace --show FILE
//
// With --domain it checkpoints a running guest of this host, by its own number, as a
// replicator does, and stops after the given number of checkpoints, or when it is
// interrupted. Nobody else may protect, save or migrate the guest meanwhile. With
// --running it takes the pages from the guest while that runs, as a first copy's rounds
// do: so a boot can be recorded, in which a guest cannot be suspended yet.
//
// STREAM is a checkpointed libxc stream of a PVH or HVM guest, as kemari-xcsave
// writes it to its file 3 (and xc_domain_save to its descriptor): recording ends
// at its end, or after the given number of checkpoints. Of the pages one in N is
// kept, with its whole history; --skip leaves out the first N checkpoints after
// the first copy. FILE is written in one go at the end.
package main

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/google/renameio/v2"

	"kemari/migrate"
	"kemari/migrate/bench"
	"kemari/migrate/bench/trace"
	"kemari/migrate/page"
	"kemari/migrate/xen"
)

func main() {
	sample := flag.Uint64("sample", 1, "keep one page in `N`")
	skip := flag.Int("skip", 0, "leave out the first `N` checkpoints after the first copy")
	epochs := flag.Int("epochs", 0, "stop after `N` checkpoints; 0 for all there are")
	about := flag.String("about", "", "what is recorded, in words")
	show := flag.Bool("show", false, "say what is in FILE")
	domain := flag.Uint("domain", 0, "checkpoint the running guest with this `ID`")
	every := flag.Duration("every", 200*time.Millisecond, "with --domain: let the guest run this `time` between two checkpoints")
	live := flag.Bool("running", false, "with --domain: do not suspend the guest")
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: trace [--sample N] [--skip N] [--epochs N] [--about TEXT] --domain ID [--every D] [--running] FILE\n       trace [--sample N] [--skip N] [--epochs N] [--about TEXT] FILE <STREAM\n       trace --show FILE")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() != 1 || *live && *domain == 0 {
		flag.Usage()
		os.Exit(2)
	}
	rec := &trace.Recorder{Sample: *sample, Skip: *skip}
	var err error
	switch {
	case *show:
		err = showFile(os.Stdout, flag.Arg(0))
	case *domain != 0:
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		if err = running(ctx, uint32(*domain), *every, *epochs, *live, rec); err == nil {
			err = write(rec, flag.Arg(0), *about)
		}
	default:
		err = record(os.Stdin, flag.Arg(0), *about, *epochs, rec)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "trace: %v\n", err)
		os.Exit(1)
	}
}

// showFile says what is in a trace.
func showFile(w io.Writer, file string) error {
	traces, err := bench.Files([]string{file})
	if err != nil {
		return err
	}
	for name, t := range traces {
		fmt.Fprintf(w, "%s: %s\n", name, t.About)
		for i := range t.Epochs {
			fmt.Fprintf(w, "epoch %d: %d pages\n", i, len(t.Epochs[i].PFNs))
		}
	}
	return nil
}

// errEnough ends the reading of a stream.
var errEnough = errors.New("enough")

// running records a guest of this host.
func running(ctx context.Context, domid uint32, every time.Duration, epochs int, live bool, rec *trace.Recorder) error {
	dir, err := os.MkdirTemp("", "trace")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	d, err := xen.OpenDomain(ctx, domid, filepath.Join(dir, "mark"), nil, slog.Default())
	if err != nil {
		return err
	}
	return errors.Join(checkpoints(ctx, d, every, epochs, live, rec), d.Close())
}

// checkpoints records a guest until there are enough epochs, or ctx ends. Live, what would
// be a checkpoint is one more round.
func checkpoints(ctx context.Context, d migrate.Guest, every time.Duration, epochs int, live bool, rec *trace.Recorder) (err error) {
	if _, err := d.Begin(ctx); err != nil {
		return err
	}
	take := func(p *migrate.Pages) error {
		for i, pfn := range p.PFNs {
			rec.Page(pfn, p.Page(i))
		}
		return nil
	}
	var c migrate.Capture
	for n := 0; epochs == 0 || n <= rec.Skip+epochs; n = rec.Checkpoint() {
		if n == 0 || live {
			_, err = d.Round(ctx, take)
		}
		if err == nil && !live {
			err = d.Checkpoint(ctx, func() error { return nil }, &c)
		}
		if ctx.Err() != nil && n > 0 {
			return nil // a checkpoint cut short is left out
		}
		if err != nil {
			return err
		}
		take(&c.Pages)
		if n == 0 {
			slog.Info("all pages are copied, recording what changes")
		}
		select {
		case <-time.After(every):
		case <-ctx.Done():
		}
	}
	return nil
}

func record(r io.Reader, file, about string, epochs int, rec *trace.Recorder) error {
	split := xen.Splitter{
		Headers: func([]byte) error { return nil },
		Record: func(x xen.Record) error {
			switch x.Type {
			case xen.RecordPageData:
				return pages(x.Body, rec.Page)
			case xen.RecordCheckpoint:
				if n := rec.Checkpoint(); epochs > 0 && n > rec.Skip+epochs {
					return errEnough
				}
			case xen.RecordEnd:
				return errEnough
			}
			return nil
		},
	}
	b := make([]byte, 1<<20)
	for {
		n, err := r.Read(b)
		if err := split.Push(b[:n]); errors.Is(err, errEnough) {
			break
		} else if err != nil {
			return err
		}
		if err == io.EOF {
			break // a checkpoint cut short is left out
		}
		if err != nil {
			return err
		}
	}
	return write(rec, file, about)
}

// write writes what was recorded, in one go.
func write(rec *trace.Recorder, file, about string) error {
	f, err := renameio.NewPendingFile(file, renameio.WithPermissions(0o644))
	if err != nil {
		return err
	}
	defer f.Cleanup()
	if err := rec.Trace(about).Write(f); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return f.CloseAtomicallyReplace()
}

// pages hands on each page of a PAGE_DATA record that has content.
func pages(body []byte, page1 func(page.PFN, []byte)) error {
	if _, err := xen.CheckPageData(body, 1<<48); err != nil {
		return err
	}
	n := binary.LittleEndian.Uint32(body)
	data := body[8+8*n:]
	for i := range n {
		e := binary.LittleEndian.Uint64(body[8+8*i:])
		if e>>60 >= 0xd { // broken or not there: no content
			continue
		}
		page1(page.PFN(e&(1<<52-1)), data[:page.Size])
		data = data[page.Size:]
	}
	return nil
}
