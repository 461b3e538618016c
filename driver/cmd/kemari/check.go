package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"kemari/driver"
	"kemari/driver/virt"
	"kemari/xml"
)

// checked is what check tells of one domain.
type checked struct {
	Domain   string               `json:"domain"`
	UUID     string               `json:"uuid"`
	Standby  string               `json:"standby,omitempty"` // if it was asked too
	Eligible bool                 `json:"eligible"`
	Reasons  []driver.HostsReason `json:"reasons"`
}

func (h *host) checkCommand(c *cli.Context) error {
	names, standby, err := checkWords(c.Args().Slice())
	if err != nil {
		return err
	}
	connect, err := h.kemariURI(c.String("connect"))
	if err != nil {
		return err
	}
	hv, err := h.open(connect, true)
	if err != nil {
		return err
	}
	defer hv.Close()
	doms, err := domains(hv, names)
	if err != nil {
		return err
	}
	all := []checked{}
	for _, d := range doms {
		r, known, err := checkHere(hv, d)
		if err != nil {
			return err
		}
		ask := standby
		if ask == "" && len(names) > 0 {
			ask = known // not of all: each answer takes a connection to another host
		}
		if ask != "" {
			e, err := h.examine(c.Context, connect, d.UUID, ask)
			switch {
			case err == nil:
				r.Standby, r.Reasons = e.Standby, e.Reasons
			case standby == "" && unreachable(err):
				fmt.Fprintf(h.err, "note: %s was not asked: %v\n", ask, err)
			default:
				return err
			}
		}
		r.Eligible = len(r.Reasons) == 0
		all = append(all, r)
	}
	if c.Bool("json") {
		b, err := json.MarshalIndent(all, "", "  ")
		if err != nil {
			return err
		}
		fmt.Fprintf(h.out, "%s\n", b)
	}
	var result error
	for _, d := range all {
		if !d.Eligible {
			result = &exit{code: exitUnprotected}
		}
		if !c.Bool("json") {
			d.print(h)
		}
	}
	return result
}

// checkWords tells the domains from the standby's URI.
func checkWords(words []string) (names []string, standby string, err error) {
	for _, w := range words {
		switch {
		case !strings.Contains(w, "://"):
			names = append(names, w)
		case standby != "":
			return nil, "", fmt.Errorf("unexpected '%s': one standby at a time", w)
		default:
			standby = w
		}
	}
	if standby != "" && len(names) != 1 {
		return nil, "", errors.New("a URI goes with one DOMAIN; see kemari check --help")
	}
	return names, standby, nil
}

// domains returns those called names, or all.
func domains(hv hypervisor, names []string) ([]virt.Domain, error) {
	if len(names) == 0 {
		return hv.List()
	}
	var doms []virt.Domain
	for _, n := range names {
		d, err := hv.Lookup(n)
		if err != nil {
			return nil, err
		}
		doms = append(doms, d)
	}
	return doms, nil
}

// checkHere tells what the domain's definition alone tells, and the standby that it
// names.
func checkHere(hv hypervisor, d virt.Domain) (checked, string, error) {
	r := checked{Domain: d.Name, UUID: d.UUID, Reasons: []driver.HostsReason{}}
	shown, err := hv.XML(d.UUID, false)
	if err != nil {
		return r, "", err
	}
	for _, why := range xml.Ineligible(shown) {
		r.Reasons = append(r.Reasons, driver.HostsReason{Text: why.Text, Remedy: why.Remedy})
	}
	var e *xml.Element
	lowered, err := xml.Lower(shown)
	if err == nil {
		e, err = xml.FromDomain(lowered)
	}
	if err != nil {
		r.Reasons = append(r.Reasons, driver.HostsReason{Text: "its element is wrong: " + err.Error(), Remedy: "correct it with virsh edit or virsh metadata"})
	}
	if e == nil || e.Standby == nil {
		return r, "", nil
	}
	return r, e.Standby.URI, nil
}

// unreachable says that virtkemarid itself could not be asked.
func unreachable(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) || errors.Is(err, os.ErrPermission)
}

func (d checked) print(h *host) {
	if d.Eligible {
		by := ""
		if d.Standby != "" {
			by = " by " + hostOf(d.Standby)
		}
		fmt.Fprintf(h.out, "Domain '%s' can be protected%s\n", d.Domain, by)
		return
	}
	fmt.Fprintf(h.out, "Domain '%s' cannot be protected:\n", d.Domain)
	for _, r := range d.Reasons {
		line := r.Text
		if r.Host != "" {
			line = r.Host + ": " + line
		}
		if r.Remedy != "" {
			line += ": " + r.Remedy
		}
		fmt.Fprintf(h.out, "  - %s\n", line)
	}
}
