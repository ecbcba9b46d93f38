// SPDX-License-Identifier: Apache-2.0

package consistency

import (
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
	"github.com/cohort-project/cohort/integration/shop"
	shopharness "github.com/cohort-project/cohort/integration/shop/harness"
)

// withoutBarrier is a cohort command whose barrier is off while the environment
// variable COHORT_TEST_NOBARRIER is 1: it captures one member after the other.
func withoutBarrier(ctx context.Context, t *testing.T, in *harness.Instance) shopharness.Cohort {
	t.Helper()
	compiler := harness.RequireTool(t, "go")
	c := command(t, in)
	c.Bin = filepath.Join(t.TempDir(), "cohort")
	// The settings of `make build`, so that most of it is compiled already.
	build := exec.CommandContext(ctx, compiler, "build", "-tags", "nobarrier", "-buildvcs=false", "-o", c.Bin, "github.com/cohort-project/cohort/cmd/cohort")
	build.Env = append(build.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building a cohort without a barrier: %v\n%s", err, out)
	}
	return c
}

func TestWithoutTheBarrierTheShopIsFoundBroken(t *testing.T) {
	in := harness.Up(t)
	ctx := limit(t, 3*time.Minute)
	cohort := withoutBarrier(ctx, t, in)
	// Without a pause between orders, so that something is always under way.
	r := openShop(ctx, t, in, 0)

	t.Setenv("COHORT_TEST_NOBARRIER", "1")
	var broken []cut
	pause := newMoments(t)
	for range 3 {
		pause.pass(ctx)
		broken = append(broken, r.checkpoint(ctx, cohort))
	}
	// The same command, the same shop: the barrier makes the difference.
	t.Setenv("COHORT_TEST_NOBARRIER", "")
	whole := r.checkpoint(ctx, cohort)
	r.close(ctx)

	if err := r.judge(ctx, whole); err != nil {
		t.Errorf("with the barrier on: %v", err)
	}
	var all []error
	for _, c := range broken {
		err := r.judge(ctx, c)
		if shop.Violated(err, shop.I2) || shop.Violated(err, shop.I3) {
			t.Logf("found out: %v", err)
			return
		}
		all = append(all, err)
	}
	t.Errorf("%d checkpoints without a barrier were not found to break I2 or I3: %v", len(broken), errors.Join(all...))
}

func TestWithoutTheBarrierAStreamIsFoundBroken(t *testing.T) {
	in := harness.Up(t)
	ctx := limit(t, 2*time.Minute)
	g := newGroup(t, in, "control")
	g.cohort = withoutBarrier(ctx, t, in)
	net := newNet(t, "control")
	g.run(ctx, "server", net.GroupPath(), "/bin/echo", "serve")
	sender := g.run(ctx, "sender", net.GroupPath(), "/bin/echo", "send", "--size", burst)

	t.Setenv("COHORT_TEST_NOBARRIER", "1")
	before := ask[programs.Echo](ctx, t, sender)
	var refs []string
	pause := newMoments(t)
	for range 3 {
		pause.pass(ctx)
		ref, _, err := g.checkpoint(ctx)
		if err != nil {
			t.Fatal(err)
		}
		refs = append(refs, ref)
	}
	g.destroy(ctx)
	for _, ref := range refs {
		// One that is broken may stand still for ever.
		soon, cancel := context.WithTimeout(ctx, 8*time.Second)
		_, err := g.streamGoesOn(soon, ref, before)
		cancel()
		g.destroy(ctx)
		if err != nil {
			t.Logf("found out: %v", err)
			return
		}
	}
	t.Errorf("%d checkpoints without a barrier lost no byte of a stream", len(refs))
}
