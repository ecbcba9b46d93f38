// SPDX-License-Identifier: Apache-2.0

package consistency

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
	shop "github.com/cohort-project/cohort/integration/shop/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

// report is where every test program writes its reports.
const report = "/report"

// group is a group of test programs. Its containers and images go with the test.
type group struct {
	t       *testing.T
	in      *harness.Instance
	name    string
	cohort  shop.Cohort
	members []string
	refs    []string
}

func newGroup(t *testing.T, in *harness.Instance, use string) *group {
	t.Helper()
	g := &group{t: t, in: in, name: in.Name(use), cohort: command(t, in)}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := errors.Join(g.remove(ctx), in.RemoveImages(ctx, g.refs...)); err != nil {
			t.Errorf("removing group %s: %v", g.name, err)
		}
	})
	return g
}

// command is the instance's cohort command.
func command(t testing.TB, in *harness.Instance) shop.Cohort {
	t.Helper()
	bin, err := in.LookPath("cohort")
	if err != nil {
		t.Fatal(err)
	}
	return shop.Cohort{Bin: bin, Address: in.Address, Namespace: in.Namespace()}
}

func (g *group) id(member string) string { return g.name + "-" + member }

// run starts a member that runs a test program, in a network namespace or, if
// netns is empty, a private one, and returns the host's pid of the program when
// that is up.
func (g *group) run(ctx context.Context, member, netns string, args ...string) int {
	g.t.Helper()
	pid := g.start(ctx, member, shop.Container{Image: harness.ToolsImage, NetNS: netns, Args: append(args, "--report", report)})
	if err := programs.WaitReady(ctx, pid, report); err != nil {
		g.t.Fatal(err)
	}
	return pid
}

// start starts a member of any kind and returns the pid of its first process.
func (g *group) start(ctx context.Context, member string, c shop.Container) int {
	g.t.Helper()
	g.in.RequireImage(g.t, c.Image, harness.CohortOnCohort.Snapshotter)
	c.ID = g.id(member)
	c.Annotations = []string{"io.cohort.group=" + g.name, "io.cohort.member=" + member}
	ctr := g.in.CtrOf(harness.CohortOnCohort)
	g.members = append(g.members, member)
	if err := ctr.Run(ctx, c); err != nil {
		g.t.Fatal(err)
	}
	pid, err := ctr.Pid(ctx, c.ID)
	if err != nil {
		g.t.Fatal(err)
	}
	return pid
}

// checkpoint checkpoints the group into an image of its own.
func (g *group) checkpoint(ctx context.Context, more ...string) (ref string, cut shop.Checkpoint, err error) {
	ref = fmt.Sprintf("cohort.test/%s:%d", g.name, len(g.refs))
	g.refs = append(g.refs, ref)
	cut, err = g.cohort.Checkpoint(ctx, g.name, ref, more...)
	return ref, cut, err
}

// remove removes the group's containers, whether they are there or not.
func (g *group) remove(ctx context.Context) error {
	var errs []error
	for _, m := range g.members {
		errs = append(errs, g.in.CtrOf(harness.CohortOnCohort).Remove(ctx, g.id(m)))
	}
	return errors.Join(errs...)
}

// destroy is remove for a test that goes on.
func (g *group) destroy(ctx context.Context) {
	g.t.Helper()
	if err := g.remove(ctx); err != nil {
		g.t.Fatal(err)
	}
}

// restore restores an image and returns the host's pids of the members.
func (g *group) restore(ctx context.Context, ref string, more ...string) (map[string]int, error) {
	back, err := g.cohort.Restore(ctx, ref, more...)
	if err != nil {
		return nil, err
	}
	pids := make(map[string]int)
	for _, m := range back.Members {
		pids[m.Name] = m.Pid
	}
	if len(pids) != len(g.members) {
		return nil, fmt.Errorf("%s brought back %v, the group had %v", ref, pids, g.members)
	}
	return pids, nil
}

// status tells how a container's process is, or how it ended.
func status(ctx context.Context, in *harness.Instance, id string) (containerd.Status, error) {
	client, err := in.Connect()
	if err != nil {
		return containerd.Status{}, err
	}
	c, err := client.LoadContainer(ctx, id)
	if err != nil {
		return containerd.Status{}, err
	}
	task, err := c.Task(ctx, nil)
	if err != nil {
		return containerd.Status{}, err
	}
	return task.Status(ctx)
}

// allRun fails unless every member still runs: the programs end, with a code of
// their own, the moment that they find something wrong.
func (g *group) allRun(ctx context.Context) error {
	var errs []error
	for _, m := range g.members {
		st, err := status(ctx, g.in, g.id(m))
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("member %s: %w", m, err))
		case st.Status != containerd.Running:
			errs = append(errs, fmt.Errorf("member %s is %s, it ended with code %d (%s)", m, st.Status, st.ExitStatus, meaning(st.ExitStatus)))
		}
	}
	return errors.Join(errs...)
}

func meaning(code uint32) string {
	switch code {
	case programs.ExitCorrupt:
		return "memory or file are not as they were left"
	case programs.ExitStream:
		return "a byte of a stream was lost, doubled or out of order"
	case programs.ExitBroken:
		return "a connection broke"
	}
	return "see package programs"
}

// moments are the pauses between checkpoints: long enough for work to go on, of a
// length that nothing in a program keeps step with. The seed is logged.
type moments struct{ r *rand.Rand }

func newMoments(t testing.TB) moments {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("moments by seed %d", seed)
	return moments{rand.New(rand.NewPCG(seed, 0))} //nolint:gosec // not a secret
}

func (m moments) pass(ctx context.Context) {
	select {
	case <-time.After(time.Duration(m.r.Int64N(int64(200 * time.Millisecond)))):
	case <-ctx.Done():
	}
}

// limit bounds a test that is longer than most.
func limit(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), d, fmt.Errorf("%s took longer than %v", t.Name(), d))
	t.Cleanup(cancel)
	return ctx
}
