// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
	shop "github.com/cohort-project/cohort/integration/shop/harness"
	barrier "github.com/cohort-project/cohort/runtime/group"
	"github.com/cohort-project/cohort/runtime/ops"
)

// states are those that cohort ps tells, by container.
func (w *world) states() map[string]string {
	w.Helper()
	out := map[string]string{}
	for _, s := range decode[[]ops.Status](w, "ps") {
		out[s.ID] = s.State
	}
	return out
}

func TestStoppedGroupLeavesItsImagesAndNothingElse(t *testing.T) {
	w := setUp(t)
	g := w.tickers(3)
	before := g.reports()
	ref := w.image("stop")
	r := g.checkpoint(ref, "--stop")
	if len(r.Members) != 3 || r.StopMS <= 0 {
		t.Errorf("result %+v", r)
	}
	for id, state := range w.states() {
		if slices.Contains(g.ids, id) && state != "stopped" {
			t.Errorf("container %s is %s", id, state)
		}
		if syscall.Kill(g.pids[id], 0) == nil {
			t.Errorf("process %d of container %s is still there", g.pids[id], id)
		}
	}
	if err := w.in.Leaks(); err != nil {
		t.Error(err)
	}
	if left := w.captures(); len(left) > 0 {
		t.Errorf("captures stayed: %v", left)
	}
	// What was captured is what was last: nobody has run since.
	w.remove(g.ids...)
	g.restored(ref, "", before)
	if in := decode[inspectDocument](w, "inspect", ref); in.Stopped == nil || !*in.Stopped {
		t.Errorf("the image does not say that the group was stopped: %+v", in)
	}
}

func TestContainersNamedOneByOneAreAGroup(t *testing.T) {
	w := setUp(t)
	a, pidA := w.run(harness.Container{Args: ticker})
	b, pidB := w.run(harness.Container{Args: ticker, Annotations: []string{"io.cohort.group=" + w.in.Name("other"), "io.cohort.member=second"}})
	w.ask(pidA)
	before := w.ask(pidB)
	ref := w.image("named")
	r := decode[shop.Checkpoint](w, "checkpoint", "--member", b, "--member", a, "--member", b, ref)
	var names []string
	for _, m := range r.Members {
		names = append(names, m.Name)
	}
	if want := []string{a, "second"}; !slices.Equal(names, want) {
		t.Errorf("members are %v, want %v", names, want)
	}
	if got := w.images(ref); !slices.Equal(got, []string{ref, ref + "-" + a, ref + "-second"}) {
		t.Errorf("images are %v", got)
	}
	_, pid := w.resume(harness.Container{Image: ref + "-second"})
	w.goesOn(pid, before)
}

func TestMembersOfOneShimAreAGroupLikeAnyOther(t *testing.T) {
	w := setUp(t)
	// containerd's own annotation that puts containers into one shim.
	g := w.tickers(2, "--annotation", "io.containerd.runc.v2.group="+w.in.Name("shim"))
	one, two := w.in.Shim(t, g.ids[0]), g.shimOf(1)
	if one.Pid != two {
		t.Fatalf("the containers are in the shims %d and %d", one.Pid, two)
	}
	before := g.reports()
	ref := w.image("shim")
	g.checkpoint(ref)
	g.restored(ref, "-copy", before)
	stopped := w.image("stopped")
	g.checkpoint(stopped, "--stop")
	w.remove(g.ids...)
	g.restored(stopped, "", before)
}

// shimOf is the pid of the shim that serves the i-th member, its parent.
func (g *group) shimOf(i int) int {
	g.Helper()
	for _, line := range strings.Split(g.status(g.pids[g.ids[i]]), "\n") {
		var pid int
		if _, err := fmt.Sscanf(line, "PPid:\t%d", &pid); err == nil {
			return pid
		}
	}
	g.Fatalf("process %d has no parent", g.pids[g.ids[i]])
	return 0
}

func TestGroupsLiveInAnyNamespaceAndInOneOnly(t *testing.T) {
	w := setUp(t)
	g := w.tickers(1)
	other := w.in.Name("ns")
	ctr := w.in.CtrOf(harness.CohortOnCohort)
	ctr.Namespace = other
	do := func(args ...string) {
		t.Helper()
		_, err := ctr.Do(w.ctx, args...)
		w.must(err)
	}
	archive := filepath.Join(t.TempDir(), "tools.tar")
	w.ctr("images", "export", archive, harness.ToolsImage)
	w.ctr("namespaces", "create", other)
	id := w.in.Name("m")
	ref := "test.local/" + w.in.Name("namespace") + ":1"
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		for _, id := range []string{id, id + "-copy"} {
			if err := ctr.Remove(ctx, id); err != nil {
				t.Error(err)
			}
		}
		if err := ctr.RemoveImages(ctx, harness.ToolsImage, ref, ref+"-a"); err != nil {
			t.Error(err)
		}
		// Snapshots of the namespace go a moment after the images.
		harness.Eventually(t, recovery, func() error {
			_, err := w.in.Ctr(ctx, "namespaces", "rm", other)
			return err
		})
	})
	do("images", "import", "--snapshotter", "cohort", archive)
	w.must(ctr.Run(w.ctx, harness.Container{ID: id, Image: harness.ToolsImage, Args: ticker, Annotations: []string{"io.cohort.group=" + g.name, "io.cohort.member=a"}}))
	pid, err := ctr.Pid(w.ctx, id)
	w.must(err)
	w.must(programs.WaitReady(w.ctx, pid, reportPath))
	before := w.ask(pid)
	r := decode[shop.Checkpoint](w, "checkpoint", "--namespace", other, g.name, ref)
	if len(r.Members) != 1 || r.Members[0].ID != id {
		t.Errorf("the group's members are %+v, of another namespace", r.Members)
	}
	if got := w.images(ref); len(got) > 0 {
		t.Errorf("the other namespace has the images %v", got)
	}
	restored := decode[shop.Restored](w, "restore", "--namespace", other, "--id-suffix", "-copy", ref)
	w.goesOn(restored.Members[0].Pid, before)
	if _, here := w.states()[id]; here {
		t.Error("cohort ps shows containers of another namespace")
	}
}

func TestPsTellsWhatMembersDo(t *testing.T) {
	w := setUp(t)
	g := w.tickers(3)
	created := w.in.Name("created")
	w.in.RemoveAfter(t, created)
	w.ctr("containers", "create", "--runtime", harness.CohortOnCohort.Runtime, "--snapshotter", "cohort", harness.ToolsImage, created, "/bin/ticker")
	w.ctr("tasks", "pause", g.ids[1])
	w.must(syscall.Kill(g.pids[g.ids[2]], syscall.SIGKILL))
	harness.Eventually(t, recovery, func() error {
		s := w.states()
		if s[g.ids[0]] != "running" || s[g.ids[1]] != "paused" || s[g.ids[2]] != "stopped" || s[created] != "created" {
			return fmt.Errorf("states are %v", s)
		}
		return nil
	})
	w.ctr("tasks", "resume", g.ids[1])
}

// A coordinator that stands still is as good as dead, and when it goes on it must not
// make anything of what it had.
func TestCommandThatWasSuspendedComesTooLate(t *testing.T) {
	k := newKiller(t)
	for _, p := range []point{{barrier.Frozen, false}, {barrier.Captured, true}} {
		e := k.begin(fmt.Sprintf("suspended when a member was %v", p))
		e.reach(k.anyone(), p)
		e.must(e.cmd.cmd.Process.Signal(syscall.SIGSTOP))
		state := k.states()
		busy := false
		for _, id := range k.ids {
			busy = busy || state[id] == "checkpointing"
		}
		if !busy {
			t.Errorf("%s: cohort ps says %v", e.what, state)
		}
		e.thawed()
		harness.Eventually(t, recovery, e.in.Leaks)
		e.must(e.cmd.cmd.Process.Signal(syscall.SIGCONT))
		if e.ended() {
			t.Errorf("%s: it succeeded", e.what)
		}
		e.recovered()
	}
	(&epoch{killer: k, what: "after all"}).again()
}

func TestTwoCheckpointsAtOnceDoNotHarmEachOther(t *testing.T) {
	k := newKiller(t)
	for range 3 {
		one, two := k.begin("one of two"), k.begin("the other of two")
		time.Sleep(time.Duration(k.rng.IntN(20)) * time.Millisecond)
		won := 0
		for _, e := range []*epoch{one, two} {
			if e.ended() {
				won++
			} else if _, err := e.cmd.wait(); exitCode(err) != 1 {
				t.Errorf("%s: %v", e.what, err)
			}
		}
		t.Logf("%d of 2 succeeded", won)
		one.recovered()
		two.recovered()
	}
	(&epoch{killer: k, what: "after all"}).again()
}

func TestSecondCheckpointUnderTheSameNameReplacesTheFirst(t *testing.T) {
	w := setUp(t)
	g := w.tickers(2)
	ref := w.image("same")
	first := g.checkpoint(ref)
	before := g.reports()
	second := g.checkpoint(ref)
	if second.Number != first.Number+1 || second.Epoch == first.Epoch {
		t.Errorf("epochs %d (%s) and %d (%s)", first.Number, first.Epoch, second.Number, second.Epoch)
	}
	if got := w.images(ref); len(got) != 3 {
		t.Errorf("images are %v", got)
	}
	g.restored(ref, "-copy", before)
}

func TestCommandInterruptedBeforeItBeganSaysSo(t *testing.T) {
	w := setUp(t)
	g := w.tickers(1)
	path, err := w.in.LookPath("cohort")
	w.must(err)
	c := startCommand(w.ctx, w.in.Env, path, "checkpoint", g.name, w.image("never"))
	w.must(c.cmd.Process.Signal(syscall.SIGTERM))
	_, err = c.wait()
	var failed *shop.CommandError
	if !errors.As(err, &failed) {
		t.Fatalf("it ended with %v", err)
	}
	if err := w.in.Leaks(); err != nil {
		t.Error(err)
	}
}
