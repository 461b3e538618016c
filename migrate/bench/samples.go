package bench

import (
	"embed"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"

	"kemari/migrate/bench/trace"
)

// Samples are the traces that come with the project; see testdata/README.md.
//
//go:embed testdata
var samples embed.FS

// maxTrace bounds the pages of a trace, in bytes.
const maxTrace = 4 << 30

// Samples reads the traces that come with the project, by name.
func Samples() (map[string]*trace.Trace, error) {
	files, err := fs.Glob(samples, "testdata/*.trace.zst")
	if err != nil {
		return nil, err
	}
	all := make(map[string]*trace.Trace)
	for _, file := range files {
		f, err := samples.Open(file)
		if err != nil {
			return nil, err
		}
		if err := add(all, file, f); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// Files reads traces, by name.
func Files(files []string) (map[string]*trace.Trace, error) {
	all := make(map[string]*trace.Trace)
	for _, file := range files {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		if err := add(all, file, f); err != nil {
			return nil, err
		}
	}
	return all, nil
}

func add(all map[string]*trace.Trace, file string, f fs.File) error {
	defer f.Close()
	t, err := trace.Read(f, maxTrace)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	all[strings.TrimSuffix(path.Base(file), ".trace.zst")] = t
	return nil
}
