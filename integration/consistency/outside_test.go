// SPDX-License-Identifier: Apache-2.0

package consistency

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
	shop "github.com/cohort-project/cohort/integration/shop/harness"
	"github.com/cohort-project/cohort/runtime/netlock"
)

// stopAndUnplug ends a group in the barrier and takes its network away: all that
// is left of it is the image.
func (g *group) stopAndUnplug(ctx context.Context, w *wired) (ref string) {
	g.t.Helper()
	ref, _, err := g.checkpoint(ctx, "--stop")
	if err != nil {
		g.t.Fatal(err)
	}
	g.destroy(ctx)
	w.unplug(g.t)
	return ref
}

func TestConnectionsFromOutsideAreClosedOnRestore(t *testing.T) {
	in := harness.Up(t)
	ctx := limit(t, time.Minute)
	w := newWired(t)
	w.plugGroup(t, w.group)
	g := newGroup(t, in, "outside")
	g.run(ctx, "server", w.group, "/bin/echo", "serve", "--listen", w.groupIP+":9000")
	id, sender := w.outsider(ctx, t, in)
	// A client that only waits: whatever the server's end does not tell it, it
	// never learns.
	waiting, err := shop.DialIn(w.client)(ctx, "tcp", w.groupIP+":9000")
	if err != nil {
		t.Fatal(err)
	}
	defer waiting.Close()
	for ask[programs.Echo](ctx, t, sender).Bursts == 0 {
	}
	ref := g.stopAndUnplug(ctx, w)
	if err := readFor(waiting, 500*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a client outside heard of the stop: %v", err)
	}

	back, err := g.cohort.Restore(ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	closed := 0
	for _, warning := range back.Warnings {
		if strings.Contains(warning, "closed the connection "+w.groupIP+":9000") {
			closed++
		} else {
			t.Errorf("warning: %s", warning)
		}
	}
	if closed != 2 {
		t.Errorf("the restore says that it closed %d connections, want 2: %q", closed, back.Warnings)
	}
	if err := readFor(waiting, 10*time.Second); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the client that waits reads %v, want %v", err, unix.ECONNRESET)
	}
	harness.Eventually(t, 20*time.Second, func() error {
		st, err := status(ctx, in, id)
		if err == nil && (st.Status != containerd.Stopped || st.ExitStatus != programs.ExitBroken) {
			err = fmt.Errorf("the client that sends is %s with code %d, want it to end with %d", st.Status, st.ExitStatus, programs.ExitBroken)
		}
		return err
	})
	// The server has seen errors, not silence, and serves on.
	harness.Eventually(t, 10*time.Second, func() error {
		var r programs.Echo
		if err := programs.Ask(ctx, back.Members[0].Pid, report, &r); err != nil {
			return err
		}
		if r.Connections != 2 || r.Broken != 2 || !strings.Contains(r.LastError, unix.ECONNABORTED.Error()) {
			return fmt.Errorf("the server had 2 connections and says %+v", r)
		}
		return nil
	})
	_, sender = w.outsider(ctx, t, in)
	for ask[programs.Echo](ctx, t, sender).Bursts == 0 {
	}
}

// readFor reads one byte that nobody is going to send.
func readFor(c net.Conn, d time.Duration) error {
	if err := c.SetReadDeadline(time.Now().Add(d)); err != nil {
		return err
	}
	_, err := c.Read(make([]byte, 1))
	return err
}

func TestConnectionsFromOutsideAreKeptWhereTheAddressComesAlong(t *testing.T) {
	in := harness.Up(t)
	ctx := limit(t, 90*time.Second)
	w := newWired(t)
	g := newGroup(t, in, "outside")
	// In a private namespace, which ends with the container. One that stays would
	// answer for the connections of its dead.
	server := g.run(ctx, "server", "", "/bin/echo", "serve", "--listen", "0.0.0.0:9000")
	w.plugGroup(t, netlock.PathOf(server))
	id, sender := w.outsider(ctx, t, in)
	pause := newMoments(t)
	for range 5 {
		pause.pass(ctx)
		before := ask[programs.Echo](ctx, t, sender)
		ref := g.stopAndUnplug(ctx, w)
		back, err := g.cohort.Restore(ctx, ref, "--tcp-outside", "keep")
		if err != nil {
			t.Fatal(err)
		}
		if len(back.Warnings) > 0 {
			t.Errorf("warnings: %q", back.Warnings)
		}
		// The sender verifies each byte, and ends when the connection does.
		harness.Eventually(t, 20*time.Second, func() error {
			st, err := status(ctx, in, id)
			if err != nil || st.Status != containerd.Running {
				t.Fatalf("the client outside is %s with code %d (%s), %v", st.Status, st.ExitStatus, meaning(st.ExitStatus), err)
			}
			if now := ask[programs.Echo](ctx, t, sender); now.Bursts < before.Bursts+2 {
				return fmt.Errorf("the client outside has echoed %d bursts since %d", now.Bursts, before.Bursts)
			}
			return nil
		})
		end := ask[programs.Echo](ctx, t, back.Members[0].Pid)
		if end.Connections != 1 || end.Broken != 0 {
			t.Errorf("the server has had %d connections, %d of them broke: %s", end.Connections, end.Broken, end.LastError)
		}
	}
}
