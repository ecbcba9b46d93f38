// SPDX-License-Identifier: Apache-2.0

package netlock

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Message types of sock_diag(7) (linux/sock_diag.h).
const (
	sockDiagByFamily = 20
	sockDestroy      = 21
)

// diag sends one sock_diag request in the namespace and returns the answers'
// payloads.
func diag(ns *os.File, kind netlink.HeaderType, flags netlink.HeaderFlags, payload []byte) ([]netlink.Message, error) {
	conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, &netlink.Config{NetNS: int(ns.Fd())})
	if err != nil {
		return nil, fmt.Errorf("opening sock_diag: %w", err)
	}
	defer conn.Close()
	return conn.Execute(netlink.Message{
		Header: netlink.Header{Type: kind, Flags: netlink.Request | flags},
		Data:   payload,
	})
}

// sockID mirrors struct inet_diag_sockid (linux/inet_diag.h), addresses in
// network byte order, 16 bytes each for both families.
type sockID struct {
	sport, dport uint16
	src, dst     [16]byte
	ifindex      uint32
	cookie       [2]uint32
}

const sockIDSize = 48

func (id *sockID) decode(b []byte) {
	id.sport, id.dport = binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:])
	copy(id.src[:], b[4:20])
	copy(id.dst[:], b[20:36])
	id.ifindex = binary.NativeEndian.Uint32(b[36:])
	id.cookie = [2]uint32{binary.NativeEndian.Uint32(b[40:]), binary.NativeEndian.Uint32(b[44:])}
}

func (id *sockID) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, id.sport)
	b = binary.BigEndian.AppendUint16(b, id.dport)
	b = append(b, id.src[:]...)
	b = append(b, id.dst[:]...)
	b = binary.NativeEndian.AppendUint32(b, id.ifindex)
	b = binary.NativeEndian.AppendUint32(b, id.cookie[0])
	return binary.NativeEndian.AppendUint32(b, id.cookie[1])
}

// inetRequest mirrors struct inet_diag_req_v2 for TCP.
func inetRequest(family uint8, states uint32, id sockID) []byte {
	b := make([]byte, 0, 8+sockIDSize)
	b = append(b, family, unix.IPPROTO_TCP, 0, 0)
	b = binary.NativeEndian.AppendUint32(b, states)
	return id.append(b)
}

// inetMessageSize is sizeof(struct inet_diag_msg).
const inetMessageSize = 4 + sockIDSize + 20

func decodeConn(b []byte) (Conn, bool) {
	if len(b) < inetMessageSize {
		return Conn{}, false
	}
	c := Conn{family: b[0], State: TCPState(b[1])}
	c.id.decode(b[4:])
	c.Local = address(b[0], c.id.src, c.id.sport)
	c.Remote = address(b[0], c.id.dst, c.id.dport)
	tail := b[4+sockIDSize:]
	c.ReadQueue = binary.NativeEndian.Uint32(tail[4:])
	c.WriteQueue = binary.NativeEndian.Uint32(tail[8:])
	c.Inode = binary.NativeEndian.Uint32(tail[16:])
	return c, true
}

// address unmaps IPv4-mapped IPv6 addresses, so that both ends of a connection
// compare whatever families their sockets have.
func address(family uint8, a [16]byte, port uint16) netip.AddrPort {
	if family == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(a[:4])), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom16(a).Unmap(), port)
}
