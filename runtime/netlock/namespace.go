// SPDX-License-Identifier: Apache-2.0

package netlock

import (
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/containerd/errdefs"
)

// Namespace describes a network namespace as plain data, to be kept in a
// checkpoint. A Namespace from a checkpoint is untrusted: Rebuild validates it.
type Namespace struct {
	Links      []Link      `json:"links"`
	Routes     []Route     `json:"routes,omitempty"`
	Rules      []Rule      `json:"rules,omitempty"`
	Neighbours []Neighbour `json:"neighbours,omitempty"`
	// Sysctls holds those that differ from a new namespace's, by their path below
	// /proc/sys, "net/ipv4/ip_forward".
	Sysctls map[string]string `json:"sysctls,omitempty"`
	// Warnings name what the namespace has and this description has not.
	Warnings []string `json:"warnings,omitempty"`
}

// Link is one interface.
type Link struct {
	Name string `json:"name"`
	// Kind is the kernel's name of the driver (veth, macvlan, bridge, ...);
	// "loopback" for lo, "device" for hardware.
	Kind   string `json:"kind"`
	Index  int    `json:"index"`
	MAC    string `json:"mac,omitempty"`
	MTU    int    `json:"mtu,omitempty"`
	TxQLen int    `json:"txqlen,omitempty"`
	Up     bool   `json:"up,omitempty"`
	// Master is the bridge of the same namespace that the link is a port of.
	Master    string    `json:"master,omitempty"`
	Addresses []Address `json:"addresses,omitempty"`
	// Peer is the other end of a veth pair, as far as it could be found.
	Peer *Peer `json:"peer,omitempty"`
	// Parent is the link of the host below a macvlan, Mode its mode.
	Parent string `json:"parent,omitempty"`
	Mode   uint32 `json:"mode,omitempty"`
}

// Places where a veth's peer may be.
const (
	PeerInHost = "host"
	PeerInSame = "same"
	PeerInOne  = "other"
)

// Peer is the other end of a veth pair.
type Peer struct {
	// Where is one of the places above, or empty when it could not be found.
	Where string `json:"where,omitempty"`
	// Netns is the name, given to Capture, of the namespace for PeerInOne.
	Netns     string    `json:"netns,omitempty"`
	Name      string    `json:"name,omitempty"`
	MAC       string    `json:"mac,omitempty"`
	MTU       int       `json:"mtu,omitempty"`
	Up        bool      `json:"up,omitempty"`
	Master    string    `json:"master,omitempty"`
	Addresses []Address `json:"addresses,omitempty"`
}

// Address is one address of a link.
type Address struct {
	Prefix    netip.Prefix `json:"prefix"`
	Peer      netip.Prefix `json:"peer,omitzero"`
	Broadcast netip.Addr   `json:"broadcast,omitzero"`
	Label     string       `json:"label,omitempty"`
	// Scope is numbered as in linux/rtnetlink.h: 0 universe, 253 link, 254 host.
	Scope int `json:"scope,omitempty"`
	// Flags are those of linux/if_addr.h that somebody sets, not the kernel.
	Flags int `json:"flags,omitempty"`
}

// Route is one route that the kernel does not make by itself.
type Route struct {
	// Dst is the zero Prefix for a default route.
	Dst      netip.Prefix `json:"dst,omitzero"`
	IPv6     bool         `json:"ipv6,omitempty"`
	Src      netip.Addr   `json:"src,omitzero"`
	Hops     []Hop        `json:"hops,omitempty"`
	Table    int          `json:"table,omitempty"`
	Priority int          `json:"priority,omitempty"`
	Scope    int          `json:"scope,omitempty"`
	Protocol int          `json:"protocol,omitempty"`
	Type     int          `json:"type,omitempty"`
	TOS      int          `json:"tos,omitempty"`
	MTU      int          `json:"mtu,omitempty"`
	AdvMSS   int          `json:"advmss,omitempty"`
}

// Hop is one way of a route.
type Hop struct {
	Link    string     `json:"link,omitempty"`
	Gateway netip.Addr `json:"gateway,omitzero"`
	// Weight counts in a route of several hops; 1 is the least.
	Weight int `json:"weight,omitempty"`
	// Flags as in linux/rtnetlink.h: 4 is onlink.
	Flags int `json:"flags,omitempty"`
}

// Rule is one routing policy rule beyond the three that every namespace has.
type Rule struct {
	IPv6     bool         `json:"ipv6,omitempty"`
	Priority int          `json:"priority"`
	Table    int          `json:"table,omitempty"`
	Src      netip.Prefix `json:"src,omitzero"`
	Dst      netip.Prefix `json:"dst,omitzero"`
	In       string       `json:"in,omitempty"`
	Out      string       `json:"out,omitempty"`
	Mark     uint32       `json:"mark,omitempty"`
	Mask     *uint32      `json:"mask,omitempty"`
	TOS      uint         `json:"tos,omitempty"`
	Goto     int          `json:"goto,omitempty"`
	Invert   bool         `json:"invert,omitempty"`
	Type     uint8        `json:"type,omitempty"`
	Protocol int          `json:"protocol,omitempty"`
	// Suppress is the longest prefix length that the rule leaves to others.
	Suppress *int `json:"suppress,omitempty"`
}

// Neighbour is one permanent entry of the neighbour table.
type Neighbour struct {
	Link    string     `json:"link"`
	Address netip.Addr `json:"address"`
	MAC     string     `json:"mac"`
}

// Bounds of what a checkpoint may ask for; far above what a container has.
const (
	maxLinks   = 256
	maxEntries = 16384
	maxSysctls = 8192
)

// Validate tells whether n may be built: names that are names, numbers within
// bounds. It does not tell whether the result makes sense.
func (n *Namespace) Validate() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("network description: %s: %w", fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
	}
	if len(n.Links) > maxLinks || len(n.Routes) > maxEntries || len(n.Rules) > maxEntries ||
		len(n.Neighbours) > maxEntries || len(n.Sysctls) > maxSysctls {
		return bad("too many entries")
	}
	seen := make(map[string]bool)
	for _, l := range n.Links {
		names := []string{l.Name, l.Master, l.Parent}
		macs := []string{l.MAC}
		addrs := l.Addresses
		if l.Peer != nil {
			names = append(names, l.Peer.Name, l.Peer.Master)
			macs = append(macs, l.Peer.MAC)
			addrs = append(addrs[:len(addrs):len(addrs)], l.Peer.Addresses...)
		}
		for i, name := range names {
			if !validName(name) && (i == 0 || name != "") {
				return bad("link name %q", name)
			}
		}
		for _, mac := range macs {
			if mac == "" {
				continue
			}
			if hw, err := net.ParseMAC(mac); err != nil || len(hw) != 6 {
				return bad("link %s: hardware address %q", l.Name, mac)
			}
		}
		if len(addrs) > maxEntries {
			return bad("link %s: too many addresses", l.Name)
		}
		for _, a := range addrs {
			if !a.Prefix.IsValid() || a.Prefix.Bits() == 0 {
				return bad("link %s: address %s", l.Name, a.Prefix)
			}
		}
		if seen[l.Name] {
			return bad("two links of the name %s", l.Name)
		}
		seen[l.Name] = true
		// 65535 is lo's own on every kernel that has IPv4 (65536).
		if l.MTU < 0 || l.MTU > 65536 || l.TxQLen < 0 || l.TxQLen > 1<<20 || l.Index < 0 || l.Index > 1<<30 {
			return bad("link %s: a number out of bounds", l.Name)
		}
	}
	for key, value := range n.Sysctls {
		if !strings.HasPrefix(key, "net/") || strings.Contains(key, "..") || len(key) > 200 || len(value) > 4096 {
			return bad("sysctl %q", key)
		}
	}
	return nil
}

// validName keeps the rule of dev_valid_name (net/core/dev.c).
func validName(s string) bool {
	return s != "" && len(s) < 16 && s != "." && s != ".." && !strings.ContainsAny(s, "/: \t\n\v\f\r\x00")
}
