// SPDX-License-Identifier: Apache-2.0

package netlock

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
)

// require skips, or fails where the environment promises that all is there.
func require(t *testing.T, ok bool, missing string) {
	t.Helper()
	if ok {
		return
	}
	if os.Getenv("COHORT_REQUIRE") == "1" {
		t.Fatalf("missing: %s", missing)
	}
	t.Skipf("missing: %s", missing)
}

// newNS makes a network namespace for one test, lo down.
func newNS(t *testing.T) string {
	t.Helper()
	require(t, os.Geteuid() == 0, "root")
	path := filepath.Join(t.TempDir(), "netns")
	remove, err := New(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := remove(); err != nil {
			t.Error(err)
		}
	})
	return path
}

// in runs fn inside the namespace at path.
func in(t *testing.T, path string, fn func() error) {
	t.Helper()
	f, err := openNS(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := inside(f, fn); err != nil {
		t.Fatal(err)
	}
}

func loUp(t *testing.T, path string) {
	t.Helper()
	in(t, path, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
}

// pair is an established TCP connection inside one namespace.
func pair(t *testing.T, path, address string) (client, server *net.TCPConn) {
	t.Helper()
	in(t, path, func() error {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		defer l.Close()
		var d net.Dialer
		d.SetMultipathTCP(false)
		c, err := d.Dial("tcp", l.Addr().String())
		if err != nil {
			return err
		}
		s, err := l.Accept()
		if err != nil {
			return err
		}
		client, server = c.(*net.TCPConn), s.(*net.TCPConn)
		return nil
	})
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

// expectNone fails when a byte or an error other than a timeout arrives.
func expectNone(t *testing.T, c net.Conn, d time.Duration) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(d))
	n, err := c.Read(make([]byte, 1))
	_ = c.SetReadDeadline(time.Time{})
	if n != 0 {
		t.Fatal("a byte came through closed rules")
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the connection ended: %v", err)
	}
}

func expect(t *testing.T, c net.Conn, want []byte) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil {
		t.Fatalf("reading: %v", err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
	_ = c.SetReadDeadline(time.Time{})
}

func TestClosedRulesSilenceAndOpenOnesLoseNothing(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(address, func(t *testing.T) {
			ns := newNS(t)
			loUp(t, ns)
			client, server := pair(t, ns, address)
			rules, err := Prepare(ns, "epoch1")
			if err != nil {
				t.Fatal(err)
			}
			defer rules.Remove()
			if _, err := client.Write([]byte("before")); err != nil {
				t.Fatal(err)
			}
			expect(t, server, []byte("before"))
			if err := errors.Join(rules.Close(), rules.Close()); err != nil {
				t.Fatal(err)
			}
			var sent []byte
			for i := range 20 {
				part := fmt.Appendf(nil, "<%d>", i)
				sent = append(sent, part...)
				if _, err := client.Write(part); err != nil {
					t.Fatal(err)
				}
			}
			expectNone(t, server, 300*time.Millisecond)
			// The other way, too, and no reset on either side.
			if _, err := server.Write([]byte("back")); err != nil {
				t.Fatal(err)
			}
			expectNone(t, client, 50*time.Millisecond)
			if err := errors.Join(rules.Open(), rules.Open()); err != nil {
				t.Fatal(err)
			}
			expect(t, server, sent)
			expect(t, client, []byte("back"))
			if err := errors.Join(rules.Remove(), rules.Remove()); err != nil {
				t.Fatal(err)
			}
			if err := rules.Close(); !errors.Is(err, os.ErrClosed) {
				t.Fatalf("Close of removed rules: %v", err)
			}
		})
	}
}

func TestNoResetLeavesAClosedNamespace(t *testing.T) {
	ns := newNS(t)
	loUp(t, ns)
	unlock, err := Lock(ns, "x")
	if err != nil {
		t.Fatal(err)
	}
	// Without rules a closed port refuses at once.
	dial := func() error {
		var derr error
		in(t, ns, func() error {
			var c net.Conn
			c, derr = net.DialTimeout("tcp", "127.0.0.1:9", 200*time.Millisecond)
			if derr == nil {
				c.Close()
			}
			return nil
		})
		return derr
	}
	var timeout net.Error
	if err := dial(); !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Fatalf("dialling into closed rules: %v, want a timeout", err)
	}
	if err := unlock(); err != nil {
		t.Fatal(err)
	}
	if err := dial(); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Fatalf("dialling after unlock: %v, want a refusal", err)
	}
}

func TestTablesOfTwoNamesAreIndependent(t *testing.T) {
	ns := newNS(t)
	loUp(t, ns)
	client, server := pair(t, ns, "127.0.0.1:0")
	a, err := Prepare(ns, "a")
	if err != nil {
		t.Fatal(err)
	}
	b, err := Prepare(ns, "b")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(a.Close(), b.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := a.Open(); err != nil {
		t.Fatal(err)
	}
	expectNone(t, server, 100*time.Millisecond)
	held, err := ListLocked(ns)
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(held, func(x, y Held) int { return strings.Compare(x.Name, y.Name) })
	if !slices.Equal(held, []Held{{"a", false}, {"b", true}}) {
		t.Fatalf("held: %v", held)
	}
	// What a janitor does after a crash, and does again.
	for range 2 {
		if err := RemoveStale(ns, "b"); err != nil {
			t.Fatal(err)
		}
	}
	expect(t, server, []byte("x"))
	if err := errors.Join(a.Remove(), b.Remove()); err != nil {
		t.Fatal(err)
	}
	if held, err := ListLocked(ns); err != nil || len(held) != 0 {
		t.Fatalf("held %v, %v; want none", held, err)
	}
}

func TestRulesRefuse(t *testing.T) {
	ns := newNS(t)
	if _, err := Lock("/proc/self/ns/net", "x"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the host's namespace: %v, want a failed precondition", err)
	}
	if _, err := Prepare(ns, "a/b"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a bad name: %v, want an invalid argument", err)
	}
	if _, err := Prepare("/proc/self/ns/mnt", "x"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a mount namespace: %v, want an invalid argument", err)
	}
	if _, err := Prepare(filepath.Join(t.TempDir(), "none"), "x"); !errdefs.IsNotFound(err) {
		t.Errorf("no namespace: %v, want not found", err)
	}
	r, err := Prepare(ns, "twice")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Remove()
	if _, err := Prepare(ns, "twice"); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a name in use: %v, want already exists", err)
	}
	if _, err := New(ns); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a namespace path in use: %v, want already exists", err)
	}
	if err := RemoveStale(filepath.Join(t.TempDir(), "none"), "x"); err != nil {
		t.Errorf("stale rules of a namespace that is gone: %v", err)
	}
}

// TestSwitchIsCheap logs the medians; the bound is far above them and catches
// only a switch that waits for something.
func TestSwitchIsCheap(t *testing.T) {
	ns := newNS(t)
	r, err := Prepare(ns, "cost")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Remove()
	var closes, opens []time.Duration
	for range 40 {
		start := time.Now()
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		mid := time.Now()
		time.Sleep(2 * time.Millisecond)
		again := time.Now()
		if err := r.Open(); err != nil {
			t.Fatal(err)
		}
		closes, opens = append(closes, mid.Sub(start)), append(opens, time.Since(again))
	}
	slices.Sort(closes)
	slices.Sort(opens)
	c, o := closes[len(closes)/2], opens[len(opens)/2]
	t.Logf("median of Close %s, of Open %s", c, o)
	if c > 5*time.Millisecond || o > 5*time.Millisecond {
		t.Errorf("median of Close %s, of Open %s; want under 5 ms", c, o)
	}
}
