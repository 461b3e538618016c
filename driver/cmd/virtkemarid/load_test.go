package main

import (
	"context"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"kemari/driver/drivertest"
	"kemari/driver/rpc"
)

const (
	procLookupByName = 23
	procGetState     = 212
)

// connect opens a connection and looks up the guest test; it returns what asks
// for its state.
func connect(socket, name string) (*rpc.Client, func() error, error) {
	nc, err := net.DialTimeout("unix", socket, 20*time.Second)
	if err != nil {
		return nil, nil, err
	}
	nc.SetDeadline(time.Now().Add(2 * time.Minute))
	c := rpc.NewClient(nc)
	call := func(proc rpc.Procedure, args []byte) ([]byte, error) {
		return c.Call(context.Background(), rpc.ProgramRemote, 1, proc, args)
	}
	if _, err := call(rpc.ProcConnectOpen, (&rpc.ConnectOpenArgs{Name: &name}).Append(nil)); err != nil {
		c.Close()
		return nil, nil, fmt.Errorf("open: %w", err)
	}
	b, err := call(procLookupByName, (&rpc.ConnectGetURIRet{URI: "test"}).Append(nil)) // a string
	if err != nil {
		c.Close()
		return nil, nil, fmt.Errorf("look up: %w", err)
	}
	state := append(b, 0, 0, 0, 0) // the domain and flags
	return c, func() error {
		_, err := call(procGetState, state)
		return err
	}, nil
}

const kemari, plain = "kemari:///system", "test:///default"

// TestOverhead holds the promise about cost: a call takes at most 1.3 times as long
// as directly and 200 µs. The two are asked in turn, so that what else the machine
// does meets both.
func TestOverhead(t *testing.T) {
	l := drivertest.StartLibvirtd(t)
	d := startDaemon(t, l.Socket)
	var state [2]func() error
	for i, to := range []struct{ socket, name string }{{l.Socket, plain}, {d.rw, kemari}} {
		c, f, err := connect(to.socket, to.name)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		state[i] = f
	}
	// Whatever else the machine does only adds to both, and to three processes more
	// than to two, so a round that holds counts.
	const rounds = 5
	for round := 1; ; round++ {
		direct, through := inTurn(t, state)
		limit := direct*13/10 + 200*time.Microsecond
		t.Logf("domstate, median of %d: %v directly, %v through virtkemarid (limit %v)", calls, direct, through, limit)
		switch {
		case through <= limit:
			return
		case round == rounds:
			t.Errorf("a call takes %v, directly %v, limit %v", through, direct, limit)
			return
		}
	}
}

// calls is how many calls a median is of.
const calls = 1000

// inTurn returns the median times that the two take.
func inTurn(t *testing.T, f [2]func() error) (time.Duration, time.Duration) {
	t.Helper()
	var took [2][]time.Duration
	for range calls {
		for i := range f {
			start := time.Now()
			if err := f[i](); err != nil {
				t.Fatal(err)
			}
			took[i] = append(took[i], time.Since(start))
		}
	}
	slices.Sort(took[0])
	slices.Sort(took[1])
	return took[0][calls/2], took[1][calls/2]
}

// TestManyClients has 500 clients connected at once, all asking.
func TestManyClients(t *testing.T) {
	l := drivertest.StartLibvirtd(t)
	d := startDaemon(t, l.Socket)
	const clients = 500
	var connected, done sync.WaitGroup
	connected.Add(clients)
	errs := make(chan error, clients)
	start := time.Now()
	for range clients {
		done.Go(func() {
			c, state, err := connect(d.rw, kemari)
			connected.Done()
			if err != nil {
				errs <- err
				return
			}
			defer c.Close()
			connected.Wait() // all are connected
			for range 10 {
				if err := state(); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	done.Wait()
	t.Logf("%d clients at once, 10 calls each: %v", clients, time.Since(start))
	close(errs)
	for err := range errs {
		t.Error(err)
	}
}

// TestStalledClients has clients that ask and do not read, and one that wants
// every event and reads none. Others must not notice.
func TestStalledClients(t *testing.T) {
	l := drivertest.StartLibvirtd(t)
	d := startDaemon(t, l.Socket)
	c, state, err := connect(d.rw, kemari)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	name := kemari
	for i := range 8 {
		nc, err := net.Dial("unix", d.rw)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		nc.SetWriteDeadline(time.Now().Add(time.Second))
		send := func(proc rpc.Procedure, serial int, args []byte) error {
			return rpc.WritePacket(nc, &rpc.Packet{
				Header:  rpc.Header{Program: rpc.ProgramRemote, Version: 1, Procedure: proc, Serial: rpc.Serial(serial)},
				Payload: args,
			})
		}
		send(rpc.ProcConnectOpen, 1, (&rpc.ConnectOpenArgs{Name: &name}).Append(nil))
		if i == 0 {
			send(rpc.ProcConnectDomainEventCallbackRegisterAny, 2, (&rpc.EventRegisterArgs{Event: rpc.EventLifecycle}).Append(nil))
			continue
		}
		// Capabilities are long. Sooner or later nothing more goes in.
		stalled := false
		for serial := 2; serial < 200000 && !stalled; serial++ {
			stalled = send(7, serial, nil) != nil
		}
		if !stalled {
			t.Error("the driver has room for all that a client does not read")
		}
	}
	longest := time.Duration(0)
	for i := range 300 {
		start := time.Now()
		if err := state(); err != nil {
			t.Fatal(err)
		}
		longest = max(longest, time.Since(start))
		if i%10 == 0 { // an event
			for _, proc := range []rpc.Procedure{34, 28} {
				dom, err := c.Call(context.Background(), rpc.ProgramRemote, 1, procLookupByName, (&rpc.ConnectGetURIRet{URI: "test"}).Append(nil))
				if err == nil {
					_, err = c.Call(context.Background(), rpc.ProgramRemote, 1, proc, dom)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	t.Logf("the longest of 300 calls beside 8 stalled clients: %v", longest)
	if longest > 5*time.Second {
		t.Errorf("a call took %v", longest)
	}
}
