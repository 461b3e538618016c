package driver

import (
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"

	"kemari/driver/rpc"
)

// Target is a standby's virtkemarid, as one reaches it.
type Target struct {
	URI     string
	User    string // empty for ssh's default
	Host    string
	Port    string // empty for ssh's default
	KeyFile string // likewise
}

const wantURI = "use kemari+ssh://[USER@]HOST[:PORT]/system"

// ParseTarget parses the URI of a standby.
func ParseTarget(s string) (Target, error) {
	bad := func(format string, a ...any) (Target, error) {
		return Target{}, refuse(rpc.CodeInvalidArg, fmt.Sprintf("%q cannot be a standby: ", s)+fmt.Sprintf(format, a...), wantURI)
	}
	u, err := url.Parse(s)
	if err != nil {
		return bad("it is not a URI")
	}
	if u.Scheme == "xenkemari+ssh" { // as a client with a connection of that name says it
		u.Scheme = "kemari+ssh"
		s = s[len("xen"):]
	}
	t := Target{URI: s, User: u.User.Username(), Host: u.Hostname(), Port: u.Port()}
	_, password := u.User.Password()
	switch {
	case u.Scheme != "kemari+ssh":
		return bad("the scheme is not kemari+ssh, the one way yet between two hosts")
	case t.Host == "":
		return bad("it names no host")
	case u.Path != "/system":
		return bad("the path is not /system")
	case password:
		return bad("it holds a password, which ssh would not take")
	case strings.HasPrefix(t.Host, "-") || strings.HasPrefix(t.User, "-"):
		return bad("a name begins with a dash") // ssh would read an option
	case strings.ContainsFunc(t.User+t.Host, func(r rune) bool { return r <= ' ' || r == 0x7f }):
		return bad("a name holds white space")
	case u.Fragment != "":
		return bad("it has a fragment")
	}
	if t.Port != "" && !validPort(t.Port) {
		return bad("the port is not a number from 1 to 65535")
	}
	for k, v := range u.Query() {
		switch k {
		case "keyfile":
			t.KeyFile = v[0]
		case "no_tty": // ssh never asks, since nobody is there to answer
		default:
			return bad("its parameter %q is not supported", k)
		}
	}
	return t, nil
}

func validPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n != 0
}

// dataAddr returns the address of the standby's data socket, given the port it
// listens on. A migrate_uri may name another host, which is how one chooses the
// network for the data, and another port, where one is forwarded.
func dataAddr(t Target, migrateURI string, port int) (string, error) {
	host, p := t.Host, strconv.Itoa(port)
	if migrateURI != "" {
		u, err := parseMigrateURI(migrateURI)
		if err != nil {
			return "", err
		}
		host = u.Hostname()
		if u.Port() != "" {
			p = u.Port()
		}
	}
	return net.JoinHostPort(host, p), nil
}

func parseMigrateURI(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "tcp" || u.Hostname() == "" || u.Path != "" && u.Path != "/" ||
		u.RawQuery != "" || u.User != nil || u.Port() != "" && !validPort(u.Port()) {
		return nil, refuse(rpc.CodeInvalidArg, fmt.Sprintf("migrate_uri %q is not an address for the data connection", s), "use tcp://HOST[:PORT]")
	}
	return u, nil
}
