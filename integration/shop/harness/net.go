// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// netnsDir is where iproute2, and with it everybody, keeps named namespaces.
const netnsDir = "/var/run/netns"

// Net is two named network namespaces joined by a veth pair: one for a group,
// one for its clients. Nothing leads from either to the host or the world. The
// addresses are of 10.213.0.0/16, which no other namespace sees.
type Net struct {
	// Group and Client name the namespaces.
	Group, Client string
	// GroupIP and ClientIP are the ends of the pair.
	GroupIP, ClientIP string

	undoDir func()
}

// Interfaces of the pair.
const (
	groupLink  = "eth0"
	clientLink = "client0"
)

// NewNet makes a Net under a name that is not in use; Close removes it.
func NewNet(prefix string) (_ *Net, err error) {
	tag := strings.ToLower(rand.Text()[:6])
	var x [1]byte
	_, _ = rand.Read(x[:]) // never fails
	subnet := "10.213." + strconv.Itoa(int(x[0])) + "."
	n := &Net{
		Group: prefix + "-" + tag, Client: prefix + "-" + tag + "-client",
		GroupIP: subnet + "2", ClientIP: subnet + "1",
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("making network namespaces for %s: %w", prefix, errors.Join(err, n.Close()))
		}
	}()
	if n.undoDir, err = prepareDir(); err != nil {
		return nil, err
	}
	for _, name := range []string{n.Group, n.Client} {
		if err := newNamed(name); err != nil {
			return nil, err
		}
	}
	return n, n.join()
}

// GroupPath is the group's namespace, for `ctr run --with-ns`.
func (n *Net) GroupPath() string { return filepath.Join(netnsDir, n.Group) }

// ClientPath is the clients' namespace.
func (n *Net) ClientPath() string { return filepath.Join(netnsDir, n.Client) }

// CloseGroup removes the group's namespace, and with it the pair. Namespaces
// live as long as a process is in them; the name is gone at once.
func (n *Net) CloseGroup() error { return deleteNamed(n.Group) }

// Close removes both namespaces. It may be called again.
func (n *Net) Close() error {
	err := errors.Join(deleteNamed(n.Group), deleteNamed(n.Client))
	if n.undoDir != nil {
		n.undoDir()
		n.undoDir = nil
	}
	return err
}

// prepareDir makes netnsDir a shared mount of itself unless it is one, as the
// first `ip netns add` after boot does. Were it left to a later one, that would
// bind it over itself with the namespaces already in it, and their names could
// not be removed any more. The undo takes the mount away if this call made it
// and nobody else's namespace is in it.
func prepareDir() (undo func(), err error) {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return nil, err
	}
	// iproute2 takes the same lock for the same purpose.
	dir, err := os.Open(netnsDir)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("locking %s: %w", netnsDir, err)
	}
	share := func() error { return unix.Mount("", netnsDir, "", unix.MS_SHARED|unix.MS_REC, "") }
	err = share()
	if err == nil {
		return func() {}, nil
	}
	if !errors.Is(err, unix.EINVAL) { // EINVAL: not a mount point yet
		return nil, fmt.Errorf("making %s a shared mount: %w", netnsDir, err)
	}
	if err := unix.Mount(netnsDir, netnsDir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return nil, fmt.Errorf("mounting %s on itself: %w", netnsDir, err)
	}
	// Fails while a namespace is mounted in it, which is then its reason to stay.
	undo = func() { _ = unix.Unmount(netnsDir, 0) }
	if err := share(); err != nil {
		undo()
		return nil, fmt.Errorf("making %s a shared mount: %w", netnsDir, err)
	}
	return undo, nil
}

func deleteNamed(name string) error {
	if err := netns.DeleteNamed(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing network namespace %s: %w", name, err)
	}
	return nil
}

// newNamed makes a named namespace with lo up.
func newNamed(name string) error {
	return onThread(func() error {
		h, err := netns.NewNamed(name) // enters it
		if err != nil {
			return fmt.Errorf("namespace %s: %w", name, err)
		}
		defer h.Close()
		nl, err := netlink.NewHandleAt(h)
		if err != nil {
			return err
		}
		defer nl.Close()
		return up(nl, "lo", "")
	})
}

// join lays the pair between both namespaces and gives its ends addresses.
func (n *Net) join() error {
	group, err := netns.GetFromName(n.Group)
	if err != nil {
		return err
	}
	defer group.Close()
	client, err := netns.GetFromName(n.Client)
	if err != nil {
		return err
	}
	defer client.Close()
	inGroup, err := netlink.NewHandleAt(group)
	if err != nil {
		return err
	}
	defer inGroup.Close()
	inClient, err := netlink.NewHandleAt(client)
	if err != nil {
		return err
	}
	defer inClient.Close()

	attrs := netlink.NewLinkAttrs()
	attrs.Name = clientLink
	pair := &netlink.Veth{LinkAttrs: attrs, PeerName: groupLink, PeerNamespace: netlink.NsFd(group)}
	if err := inClient.LinkAdd(pair); err != nil {
		return fmt.Errorf("veth pair: %w", err)
	}
	if err := up(inClient, clientLink, n.ClientIP+"/24"); err != nil {
		return err
	}
	return up(inGroup, groupLink, n.GroupIP+"/24")
}

func up(nl *netlink.Handle, name, cidr string) error {
	link, err := nl.LinkByName(name)
	if err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	if cidr != "" {
		addr, err := netlink.ParseAddr(cidr)
		if err != nil {
			return err
		}
		if err := nl.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("address %s of %s: %w", cidr, name, err)
		}
	}
	if err := nl.LinkSetUp(link); err != nil {
		return fmt.Errorf("link %s up: %w", name, err)
	}
	return nil
}

// InNetNS runs f on a thread inside the network namespace at path, which may
// be a named one or /proc/PID/ns/net. Sockets made and processes started on
// that thread belong to the namespace; goroutines started by f do not.
func InNetNS(path string, f func() error) error {
	return onThread(func() error {
		h, err := netns.GetFromPath(path)
		if err != nil {
			return fmt.Errorf("network namespace %s: %w", path, err)
		}
		defer h.Close()
		if err := netns.Set(h); err != nil {
			return fmt.Errorf("entering network namespace %s: %w", path, err)
		}
		return f()
	})
}

// onThread runs f on a thread that is thrown away afterwards: it is never
// unlocked, so the runtime ends it, and no other goroutine can come to run in
// a namespace that it did not ask for.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}

// DialIn returns a dialer whose connections begin in the network namespace at
// path. Addresses must be numeric: a resolver has goroutines of its own.
func DialIn(path string) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (c net.Conn, err error) {
		err = InNetNS(path, func() error {
			var d net.Dialer
			var dialErr error
			c, dialErr = d.DialContext(ctx, network, addr)
			return dialErr
		})
		return c, err
	}
}
