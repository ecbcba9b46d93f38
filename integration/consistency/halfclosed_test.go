// SPDX-License-Identifier: Apache-2.0

package consistency

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/cohort-project/cohort/integration/harness"
	shop "github.com/cohort-project/cohort/integration/shop/harness"
	"github.com/cohort-project/cohort/runtime/netlock"
)

// A client that has said all it had to say waits for the answer of a server that
// has not looked yet: the end of the stream is in the server's socket, behind the
// last bytes, and nowhere else.
const (
	askingClient = `until echo hello | nc 127.0.0.1 9000 >/answer; do sleep 0.1; done; mv /answer /answered; exec sleep 1000`
	slowServer   = `nc -l -p 9000 -e /bin/sh -c 'until [ -e /go ]; do sleep 0.1; done; cat; echo bye'; exec sleep 1000`
)

func TestTheEndOfAStreamIsNotLostEither(t *testing.T) {
	in := harness.Up(t)
	ctx := limit(t, time.Minute)
	net := newNet(t, "half")
	g := newGroup(t, in, "half")
	for member, script := range map[string]string{"server": slowServer, "client": askingClient} {
		g.start(ctx, member, shop.Container{Image: harness.BusyboxImage, NetNS: net.GroupPath(), Args: []string{"/bin/sh", "-c", script}})
	}
	harness.Eventually(t, 10*time.Second, func() error {
		conns, err := netlock.Connections(net.GroupPath())
		if err != nil {
			t.Fatal(err)
		}
		// FIN_WAIT2 and CLOSE_WAIT, include/net/tcp_states.h.
		for _, want := range []netlock.TCPState{5, 8} {
			if !slices.ContainsFunc(conns, func(c netlock.Conn) bool { return c.State == want }) {
				return fmt.Errorf("no connection is in %v: %v", want, conns)
			}
		}
		return nil
	})
	ref, _, err := g.checkpoint(ctx)
	if err != nil {
		t.Fatal(err)
	}
	g.destroy(ctx)
	if err := net.Close(); err != nil {
		t.Fatal(err)
	}
	pids, err := g.restore(ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	inside := func(member, path string) string {
		return filepath.Join("/proc", strconv.Itoa(pids[member]), "root", path)
	}
	if err := os.WriteFile(inside("server", "go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 15*time.Second, func() error {
		answer, err := os.ReadFile(inside("client", "answered"))
		if err != nil {
			so, _ := os.ReadFile(inside("client", "answer"))
			return errors.Join(err, fmt.Errorf("the client waits on, with %q", so))
		}
		if string(answer) != "hello\nbye\n" {
			t.Fatalf("the client was answered %q", answer)
		}
		return nil
	})
}
