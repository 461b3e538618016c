package xenstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// Error is what the operations return: which, on which node, and why. A missing
// node is fs.ErrNotExist, a conflict in a transaction syscall.EAGAIN.
type Error struct {
	Op   string
	Path string
	Err  error
}

func (e *Error) Error() string {
	if e.Path == "" {
		return "xenstore " + e.Op + ": " + e.Err.Error()
	}
	return "xenstore " + e.Op + " " + e.Path + ": " + e.Err.Error()
}

func (e *Error) Unwrap() error { return e.Err }

// ErrClosed is returned by what is called after Close or interrupted by it.
var ErrClosed = errors.New("connection closed")

// sockets are where xenstored or oxenstored listens, devices what the kernel
// offers where the daemon runs in a domain of its own.
var (
	sockets = []string{"/run/xenstored/socket", "/var/run/xenstored/socket"}
	devices = []string{"/dev/xen/xenbus"}
)

// Client is one connection to xenstore.
type Client struct {
	conn io.ReadWriteCloser

	write sync.Mutex // keeps requests whole on the connection

	mu      sync.Mutex
	lastID  uint32
	waiting map[uint32]chan message // by request id; capacity 1
	watches map[string]*Watch       // by token
	err     error                   // why the connection has ended

	done chan struct{} // closed when the reader has returned
}

// Dial connects to this host's xenstore.
func Dial() (*Client, error) {
	var errs []error
	for _, path := range sockets {
		c, err := DialSocket(path)
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
	}
	for _, path := range devices {
		f, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err == nil {
			return New(f), nil
		}
		errs = append(errs, err)
	}
	return nil, fmt.Errorf("connect to xenstore: %w", errors.Join(errs...))
}

// DialSocket connects to a daemon listening at path.
func DialSocket(path string) (*Client, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	for {
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("connect to %s: %w", path, err)
	}
	return New(os.NewFile(uintptr(fd), path)), nil
}

// New makes a client of an open connection, which it closes in the end.
func New(conn io.ReadWriteCloser) *Client {
	c := &Client{
		conn:    conn,
		waiting: make(map[uint32]chan message),
		watches: make(map[string]*Watch),
		done:    make(chan struct{}),
	}
	go c.read()
	return c
}

// Close ends the connection, whatever waits on it, and its watches. It is
// idempotent.
func (c *Client) Close() error {
	c.fail(ErrClosed)
	err := c.conn.Close()
	<-c.done
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// fail notes why the connection is of no more use, and releases who waits.
func (c *Client) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = err
	for _, w := range c.watches {
		close(w.c)
	}
	clear(c.watches)
	for _, reply := range c.waiting {
		close(reply)
	}
	clear(c.waiting)
}

// read hands replies and events to those who wait, until the connection ends.
func (c *Client) read() {
	defer close(c.done)
	for {
		m, err := readMessage(c.conn)
		if err != nil {
			c.fail(fmt.Errorf("connection lost: %w", err))
			c.conn.Close()
			return
		}
		c.dispatch(m)
	}
}

// dispatch never blocks: replies and watches have a channel of capacity one.
func (c *Client) dispatch(m message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if m.op == opWatchEvent {
		if s := splitStrings(m.payload); len(s) >= 2 {
			if w, ok := c.watches[s[1]]; ok {
				select {
				case w.c <- struct{}{}:
				default: // one is waiting to be seen already
				}
			}
		}
		return
	}
	// A reply whose request was given up is nobody's.
	if reply, ok := c.waiting[m.id]; ok {
		delete(c.waiting, m.id)
		reply <- m
	}
}

// call sends a request and waits for its reply. A context that ends gives up
// the waiting only: what was asked may still be done.
func (c *Client) call(ctx context.Context, o op, tx uint32, path string, payload []byte) ([]byte, error) {
	p, err := c.exchange(ctx, message{op: o, tx: tx, payload: payload})
	if err != nil {
		return nil, &Error{Op: o.String(), Path: path, Err: err}
	}
	return p, nil
}

func (c *Client) exchange(ctx context.Context, m message) ([]byte, error) {
	if len(m.payload) > maxPayload {
		return nil, errTooLong
	}
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	reply := make(chan message, 1)
	c.mu.Lock()
	if c.err != nil {
		defer c.mu.Unlock()
		return nil, c.err
	}
	c.lastID++
	m.id = c.lastID
	c.waiting[m.id] = reply
	c.mu.Unlock()

	c.write.Lock()
	_, err := c.conn.Write(m.append(make([]byte, 0, headerLen+len(m.payload))))
	c.write.Unlock()
	if err != nil {
		c.fail(fmt.Errorf("connection lost: %w", err))
	}

	select {
	case r, ok := <-reply:
		switch {
		case !ok:
			c.mu.Lock()
			defer c.mu.Unlock()
			return nil, c.err
		case r.op == opError:
			return nil, parseError(r.payload)
		case r.op != m.op:
			return nil, fmt.Errorf("answered by a reply to %v", r.op)
		}
		return r.payload, nil
	case <-ctx.Done():
		c.mu.Lock()
		delete(c.waiting, m.id)
		c.mu.Unlock()
		return nil, context.Cause(ctx)
	}
}

// onPath is call for a request about a node, whose payload begins with its path.
func (c *Client) onPath(ctx context.Context, o op, tx uint32, path, rest string) ([]byte, error) {
	if err := checkPath(path); err != nil {
		return nil, &Error{Op: o.String(), Path: path, Err: err}
	}
	payload := make([]byte, 0, len(path)+1+len(rest))
	payload = append(payload, path...)
	payload = append(payload, 0)
	payload = append(payload, rest...)
	return c.call(ctx, o, tx, path, payload)
}

// Read returns the value of a node.
func (c *Client) Read(ctx context.Context, path string) (string, error) {
	return c.in(0).Read(ctx, path)
}

// Write sets a node, making it and its parents if need be.
func (c *Client) Write(ctx context.Context, path, value string) error {
	return c.in(0).Write(ctx, path, value)
}

// Mkdir makes an empty node; it is fine if the node exists.
func (c *Client) Mkdir(ctx context.Context, path string) error {
	return c.in(0).Mkdir(ctx, path)
}

// Rm removes a node and all below it; it is fine if there is none.
func (c *Client) Rm(ctx context.Context, path string) error {
	return c.in(0).Rm(ctx, path)
}

// List returns the names of a node's children. A node with more of them than
// fit a message is an error, syscall.E2BIG.
func (c *Client) List(ctx context.Context, path string) ([]string, error) {
	return c.in(0).List(ctx, path)
}

func (c *Client) in(tx uint32) *Tx { return &Tx{c: c, id: tx} }

// Tx is a transaction: what is read and written through it happens at one
// instant, or not at all.
type Tx struct {
	c  *Client
	id uint32 // zero: no transaction
}

// Read is Client.Read within the transaction.
func (t *Tx) Read(ctx context.Context, path string) (string, error) {
	p, err := t.c.onPath(ctx, opRead, t.id, path, "")
	return string(p), err
}

// Write is Client.Write within the transaction.
func (t *Tx) Write(ctx context.Context, path, value string) error {
	_, err := t.c.onPath(ctx, opWrite, t.id, path, value)
	return err
}

// Mkdir is Client.Mkdir within the transaction.
func (t *Tx) Mkdir(ctx context.Context, path string) error {
	_, err := t.c.onPath(ctx, opMkdir, t.id, path, "")
	return err
}

// Rm is Client.Rm within the transaction.
func (t *Tx) Rm(ctx context.Context, path string) error {
	_, err := t.c.onPath(ctx, opRm, t.id, path, "")
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// List is Client.List within the transaction.
func (t *Tx) List(ctx context.Context, path string) ([]string, error) {
	p, err := t.c.onPath(ctx, opDirectory, t.id, path, "")
	if err != nil {
		return nil, err
	}
	return splitStrings(p), nil
}

// Transact calls f, which must have no effect but through the transaction, as
// often as others interfere, until the transaction is through. If f fails the
// transaction is undone and f's error returned.
func (c *Client) Transact(ctx context.Context, f func(*Tx) error) error {
	for {
		p, err := c.call(ctx, opTransactionStart, 0, "", []byte{0})
		if err != nil {
			return err
		}
		id, err := txID(p)
		if err != nil {
			return &Error{Op: opTransactionStart.String(), Err: err}
		}
		ferr := f(c.in(id))
		verdict := "T\x00"
		if ferr != nil {
			verdict = "F\x00"
		}
		// A context that has ended meanwhile must not leave the transaction open.
		_, err = c.call(context.WithoutCancel(ctx), opTransactionEnd, id, "", []byte(verdict))
		if ferr != nil {
			return ferr
		}
		if !errors.Is(err, unix.EAGAIN) {
			return err
		}
		if err := ctx.Err(); err != nil {
			return &Error{Op: opTransactionEnd.String(), Err: context.Cause(ctx)}
		}
	}
}

// txID reads the reply to a transaction's start.
func txID(p []byte) (uint32, error) {
	s := splitStrings(p)
	if len(s) != 1 {
		return 0, errors.New("malformed transaction id")
	}
	id, err := strconv.ParseUint(s[0], 10, 32)
	if err != nil || id == 0 {
		return 0, fmt.Errorf("malformed transaction id %q", s[0])
	}
	return uint32(id), nil
}

// Watch tells of changes at a node or below it.
type Watch struct {
	c     chan struct{}
	cl    *Client
	path  string
	token string
}

// Watch begins to watch a node, which need not exist. As xenstore does, it
// reports once at the beginning.
func (c *Client) Watch(ctx context.Context, path string) (*Watch, error) {
	c.mu.Lock()
	c.lastID++
	w := &Watch{c: make(chan struct{}, 1), cl: c, path: path, token: "k" + strconv.FormatUint(uint64(c.lastID), 10)}
	if err := c.err; err != nil {
		c.mu.Unlock()
		return nil, &Error{Op: opWatch.String(), Path: path, Err: err}
	}
	// Before the request: the first event may overtake our reading of its reply.
	c.watches[w.token] = w
	c.mu.Unlock()
	if _, err := c.onPath(ctx, opWatch, 0, path, w.token+"\x00"); err != nil {
		w.forget()
		return nil, err
	}
	return w, nil
}

// C receives when something has changed since the last receive, and is closed
// when the watch or its connection ends.
func (w *Watch) C() <-chan struct{} { return w.c }

// Close ends the watch. It is idempotent.
func (w *Watch) Close(ctx context.Context) error {
	if !w.forget() {
		return nil
	}
	_, err := w.cl.onPath(ctx, opUnwatch, 0, w.path, w.token+"\x00")
	return err
}

// forget closes the channel, once; false if that was done before.
func (w *Watch) forget() bool {
	w.cl.mu.Lock()
	defer w.cl.mu.Unlock()
	if w.cl.watches[w.token] != w {
		return false
	}
	delete(w.cl.watches, w.token)
	close(w.c)
	return true
}
