// Package xenstoretest is a small xenstore daemon for tests: one tree in memory,
// with transactions and watches, without permissions and quotas.
package xenstoretest

import (
	"encoding/binary"
	"io"
	"maps"
	"net"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// Server serves a tree on a UNIX socket.
type Server struct {
	l  net.Listener
	wg sync.WaitGroup

	mu    sync.Mutex
	nodes map[string]string
	gen   int // counts changes, so that a transaction sees others'
	conns map[*conn]bool
}

type conn struct {
	net.Conn
	watches map[string]string // token to path
	txs     map[uint32]*tx
}

type tx struct {
	nodes map[string]string
	gen   int
	wrote []string
}

// Listen starts a server at the given path.
func Listen(socket string) (*Server, error) {
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	s := &Server{l: l, nodes: map[string]string{"/": ""}, conns: map[*conn]bool{}}
	s.wg.Go(s.accept)
	return s, nil
}

// Close ends the server and its connections. It is idempotent.
func (s *Server) Close() {
	s.l.Close()
	s.mu.Lock()
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

// Set sets a node as some other client would.
func (s *Server) Set(path, value string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gen++
	set(s.nodes, path, value)
	s.fire(path)
}

// Get returns the value of a node, empty if there is none.
func (s *Server) Get(path string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.nodes[path]
}

func (s *Server) accept() {
	for {
		nc, err := s.l.Accept()
		if err != nil {
			return
		}
		c := &conn{Conn: nc, watches: map[string]string{}, txs: map[uint32]*tx{}}
		s.mu.Lock()
		s.conns[c] = true
		s.mu.Unlock()
		s.wg.Go(func() { s.serve(c) })
	}
}

func (s *Server) serve(c *conn) {
	defer func() {
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		c.Close()
	}()
	for {
		var h [16]byte
		if _, err := io.ReadFull(c, h[:]); err != nil {
			return
		}
		op, id := binary.NativeEndian.Uint32(h[0:]), binary.NativeEndian.Uint32(h[4:])
		txid, n := binary.NativeEndian.Uint32(h[8:]), binary.NativeEndian.Uint32(h[12:])
		if n > 4096 {
			return
		}
		payload := make([]byte, n)
		if _, err := io.ReadFull(c, payload); err != nil {
			return
		}
		s.mu.Lock()
		reply, errname, changed := s.handle(c, op, txid, string(payload))
		if errname != "" {
			op, reply = 16, errname+"\x00"
		}
		c.send(op, id, txid, reply)
		for _, p := range changed {
			s.fire(p)
		}
		if op == 4 { // a new watch fires at once
			p, token, _ := strings.Cut(string(payload), "\x00")
			c.send(15, 0, 0, p+"\x00"+token)
		}
		s.mu.Unlock()
	}
}

func (c *conn) send(op, id, tx uint32, payload string) {
	b := binary.NativeEndian.AppendUint32(nil, op)
	b = binary.NativeEndian.AppendUint32(b, id)
	b = binary.NativeEndian.AppendUint32(b, tx)
	b = binary.NativeEndian.AppendUint32(b, uint32(len(payload)))
	c.Write(append(b, payload...))
}

// handle carries out one request under the lock.
func (s *Server) handle(c *conn, op, txid uint32, payload string) (reply, errname string, changed []string) {
	nodes := s.nodes
	t := c.txs[txid]
	if txid != 0 && t == nil {
		return "", "ENOENT", nil
	}
	if t != nil {
		nodes = t.nodes
	}
	p, rest, _ := strings.Cut(payload, "\x00")
	write := func() {
		if t != nil {
			t.wrote = append(t.wrote, p)
			return
		}
		s.gen++
		changed = []string{p}
	}
	switch op {
	case 1:
		if _, ok := nodes[p]; !ok {
			return "", "ENOENT", nil
		}
		for _, n := range slices.Sorted(maps.Keys(nodes)) {
			if n != "/" && path.Dir(n) == path.Clean(p) {
				reply += path.Base(n) + "\x00"
			}
		}
		return reply, "", nil
	case 2:
		v, ok := nodes[p]
		if !ok {
			return "", "ENOENT", nil
		}
		return v, "", nil
	case 4:
		c.watches[strings.TrimSuffix(rest, "\x00")] = p
	case 5:
		delete(c.watches, strings.TrimSuffix(rest, "\x00"))
	case 6:
		id := uint32(len(c.txs) + 1)
		c.txs[id] = &tx{nodes: maps.Clone(s.nodes), gen: s.gen}
		return strconv.FormatUint(uint64(id), 10) + "\x00", "", nil
	case 7:
		c.txs[txid] = nil
		if p != "T" {
			break
		}
		if t.gen != s.gen {
			return "", "EAGAIN", nil
		}
		s.nodes = t.nodes
		s.gen++
		changed = t.wrote
	case 11:
		set(nodes, p, rest)
		write()
	case 12:
		if _, ok := nodes[p]; !ok {
			set(nodes, p, "")
			write()
		}
	case 13:
		if _, ok := nodes[p]; !ok {
			return "", "ENOENT", nil
		}
		maps.DeleteFunc(nodes, func(n, _ string) bool { return n == p || strings.HasPrefix(n, p+"/") })
		write()
	default:
		return "", "ENOSYS", nil
	}
	return "OK\x00", "", changed
}

func set(nodes map[string]string, p, value string) {
	for d := path.Dir(p); d != "/" && d != "."; d = path.Dir(d) {
		if _, ok := nodes[d]; !ok {
			nodes[d] = ""
		}
	}
	nodes[p] = value
}

// fire sends the event of a change to all who watch there.
func (s *Server) fire(p string) {
	for c := range s.conns {
		for token, w := range c.watches {
			if p == w || strings.HasPrefix(p, strings.TrimSuffix(w, "/")+"/") {
				c.send(15, 0, 0, p+"\x00"+token+"\x00")
			}
		}
	}
}
