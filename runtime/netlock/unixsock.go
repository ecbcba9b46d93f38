// SPDX-License-Identifier: Apache-2.0

package netlock

import (
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// UnixSocket is one AF_UNIX socket of a namespace. Sockets belong to the network
// namespace in which they were made, also when their path is shared with another.
type UnixSocket struct {
	Inode uint32
	// Peer is the inode of the connected socket, 0 when there is none. The peer
	// may be in another namespace.
	Peer uint32
	// Type is SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET.
	Type  uint8
	State TCPState
	// Name is the bound path; an abstract name starts with "@". Empty when unbound.
	Name string
	// Pending are the inodes of connections that wait to be accepted, 0 for one
	// whose client is gone.
	Pending []uint32
	// ReadQueue is in bytes, for a listening socket in connections.
	ReadQueue uint32
}

// linux/unix_diag.h
const (
	udiagShowName  = 0x01
	udiagShowPeer  = 0x04
	udiagShowIcons = 0x08
	udiagShowRQlen = 0x10

	unixDiagName  = 0
	unixDiagPeer  = 2
	unixDiagIcons = 3
	unixDiagRQlen = 4
)

// UnixSockets lists the unix sockets of a namespace by inode.
func UnixSockets(netns string) (map[uint32]UnixSocket, error) {
	ns, err := openNS(netns)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	// struct unix_diag_req
	req := []byte{unix.AF_UNIX, 0, 0, 0}
	req = binary.NativeEndian.AppendUint32(req, ^uint32(0))
	req = binary.NativeEndian.AppendUint32(req, 0)
	req = binary.NativeEndian.AppendUint32(req, udiagShowName|udiagShowPeer|udiagShowIcons|udiagShowRQlen)
	req = append(req, make([]byte, 8)...)
	msgs, err := diag(ns, sockDiagByFamily, netlink.Dump, req)
	if err != nil {
		return nil, fmt.Errorf("listing the unix sockets of %s (needs CONFIG_UNIX_DIAG): %w", netns, err)
	}
	socks := make(map[uint32]UnixSocket, len(msgs))
	for _, m := range msgs {
		s, err := decodeUnix(m.Data)
		if err != nil {
			return nil, fmt.Errorf("listing the unix sockets of %s: %w", netns, err)
		}
		socks[s.Inode] = s
	}
	return socks, nil
}

// UnixPeers maps the inode of every connected unix socket of stream or
// sequential-packet type to its peer's.
func UnixPeers(netns string) (map[uint32]uint32, error) {
	socks, err := UnixSockets(netns)
	if err != nil {
		return nil, err
	}
	peers := make(map[uint32]uint32)
	for ino, s := range socks {
		if s.Peer != 0 && s.Type != unix.SOCK_DGRAM {
			peers[ino] = s.Peer
		}
	}
	return peers, nil
}

// decodeUnix reads struct unix_diag_msg and its attributes.
func decodeUnix(b []byte) (UnixSocket, error) {
	const size = 16
	if len(b) < size {
		return UnixSocket{}, fmt.Errorf("unix_diag answer of %d bytes", len(b))
	}
	s := UnixSocket{Type: b[1], State: TCPState(b[2]), Inode: binary.NativeEndian.Uint32(b[4:])}
	ad, err := netlink.NewAttributeDecoder(b[size:])
	if err != nil {
		return UnixSocket{}, fmt.Errorf("unix_diag answer: %w", err)
	}
	for ad.Next() {
		switch ad.Type() {
		case unixDiagName:
			name := string(ad.Bytes())
			if abstract, ok := strings.CutPrefix(name, "\x00"); ok {
				name = "@" + abstract
			}
			s.Name = strings.TrimRight(name, "\x00")
		case unixDiagPeer:
			s.Peer = ad.Uint32()
		case unixDiagIcons:
			for data := ad.Bytes(); len(data) >= 4; data = data[4:] {
				s.Pending = append(s.Pending, binary.NativeEndian.Uint32(data))
			}
		case unixDiagRQlen:
			if data := ad.Bytes(); len(data) >= 4 {
				s.ReadQueue = binary.NativeEndian.Uint32(data)
			}
		}
	}
	return s, ad.Err()
}
