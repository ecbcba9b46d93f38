// SPDX-License-Identifier: Apache-2.0

package netlock

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func setSysctl(t *testing.T, ns, key, value string) {
	t.Helper()
	in(t, ns, func() error {
		if failed := writeSysctls(map[string]string{key: value}); len(failed) > 0 {
			return errors.New(failed[0])
		}
		return nil
	})
}

func sysctl(t *testing.T, ns, key string) string {
	t.Helper()
	var data []byte
	in(t, ns, func() (err error) {
		data, err = os.ReadFile(filepath.Join(sysctlRoot, key))
		return err
	})
	return strings.TrimSpace(string(data))
}

// bridgedNS makes a namespace as a container engine does: eth0 is a veth whose
// peer is a port of bridge br0 in the namespace that stands for the host.
func bridgedNS(t *testing.T, host string) string {
	t.Helper()
	ns := newNS(t)
	f, err := os.Open(host)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	in(t, ns, func() error {
		veth := netlink.NewVeth(netlink.LinkAttrs{Name: "eth0", Index: 7, MTU: 1400, TxQLen: 500})
		veth.HardwareAddr, _ = net.ParseMAC("02:42:0a:09:00:02")
		veth.PeerName, veth.PeerMTU, veth.PeerNamespace = "vethA", 1400, netlink.NsFd(f.Fd())
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		for _, s := range []string{"10.9.0.2/24", "10.9.0.3/24", "fd09::2/64"} {
			addr, err := netlink.ParseAddr(s)
			if err != nil {
				return err
			}
			addr.Broadcast = net.IPv4zero
			if err := netlink.AddrAdd(link, addr); err != nil {
				return err
			}
		}
		_, far, _ := net.ParseCIDR("172.30.0.0/16")
		_, all, _ := net.ParseCIDR("0.0.0.0/0")
		_, all6, _ := net.ParseCIDR("::/0")
		_, hole, _ := net.ParseCIDR("192.0.2.0/24")
		for _, r := range []*netlink.Route{
			{Dst: all, Gw: net.ParseIP("10.9.0.1"), LinkIndex: link.Attrs().Index},
			{Dst: all6, Gw: net.ParseIP("fd09::1"), LinkIndex: link.Attrs().Index},
			{Dst: far, Gw: net.ParseIP("10.9.0.9"), LinkIndex: link.Attrs().Index, Table: 100, Priority: 5},
			{Dst: hole, Type: unix.RTN_BLACKHOLE},
		} {
			if err := netlink.RouteAdd(r); err != nil {
				return err
			}
		}
		rule := netlink.NewRule()
		rule.Priority, rule.Table, rule.Src = 1000, 100, ipNet(netip.MustParsePrefix("10.9.0.3/32"))
		if err := netlink.RuleAdd(rule); err != nil {
			return err
		}
		hw, _ := net.ParseMAC("02:00:00:00:00:99")
		return netlink.NeighSet(&netlink.Neigh{
			LinkIndex: link.Attrs().Index, IP: net.ParseIP("10.9.0.9"), HardwareAddr: hw, State: netlink.NUD_PERMANENT,
		})
	})
	loUp(t, ns)
	setSysctl(t, ns, "net/ipv4/ip_unprivileged_port_start", "80")
	setSysctl(t, ns, "net/ipv4/ip_local_port_range", "20000\t30000")
	setSysctl(t, ns, "net/core/somaxconn", "1234")
	setSysctl(t, ns, "net/ipv4/ip_forward", "1")
	setSysctl(t, ns, "net/ipv4/conf/eth0/rp_filter", "2")
	connectPeer(t, host)
	// The kernel gives eth0 its link-local address a while after its carrier came.
	for deadline := time.Now().Add(5 * time.Second); !linkLocal(t, ns, "eth0") && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	return ns
}

func linkLocal(t *testing.T, ns, name string) (found bool) {
	t.Helper()
	in(t, ns, func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		list, err := retryDump(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_V6) })
		for _, a := range list {
			found = found || a.IP.IsLinkLocalUnicast()
		}
		return err
	})
	return found
}

func newHost(t *testing.T) string {
	t.Helper()
	host := newNS(t)
	in(t, host, func() error {
		br := &netlink.Bridge{LinkAttrs: netlink.NewLinkAttrs()}
		br.Name = "br0"
		if err := netlink.LinkAdd(br); err != nil {
			return err
		}
		addr, _ := netlink.ParseAddr("10.9.0.1/24")
		return errors.Join(netlink.AddrAdd(br, addr), netlink.LinkSetUp(br))
	})
	return host
}

func connectPeer(t *testing.T, host string) {
	t.Helper()
	in(t, host, func() error {
		br, err := netlink.LinkByName("br0")
		if err != nil {
			return err
		}
		end, err := netlink.LinkByName("vethA")
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetMaster(end, br), netlink.LinkSetUp(end))
	})
}

// captureFrom is Capture with the namespace at host standing for the host's.
func captureFrom(t *testing.T, host, path string) *Namespace {
	t.Helper()
	n, err := Capture(path, Other{Name: "host", Path: host})
	if err != nil {
		t.Fatal(err)
	}
	for i := range n.Links {
		if p := n.Links[i].Peer; p != nil && p.Netns == "host" {
			p.Where, p.Netns = PeerInHost, ""
		}
	}
	return n
}

func roundTrip(t *testing.T, n *Namespace) *Namespace {
	t.Helper()
	data, err := json.Marshal(n)
	if err != nil {
		t.Fatal(err)
	}
	var back Namespace
	if err := json.Unmarshal(data, &back); err != nil {
		t.Fatal(err)
	}
	return &back
}

func TestARebuiltNamespaceIsTheCapturedOne(t *testing.T) {
	host := newHost(t)
	ns := bridgedNS(t, host)
	start := time.Now()
	want := captureFrom(t, host, ns)
	t.Logf("captured in %s", time.Since(start))
	if len(want.Warnings) != 0 {
		t.Errorf("warnings: %v", want.Warnings)
	}
	if len(want.Links) != 2 || len(want.Routes) != 4 || len(want.Rules) != 1 || len(want.Neighbours) != 1 {
		t.Fatalf("captured %+v", want)
	}
	in(t, host, func() error {
		end, err := netlink.LinkByName("vethA")
		if err != nil {
			return err
		}
		return netlink.LinkDel(end)
	})
	again := newNS(t)
	start = time.Now()
	report, err := Rebuild(context.Background(), again, roundTrip(t, want), RebuildOptions{Host: host})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("rebuilt in %s", time.Since(start))
	if len(report) != 0 {
		t.Errorf("report: %q", report)
	}
	got := captureFrom(t, host, again)
	if !reflect.DeepEqual(want, got) {
		w, _ := json.MarshalIndent(want, "", " ")
		g, _ := json.MarshalIndent(got, "", " ")
		t.Errorf("captured %s\nrebuilt %s", w, g)
	}
	if v := sysctl(t, again, "net/ipv4/ip_unprivileged_port_start"); v != "80" {
		t.Errorf("ip_unprivileged_port_start is %s, want 80", v)
	}
	// It works: the host answers at once, and an IPv6 address can be bound.
	in(t, again, func() error {
		l, err := net.Listen("tcp", "[fd09::2]:0")
		if err != nil {
			return err
		}
		return l.Close()
	})
	across(t, again, host, "10.9.0.1")
}

func TestALinkWhosePeersNameIsTakenBecomesPrivate(t *testing.T) {
	host := newHost(t)
	n := captureFrom(t, host, bridgedNS(t, host))
	again := newNS(t)
	report, err := Rebuild(context.Background(), again, n, RebuildOptions{Host: host})
	if err != nil {
		t.Fatal(err)
	}
	if len(report) != 1 || !strings.Contains(report[0], "vethA") || !strings.Contains(report[0], "private") {
		t.Fatalf("report: %q", report)
	}
	// Addresses are there all the same, for connections to be restored onto.
	in(t, again, func() error {
		for _, a := range []string{"10.9.0.2:0", "10.9.0.3:0", "[fd09::2]:0"} {
			l, err := net.Listen("tcp", a)
			if err != nil {
				return err
			}
			l.Close()
		}
		return nil
	})
}

func TestPrivateRebuildLeavesTheHostAlone(t *testing.T) {
	host, other := newHost(t), newHost(t)
	n := captureFrom(t, host, bridgedNS(t, host))
	again := newNS(t)
	report, err := Rebuild(context.Background(), again, n, RebuildOptions{Host: other, Private: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("report: %q", report)
	in(t, other, func() error {
		if _, err := netlink.LinkByName("vethA"); err == nil {
			t.Error("a peer was made in the host")
		}
		return nil
	})
}

func TestMembersWiredToEachOtherAreRewired(t *testing.T) {
	a, b := newNS(t), newNS(t)
	wire(t, a, b)
	na, err := Capture(a, Other{"b", b})
	if err != nil {
		t.Fatal(err)
	}
	nb, err := Capture(b, Other{"a", a})
	if err != nil {
		t.Fatal(err)
	}
	a2, b2 := newNS(t), newNS(t)
	for _, s := range []struct {
		path string
		n    *Namespace
	}{{a2, na}, {b2, nb}} {
		report, err := Rebuild(context.Background(), s.path, s.n, RebuildOptions{Others: map[string]string{"a": a2, "b": b2}})
		if err != nil || len(report) != 0 {
			t.Fatalf("%v, report %q", err, report)
		}
	}
	across(t, a2, b2, "10.9.0.2")
	across(t, a2, b2, "fd09::2")
}

func TestMacvlanIsRebuiltOnItsParent(t *testing.T) {
	host := newHost(t)
	ns := newNS(t)
	f, err := os.Open(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var missing error
	in(t, host, func() error {
		br, err := netlink.LinkByName("br0")
		if err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.ParentIndex, attrs.Namespace = "mv0", br.Attrs().Index, netlink.NsFd(f.Fd())
		missing = netlink.LinkAdd(&netlink.Macvlan{LinkAttrs: attrs, Mode: netlink.MACVLAN_MODE_BRIDGE})
		return nil
	})
	require(t, missing == nil, "macvlan links")
	in(t, ns, func() error {
		l, err := netlink.LinkByName("mv0")
		if err != nil {
			return err
		}
		addr, _ := netlink.ParseAddr("10.9.0.5/24")
		return errors.Join(netlink.AddrAdd(l, addr), netlink.LinkSetUp(l))
	})
	n, err := Capture(ns)
	if err != nil {
		t.Fatal(err)
	}
	// The test's "host" is no place that Capture knows for parents.
	for i := range n.Links {
		if n.Links[i].Kind == "macvlan" {
			n.Links[i].Parent = "br0"
		}
	}
	in(t, ns, func() error {
		l, err := netlink.LinkByName("mv0")
		if err != nil {
			return err
		}
		return netlink.LinkDel(l)
	})
	again := newNS(t)
	report, err := Rebuild(context.Background(), again, n, RebuildOptions{Host: host})
	if err != nil || len(report) != 0 {
		t.Fatalf("%v, report %q", err, report)
	}
	in(t, again, func() error {
		l, err := netlink.LinkByName("mv0")
		if err == nil && l.Type() != "macvlan" {
			t.Errorf("mv0 is a %s", l.Type())
		}
		return err
	})
}

func TestPacketFiltersAreWarnedOf(t *testing.T) {
	ns := newNS(t)
	f, err := os.Open(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	conn, err := nftables.New(nftables.WithNetNSFd(int(f.Fd())))
	if err != nil {
		t.Fatal(err)
	}
	conn.AddTable(&nftables.Table{Name: "theirs", Family: nftables.TableFamilyINet})
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	unlock, err := Lock(ns, "ours")
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	n, err := Capture(ns)
	if err != nil {
		t.Fatal(err)
	}
	if len(n.Warnings) != 1 || !strings.Contains(n.Warnings[0], "theirs") || strings.Contains(n.Warnings[0], "ours") {
		t.Errorf("warnings: %q", n.Warnings)
	}
}

func TestHostileDescriptionsAreRefused(t *testing.T) {
	ns := newNS(t)
	for name, n := range map[string]*Namespace{
		"a path as a name":     {Links: []Link{{Name: "../../x", Kind: "veth"}}},
		"a peer with a slash":  {Links: []Link{{Name: "eth0", Kind: "veth", Peer: &Peer{Where: PeerInHost, Name: "a/b"}}}},
		"two of one name":      {Links: []Link{{Name: "eth0"}, {Name: "eth0"}}},
		"a hardware address":   {Links: []Link{{Name: "eth0", MAC: "zz"}}},
		"a sysctl of the host": {Sysctls: map[string]string{"kernel/core_pattern": "|/x"}},
		"a sysctl upwards":     {Sysctls: map[string]string{"net/../kernel/core_pattern": "|/x"}},
		"everybody's address":  {Links: []Link{{Name: "eth0", Addresses: []Address{{Prefix: netip.MustParsePrefix("0.0.0.0/0")}}}}},
	} {
		if _, err := Rebuild(context.Background(), ns, n, RebuildOptions{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, want an invalid argument", name, err)
		}
	}
	if _, err := Rebuild(context.Background(), "/proc/self/ns/net", &Namespace{}, RebuildOptions{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the host's namespace: %v, want a failed precondition", err)
	}
}
