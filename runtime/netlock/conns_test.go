// SPDX-License-Identifier: Apache-2.0

package netlock

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// wire joins two namespaces with a veth pair: 10.9.0.1 and fd09::1 in a,
// 10.9.0.2 and fd09::2 in b.
func wire(t *testing.T, a, b string) {
	t.Helper()
	fb, err := os.Open(b)
	if err != nil {
		t.Fatal(err)
	}
	defer fb.Close()
	in(t, a, func() error {
		veth := netlink.NewVeth(netlink.LinkAttrs{Name: "eth0", TxQLen: -1})
		veth.PeerName, veth.PeerNamespace = "eth0", netlink.NsFd(fb.Fd())
		return netlink.LinkAdd(veth)
	})
	for ns, addrs := range map[string][]string{a: {"10.9.0.1/24", "fd09::1/64"}, b: {"10.9.0.2/24", "fd09::2/64"}} {
		in(t, ns, func() error {
			link, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			for _, s := range addrs {
				addr, err := netlink.ParseAddr(s)
				if err != nil {
					return err
				}
				addr.Flags = unix.IFA_F_NODAD
				if err := netlink.AddrAdd(link, addr); err != nil {
					return err
				}
			}
			return netlink.LinkSetUp(link)
		})
		loUp(t, ns)
	}
	for _, ns := range []string{a, b} {
		awaitOper(t, ns, "eth0")
	}
}

// awaitOper returns when a link carries packets. Until the kernel's link watch
// has run, up to a second after both ends are up, it drops what is sent
// (net/core/link_watch.c: LW_URGENT, dev_activate).
func awaitOper(t *testing.T, ns, name string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		var state netlink.LinkOperState
		in(t, ns, func() error {
			link, err := netlink.LinkByName(name)
			if err == nil {
				state = link.Attrs().OperState
			}
			return err
		})
		if state == netlink.OperUp {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("link %s is %s", name, state)
		}
	}
}

// across is a connection from a to b.
func across(t *testing.T, a, b, address string) (client, server net.Conn) {
	t.Helper()
	var l net.Listener
	in(t, b, func() (err error) {
		l, err = net.Listen("tcp", net.JoinHostPort(address, "0"))
		return err
	})
	defer l.Close()
	in(t, a, func() error {
		d := net.Dialer{Timeout: 5 * time.Second}
		d.SetMultipathTCP(false)
		c, err := d.Dial("tcp", l.Addr().String())
		client = c
		return err
	})
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

func TestConnectionsAreListedWithStateAndInode(t *testing.T) {
	ns := newNS(t)
	loUp(t, ns)
	client, server := pair(t, ns, "[::ffff:127.0.0.1]:0")
	if _, err := client.Write([]byte("12345")); err != nil {
		t.Fatal(err)
	}
	conns, err := Connections(ns)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, c := range conns {
		for _, end := range []*net.TCPConn{client, server} {
			if c.Local.String() != end.LocalAddr().String() || c.State != Established {
				continue
			}
			found++
			if want := inodeOf(t, end); c.Inode != want {
				t.Errorf("%s has inode %d, want %d", c, c.Inode, want)
			}
			if end == server && c.ReadQueue != 5 {
				t.Errorf("%s has %d bytes to read, want 5", c, c.ReadQueue)
			}
		}
	}
	if found != 2 {
		t.Errorf("found %d of 2 ends in %v", found, conns)
	}
}

func inodeOf(t *testing.T, c interface{ File() (*os.File, error) }) uint32 {
	t.Helper()
	f, err := c.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return uint32(st.Ino)
}

func TestCloseOutsideClosesOutsideConnectionsAlone(t *testing.T) {
	member, other, outside := newNS(t), newNS(t), newNS(t)
	wire(t, member, outside)
	// A second pair of interfaces: the member's way to the other member.
	fo, err := os.Open(other)
	if err != nil {
		t.Fatal(err)
	}
	defer fo.Close()
	in(t, member, func() error {
		veth := netlink.NewVeth(netlink.LinkAttrs{Name: "eth1", TxQLen: -1})
		veth.PeerName, veth.PeerNamespace = "eth1", netlink.NsFd(fo.Fd())
		return netlink.LinkAdd(veth)
	})
	for ns, s := range map[string]string{member: "10.8.0.1/24", other: "10.8.0.2/24"} {
		in(t, ns, func() error {
			link, err := netlink.LinkByName("eth1")
			if err != nil {
				return err
			}
			addr, err := netlink.ParseAddr(s)
			if err != nil {
				return err
			}
			return errors.Join(netlink.AddrAdd(link, addr), netlink.LinkSetUp(link))
		})
	}
	out4, far4 := across(t, member, outside, "10.9.0.2")
	out6, far6 := across(t, member, outside, "fd09::2")
	client, server := pair(t, member, "127.0.0.1:0")
	toOther, atOther := across(t, member, other, "10.8.0.2")

	keep, err := Inside(member, other)
	if err != nil {
		t.Fatal(err)
	}
	closed, err := CloseOutside(member, keep)
	if errors.Is(err, unix.EOPNOTSUPP) {
		require(t, false, "CONFIG_INET_DIAG_DESTROY")
	}
	if err != nil {
		t.Fatal(err)
	}
	if len(closed) != 2 {
		t.Fatalf("closed %v, want the two outside connections", closed)
	}
	for _, c := range []net.Conn{out4, out6} {
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNABORTED) {
			t.Errorf("the member's outside end: %v, want %v", err, unix.ECONNABORTED)
		}
	}
	for _, c := range []net.Conn{far4, far6} {
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("the outside end: %v, want %v", err, unix.ECONNRESET)
		}
	}
	for _, ends := range [][2]net.Conn{{client, server}, {toOther, atOther}} {
		if _, err := ends[0].Write([]byte("still")); err != nil {
			t.Fatal(err)
		}
		expect(t, ends[1], []byte("still"))
	}
	if _, err := CloseOutside("/proc/self/ns/net", func(Conn) bool { return true }); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the host's namespace: %v, want a failed precondition", err)
	}
}

func TestUnixPeersNameBothEnds(t *testing.T) {
	ns := newNS(t)
	path := filepath.Join(t.TempDir(), "sock")
	var l *net.UnixListener
	var c *net.UnixConn
	in(t, ns, func() (err error) {
		if l, err = net.ListenUnix("unix", &net.UnixAddr{Name: path}); err != nil {
			return err
		}
		c, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: path})
		return err
	})
	defer l.Close()
	defer c.Close()
	socks, err := UnixSockets(ns)
	if err != nil {
		t.Fatal(err)
	}
	listening := socks[inodeOf(t, l)]
	if listening.Name != path || listening.State != Listen || len(listening.Pending) != 1 || listening.Pending[0] != inodeOf(t, c) {
		t.Errorf("the listening socket is %+v", listening)
	}
	s, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	peers, err := UnixPeers(ns)
	if err != nil {
		t.Fatal(err)
	}
	if a, b := inodeOf(t, c), inodeOf(t, s); peers[a] != b || peers[b] != a || len(peers) != 2 {
		t.Errorf("peers are %v, want %d and %d of each other", peers, a, b)
	}
}
