// SPDX-License-Identifier: Apache-2.0

package consistency

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
	shop "github.com/cohort-project/cohort/integration/shop/harness"
)

// burst is how many bytes the sender has echoed before it begins anew: a
// checkpoint of a stream that never pauses falls into the middle of one.
const burst = "8388608"

func TestAStreamBetweenMembersLosesNoByte(t *testing.T) {
	for _, tc := range []struct {
		name string
		// Where the sender is, and the address at which it finds the server, which
		// is in the group's namespace.
		sender func(*shop.Net) (netns, server string)
	}{
		{"in one network namespace", func(n *shop.Net) (string, string) { return n.GroupPath(), "127.0.0.1" }},
		{"across two network namespaces", func(n *shop.Net) (string, string) { return n.ClientPath(), n.GroupIP }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in := harness.Up(t)
			ctx := limit(t, 2*time.Minute)
			net := newNet(t, "stream")
			g := newGroup(t, in, "stream")
			netns, server := tc.sender(net)
			g.run(ctx, "server", net.GroupPath(), "/bin/echo", "serve", "--listen", server+":9000")
			sender := g.run(ctx, "sender", netns, "/bin/echo", "send", "--to", server+":9000", "--size", burst)

			type cut struct {
				ref    string
				before programs.Echo
				queued int64
			}
			var cuts []cut
			pause, inFlight := newMoments(t), 0
			for range 10 {
				pause.pass(ctx)
				c := cut{before: ask[programs.Echo](ctx, t, sender)}
				queued := watchQueues(t, in)
				var err error
				if c.ref, _, err = g.checkpoint(ctx); err != nil {
					t.Fatal(err)
				}
				if c.queued = queued(); c.queued > 0 {
					inFlight++
				}
				cuts = append(cuts, c)
			}
			if err := g.allRun(ctx); err != nil {
				t.Fatalf("after ten checkpoints of the running group: %v", err)
			}
			g.destroy(ctx)
			if err := net.Close(); err != nil {
				t.Fatal(err)
			}
			var took []float64
			for i, c := range cuts {
				run, err := g.streamGoesOn(ctx, c.ref, c.before)
				if err != nil {
					t.Errorf("checkpoint %d, with %d bytes in the sockets: %v", i, c.queued, err)
				}
				took = append(took, float64(run.Milliseconds()))
				g.destroy(ctx)
			}
			t.Logf("ms until two bursts were echoed by the restored group: %.0f", took)
			// A restored socket has no measured round trip: had its first segment been
			// dropped, the stream would stand still for a second at least.
			if m := median(took); m > 900 {
				t.Errorf("restored streams mostly stood still: two bursts took %.0f ms", m)
			}
			// Else the test shows less than it says.
			if inFlight < len(cuts)/2 {
				t.Errorf("only %d of %d checkpoints had bytes in flight", inFlight, len(cuts))
			}
		})
	}
}

// streamGoesOn restores an echo group and lets it run on for a whole burst that
// began after the restore. It returns how long that took.
func (g *group) streamGoesOn(ctx context.Context, ref string, before programs.Echo) (time.Duration, error) {
	g.t.Helper()
	pids, err := g.restore(ctx, ref)
	if err != nil {
		return 0, err
	}
	began := time.Now()
	err = g.streamsOn(ctx, pids, before)
	return time.Since(began), err
}

func (g *group) streamsOn(ctx context.Context, pids map[string]int, before programs.Echo) error {
	g.t.Helper()
	ctx, cancel := context.WithTimeoutCause(ctx, 20*time.Second, errors.New("the stream stands still"))
	defer cancel()
	var first, sender, server programs.Echo
	if err := programs.Ask(ctx, pids["sender"], report, &first); err != nil {
		return errors.Join(err, context.Cause(ctx), g.allRun(g.t.Context()))
	}
	for sender = first; sender.Bursts < first.Bursts+2; {
		if err := programs.Ask(ctx, pids["sender"], report, &sender); err != nil {
			return errors.Join(err, context.Cause(ctx), g.allRun(g.t.Context()))
		}
	}
	if err := programs.Ask(ctx, pids["server"], report, &server); err != nil {
		return err
	}
	if sender.Received < before.Received || sender.Bursts < before.Bursts {
		return fmt.Errorf("the restored sender is older than its state before the cut: %+v, was %+v", sender, before)
	}
	for end, r := range map[string]programs.Echo{"sender": sender, "server": server} {
		if r.Connections != 1 || r.Broken != 0 {
			return fmt.Errorf("the %s has had %d connections, %d of them broke: %s", end, r.Connections, r.Broken, r.LastError)
		}
	}
	return g.allRun(ctx)
}

// ask is programs.Ask.
func ask[R any](ctx context.Context, t testing.TB, pid int) (r R) {
	t.Helper()
	if err := programs.Ask(ctx, pid, report, &r); err != nil {
		t.Fatal(err)
	}
	return r
}

// newNet is shop.NewNet for the time of the test.
func newNet(t *testing.T, use string) *shop.Net {
	t.Helper()
	n, err := shop.NewNet(use)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

// tcpStreams are CRIU's images of TCP sockets in the checkpoints of committed
// snapshots. Beyond a head of less than 200 bytes each is what was in the
// socket's queues.
func tcpStreams(t testing.TB, in *harness.Instance) map[string]int64 {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(in.Root, "snapshots", "*", "checkpoint", "checkpoint", "tcp-stream-*.img"))
	if err != nil {
		t.Fatal(err)
	}
	sizes := make(map[string]int64)
	for _, f := range files {
		if fi, err := os.Stat(f); err == nil {
			sizes[f] = max(0, fi.Size()-200)
		}
	}
	return sizes
}

// watchQueues returns a function that tells how many bytes were in the sockets
// of what has been checkpointed since.
func watchQueues(t testing.TB, in *harness.Instance) func() int64 {
	old := tcpStreams(t, in)
	return func() (sum int64) {
		for f, size := range tcpStreams(t, in) {
			if _, was := old[f]; !was {
				sum += size
			}
		}
		return sum
	}
}
