// SPDX-License-Identifier: Apache-2.0

package netlock

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Other is another namespace in which Capture looks for peers: a member's that is
// wired to this one directly.
type Other struct {
	Name, Path string
}

// captor reads one namespace.
type captor struct {
	h     *netlink.Handle
	host  *netlink.Handle
	names map[int]string
	n     *Namespace
	// places maps the namespace ids that the captured namespace knows to where
	// they are.
	places map[int]place
}

type place struct {
	where, name string
	h           *netlink.Handle
}

// Capture describes the network namespace at path. It changes nothing and takes
// some milliseconds, most of them for sysctls: call it while members still run.
// What it cannot describe it names in Warnings.
func Capture(path string, others ...Other) (_ *Namespace, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("capturing network namespace %s: %w", path, err)
		}
	}()
	ns, err := openNS(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	c := &captor{n: &Namespace{}, names: make(map[int]string), places: make(map[int]place)}
	if c.h, err = handle(ns); err != nil {
		return nil, err
	}
	defer c.h.Close()
	hostNS, err := openNS("/proc/self/ns/net")
	if err != nil {
		return nil, err
	}
	defer hostNS.Close()
	if c.host, err = handle(hostNS); err != nil {
		return nil, err
	}
	defer c.host.Close()
	c.place(hostNS, place{where: PeerInHost, h: c.host})
	for _, o := range others {
		f, err := openNS(o.Path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		h, err := handle(f)
		if err != nil {
			return nil, err
		}
		defer h.Close()
		c.place(f, place{where: PeerInOne, name: o.Name, h: h})
	}
	for _, step := range []func() error{c.links, c.routes, c.rules, c.neighbours} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	if err := c.foreignTables(ns); err != nil {
		return nil, err
	}
	if c.n.Sysctls, err = changedSysctls(ns); err != nil {
		return nil, err
	}
	return c.n, nil
}

func handle(ns *os.File) (*netlink.Handle, error) {
	h, err := netlink.NewHandleAt(netns.NsHandle(ns.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening netlink in %s: %w", ns.Name(), err)
	}
	return h, nil
}

func (c *captor) warn(format string, args ...any) {
	c.n.Warnings = append(c.n.Warnings, fmt.Sprintf(format, args...))
}

func (c *captor) place(ns *os.File, p place) {
	// A namespace has an id here only once a link leads to it.
	if id, err := c.h.GetNetNsIdByFd(int(ns.Fd())); err == nil && id >= 0 {
		c.places[id] = p
	}
}

func (c *captor) links() error {
	links, err := retryDump(c.h.LinkList)
	if err != nil {
		return fmt.Errorf("listing links: %w", err)
	}
	for _, l := range links {
		c.names[l.Attrs().Index] = l.Attrs().Name
	}
	for _, l := range links {
		a := l.Attrs()
		link := Link{
			Name: a.Name, Kind: l.Type(), Index: a.Index, MTU: a.MTU, TxQLen: a.TxQLen,
			MAC: mac(a), Up: a.Flags&net.FlagUp != 0, Master: c.names[a.MasterIndex],
		}
		if a.Flags&net.FlagLoopback != 0 {
			link.Kind, link.MAC = "loopback", ""
		}
		if link.Addresses, err = addresses(c.h, l); err != nil {
			return err
		}
		switch l := l.(type) {
		case *netlink.Veth:
			if link.Peer, err = c.peer(a); err != nil {
				return err
			}
		case *netlink.Macvlan:
			link.Mode = uint32(l.Mode)
			if p, ok := c.places[a.NetNsID]; ok && p.where == PeerInHost {
				if parent, err := c.host.LinkByIndex(a.ParentIndex); err == nil {
					link.Parent = parent.Attrs().Name
				}
			}
		}
		c.n.Links = append(c.n.Links, link)
	}
	return nil
}

// peer looks a veth's other end up where the kernel says it is: IFLA_LINK is its
// index, IFLA_LINK_NETNSID its namespace.
func (c *captor) peer(a *netlink.LinkAttrs) (*Peer, error) {
	p := place{where: PeerInSame, h: c.h}
	if a.NetNsID >= 0 {
		var ok bool
		if p, ok = c.places[a.NetNsID]; !ok {
			c.warn("link %s: its peer is in a network namespace that belongs neither to the host nor to the group", a.Name)
			return &Peer{}, nil
		}
	}
	l, err := p.h.LinkByIndex(a.ParentIndex)
	if err != nil {
		var none netlink.LinkNotFoundError
		if errors.As(err, &none) {
			c.warn("link %s: its peer was not found", a.Name)
			return &Peer{}, nil
		}
		return nil, fmt.Errorf("looking up the peer of %s: %w", a.Name, err)
	}
	pa := l.Attrs()
	peer := &Peer{Where: p.where, Netns: p.name, Name: pa.Name, MAC: mac(pa), MTU: pa.MTU, Up: pa.Flags&net.FlagUp != 0}
	if pa.MasterIndex != 0 {
		if m, err := p.h.LinkByIndex(pa.MasterIndex); err == nil {
			peer.Master = m.Attrs().Name
		}
	}
	// In the same namespace the peer is a link of its own in the description.
	if p.where != PeerInSame {
		peer.Addresses, err = addresses(p.h, l)
	}
	return peer, err
}

func mac(a *netlink.LinkAttrs) string {
	if len(a.HardwareAddr) != 6 {
		return ""
	}
	return a.HardwareAddr.String()
}

// userFlags are the address flags that a user sets; the others are states or
// come with the way the address was learnt (linux/if_addr.h).
const userFlags = unix.IFA_F_NOPREFIXROUTE | unix.IFA_F_HOMEADDRESS | unix.IFA_F_MANAGETEMPADDR | unix.IFA_F_MCAUTOJOIN

func addresses(h *netlink.Handle, l netlink.Link) ([]Address, error) {
	list, err := retryDump(func() ([]netlink.Addr, error) { return h.AddrList(l, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("listing the addresses of %s: %w", l.Attrs().Name, err)
	}
	var out []Address
	for _, a := range list {
		prefix, ok := prefixOf(a.IPNet)
		if !ok {
			continue
		}
		addr := Address{Prefix: prefix, Label: a.Label, Scope: a.Scope, Flags: a.Flags & userFlags}
		addr.Peer, _ = prefixOf(a.Peer)
		addr.Broadcast = addrOf(a.Broadcast)
		if addr.Label == l.Attrs().Name {
			addr.Label = ""
		}
		out = append(out, addr)
	}
	return out, nil
}

func (c *captor) routes() error {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := retryDump(func() ([]netlink.Route, error) {
			return c.h.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return fmt.Errorf("listing routes: %w", err)
		}
		for _, r := range list {
			// The kernel adds these with the addresses.
			if r.Table == unix.RT_TABLE_LOCAL || r.Protocol == unix.RTPROT_KERNEL {
				continue
			}
			switch r.Type {
			case unix.RTN_UNICAST, unix.RTN_BLACKHOLE, unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT, unix.RTN_THROW:
			default:
				continue
			}
			if r.Encap != nil || r.MPLSDst != nil || r.Via != nil || r.NewDst != nil {
				c.warn("route %s: it encapsulates or crosses families, which is not kept", r)
				continue
			}
			route := Route{
				IPv6: family == netlink.FAMILY_V6, Src: addrOf(r.Src), Table: r.Table, Priority: r.Priority,
				Scope: int(r.Scope), Protocol: int(r.Protocol), Type: r.Type, TOS: r.Tos, MTU: r.MTU, AdvMSS: r.AdvMSS,
			}
			if dst, ok := prefixOf(r.Dst); ok && dst.Bits() > 0 {
				route.Dst = dst
			}
			if len(r.MultiPath) == 0 {
				route.Hops = []Hop{{Link: c.names[r.LinkIndex], Gateway: addrOf(r.Gw), Flags: r.Flags & unix.RTNH_F_ONLINK}}
			}
			for _, hop := range r.MultiPath {
				route.Hops = append(route.Hops, Hop{
					Link: c.names[hop.LinkIndex], Gateway: addrOf(hop.Gw), Weight: hop.Hops + 1, Flags: hop.Flags & unix.RTNH_F_ONLINK,
				})
			}
			c.n.Routes = append(c.n.Routes, route)
		}
	}
	return nil
}

func (c *captor) rules() error {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := retryDump(func() ([]netlink.Rule, error) { return c.h.RuleList(family) })
		if err != nil {
			return fmt.Errorf("listing rules: %w", err)
		}
		for _, r := range list {
			// The three that every namespace has (net/ipv4/fib_rules.c).
			if (r.Priority == 0 && r.Table == unix.RT_TABLE_LOCAL) ||
				(r.Priority == 32766 && r.Table == unix.RT_TABLE_MAIN) ||
				(r.Priority == 32767 && r.Table == unix.RT_TABLE_DEFAULT) {
				continue
			}
			if r.Dport != nil || r.Sport != nil || r.UIDRange != nil || r.TunID != 0 || r.SuppressIfgroup > 0 {
				c.warn("rule %d: it selects by port, user, tunnel or group, which is not kept", r.Priority)
				continue
			}
			rule := Rule{
				IPv6: family == netlink.FAMILY_V6, Priority: r.Priority, Table: r.Table, In: r.IifName, Out: r.OifName,
				Mark: r.Mark, Mask: r.Mask, TOS: r.Tos, Invert: r.Invert, Type: r.Type, Protocol: r.IPProto,
			}
			if r.Goto > 0 {
				rule.Goto = r.Goto
			}
			if r.SuppressPrefixlen >= 0 {
				rule.Suppress = &r.SuppressPrefixlen
			}
			rule.Src, _ = prefixOf(r.Src)
			rule.Dst, _ = prefixOf(r.Dst)
			c.n.Rules = append(c.n.Rules, rule)
		}
	}
	return nil
}

func (c *captor) neighbours() error {
	list, err := retryDump(func() ([]netlink.Neigh, error) { return c.h.NeighList(0, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("listing neighbours: %w", err)
	}
	for _, n := range list {
		if n.State&netlink.NUD_PERMANENT == 0 || len(n.HardwareAddr) != 6 {
			continue
		}
		c.n.Neighbours = append(c.n.Neighbours, Neighbour{Link: c.names[n.LinkIndex], Address: addrOf(n.IP), MAC: n.HardwareAddr.String()})
	}
	return nil
}

// foreignTables warns of packet filters, which are not part of a description.
func (c *captor) foreignTables(ns *os.File) error {
	conn, err := nftables.New(nftables.WithNetNSFd(int(ns.Fd())))
	if err != nil {
		return fmt.Errorf("opening nftables: %w", err)
	}
	tables, err := conn.ListTables()
	if err != nil {
		return fmt.Errorf("listing nftables: %w", err)
	}
	var names []string
	for _, t := range tables {
		if !strings.HasPrefix(t.Name, tablePrefix) {
			names = append(names, t.Name)
		}
	}
	slices.Sort(names)
	if names = slices.Compact(names); len(names) > 0 {
		c.warn("packet filter tables are not kept: %s", strings.Join(names, ", "))
	}
	return nil
}

// retryDump repeats a listing that a change of the tables interrupted; the kernel
// then says that it may be incomplete.
func retryDump[T any](list func() (T, error)) (T, error) {
	var (
		v   T
		err error
	)
	for range 10 {
		if v, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return v, err
		}
	}
	return v, err
}

func addrOf(ip net.IP) netip.Addr {
	a, ok := netip.AddrFromSlice(ip)
	if !ok {
		return netip.Addr{}
	}
	return a.Unmap()
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a := addrOf(n.IP)
	ones, _ := n.Mask.Size()
	if !a.IsValid() {
		return netip.Prefix{}, false
	}
	p := netip.PrefixFrom(a, ones)
	return p, p.IsValid()
}

func ipNet(p netip.Prefix) *net.IPNet {
	if !p.IsValid() {
		return nil
	}
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func ip(a netip.Addr) net.IP {
	if !a.IsValid() {
		return nil
	}
	return a.AsSlice()
}
