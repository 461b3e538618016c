// Trace records which pages a guest dirties, and what they become, for the
// benchmarks of page encoding.
//
//	trace [--sample N] [--skip N] [--epochs N] [--about TEXT] FILE <STREAM
//	trace --show FILE
//
// STREAM is a checkpointed libxc stream of a PVH or HVM guest, as kemari-xcsave
// writes it to its file 3 (and xc_domain_save to its descriptor): recording ends
// at its end, or after the given number of checkpoints. Of the pages one in N is
// kept, with its whole history; --skip leaves out the first N checkpoints after
// the first copy. FILE is written in one go at the end.
package main

import (
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/google/renameio/v2"

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
	flag.Usage = func() {
		fmt.Fprintln(os.Stderr, "usage: trace [--sample N] [--skip N] [--epochs N] [--about TEXT] FILE <STREAM\n       trace --show FILE")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() != 1 {
		flag.Usage()
		os.Exit(2)
	}
	err := error(nil)
	if *show {
		err = showFile(os.Stdout, flag.Arg(0))
	} else {
		err = record(os.Stdin, flag.Arg(0), *about, *sample, *skip, *epochs)
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

func record(r io.Reader, file, about string, sample uint64, skip, epochs int) error {
	rec := trace.Recorder{Sample: sample, Skip: skip}
	split := xen.Splitter{
		Headers: func([]byte) error { return nil },
		Record: func(x xen.Record) error {
			switch x.Type {
			case xen.RecordPageData:
				return pages(x.Body, rec.Page)
			case xen.RecordCheckpoint:
				if n := rec.Checkpoint(); epochs > 0 && n > skip+epochs {
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
