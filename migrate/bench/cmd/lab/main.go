// Bench-lab measures the promises of migrate/bench/SPEC.md that need the two-host
// laboratory, and prints a line for each; it fails if one is not kept, or could not
// be measured.
//
//	bench-lab [--epochs N] [--as-is] [--lab COMMAND]
//
// It brings the laboratory up, deploys this checkout, starts a guest, measures, and
// takes the laboratory down again. --epochs, or KEMARI_BENCH_EPOCHS, is how many
// epochs in a row `endurance` takes. With --as-is the laboratory is used as it is: it
// must be up, with Kemari deployed and g1 running unprotected on xen1; it stays up,
// and what is left of g1 is of no use.
//
// The program copies itself to the hosts, where it runs as
//
//	bench-lab host watch|remus|copy …
//
// and prints JSON: see host.go. It is linked statically for that.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if len(os.Args) > 1 && os.Args[1] == "host" {
		if err := host(ctx, os.Stdout, os.Args[2:]); err != nil {
			fmt.Fprintf(os.Stderr, "bench-lab host: %v\n", err)
			os.Exit(1)
		}
		return
	}
	epochs := defaultEpochs
	if s := os.Getenv("KEMARI_BENCH_EPOCHS"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil {
			fmt.Fprintf(os.Stderr, "bench-lab: KEMARI_BENCH_EPOCHS: %v\n", err)
			os.Exit(2)
		}
		epochs = n
	}
	flag.IntVar(&epochs, "epochs", epochs, "take `N` epochs in a row for endurance")
	asIs := flag.Bool("as-is", false, "use the laboratory as it is, and leave it up")
	command := flag.String("lab", "virsh-examples/lab/lab", "the laboratory's `command`")
	flag.Parse()
	if flag.NArg() > 0 || epochs < 10 {
		flag.Usage()
		os.Exit(2)
	}
	f := figures{epochs: epochs}
	err := possible()
	if err != nil {
		err = fmt.Errorf("there can be no laboratory on this machine: %w", err)
	} else {
		l := &laboratory{command: *command}
		err = l.measure(ctx, &f, *asIs)
	}
	ok := report(os.Stdout, &f)
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench-lab: %v\n", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

// defaultEpochs is what takes about six minutes.
const defaultEpochs = 1000

// report writes a line for each figure, those that promise something last, and tells
// whether all are kept. What was not measured is a promise not kept.
func report(w io.Writer, f *figures) bool {
	ok := true
	for _, promised := range []bool{false, true} {
		for _, r := range f.results() {
			if r.Info == promised {
				continue
			}
			fmt.Fprintln(w, r)
			ok = ok && (r.Info || r.OK())
		}
	}
	return ok
}

// possible says whether this machine can run the laboratory.
func possible() error {
	if runtime.GOOS != "linux" || runtime.GOARCH != "amd64" {
		return errors.New("it needs Linux on amd64")
	}
	if os.Getuid() != 0 {
		return errors.New("it needs root")
	}
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}
