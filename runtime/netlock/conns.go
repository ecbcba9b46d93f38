// SPDX-License-Identifier: Apache-2.0

package netlock

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// TCPState is a state of a TCP socket, numbered as in include/net/tcp_states.h.
type TCPState uint8

// The states that callers tell apart.
const (
	Established TCPState = 1
	SynSent     TCPState = 2
	SynReceived TCPState = 3
	TimeWait    TCPState = 6
	Closed      TCPState = 7
	Listen      TCPState = 10
)

var stateNames = map[TCPState]string{
	1: "established", 2: "syn-sent", 3: "syn-received", 4: "fin-wait-1", 5: "fin-wait-2", 6: "time-wait",
	7: "closed", 8: "close-wait", 9: "last-ack", 10: "listen", 11: "closing", 12: "new-syn-received",
}

func (s TCPState) String() string {
	if name, ok := stateNames[s]; ok {
		return name
	}
	return strconv.Itoa(int(s))
}

// Conn is one TCP socket of a namespace.
type Conn struct {
	State         TCPState
	Local, Remote netip.AddrPort
	// Inode is the socket's, as in the link of /proc/PID/fd; 0 when no process
	// holds it.
	Inode uint32
	// ReadQueue and WriteQueue are bytes that wait in the kernel; for a listening
	// socket, connections that wait to be accepted and the most of them.
	ReadQueue, WriteQueue uint32

	family uint8
	id     sockID
}

func (c Conn) String() string {
	return fmt.Sprintf("%s > %s (%s)", c.Local, c.Remote, c.State)
}

// Connected tells whether the socket has a peer, or is about to have one or to
// part from one.
func (c Conn) Connected() bool {
	return c.State != Listen && c.State != Closed && c.State != TimeWait
}

// Connections lists the TCP sockets of a namespace, IPv4 and IPv6, in every
// state. Bound sockets that neither listen nor connect are not among them.
func Connections(netns string) ([]Conn, error) {
	ns, err := openNS(netns)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	conns, err := connections(ns)
	if err != nil {
		return nil, fmt.Errorf("listing the TCP sockets of %s: %w", netns, err)
	}
	return conns, nil
}

func connections(ns *os.File) ([]Conn, error) {
	var conns []Conn
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		msgs, err := diag(ns, sockDiagByFamily, netlink.Dump, inetRequest(family, ^uint32(0), sockID{}))
		if err != nil {
			// ENOENT: the kernel has no support for the family.
			if family == unix.AF_INET6 && errors.Is(err, unix.ENOENT) {
				continue
			}
			return nil, err
		}
		for _, m := range msgs {
			if c, ok := decodeConn(m.Data); ok {
				conns = append(conns, c)
			}
		}
	}
	return conns, nil
}

// ends is a connection as a set of sockets sees it.
type ends struct {
	local, remote netip.AddrPort
}

// Inside returns a keep function for CloseOutside: it holds a connection back
// whose other end is a socket of one of the namespaces, which are those of the
// whole group. The sockets are listed once, now.
func Inside(netns ...string) (keep func(Conn) bool, err error) {
	known := make(map[ends]struct{})
	for _, path := range netns {
		conns, err := Connections(path)
		if err != nil {
			return nil, err
		}
		for _, c := range conns {
			if c.Connected() {
				known[ends{c.Local, c.Remote}] = struct{}{}
			}
		}
	}
	return func(c Conn) bool {
		_, ok := known[ends{c.Remote, c.Local}]
		return ok
	}, nil
}

// CloseOutside destroys every TCP connection of the namespace whose other end is
// not a socket of the same namespace and for which keep, where it is not nil,
// returns false. The process that holds it reads ECONNABORTED; the peer is sent a
// reset unless communication rules are closed. It returns what it closed, also
// when it fails half way. Listening sockets stay.
//
// The kernel must have CONFIG_INET_DIAG_DESTROY. The host's namespace is refused
// with errdefs.ErrFailedPrecondition.
func CloseOutside(netns string, keep func(Conn) bool) (closed []Conn, err error) {
	return closeThose(netns, "closing outside connections of "+netns, func(conns []Conn) func(Conn) bool {
		known := make(map[ends]struct{}, len(conns))
		for _, c := range conns {
			if c.Connected() {
				known[ends{c.Local, c.Remote}] = struct{}{}
			}
		}
		return func(c Conn) bool {
			_, here := known[ends{c.Remote, c.Local}]
			return !here && (keep == nil || !keep(c))
		}
	})
}

// CloseOrphans destroys those of the connections, which Connections listed before
// their processes were killed, that no process holds any more: the kernel would
// go on to part from their peers. A peer is sent a reset, once, which closed
// communication rules swallow. It returns what it closed, also when it fails half
// way; the namespace's other connections stay, and the kernel and the host are as
// for CloseOutside.
func CloseOrphans(netns string, held []Conn) (closed []Conn, err error) {
	return closeThose(netns, "closing orphaned connections of "+netns, func([]Conn) func(Conn) bool {
		known := make(map[sockID]struct{}, len(held))
		for _, c := range held {
			if c.Connected() && c.Inode != 0 {
				known[c.id] = struct{}{}
			}
		}
		return func(c Conn) bool {
			_, was := known[c.id]
			return was && c.Inode == 0
		}
	})
}

// closeThose destroys the connections of a namespace that the chooser, made from
// all of its connections, wants gone.
func closeThose(netns, doing string, chooser func([]Conn) func(Conn) bool) (closed []Conn, err error) {
	ns, err := openNS(netns)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", doing, err)
	}
	defer ns.Close()
	if err := refuseHost(ns, doing); err != nil {
		return nil, err
	}
	conns, err := connections(ns)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", doing, err)
	}
	wanted := chooser(conns)
	for _, c := range conns {
		if !c.Connected() || !wanted(c) {
			continue
		}
		done, err := destroy(ns, c)
		if err != nil {
			return closed, fmt.Errorf("%s: %w", doing, err)
		}
		if done {
			closed = append(closed, c)
		}
	}
	return closed, nil
}

// destroy ends one connection; it is not done if that ended by itself meanwhile.
func destroy(ns *os.File, c Conn) (done bool, err error) {
	_, err = diag(ns, sockDestroy, netlink.Acknowledge, inetRequest(c.family, 1<<c.State, c.id))
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.ENOENT):
		return false, nil
	case errors.Is(err, unix.EOPNOTSUPP):
		return false, fmt.Errorf("destroying %s: the kernel cannot (CONFIG_INET_DIAG_DESTROY): %w", c, err)
	}
	return false, fmt.Errorf("destroying %s: %w", c, err)
}
