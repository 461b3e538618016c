// Counter is the laboratory guest's service: one number, served over TCP. A line
// INC answers the next number, GET the last one, so that anyone who counts from
// outside can check that nothing acknowledged is ever lost. The number lives in
// memory only: it survives a host, not a reboot of the guest.
package main

import (
	"bufio"
	"fmt"
	"log"
	"net"
	"strings"
	"sync/atomic"
)

func main() {
	l, err := net.Listen("tcp", ":7")
	if err != nil {
		log.Fatal(err)
	}
	var n atomic.Uint64
	for {
		c, err := l.Accept()
		if err != nil {
			log.Print(err)
			continue
		}
		go serve(c, &n)
	}
}

func serve(c net.Conn, n *atomic.Uint64) {
	defer c.Close()
	for s := bufio.NewScanner(c); s.Scan(); {
		var err error
		switch strings.TrimSpace(s.Text()) {
		case "INC":
			_, err = fmt.Fprintln(c, n.Add(1))
		case "GET":
			_, err = fmt.Fprintln(c, n.Load())
		default:
			_, err = fmt.Fprintln(c, "ERROR: one of INC, GET a line")
		}
		if err != nil {
			return
		}
	}
}
