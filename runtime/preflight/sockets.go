// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/runtime/netlock"
)

// socket judges a socket by the name of its protocol, which sockfs gives as an
// extended attribute (net/socket.c, sockfs_xattr_get): no descriptor of it is
// needed. The rules are those of criu/sockets.c, dump_socket, and criu/sk-inet.c,
// can_dump_ipproto.
func (c *checker) socket(m *member, p *process, fd int, path string, ino uint32, once func(string) bool) {
	var buf [64]byte
	n, err := unix.Getxattr(path, "system.sockprotoname", buf[:])
	if err != nil {
		return // closed since
	}
	proto := strings.TrimRight(string(buf[:n]), "\x00")
	switch proto {
	case "UNIX", "UNIX-STREAM":
		if _, ok := c.unix[ino]; !ok {
			c.unix[ino] = holder{m, p, fd}
		}
		return
	case "NETLINK":
		if once("netlink") {
			// criu/sk-netlink.c, can_dump_netlink_sk.
			c.find(Warn, CodeSocket, m, p, "expect lost notifications, and a failure if one waits to be read",
				"has a netlink socket (descriptor %d)", fd)
		}
		return
	case "PACKET":
		if once("packet") {
			c.find(Warn, CodeSocket, m, p, "expect packets to be lost", "has a packet socket (descriptor %d)", fd)
		}
	case "TCP", "TCPv6":
		if _, ok := c.inet[ino]; !ok {
			c.inet[ino] = holder{m, p, fd}
		}
	case "UDP", "UDPv6", "UDP-Lite", "UDPLITEv6", "RAW", "RAWv6", "PING", "PINGv6":
	case "MPTCP", "MPTCPv6":
		// An accepted socket that fell back is plain TCP and keeps the name.
		if multipath(p, fd) && once("mptcp") {
			c.find(Refuse, CodeSocket, m, p, "switch multipath TCP off: GODEBUG=multipathtcp=0 for a Go program, or sysctl net.mptcp.enabled=0 in the container",
				"has a multipath TCP socket, which CRIU cannot save (descriptor %d)", fd)
		}
		if _, ok := c.inet[ino]; !ok {
			c.inet[ino] = holder{m, p, fd}
		}
	default:
		if once("socket:" + proto) {
			c.find(Refuse, CodeSocket, m, p, "have it close that before the checkpoint",
				"has a socket of the kind %s, which CRIU cannot save (descriptor %d)", proto, fd)
		}
		return
	}
	if m.HostNetwork && once("host") {
		c.find(Refuse, CodeHostNetwork, m, p, "run the container in a network namespace of its own",
			"has network sockets in the host's network namespace, which cannot be held still (descriptor %d)", fd)
	}
}

// multipath asks the socket itself, through a copy of the descriptor.
func multipath(p *process, fd int) bool {
	pidfd, err := unix.PidfdOpen(p.pid, 0)
	if err != nil {
		return true
	}
	defer unix.Close(pidfd)
	sock, err := unix.PidfdGetfd(pidfd, fd, 0)
	if err != nil {
		return true
	}
	defer unix.Close(sock)
	proto, err := unix.GetsockoptInt(sock, unix.SOL_SOCKET, unix.SO_PROTOCOL)
	return err != nil || proto == unix.IPPROTO_MPTCP
}

// sockets checks what only the kernel's listings tell: who is connected to whom.
func (c *checker) sockets() error {
	if len(c.unix) == 0 && len(c.inet) == 0 {
		return nil
	}
	// One listing for each network namespace that a process of the group is in.
	socks := make(map[uint32]netlock.UnixSocket)
	var conns []netlock.Conn
	seen := make(map[uint64]bool)
	for _, m := range c.members {
		for _, p := range m.procs {
			ns := p.namespaces["net"]
			if p.state == 'Z' || seen[ns] {
				continue
			}
			seen[ns] = true
			path := netlock.PathOf(p.pid)
			list, err := netlock.UnixSockets(path)
			if err != nil {
				if ended(err) {
					continue
				}
				return err
			}
			for ino, s := range list {
				socks[ino] = s
			}
			if m.HostNetwork || len(c.inet) == 0 {
				continue
			}
			tcp, err := netlock.Connections(path)
			if err != nil && !ended(err) {
				return err
			}
			conns = append(conns, tcp...)
		}
	}
	c.pending(conns)
	c.unixPeers(socks)
	return nil
}

// pending warns of connections that nobody accepted yet: criu/sk-inet.c,
// can_dump_inet_sk, cannot save them.
func (c *checker) pending(conns []netlock.Conn) {
	for _, conn := range conns {
		h, ours := c.inet[conn.Inode]
		if ours && conn.State == netlock.Listen && conn.ReadQueue > 0 {
			c.find(Warn, CodePending, h.m, h.p, "expect those connections to be dropped",
				"has %d connections to %s waiting to be accepted", conn.ReadQueue, conn.Local)
		}
	}
}

// unixPeers refuses what criu/sk-unix.c, fix_external_unix_sockets, refuses: a
// stream whose other end is in another process tree.
func (c *checker) unixPeers(socks map[uint32]netlock.UnixSocket) {
	done := make(map[[2]uint32]bool)
	type outside struct {
		ino uint32
		h   holder
		s   netlock.UnixSocket
	}
	var out []outside
	for ino, h := range c.unix {
		s, ok := socks[ino]
		if !ok {
			// criu/sk-unix.c, dump_one_unix_fd: "Unix socket not found". Look again,
			// it may have been closed before the listing.
			if link, err := os.Readlink(h.p.path("fd", strconv.Itoa(h.fd))); err == nil && link == fmt.Sprintf("socket:[%d]", ino) {
				c.find(Refuse, CodeUnix, h.m, h.p, "have the container make the socket itself",
					"has a unix socket that was made in another network namespace than the container's (descriptor %d)", h.fd)
			}
			continue
		}
		if s.Peer == 0 {
			continue
		}
		peer, ours := c.unix[s.Peer]
		if ours && peer.m == h.m {
			continue
		}
		if !ours {
			out = append(out, outside{ino, h, s})
			continue
		}
		// Both ends may list the pair; a datagram socket's peer need not.
		pair := [2]uint32{min(ino, s.Peer), max(ino, s.Peer)}
		if done[pair] {
			continue
		}
		done[pair] = true
		if s.Type == unix.SOCK_DGRAM {
			c.find(Warn, CodeUnix, h.m, h.p, "expect messages in flight to be lost",
				"sends datagrams to process %d (%s) of member %s over %s", peer.p.pid, peer.p.comm, peer.m.ID, where(s, socks[s.Peer]))
			continue
		}
		c.find(Refuse, CodeUnix, h.m, h.p, "let them talk over TCP, or run both in one container",
			"is connected to process %d (%s) of member %s over %s, which cannot be saved from two sides",
			peer.p.pid, peer.p.comm, peer.m.ID, where(s, socks[s.Peer]))
	}
	if len(out) == 0 {
		return
	}
	inodes := make(map[uint32]bool)
	for _, o := range out {
		inodes[o.s.Peer] = true
	}
	// Only now is the host's whole process table worth looking at.
	names := owners(inodes)
	for _, o := range out {
		who, ok := names[o.s.Peer]
		if !ok {
			who = "a socket that no process holds"
		}
		far := socks[o.s.Peer]
		if o.s.Type == unix.SOCK_DGRAM {
			if far.Name == "" {
				c.find(Refuse, CodeUnix, o.h.m, o.h.p, "have it close that before the checkpoint",
					"sends datagrams to %s outside the group, at a socket without a name", who)
			} else {
				c.find(Warn, CodeUnix, o.h.m, o.h.p, "make sure that "+far.Name+" is there on restore",
					"sends datagrams to %s outside the group over %s", who, far.Name)
			}
			continue
		}
		c.find(Refuse, CodeUnix, o.h.m, o.h.p, "close the connection, or make the other end a part of the same container",
			"is connected to %s outside the group over %s", who, where(o.s, far))
	}
}

// where names a connection by the end that has a name.
func where(ends ...netlock.UnixSocket) string {
	for _, s := range ends {
		if s.Name != "" {
			return "the unix socket " + s.Name
		}
	}
	return "an unnamed unix socket pair"
}

// owners finds a process for each of the sockets.
func owners(inodes map[uint32]bool) map[uint32]string {
	found := make(map[uint32]string)
	entries, err := readNames("/proc")
	if err != nil {
		return found
	}
	for _, name := range entries {
		if name[0] < '1' || name[0] > '9' {
			continue
		}
		dir := "/proc/" + name + "/fd"
		fds, err := readNames(dir)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			link, err := os.Readlink(dir + "/" + fd)
			if err != nil || !strings.HasPrefix(link, "socket:[") {
				continue
			}
			n, _ := strconv.ParseUint(strings.TrimSuffix(link[len("socket:["):], "]"), 10, 64)
			ino := uint32(n)
			if inodes[ino] && found[ino] == "" {
				pid, _ := strconv.Atoi(name)
				found[ino] = fmt.Sprintf("process %d (%s)", pid, commOf(pid))
			}
		}
		if len(found) == len(inodes) {
			break
		}
	}
	return found
}
