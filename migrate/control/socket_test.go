package control

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestCheckpoint: settings reach a handler that takes them, and one that does not
// is never asked.
func TestCheckpoint(t *testing.T) {
	want := Checkpoint{Trigger: "interval", Min: time.Millisecond, Max: time.Second}
	for name, serve := range map[string]func(context.Context, string, *[]Request) error{
		"whole": func(ctx context.Context, path string, got *[]Request) error {
			l, err := Listen(path, 0)
			if err != nil {
				return err
			}
			return ServeRequests(ctx, l, func(_ context.Context, r Request) (Status, error) {
				*got = append(*got, r)
				return Status{Epoch: 7}, nil
			})
		},
		"op": func(ctx context.Context, path string, got *[]Request) error {
			l, err := Listen(path, 0)
			if err != nil {
				return err
			}
			return Serve(ctx, l, func(_ context.Context, op Op) (Status, error) {
				*got = append(*got, Request{Op: op})
				return Status{Epoch: 7}, nil
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "s")
			var got []Request
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error, 1)
			go func() { done <- serve(ctx, path, &got) }()
			var st Status
			var err error
			for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
				if st, err = SetCheckpoint(ctx, path, want); !errors.Is(err, ErrNotRunning) {
					break
				}
			}
			if name == "op" {
				if err == nil || err.Error() != ErrSettings.Error() {
					t.Errorf("%+v, %v", st, err)
				}
				if st, err := Ask(ctx, path, OpStatus); err != nil || st.Epoch != 7 {
					t.Errorf("%+v, %v", st, err)
				}
			} else if err != nil || st.Epoch != 7 {
				t.Errorf("%+v, %v", st, err)
			}
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
			all := []Request{{Op: OpCheckpoint, Checkpoint: &want}}
			if name == "op" {
				all = []Request{{Op: OpStatus}}
			}
			if !reflect.DeepEqual(got, all) {
				t.Errorf("handled %+v", got)
			}
		})
	}
}

// TestLookWhileEnding: who asks a process that is just ending gets what it left.
func TestLookWhileEnding(t *testing.T) {
	dir := t.TempDir()
	p := Paths{Socket: filepath.Join(dir, "s"), Last: filepath.Join(dir, "last")}
	l, err := net.Listen("unix", p.Socket)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		for range 2 { // it is asked again while its socket is there
			c, err := l.Accept()
			if err != nil {
				ended <- err
				return
			}
			WriteLast(p, Status{Phase: Ended, Epoch: 7})
			c.Close()
		}
		ended <- l.Close()
	}()
	st, err := Look(t.Context(), p)
	if err != nil || st.Phase != Ended || st.Epoch != 7 {
		t.Errorf("%+v, %v", st, err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
