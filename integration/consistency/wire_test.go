// SPDX-License-Identifier: Apache-2.0

package consistency

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/cohort-project/cohort/integration/harness"
	shop "github.com/cohort-project/cohort/integration/shop/harness"
	"github.com/cohort-project/cohort/runtime/netlock"
)

// wired is a group's network as a container engine makes it: a veth pair whose
// host end is a port of a bridge. The bridge has no address and no other port
// than that of the client's network namespace, so nothing leads to the host.
type wired struct {
	// group and client are the paths of the network namespaces.
	group, client string
	// groupIP and clientIP are their addresses.
	groupIP, clientIP string
	bridge, port      string
	link              netlink.Link
}

// newWired makes the network for the time of the test.
func newWired(t *testing.T) *wired {
	t.Helper()
	tag := strings.ToLower(rand.Text()[:6])
	var x [1]byte
	_, _ = rand.Read(x[:]) // never fails
	subnet := "10.214." + strconv.Itoa(int(x[0])) + "."
	dir := t.TempDir()
	w := &wired{
		group: filepath.Join(dir, "group"), client: filepath.Join(dir, "client"),
		groupIP: subnet + "2", clientIP: subnet + "1", bridge: "chb" + tag, port: "chg" + tag,
	}
	bridge := &netlink.Bridge{LinkAttrs: netlink.NewLinkAttrs()}
	bridge.Name = w.bridge
	if err := netlink.LinkAdd(bridge); err != nil {
		t.Fatalf("bridge: %v", err)
	}
	t.Cleanup(func() {
		if err := netlink.LinkDel(bridge); err != nil {
			t.Errorf("removing bridge %s: %v", w.bridge, err)
		}
	})
	quiet(t, w.bridge)
	if err := netlink.LinkSetUp(bridge); err != nil {
		t.Fatal(err)
	}
	w.link = bridge
	for _, path := range []string{w.group, w.client} {
		remove, err := netlock.New(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := remove(); err != nil {
				t.Error(err)
			}
		})
	}
	w.plug(t, w.client, "chc"+tag, w.clientIP)
	return w
}

// plugGroup connects a namespace, the group's own or a member's private one, at
// the group's address.
func (w *wired) plugGroup(t *testing.T, path string) {
	t.Helper()
	w.plug(t, path, w.port, w.groupIP)
}

func (w *wired) plug(t *testing.T, path, port, address string) {
	t.Helper()
	if err := plug(path, port, address+"/24", w.link); err != nil {
		t.Fatalf("wiring %s: %v", path, err)
	}
	quiet(t, port)
}

// quiet keeps the kernel from giving a link of the host an address by itself.
func quiet(t *testing.T, link string) {
	t.Helper()
	err := os.WriteFile("/proc/sys/net/ipv6/conf/"+link+"/disable_ipv6", []byte("1"), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
}

// plug lays a pair between a namespace, where it is eth0, and the bridge.
func plug(path, port, cidr string, bridge netlink.Link) error {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MasterIndex = port, bridge.Attrs().Index
	pair := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns)}
	if err := netlink.LinkAdd(pair); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(pair); err != nil {
		return err
	}
	in, err := netlink.NewHandleAt(ns)
	if err != nil {
		return err
	}
	defer in.Close()
	for _, name := range []string{"lo", "eth0"} {
		link, err := in.LinkByName(name)
		if err != nil {
			return err
		}
		if name == "eth0" {
			addr, err := netlink.ParseAddr(cidr)
			if err != nil {
				return err
			}
			if err := in.AddrAdd(link, addr); err != nil {
				return err
			}
		}
		if err := in.LinkSetUp(link); err != nil {
			return err
		}
	}
	return nil
}

// unplug removes the group's own namespace, and returns when its port is gone,
// with that or with a private one: its name would else be in use when the group is
// restored.
func (w *wired) unplug(t *testing.T) {
	t.Helper()
	if err := netlock.Remove(w.group); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 10*time.Second, func() error {
		_, err := netlink.LinkByName(w.port)
		var gone netlink.LinkNotFoundError
		if errors.As(err, &gone) {
			return nil
		}
		return errors.Join(fmt.Errorf("port %s is still there", w.port), err)
	})
}

// outsider runs the sender of an echo stream to the group in a container that is
// no member of it, under the stock shim, and returns its id and pid.
func (w *wired) outsider(ctx context.Context, t *testing.T, in *harness.Instance) (id string, pid int) {
	t.Helper()
	return in.Run(t, harness.Stock, shop.Container{
		ID: in.Name("outsider"), Image: harness.ToolsImage, NetNS: w.client,
		Args: []string{"/bin/echo", "send", "--to", w.groupIP + ":9000", "--size", burst, "--report", report},
	})
}
