// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/cohort-project/cohort/integration/programs"
	"github.com/cohort-project/cohort/integration/shop"
)

// TestMain starts a containerd where tests may not be skipped and none is
// given. Starting one needs what `make setup build` brings.
func TestMain(m *testing.M) {
	code := func() int {
		if os.Getenv("COHORT_REQUIRE") != "1" || os.Getenv("CONTAINERD_ADDRESS") != "" {
			return m.Run()
		}
		dir, err := os.MkdirTemp("", "shop-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		stop, err := StartInstance(ctx, filepath.Join(dir, "run"))
		cancel()
		result := 1
		if err != nil {
			fmt.Fprintln(os.Stderr, "no containerd for the tests:", err)
		} else {
			result = m.Run()
		}
		ctx, cancel = context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := errors.Join(stop(ctx), os.RemoveAll(dir)); err != nil {
			fmt.Fprintln(os.Stderr, "ending the tests' containerd:", err)
			return 1
		}
		return result
	}()
	os.Exit(code)
}

// need skips a test for want of something, or fails it where nothing may be
// wanting.
func need(t *testing.T, have bool, what string) {
	t.Helper()
	if have {
		return
	}
	if os.Getenv("COHORT_REQUIRE") == "1" {
		t.Fatalf("missing: %s", what)
	}
	t.Skipf("missing: %s", what)
}

// stock is a containerd with the shop's images, running the stock shim: what
// the shop does there owes nothing to cohort.
func stock(ctx context.Context, t *testing.T) Ctr {
	t.Helper()
	need(t, os.Geteuid() == 0, "root")
	need(t, os.Getenv("CONTAINERD_ADDRESS") != "", `a containerd in CONTAINERD_ADDRESS (eval "$(make -s up)")`)
	c := Ctr{Runtime: "io.containerd.runc.v2", Snapshotter: "overlayfs"}
	for _, image := range []string{DataImage, ToolsImage} {
		out, err := c.Do(ctx, "images", "ls", "-q", "name=="+image)
		if err != nil {
			t.Fatal(err)
		}
		need(t, out != "", "image "+image)
	}
	return c
}

func startStock(ctx context.Context, t *testing.T, group string) *Shop {
	t.Helper()
	c := stock(ctx, t)
	n, err := NewNet("test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	s, err := StartShop(ctx, Options{Ctr: c, Group: group, Net: n})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Destroy(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return s
}

// round loads the shop for a while.
func round(ctx context.Context, t *testing.T, s *Shop, orders int) *shop.Log {
	t.Helper()
	l, err := s.StartLoad(LoadOptions{Rate: 400, Log: filepath.Join(t.TempDir(), "log")})
	if err != nil {
		t.Fatal(err)
	}
	waitErr := l.WaitAcked(ctx, orders)
	summary, log, err := l.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if waitErr != nil {
		t.Fatalf("%v; %+v", waitErr, summary)
	}
	t.Logf("load: %+v", summary)
	if !log.Complete || len(log.Attempts) != 0 || summary.Dials != 8 {
		t.Fatalf("the load itself met trouble: %+v", summary)
	}
	return log
}

func quiet(ctx context.Context, t *testing.T, s *Shop) (shop.State, []shop.Order) {
	t.Helper()
	state, err := s.Query.State(ctx)
	if err != nil {
		t.Fatal(err)
	}
	orders, err := s.Query.Orders(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return state, orders
}

// A shop that was never stopped is the checkpoint that changed nothing.
func TestAnUndisturbedShopHoldsEveryInvariant(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	s := startStock(ctx, t, "calm")
	e := shop.Evidence{Before: must(t)(s.Query.LiveState(ctx))}
	e.Load = round(ctx, t, s, 500)
	e.Cut = shop.Window{From: time.Now(), To: time.Now()}
	e.Restored, e.Orders = quiet(ctx, t, s)
	e.After = round(ctx, t, s, 500)
	last, orders := quiet(ctx, t, s)
	e.AfterState, e.AfterOrders = &last, orders
	if err := shop.Check(e); err != nil {
		t.Fatal(err)
	}
	if n := len(orders); n != len(e.Load.Acks)+len(e.After.Acks) || len(last.Conns.PG) != 8 {
		t.Fatalf("%d orders, state %+v", n, last)
	}
}

// The checker finds in a real shop what no restore may do.
func TestARedisThatWasStartedAgainBreaksTheInvariants(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	s := startStock(ctx, t, "restarted")
	e := shop.Evidence{Before: must(t)(s.Query.State(ctx))}
	e.Load = round(ctx, t, s, 200)
	e.Cut = shop.Window{From: time.Now(), To: time.Now()}
	cache := s.Members()[1]
	if err := s.Ctr.Remove(ctx, cache.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.Ctr.Run(ctx, cache); err != nil {
		t.Fatal(err)
	}
	// Each dead connection fails one order before its pool dials anew, and the
	// new Redis refuses until it is up: the state is had when neither is left.
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var err error
	for n := 0; ; n++ {
		_, _ = s.Query.Place(ctx, fmt.Sprintf("after the restart %d", n))
		if e.Restored, err = s.Query.State(ctx); err == nil {
			break
		}
		select {
		case <-ctx.Done():
			t.Fatalf("the shop does not find its new Redis: %v", err)
		case <-tick.C:
		}
	}
	if e.Orders, err = s.Query.Orders(ctx); err != nil {
		t.Fatal(err)
	}
	err = shop.Check(e)
	if !shop.Violated(err, shop.I2) || !shop.Violated(err, shop.I3) || shop.Violated(err, shop.I4) {
		t.Fatalf("want I2 and I3 broken, have: %v", err)
	}
}

// The programs need nothing of their image and report without a network.
func TestAProgramInAContainerReports(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c := stock(ctx, t)
	k := Container{ID: "reporting", Image: ToolsImage, Args: []string{
		"/bin/ticker", "--mem", "32", "--checksum", "--file", "/log", "--report", "/report",
	}}
	if err := c.Run(ctx, k); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Remove(context.Background(), k.ID); err != nil {
			t.Error(err)
		}
	})
	pid, err := c.Pid(ctx, k.ID)
	if err != nil {
		t.Fatal(err)
	}
	var first, second programs.Ticker
	if err := programs.Ask(ctx, pid, "/report", &first); err != nil {
		t.Fatal(err)
	}
	if err := programs.AskVerified(ctx, pid, "/report", &second); err != nil {
		t.Fatal(err)
	}
	if !second.SumOK || second.Verified < first.Verified+32<<20 || second.N != first.N+1 {
		t.Fatalf("reported %+v, then %+v", first, second)
	}
}

// `ip netns add`, run while a Net is there, must not make it unremovable, and
// nothing may be left behind.
func TestNamespacesAreRemovedWhateverElseIsMadeMeanwhile(t *testing.T) {
	need(t, os.Geteuid() == 0, "root")
	_, err := exec.LookPath("ip")
	need(t, err == nil, "the command ip (iproute2)")
	n, err := NewNet("test")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, args := range [][]string{{"ip", "netns", "add", n.Group + "-x"}, {"ip", "netns", "delete", n.Group + "-x"}} {
		if _, err := run(ctx, args, nil); err != nil {
			t.Error(err)
		}
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if err := n.Close(); err != nil {
		t.Errorf("the second time: %v", err)
	}
	if left, _ := filepath.Glob(n.GroupPath() + "*"); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func must(t *testing.T) func(shop.State, error) shop.State {
	return func(s shop.State, err error) shop.State {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
}
