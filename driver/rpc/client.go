package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
)

// ErrClosed is returned by calls on a client whose connection has ended.
var ErrClosed = errors.New("the RPC connection is closed")

// Client makes calls over one connection. It is safe for concurrent use.
type Client struct {
	rwc  io.ReadWriteCloser
	done chan struct{} // closed when the reader has returned

	writing sync.Mutex // one frame at a time

	mu      sync.Mutex
	serial  Serial
	pending map[Serial]chan *Packet // nil once the connection has ended
	err     error                   // why it ended
}

// NewClient starts a client on rwc, which it owns from now on.
func NewClient(rwc io.ReadWriteCloser) *Client {
	c := &Client{rwc: rwc, done: make(chan struct{}), pending: make(map[Serial]chan *Packet)}
	go c.read()
	return c
}

// Close ends the connection and every call that waits. It is idempotent.
func (c *Client) Close() error {
	err := c.rwc.Close()
	<-c.done
	return err
}

// Call makes one call and returns the payload of its reply, or the *Error that
// the server answered with. It blocks until the reply, the end of the connection
// or the end of ctx; in the last case the connection stays usable, and the
// server may still be at work on the call. A Write that blocks is not cut short
// by ctx, only by Close.
func (c *Client) Call(ctx context.Context, prog Program, version uint32, proc Procedure, payload []byte) ([]byte, error) {
	ch := make(chan *Packet, 1)
	c.mu.Lock()
	if c.pending == nil {
		defer c.mu.Unlock()
		return nil, c.err
	}
	c.serial++
	serial := c.serial
	c.pending[serial] = ch
	c.mu.Unlock()

	err := c.write(&Packet{
		Header:  Header{Program: prog, Version: version, Procedure: proc, Type: Call, Serial: serial},
		Payload: payload,
	})
	if err != nil {
		c.forget(serial)
		// Why the peer closed is known to the reader, which sees it at once.
		select {
		case <-c.done:
			return nil, c.ended()
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	select {
	case p, ok := <-ch:
		if !ok {
			return nil, c.ended()
		}
		if p.Program != prog || p.Procedure != proc {
			return nil, fmt.Errorf("%w: reply of another procedure", ErrFrame)
		}
		if p.Status == OK {
			return p.Payload, nil
		}
		e, err := DecodeError(p.Payload)
		if err != nil {
			return nil, err
		}
		return nil, e
	case <-ctx.Done():
		c.forget(serial)
		return nil, context.Cause(ctx)
	}
}

func (c *Client) write(p *Packet) error {
	c.writing.Lock()
	defer c.writing.Unlock()
	err := WritePacket(c.rwc, p)
	if err != nil {
		c.rwc.Close() // a frame may be half out; the reader ends and says why
	}
	return err
}

func (c *Client) forget(s Serial) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.pending, s)
}

func (c *Client) ended() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

func (c *Client) read() {
	defer close(c.done)
	err := c.readPackets()
	if errors.Is(err, io.EOF) {
		err = ErrClosed
	} else {
		err = fmt.Errorf("%w: %w", ErrClosed, err)
	}
	c.rwc.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
	for _, ch := range c.pending {
		close(ch)
	}
	c.pending = nil
}

func (c *Client) readPackets() error {
	for {
		p, err := ReadPacket(c.rwc)
		if err != nil {
			return err
		}
		switch {
		case p.Program == ProgramKeepalive:
			if p.Procedure == KeepalivePing {
				if err := c.write(Keepalive(KeepalivePong)); err != nil {
					return err
				}
			}
		case p.Type == Reply:
			c.mu.Lock()
			if ch := c.pending[p.Serial]; ch != nil {
				delete(c.pending, p.Serial)
				ch <- p // has room, and only one reply goes in
			}
			c.mu.Unlock()
		default: // events of others; nobody registered for any
		}
	}
}
