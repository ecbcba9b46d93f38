// SPDX-License-Identifier: Apache-2.0

package netlock

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// links makes every link, down and without a master.
func (b *builder) links() error {
	for _, l := range b.n.Links {
		if err := b.ctx.Err(); err != nil {
			return err
		}
		// Made already: lo, the other half of a pair, or by whoever made the
		// namespace.
		if have, err := b.h.LinkByName(l.Name); err == nil {
			b.made[l.Name] = have.Attrs().Index
			if l.MTU != 0 && have.Attrs().MTU != l.MTU {
				if err := b.h.LinkSetMTU(have, l.MTU); err != nil {
					b.say("link %s: setting its MTU to %d: %v", l.Name, l.MTU, err)
				}
			}
			continue
		}
		if l.Kind == "loopback" {
			b.say("link %s: a namespace has one loopback link", l.Name)
			continue
		}
		index, err := b.link(l)
		if err != nil {
			return fmt.Errorf("making link %s: %w", l.Name, err)
		}
		b.made[l.Name] = index
	}
	return nil
}

// link makes one link as it was, or a private stand-in, and returns its index.
func (b *builder) link(l Link) (int, error) {
	var why string
	switch {
	case b.opts.Private && !(l.Kind == "bridge" || (l.Peer != nil && l.Peer.Where == PeerInSame)):
		why = "asked for"
	case l.Kind == "veth":
		why = b.veth(l)
	case l.Kind == "macvlan":
		why = b.macvlan(l)
	case l.Kind == "bridge":
		why = b.add(b.h, &netlink.Bridge{LinkAttrs: attrs(l)})
	default:
		why = "links of kind " + l.Kind + " cannot be remade"
	}
	if why != "" {
		if err := b.standIn(l); err != nil {
			return 0, err
		}
		b.say("link %s is private, it reaches nothing: %s", l.Name, why)
	}
	made, err := b.h.LinkByName(l.Name)
	if err != nil {
		return 0, err
	}
	if a := made.Attrs(); l.Index != 0 && a.Index != l.Index {
		b.say("link %s has index %d, it had %d", l.Name, a.Index, l.Index)
	}
	return made.Attrs().Index, nil
}

func attrs(l Link) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name, a.Index, a.MTU, a.TxQLen = l.Name, l.Index, l.MTU, l.TxQLen
	// Validate has parsed it.
	a.HardwareAddr, _ = net.ParseMAC(l.MAC)
	return a
}

// add creates a link through h, without its index where that is taken. It returns
// the reason of a failure, empty for none.
func (b *builder) add(h *netlink.Handle, link netlink.Link) string {
	err := h.LinkAdd(link)
	if (errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST)) && link.Attrs().Index != 0 {
		link.Attrs().Index = 0
		err = h.LinkAdd(link)
	}
	if err != nil {
		return err.Error()
	}
	return ""
}

func (b *builder) veth(l Link) string {
	if l.Peer == nil || l.Peer.Where == "" || l.Peer.Name == "" {
		return "its peer was in an unknown network namespace"
	}
	p := l.Peer
	veth := netlink.NewVeth(attrs(l))
	veth.PeerName, veth.PeerMTU = p.Name, uint32(p.MTU)
	veth.PeerHardwareAddr, _ = net.ParseMAC(p.MAC)
	far, farNS := b.host, b.hostNS
	switch p.Where {
	case PeerInHost:
	case PeerInSame:
		far, farNS = b.h, b.ns
	case PeerInOne:
		path, ok := b.opts.Others[p.Netns]
		if !ok {
			return fmt.Sprintf("its peer %s was in the network namespace of %s, which is not being restored", p.Name, p.Netns)
		}
		f, err := openNS(path)
		if err != nil {
			return err.Error()
		}
		defer f.Close()
		h, err := handle(f)
		if err != nil {
			return err.Error()
		}
		defer h.Close()
		far, farNS = h, f
	default:
		return fmt.Sprintf("its peer is in an unknown place %q", p.Where)
	}
	if _, err := far.LinkByName(p.Name); err == nil {
		return fmt.Sprintf("the name %s of its peer is in use", p.Name)
	}
	veth.PeerNamespace = netlink.NsFd(farNS.Fd())
	if why := b.add(b.h, veth); why != "" {
		return why
	}
	if p.Where != PeerInSame {
		b.peer(far, l)
	}
	return ""
}

// peer configures the end of a pair that is outside the namespace.
func (b *builder) peer(h *netlink.Handle, l Link) {
	p := l.Peer
	end, err := h.LinkByName(p.Name)
	if err != nil {
		b.say("link %s: its peer %s: %v", l.Name, p.Name, err)
		return
	}
	if p.Master != "" {
		master, err := h.LinkByName(p.Master)
		if err == nil {
			err = h.LinkSetMaster(end, master)
		}
		if err != nil {
			b.say("link %s: its peer %s is not connected to %s, it reaches nothing: %v", l.Name, p.Name, p.Master, err)
		}
	}
	if p.Up {
		if err := h.LinkSetUp(end); err != nil {
			b.say("link %s: raising its peer %s: %v", l.Name, p.Name, err)
		}
	}
	b.address(h, end, p.Addresses)
}

func (b *builder) macvlan(l Link) string {
	if l.Parent == "" {
		return "the link below it was not in the host"
	}
	parent, err := b.host.LinkByName(l.Parent)
	if err != nil {
		return fmt.Sprintf("the link %s below it: %v", l.Parent, err)
	}
	m := &netlink.Macvlan{LinkAttrs: attrs(l), Mode: netlink.MacvlanMode(l.Mode)}
	m.ParentIndex, m.Namespace = parent.Attrs().Index, netlink.NsFd(b.ns.Fd())
	return b.add(b.host, m)
}

// standIn makes a link that only carries addresses: a dummy, or where the kernel
// has none, one end of a pair whose other end stays in the namespace.
func (b *builder) standIn(l Link) error {
	if why := b.add(b.h, &netlink.Dummy{LinkAttrs: attrs(l)}); why == "" {
		return nil
	}
	veth := netlink.NewVeth(attrs(l))
	for i := 0; ; i++ {
		veth.PeerName = "private" + strconv.Itoa(i)
		if _, err := b.h.LinkByName(veth.PeerName); err != nil {
			break
		}
	}
	if why := b.add(b.h, veth); why != "" {
		return errors.New(why)
	}
	end, err := b.h.LinkByName(veth.PeerName)
	if err != nil {
		return err
	}
	// The stand-in's other end must not have an address of its own.
	if err := inside(b.ns, func() error {
		if _, err := os.Stat("/proc/sys/net/ipv6"); err == nil {
			writeSysctls(map[string]string{"net/ipv6/conf/" + veth.PeerName + "/disable_ipv6": "1"})
		}
		return nil
	}); err != nil {
		return err
	}
	return b.h.LinkSetUp(end)
}

// masters puts ports into the bridges of the namespace.
func (b *builder) masters() error {
	for _, l := range b.n.Links {
		index, ok := b.made[l.Name]
		if !ok || l.Master == "" {
			continue
		}
		master, ok := b.made[l.Master]
		if !ok {
			b.say("link %s: there is no link %s for it to be a port of", l.Name, l.Master)
			continue
		}
		link, err := b.h.LinkByIndex(index)
		if err != nil {
			return fmt.Errorf("link %s: %w", l.Name, err)
		}
		if err := b.h.LinkSetMasterByIndex(link, master); err != nil {
			b.say("link %s: making it a port of %s: %v", l.Name, l.Master, err)
		}
	}
	return nil
}
