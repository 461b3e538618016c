// Count counts against the laboratory guest's counter from outside, all the time,
// and judges what it was told: once a number has been acknowledged, no later
// request may get it or a smaller one.
//
//	count [--every 50ms] ADDRESS
//
// One connection is kept, and asks anew so long after each answer, to show that it
// survives; besides, a fresh connection asks every so often, to time an outage
// without TCP's growing retransmission intervals in the figure. A line "mark" on
// stdin notes the time of a power cut; "end", or the end of stdin, ends it. It then
// prints its Result as words key=value on one line, and exits 1 if anything was lost
// or doubled.
//
// It is to watch the guest and not to load it: an emulated guest that is asked
// faster than it can answer keeps its host from everything else.
package main

import (
	"bufio"
	"flag"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
)

func main() {
	every := flag.Duration("every", 50*time.Millisecond, "between two requests of a kind")
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: count [--every 50ms] HOST:PORT")
		os.Exit(2)
	}
	c := &counting{addr: flag.Arg(0), born: time.Now(), stop: make(chan struct{})}
	c.wg.Go(func() { c.steady(*every) })
	c.wg.Go(func() { c.probe(*every) })
	for s := bufio.NewScanner(os.Stdin); s.Scan(); {
		if s.Text() == "end" {
			break
		}
		if s.Text() == "mark" {
			c.mu.Lock()
			c.mark = time.Since(c.born)
			c.mu.Unlock()
		}
	}
	close(c.stop)
	c.wg.Wait()
	r := judge(c.answers, c.mark)
	r.Reconnects = max(0, c.connects-1)
	r.Last = c.last()
	if r.Last < r.Highest {
		r.Lost++ // the counter itself has gone back
	}
	fmt.Println(r)
	if r.Lost > 0 || r.Doubled > 0 || r.Answers == 0 {
		os.Exit(1)
	}
}

// counting is a run of the client. Times are since born, on the monotonic clock.
type counting struct {
	addr string
	born time.Time
	stop chan struct{}
	wg   sync.WaitGroup

	mu       sync.Mutex
	answers  []answer
	mark     time.Duration
	connects int // of the steady connection
}

const patience = 3 * time.Second // with an answer

// once is as long as TCP waits before it sends a fresh connection's first segment
// again. The next connection asks sooner than that, and all of an outage's time is
// watched alike.
const once = time.Second

// atOnce bounds the fresh connections under way. Without it a slow guest that comes
// back finds more of them than it can serve within their patience, and serves none.
const atOnce = 4

func (c *counting) stopped() bool {
	select {
	case <-c.stop:
		return true
	default:
		return false
	}
}

// ask sends one request on conn and records its answer.
func (c *counting) ask(conn net.Conn, r *bufio.Reader) error {
	a := answer{start: time.Since(c.born)}
	if _, err := fmt.Fprintln(conn, "INC"); err != nil {
		return err
	}
	if _, err := fmt.Fscanln(r, &a.value); err != nil {
		return err
	}
	a.end = time.Since(c.born)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.answers = append(c.answers, a)
	return nil
}

func (c *counting) steady(every time.Duration) {
	for !c.stopped() {
		conn, err := net.DialTimeout("tcp", c.addr, patience)
		if err != nil {
			time.Sleep(100 * time.Millisecond)
			continue
		}
		c.mu.Lock()
		c.connects++
		c.mu.Unlock()
		go func() { // a request may wait for long; not beyond the end
			<-c.stop
			conn.SetDeadline(time.Now().Add(patience))
		}()
		for r := bufio.NewReader(conn); !c.stopped() && c.ask(conn, r) == nil; {
			time.Sleep(every)
		}
		conn.Close()
	}
}

func (c *counting) probe(every time.Duration) {
	t := time.NewTicker(every)
	defer t.Stop()
	slots := make(chan struct{}, atOnce)
	for {
		select {
		case <-c.stop:
			return
		case <-t.C:
		}
		select {
		case slots <- struct{}{}:
		default:
			continue
		}
		c.wg.Go(func() {
			defer func() { <-slots }()
			conn, err := net.DialTimeout("tcp", c.addr, once)
			if err != nil {
				return
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(patience))
			c.ask(conn, bufio.NewReader(conn))
		})
	}
}

// last asks for the counter's number after all is done; 0 if nobody answers.
func (c *counting) last() (n uint64) {
	for range 5 {
		conn, err := net.DialTimeout("tcp", c.addr, patience)
		if err != nil {
			continue
		}
		conn.SetDeadline(time.Now().Add(patience))
		fmt.Fprintln(conn, "GET")
		_, err = fmt.Fscanln(conn, &n)
		conn.Close()
		if err == nil {
			return n
		}
	}
	return 0
}
