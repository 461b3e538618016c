package output

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"math/bits"
	"strings"
	"syscall"

	"github.com/florianl/go-tc"
	"github.com/florianl/go-tc/core"
	"github.com/mdlayher/netlink"
	link "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	rootHandle = 1 << 16
	// The filter goes before any other at the ingress, and is known by a handle
	// that nobody else has.
	filterPref   = 1
	filterHandle = 0x6b656d61 // "kema"
)

// bandParent and bandHandle name the plug of a band.
func bandParent(band int) uint32 { return rootHandle + uint32(band) + 1 }
func bandHandle(band int) uint32 { return uint32(0x10+band) << 16 }

// device is one plugged interface.
type device struct {
	vif       string
	vifIndex  uint32
	ifb       uint32 // index
	ownClsact bool   // the vif had none before

	ring  ring
	drops uint64 // as last seen

	// The requests of Seal and Release, ready to be sent: to fill a band, to open
	// its plug, and to close it; and to list the bands.
	fill, open, shut [numBands]netlink.Message
	list             netlink.Message
}

// kernel is the connections to the kernel. They belong to the network namespace
// in which they were opened.
type kernel struct {
	tc    *tc.Tc          // filters and the vif's qdisc
	nl    *netlink.Conn   // the ifb's qdiscs, and what there is
	raw   syscall.RawConn // of nl
	links *link.Handle
}

func openKernel() (_ *kernel, err error) {
	k := &kernel{}
	defer func() {
		if err != nil {
			err = fmt.Errorf("open netlink: %w", errors.Join(err, k.Close()))
		}
	}()
	if k.tc, err = tc.Open(nil); err != nil {
		return nil, err
	}
	// With it the kernel says what it does not like; an old one does without.
	_ = k.tc.SetOption(netlink.ExtendedAcknowledge, true)
	if k.nl, err = netlink.Dial(unix.NETLINK_ROUTE, nil); err != nil {
		return nil, err
	}
	_ = k.nl.SetOption(netlink.ExtendedAcknowledge, true)
	if k.raw, err = k.nl.SyscallConn(); err != nil {
		return nil, err
	}
	if k.links, err = link.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, err
	}
	return k, nil
}

func (k *kernel) Close() error {
	var errs []error
	if k.tc != nil {
		errs = append(errs, k.tc.Close())
	}
	if k.nl != nil {
		errs = append(errs, k.nl.Close())
	}
	if k.links != nil {
		k.links.Close()
	}
	return errors.Join(errs...)
}

// ifbName derives the name of an interface's ifb: kemari3.0 for vif3.0, and a
// hash where the interface was given another name, which may be too long.
func ifbName(vif string) string {
	if n, ok := strings.CutPrefix(vif, "vif"); ok && len(n) <= unix.IFNAMSIZ-1-len("kemari") &&
		strings.Trim(n, "0123456789.") == "" {
		return "kemari" + n
	}
	h := fnv.New32a()
	h.Write([]byte(vif))
	return fmt.Sprintf("kemari-%08x", h.Sum32())
}

// label is the ifb's alias, by which ip link shows what it is for and a later
// process knows what it may do with it.
type label struct {
	vif       string
	index     uint32
	ownClsact bool
}

func (l label) String() string {
	own := "found"
	if l.ownClsact {
		own = "own"
	}
	return fmt.Sprintf("kemari holds %s index %d clsact %s", l.vif, l.index, own)
}

func parseLabel(s string) (l label, ok bool) {
	var own string
	n, err := fmt.Sscanf(s, "kemari holds %s index %d clsact %s", &l.vif, &l.index, &own)
	if n != 3 || err != nil || own != "own" && own != "found" {
		return label{}, false
	}
	l.ownClsact = own == "own"
	return l, l.String() == s
}

// create builds the plug of one interface, passing. If it fails nothing is left.
func (k *kernel) create(vif string) (*device, error) {
	v, err := k.links.LinkByName(vif)
	if err != nil {
		if isGone(err) {
			err = ErrGone
		}
		return nil, err
	}
	d := &device{vif: vif, vifIndex: uint32(v.Attrs().Index)}
	if d.ownClsact, err = k.checkIngress(d); err != nil {
		return nil, err
	}
	name := ifbName(vif)
	attrs := link.NewLinkAttrs()
	attrs.Name = name
	attrs.TxQLen = 1000 // the ifb's default is 32, which slows the release of many frames
	if err := k.links.LinkAdd(&link.Ifb{LinkAttrs: attrs}); err != nil {
		if errors.Is(err, unix.EEXIST) {
			return nil, fmt.Errorf("%s exists: the interface is plugged already, or a process died and has to be cleaned up after", name)
		}
		return nil, fmt.Errorf("make %s (kernel module ifb): %w", name, err)
	}
	l, err := k.links.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("find %s: %w", name, err)
	}
	d.ifb = uint32(l.Attrs().Index)
	d.prepare()
	if err := k.build(d, l); err != nil {
		return nil, errors.Join(err, k.remove([]*device{d}, nil))
	}
	return d, nil
}

// build puts everything in its place; the redirect last, since all bands but the
// first hold from the beginning.
func (k *kernel) build(d *device, l link.Link) error {
	mark := label{vif: d.vif, index: d.vifIndex, ownClsact: d.ownClsact}
	if err := k.links.LinkSetAlias(l, mark.String()); err != nil {
		return fmt.Errorf("label ifb: %w", err)
	}
	if err := k.request(add(d.fill[d.ring.fill])); err != nil {
		return fmt.Errorf("add prio qdisc (kernel module sch_prio): %w", err)
	}
	for band := range numBands {
		if err := k.request(add(d.plug(band, tc.PlugLimit))); err != nil {
			return fmt.Errorf("add plug qdisc (kernel module sch_plug): %w", err)
		}
	}
	if err := k.request(d.open[d.ring.head]); err != nil {
		return fmt.Errorf("open plug: %w", err)
	}
	if err := k.links.LinkSetUp(l); err != nil {
		return fmt.Errorf("set ifb up: %w", err)
	}
	if d.ownClsact {
		if err := k.tc.Qdisc().Add(d.clsact()); err != nil {
			return fmt.Errorf("add clsact qdisc (kernel module sch_ingress): %w", err)
		}
	}
	f := d.filter()
	f.Matchall = &tc.Matchall{Actions: &[]*tc.Action{{
		Kind: "mirred",
		Mirred: &tc.Mirred{Parms: &tc.MirredParam{
			Action:  4, // TC_ACT_STOLEN
			Eaction: 1, // TCA_EGRESS_REDIR
			IfIndex: d.ifb,
		}},
	}}}
	if err := k.tc.Filter().Add(f); err != nil {
		return fmt.Errorf("add redirect (kernel modules cls_matchall, act_mirred): %w", err)
	}
	return nil
}

// checkIngress returns whether the interface needs a clsact qdisc, or an error
// if something is there that cannot be shared.
func (k *kernel) checkIngress(d *device) (missing bool, err error) {
	qdiscs, err := k.qdiscs()
	if err != nil {
		return false, err
	}
	missing = true
	for _, q := range qdiscs {
		if q.ifindex != d.vifIndex || q.parent != tc.HandleIngress {
			continue
		}
		if q.kind != "clsact" {
			return false, fmt.Errorf("it has an %s qdisc, beside which its output cannot be held; remove it with: tc qdisc del dev %s ingress", q.kind, d.vif)
		}
		missing = false
	}
	if missing {
		return true, nil
	}
	some, err := k.filters(d.vifIndex, tc.HandleMinIngress)
	if err != nil {
		return false, err
	}
	if some {
		return false, fmt.Errorf("it has tc filters at its ingress, which its output would bypass; look at them with: tc filter show dev %s ingress, and remove them with: tc filter del dev %s ingress", d.vif, d.vif)
	}
	return false, nil
}

// request asks the kernel for one thing. What it asks for is done, and done for
// every frame that comes after, when it returns: rtnetlink does it within the send. It
// answers only where it could not, since nothing asks for an acknowledgement: reading that
// would take the guest's time. It is for one goroutine at a time, as all that uses nl.
func (k *kernel) request(m netlink.Message) error {
	if _, err := k.nl.Send(m); err != nil {
		return err
	}
	var none error
	if err := k.raw.Control(func(fd uintptr) {
		var b [1]byte
		_, _, none = unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
	}); err != nil {
		return err
	}
	switch none {
	case nil:
		if _, err := k.nl.Receive(); err != nil {
			return err
		}
		return errors.New("the kernel has answered what was not asked")
	case unix.EAGAIN:
		return nil
	}
	return fmt.Errorf("look for the kernel's answer: %w", none) // it had no memory for one
}

// add turns a request to change a qdisc into one to add it.
func add(m netlink.Message) netlink.Message {
	m.Header.Flags |= netlink.Create | netlink.Excl
	return m
}

// prepare makes the requests that are needed while the guest is suspended.
func (d *device) prepare() {
	d.list = tcRequest(unix.RTM_GETTCLASS, d.ifb, 0)
	for band := range numBands {
		// struct tc_prio_qopt: the number of bands, and one for each priority.
		prio := binary.NativeEndian.AppendUint32(nil, numBands)
		for range 16 {
			prio = append(prio, byte(band))
		}
		d.fill[band] = changeQdisc(d.ifb, rootHandle, tc.HandleRoot, "prio", prio)
		d.open[band] = d.plug(band, tc.PlugReleaseIndefinite)
		d.shut[band] = d.plug(band, tc.PlugBuffer)
	}
}

func (d *device) plug(band int, action tc.PlugAction) netlink.Message {
	// struct tc_plug_qopt; the limit counts only where the action is to set it,
	// and when the qdisc is added.
	opt := binary.NativeEndian.AppendUint32(nil, uint32(action))
	opt = binary.NativeEndian.AppendUint32(opt, Limit)
	return changeQdisc(d.ifb, bandHandle(band), bandParent(band), "plug", opt)
}

func (d *device) clsact() *tc.Object {
	return &tc.Object{
		Msg:       tc.Msg{Ifindex: d.vifIndex, Handle: core.BuildHandle(tc.HandleRoot, 0), Parent: tc.HandleIngress},
		Attribute: tc.Attribute{Kind: "clsact"},
	}
}

func (d *device) filter() *tc.Object {
	return &tc.Object{
		Msg: tc.Msg{
			Ifindex: d.vifIndex,
			Handle:  filterHandle,
			Parent:  core.BuildHandle(tc.HandleRoot, tc.HandleMinIngress),
			Info:    filterPref<<16 | uint32(bits.ReverseBytes16(unix.ETH_P_ALL)),
		},
		Attribute: tc.Attribute{Kind: "matchall"},
	}
}

// isGone: the error says that a device, or what hung on it, is not there.
func isGone(err error) bool {
	var notFound link.LinkNotFoundError
	return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOENT) ||
		errors.As(err, &notFound)
}
