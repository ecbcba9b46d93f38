// SPDX-License-Identifier: Apache-2.0

package netlock

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// RebuildOptions say where a rebuilt namespace is connected to.
type RebuildOptions struct {
	// Host is the path of the namespace that stands for the host: peers and
	// parents are made and looked for there. Empty means the caller's own.
	Host string
	// Others are the paths of namespaces by the names that were given to Capture.
	Others map[string]string
	// Private leaves the host alone: every link gets a private peer, so that its
	// addresses exist and nothing outside is reached.
	Private bool
}

// builder makes one namespace.
type builder struct {
	ctx    context.Context
	n      *Namespace
	opts   RebuildOptions
	ns     *os.File
	h      *netlink.Handle
	hostNS *os.File
	host   *netlink.Handle
	// made maps link names to indexes in the new namespace.
	made map[string]int
	// dad holds the accept_dad of the new links while it is off.
	dad    map[string]string
	report []string
}

// Rebuild makes what n describes in the namespace at path, which should be fresh:
// a link that is there is kept and configured. IPv6 addresses are usable at once,
// without duplicate address detection. A link that cannot be made as it was, or
// whose peer's name is in use, becomes a private one that carries the addresses,
// so that connections can be restored and then closed in order.
//
// The report says, in one sentence each, what came out differently. An error means
// that the namespace is not usable; removing it removes the peers too. The host's
// own namespace is refused with errdefs.ErrFailedPrecondition.
func Rebuild(ctx context.Context, path string, n *Namespace, opts RebuildOptions) (report []string, err error) {
	doing := "rebuilding network namespace " + path
	if err := n.Validate(); err != nil {
		return nil, fmt.Errorf("%s: %w", doing, err)
	}
	b := &builder{ctx: ctx, n: n, opts: opts, made: make(map[string]int)}
	if b.ns, err = openNS(path); err != nil {
		return nil, fmt.Errorf("%s: %w", doing, err)
	}
	defer b.ns.Close()
	if err := refuseHost(b.ns, doing); err != nil {
		return nil, err
	}
	if opts.Host == "" {
		opts.Host = "/proc/self/ns/net"
	}
	if b.hostNS, err = openNS(opts.Host); err != nil {
		return nil, fmt.Errorf("%s: %w", doing, err)
	}
	defer b.hostNS.Close()
	if b.h, err = handle(b.ns); err != nil {
		return nil, fmt.Errorf("%s: %w", doing, err)
	}
	defer b.h.Close()
	if b.host, err = handle(b.hostNS); err != nil {
		return nil, fmt.Errorf("%s: %w", doing, err)
	}
	defer b.host.Close()
	general, perLink := make(map[string]string), make(map[string]string)
	for key, value := range n.Sysctls {
		if linkOf(key) == "" {
			general[key] = value
		} else {
			perLink[key] = value
		}
	}
	for _, step := range []func() error{
		func() error { return b.sysctls(general) },
		b.links,
		b.masters,
		func() error { return b.linkSysctls(perLink) },
		b.raise,
		b.routes,
		b.neighbours,
		b.rules,
		// Again: raising a link and accepting addresses moves some of them.
		func() error { return b.sysctls(perLink) },
	} {
		if err := ctx.Err(); err != nil {
			return b.report, fmt.Errorf("%s: %w", doing, err)
		}
		if err := step(); err != nil {
			return b.report, fmt.Errorf("%s: %w", doing, err)
		}
	}
	return b.report, nil
}

func (b *builder) say(format string, args ...any) {
	b.report = append(b.report, fmt.Sprintf(format, args...))
}

func (b *builder) sysctls(values map[string]string) error {
	var failed []string
	err := inside(b.ns, func() error {
		failed = writeSysctls(values)
		return nil
	})
	for _, f := range failed {
		b.say("%s", f)
	}
	return err
}

// linkSysctls sets what must hold before a link is raised, and turns duplicate
// address detection off for the link-local addresses that the kernel makes then.
func (b *builder) linkSysctls(values map[string]string) error {
	values = maps.Clone(values)
	b.dad = make(map[string]string)
	for name := range b.made {
		values[acceptDAD(name)] = "0"
	}
	// A link may have become another kind, whose directory lacks a setting; the
	// second pass reports it.
	return inside(b.ns, func() error {
		for name := range b.made {
			data, err := os.ReadFile(sysctlRoot + "/" + acceptDAD(name))
			if err == nil {
				b.dad[acceptDAD(name)] = strings.TrimSpace(string(data))
			}
		}
		writeSysctls(values)
		return nil
	})
}

func acceptDAD(link string) string { return "net/ipv6/conf/" + link + "/accept_dad" }

// raise sets the links up and gives them their addresses; up first, so that the
// kernel's own routes come with the addresses.
func (b *builder) raise() error {
	for _, l := range b.n.Links {
		index, ok := b.made[l.Name]
		if !ok {
			continue
		}
		link, err := b.h.LinkByIndex(index)
		if err != nil {
			return fmt.Errorf("link %s: %w", l.Name, err)
		}
		if l.Up {
			if err := b.h.LinkSetUp(link); err != nil {
				return fmt.Errorf("raising link %s: %w", l.Name, err)
			}
		}
		b.address(b.h, link, l.Addresses)
	}
	// What the fresh link had; a captured value follows later.
	return inside(b.ns, func() error {
		writeSysctls(b.dad)
		return nil
	})
}

func (b *builder) address(h *netlink.Handle, link netlink.Link, addrs []Address) {
	for _, a := range addrs {
		addr := &netlink.Addr{
			IPNet: ipNet(a.Prefix), Peer: ipNet(a.Peer), Broadcast: ip(a.Broadcast),
			Label: a.Label, Scope: a.Scope, Flags: a.Flags & userFlags,
		}
		if a.Prefix.Addr().Is6() {
			addr.Flags |= unix.IFA_F_NODAD
		} else if !a.Broadcast.IsValid() {
			// The library would make one up.
			addr.Broadcast = net.IPv4zero
		}
		if err := h.AddrReplace(link, addr); err != nil && !errors.Is(err, unix.EEXIST) {
			b.say("address %s on %s: %v", a.Prefix, link.Attrs().Name, err)
		}
	}
}

// routes adds in rounds: a route through a gateway needs the one that leads to
// the gateway.
func (b *builder) routes() error {
	todo := b.n.Routes
	for len(todo) > 0 {
		var later []Route
		var reasons []error
		for _, r := range todo {
			if err := b.route(r); err != nil && !errors.Is(err, unix.EEXIST) {
				later, reasons = append(later, r), append(reasons, err)
			}
		}
		if len(later) == len(todo) {
			for i, r := range later {
				b.say("route to %s: %v", routeName(r), reasons[i])
			}
			return nil
		}
		todo = later
	}
	return nil
}

func routeName(r Route) string {
	if !r.Dst.IsValid() {
		return "default"
	}
	return r.Dst.String()
}

func (b *builder) route(r Route) error {
	route := &netlink.Route{
		Dst: ipNet(r.Dst), Src: ip(r.Src), Table: r.Table, Priority: r.Priority, Scope: netlink.Scope(r.Scope),
		Protocol: netlink.RouteProtocol(r.Protocol), Type: r.Type, Tos: r.TOS, MTU: r.MTU, AdvMSS: r.AdvMSS,
		Family: netlink.FAMILY_V4,
	}
	if r.IPv6 {
		route.Family = netlink.FAMILY_V6
	}
	if route.Dst == nil {
		any4or6 := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if r.IPv6 {
			any4or6 = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		route.Dst = ipNet(any4or6)
	}
	for i, hop := range r.Hops {
		index := 0
		if hop.Link != "" {
			var ok bool
			if index, ok = b.made[hop.Link]; !ok {
				return fmt.Errorf("there is no link %s", hop.Link)
			}
		}
		if len(r.Hops) == 1 {
			route.LinkIndex, route.Gw, route.Flags = index, ip(hop.Gateway), hop.Flags
			break
		}
		if hop.Weight < 1 || hop.Weight > 256 {
			return fmt.Errorf("hop %d has weight %d: %w", i, hop.Weight, errdefs.ErrInvalidArgument)
		}
		route.MultiPath = append(route.MultiPath, &netlink.NexthopInfo{
			LinkIndex: index, Gw: ip(hop.Gateway), Hops: hop.Weight - 1, Flags: hop.Flags,
		})
	}
	return b.h.RouteAdd(route)
}

func (b *builder) neighbours() error {
	for _, n := range b.n.Neighbours {
		hw, err := net.ParseMAC(n.MAC)
		index, ok := b.made[n.Link]
		if err == nil && !ok {
			err = fmt.Errorf("there is no link %s", n.Link)
		}
		if err == nil {
			err = b.h.NeighSet(&netlink.Neigh{LinkIndex: index, IP: ip(n.Address), HardwareAddr: hw, State: netlink.NUD_PERMANENT})
		}
		if err != nil {
			b.say("neighbour %s on %s: %v", n.Address, n.Link, err)
		}
	}
	return nil
}

func (b *builder) rules() error {
	for _, r := range b.n.Rules {
		rule := netlink.NewRule()
		rule.Family = netlink.FAMILY_V4
		if r.IPv6 {
			rule.Family = netlink.FAMILY_V6
		}
		rule.Priority, rule.Table, rule.Src, rule.Dst = r.Priority, r.Table, ipNet(r.Src), ipNet(r.Dst)
		rule.IifName, rule.OifName, rule.Mark, rule.Mask = r.In, r.Out, r.Mark, r.Mask
		rule.Tos, rule.Invert, rule.Type, rule.IPProto = r.TOS, r.Invert, r.Type, r.Protocol
		if r.Goto > 0 {
			rule.Goto = r.Goto
		}
		if r.Suppress != nil {
			rule.SuppressPrefixlen = *r.Suppress
		}
		if err := b.h.RuleAdd(rule); err != nil && !errors.Is(err, unix.EEXIST) {
			b.say("rule %d: %v", r.Priority, err)
		}
	}
	return nil
}
