package output

import (
	"encoding/binary"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Two things are done here rather than by go-tc. Reading, since it decodes every
// qdisc and filter of the host in full and gives up on the first it does not
// know. And the changes made while the guest is suspended, since they can be
// encoded beforehand.

// tcmsgLen is the length of struct tcmsg.
const tcmsgLen = 20

// Attributes from linux/rtnetlink.h and gen_stats.h.
const (
	tcaKind       = 1
	tcaOptions    = 2
	tcaStats2     = 7
	tcaStatsQueue = 3
)

// qdisc is what is of interest of one, or of a class, which is listed alike.
type qdisc struct {
	ifindex        uint32
	handle, parent uint32
	kind           string
	bandStats
	options []byte
}

// bandStats is how many frames and bytes one band of prio has, and how many
// frames it had no room for.
type bandStats struct{ qlen, backlog, drops uint32 }

// bands lists those of one interface, which needs neither a walk over all the
// host's qdiscs nor tells others of it.
func (k *kernel) bands(d *device) (all [numBands]bandStats, err error) {
	msgs, err := k.nl.Execute(d.list)
	if err != nil {
		return all, fmt.Errorf("list bands: %w", err)
	}
	found := 0
	for _, m := range msgs {
		if m.Header.Type != unix.RTM_NEWTCLASS {
			continue
		}
		q, err := parseQdisc(m.Data)
		if err != nil {
			return all, fmt.Errorf("list bands: %w", err)
		}
		n := int(q.handle) - rootHandle - 1
		if q.ifindex != d.ifb || n < 0 || n >= numBands {
			continue
		}
		all[n] = q.bandStats
		found++
	}
	if found != numBands {
		// Taken for empty, a missing one might be opened too early.
		return all, fmt.Errorf("list bands: %d of %d: %w", found, numBands, unix.ENOENT)
	}
	return all, nil
}

// qdiscs lists those of all interfaces; the kernel cannot list those of one.
func (k *kernel) qdiscs() ([]qdisc, error) {
	msgs, err := k.nl.Execute(tcRequest(unix.RTM_GETQDISC, 0, 0))
	if err != nil {
		return nil, fmt.Errorf("list qdiscs: %w", err)
	}
	var all []qdisc
	for _, m := range msgs {
		if m.Header.Type != unix.RTM_NEWQDISC {
			continue
		}
		q, err := parseQdisc(m.Data)
		if err != nil {
			return nil, fmt.Errorf("list qdiscs: %w", err)
		}
		all = append(all, q)
	}
	return all, nil
}

// filters tells whether an interface has filters at ingress or egress.
func (k *kernel) filters(ifindex uint32, hook uint32) (some bool, err error) {
	msgs, err := k.nl.Execute(tcRequest(unix.RTM_GETTFILTER, ifindex, 0xffff<<16|hook))
	if err != nil {
		return false, fmt.Errorf("list filters: %w", err)
	}
	for _, m := range msgs {
		some = some || m.Header.Type == unix.RTM_NEWTFILTER
	}
	return some, nil
}

func tcRequest(typ netlink.HeaderType, ifindex, parent uint32) netlink.Message {
	data := make([]byte, tcmsgLen)
	binary.NativeEndian.PutUint32(data[4:], ifindex)
	binary.NativeEndian.PutUint32(data[12:], parent)
	return netlink.Message{
		Header: netlink.Header{Type: typ, Flags: netlink.Request | netlink.Dump},
		Data:   data,
	}
}

// changeQdisc makes the request to change a qdisc, whose kind must be known.
func changeQdisc(ifindex, handle, parent uint32, kind string, options []byte) netlink.Message {
	m := tcRequest(unix.RTM_NEWQDISC, ifindex, parent)
	m.Header.Flags = netlink.Request
	binary.NativeEndian.PutUint32(m.Data[8:], handle)
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: tcaKind, Data: append([]byte(kind), 0)},
		{Type: tcaOptions, Data: options},
	})
	if err != nil {
		panic(err) // they would have to be 64 KiB long
	}
	m.Data = append(m.Data, attrs...)
	return m
}

func parseQdisc(b []byte) (q qdisc, err error) {
	if len(b) < tcmsgLen {
		return qdisc{}, fmt.Errorf("message of %d bytes", len(b))
	}
	q.ifindex = binary.NativeEndian.Uint32(b[4:])
	q.handle = binary.NativeEndian.Uint32(b[8:])
	q.parent = binary.NativeEndian.Uint32(b[12:])
	ad, err := netlink.NewAttributeDecoder(b[tcmsgLen:])
	if err != nil {
		return qdisc{}, err
	}
	for ad.Next() {
		switch ad.Type() {
		case tcaKind:
			q.kind = ad.String()
		case tcaOptions:
			q.options = ad.Bytes()
		case tcaStats2:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					// struct gnet_stats_queue: qlen, backlog, drops, …
					if s := ad.Bytes(); ad.Type() == tcaStatsQueue && len(s) >= 12 {
						q.qlen = binary.NativeEndian.Uint32(s)
						q.backlog = binary.NativeEndian.Uint32(s[4:])
						q.drops = binary.NativeEndian.Uint32(s[8:])
					}
				}
				return nil
			})
		}
	}
	if err := ad.Err(); err != nil {
		return qdisc{}, err
	}
	return q, nil
}

// fillBand reads from the root qdisc which band it fills.
func (q qdisc) fillBand() (band int, ok bool) {
	// struct tc_prio_qopt: the number of bands, and a map of 16 priorities.
	if q.kind != "prio" || len(q.options) < 4+16 {
		return 0, false
	}
	band = int(q.options[4])
	return band, band < numBands
}
