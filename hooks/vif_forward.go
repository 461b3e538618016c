package hooks

import (
	"bytes"
	"encoding/binary"
	"os"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// forwardOpen reports whether bridged frames of a new interface get through
// without a rule for it. They do where the bridge does not call iptables (as
// long as br_netfilter is not loaded), or where the FORWARD chains hold nothing
// but a policy and rules to accept. When in doubt they do not.
func forwardOpen(root string) bool {
	called := false
	for _, f := range []string{"bridge-nf-call-iptables", "bridge-nf-call-ip6tables"} {
		b, err := os.ReadFile(root + "/proc/sys/net/bridge/" + f)
		called = called || err == nil && !bytes.HasPrefix(b, []byte("0"))
	}
	if !called {
		return true
	}
	for _, f := range []string{"ip_tables_names", "ip6_tables_names"} {
		b, _ := os.ReadFile(root + "/proc/net/" + f)
		if bytes.Contains(b, []byte("filter")) {
			return false // iptables of old; its rules are not for us to read
		}
	}
	if !exists(root + "/sys/module/nf_tables") {
		return true
	}
	open, err := nftForwardOpen()
	return err == nil && open
}

// From linux/netfilter/nf_tables.h, which x/sys has in part.
const (
	nfgenmsgLen    = 4
	nftSubsystem   = unix.NFNL_SUBSYS_NFTABLES << 8
	nftaHookNum    = 1
	nfInetForward  = 2
	nfAccept       = 1
	nftContinue    = 0xffffffff // NFT_CONTINUE, -1
	nftaVerdict    = 2          // NFTA_DATA_VERDICT
	nftaVerdictNum = 1          // NFTA_VERDICT_CODE
)

type nftChain struct {
	family      byte
	table, name string
}

// nftForwardOpen looks at the rules iptables-nft and others made.
func nftForwardOpen() (bool, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return false, err
	}
	defer c.Close()

	msgs, err := nftDump(c, unix.NFT_MSG_GETCHAIN)
	if err != nil {
		return false, err
	}
	forward := map[nftChain]bool{}
	for _, m := range msgs {
		chain, accepts, ok, err := nftForwardChain(m.Data)
		if err != nil || ok && !accepts {
			return false, err
		}
		if ok {
			forward[chain] = true
		}
	}
	if len(forward) == 0 {
		return true, nil
	}
	if msgs, err = nftDump(c, unix.NFT_MSG_GETRULE); err != nil {
		return false, err
	}
	for _, m := range msgs {
		chain, harmless, err := nftRule(m.Data)
		if err != nil || forward[chain] && !harmless {
			return false, err
		}
	}
	return true, nil
}

func nftDump(c *netlink.Conn, what int) ([]netlink.Message, error) {
	return c.Execute(netlink.Message{
		Header: netlink.Header{
			Type:  netlink.HeaderType(nftSubsystem | what),
			Flags: netlink.Request | netlink.Dump,
		},
		Data: make([]byte, nfgenmsgLen), // every family
	})
}

// nftDecoder returns the address family of a message and its attributes.
func nftDecoder(b []byte) (family byte, ad *netlink.AttributeDecoder, err error) {
	if len(b) < nfgenmsgLen {
		return 0, nil, unix.EBADMSG
	}
	ad, err = netlink.NewAttributeDecoder(b[nfgenmsgLen:])
	if err == nil {
		ad.ByteOrder = binary.BigEndian
	}
	return b[0], ad, err
}

// nftForwardChain reads a chain; ok if it is one that forwarded IP passes.
func nftForwardChain(b []byte) (chain nftChain, accepts, ok bool, err error) {
	family, ad, err := nftDecoder(b)
	if err != nil {
		return chain, false, false, err
	}
	chain.family = family
	hooked := false
	accepts = true
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_CHAIN_TABLE:
			chain.table = ad.String()
		case unix.NFTA_CHAIN_NAME:
			chain.name = ad.String()
		case unix.NFTA_CHAIN_POLICY:
			accepts = ad.Uint32() == nfAccept
		case unix.NFTA_CHAIN_HOOK:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					if ad.Type() == nftaHookNum {
						hooked = ad.Uint32() == nfInetForward
					}
				}
				return nil
			})
		}
	}
	switch family {
	case unix.NFPROTO_IPV4, unix.NFPROTO_IPV6, unix.NFPROTO_INET:
	default:
		hooked = false
	}
	return chain, accepts, hooked, ad.Err()
}

// nftRule reads a rule; harmless if all it can do is to count and to accept.
func nftRule(b []byte) (chain nftChain, harmless bool, err error) {
	family, ad, err := nftDecoder(b)
	if err != nil {
		return chain, false, err
	}
	chain.family = family
	harmless = true
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_RULE_TABLE:
			chain.table = ad.String()
		case unix.NFTA_RULE_CHAIN:
			chain.name = ad.String()
		case unix.NFTA_RULE_EXPRESSIONS:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					ad.Nested(func(ad *netlink.AttributeDecoder) error {
						harmless = nftHarmless(ad) && harmless
						return nil
					})
				}
				return nil
			})
		}
	}
	return chain, harmless, ad.Err()
}

// nftHarmless looks at one expression of a rule.
func nftHarmless(ad *netlink.AttributeDecoder) bool {
	name, verdict := "", uint32(nftContinue)
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_EXPR_NAME:
			name = ad.String()
		case unix.NFTA_EXPR_DATA:
			if name == "immediate" {
				ad.Nested(func(ad *netlink.AttributeDecoder) error {
					verdict = nftVerdict(ad)
					return nil
				})
			}
		}
	}
	switch name {
	case "match", "counter", "meta", "payload", "cmp", "bitwise", "ct":
		return true
	case "immediate":
		return verdict == nfAccept || verdict == nftContinue
	}
	return false
}

// nftVerdict reads an immediate's data: the verdict if it holds one.
func nftVerdict(ad *netlink.AttributeDecoder) uint32 {
	verdict := uint32(nftContinue)
	for ad.Next() {
		if ad.Type() != unix.NFTA_IMMEDIATE_DATA {
			continue
		}
		ad.Nested(func(ad *netlink.AttributeDecoder) error {
			for ad.Next() {
				if ad.Type() != nftaVerdict {
					continue
				}
				ad.Nested(func(ad *netlink.AttributeDecoder) error {
					for ad.Next() {
						if ad.Type() == nftaVerdictNum {
							verdict = ad.Uint32()
						}
					}
					return nil
				})
			}
			return nil
		})
	}
	return verdict
}
