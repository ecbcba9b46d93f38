// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
	"github.com/cohort-project/cohort/runtime/ops"
)

func TestWrongUsageSaysWhatIsRightAndExitsWith2(t *testing.T) {
	w := setUp(t)
	g := w.tickers(1)
	twin := w.tickers(1)
	const ref = "test.local/usage:1"
	for _, c := range []struct {
		args  string
		words []string
	}{
		{"frobnicate", []string{`"frobnicate"`, "--help"}},
		{"checkpoint", []string{"GROUP and REF", "cohort checkpoint --help"}},
		{"checkpoint " + g.name, []string{"GROUP and REF"}},
		{"checkpoint --frobnicate " + g.name + " " + ref, []string{"--frobnicate", "cohort checkpoint --help"}},
		{"checkpoint --member " + g.ids[0] + " " + g.name + " " + ref, []string{"--member", "REF alone"}},
		{"checkpoint --timeout 0s " + g.name + " " + ref, []string{"--timeout", "positive"}},
		{"checkpoint --full --parent x " + g.name + " " + ref, []string{"--full", "--parent"}},
		{"checkpoint --memory magic " + g.name + " " + ref, []string{`"magic"`, "wp-async"}},
		{"checkpoint --max-chain 0 " + g.name + " " + ref, []string{"--max-chain"}},
		{"prune " + g.name, []string{"--keep", "at least 1"}},
		{"prune --keep 1 a b", []string{"cohort prune --help"}},
		{"merge", []string{"cohort merge --help"}},
		{"checkpoint --timeout soon " + g.name + " " + ref, []string{"--timeout", `"soon"`}},
		{"checkpoint " + g.name + " test.local/Upper:1", []string{"test.local/Upper:1", "lowercase"}},
		{"checkpoint " + g.name + " test.local/x@" + digest.FromString("x").String(), []string{"digest", "by a tag"}},
		{"checkpoint " + g.name + " test.local/x:" + strings.Repeat("y", 127), []string{"at most 128"}},
		{"checkpoint --member " + g.ids[0] + " --member " + twin.ids[0] + " " + ref, []string{g.ids[0], twin.ids[0], `both member "a"`, "io.cohort.member"}},
		{"check", []string{"GROUP", "--member"}},
		{"restore", []string{"cohort restore --help"}},
		{"restore --bind /data " + ref, []string{`"/data"`, "DESTINATION=SOURCE"}},
		{"restore --tcp-outside maybe " + ref, []string{`"maybe"`, "close or keep"}},
		{"inspect", []string{"cohort inspect --help"}},
		{"ps everything", []string{"cohort ps --help"}},
	} {
		t.Run(c.args, func(t *testing.T) {
			w := &world{T: t, in: w.in, ctx: w.ctx}
			w.untouched(func() { w.says(w.failure(strings.Fields(c.args)...), 2, c.words...) })
		})
	}
}

func TestWhatCannotBeDoneIsNamedWithItsCureAndChangesNothing(t *testing.T) {
	w := setUp(t)
	g := w.tickers(1)
	before := g.reports()
	ref := w.image("errors")
	g.checkpoint(ref)
	stock, _ := w.in.Run(t, harness.Stock, harness.Container{Image: harness.ToolsImage, Args: ticker})
	lost := w.damaged(ref)
	const none = "test.local/none:1"
	for _, c := range []struct {
		args  string
		words []string
	}{
		{"checkpoint nobody " + none, []string{`"nobody"`, `"default"`, g.name}},
		{"check nobody", []string{`"nobody"`, g.name}},
		{"checkpoint --member nobody " + none, []string{`"nobody"`, "cohort ps"}},
		{"checkpoint --member " + stock + " " + none, []string{stock, "io.containerd.runc.v2", "--runtime io.containerd.cohort.v2"}},
		{"--namespace elsewhere checkpoint " + g.name + " " + none, []string{g.name, `"elsewhere"`}},
		{"--address /nowhere.sock ps", []string{"/nowhere.sock", "--address", "CONTAINERD_ADDRESS"}},
		{"--address " + w.in.Dir + "/containerd.toml ps", []string{"containerd.toml", "is it running"}},
		{"restore " + none, []string{none, "ctr image pull"}},
		{"inspect " + none, []string{none, "ctr image pull"}},
		{"restore " + harness.ToolsImage, []string{harness.ToolsImage, "no checkpoint", "cohort images"}},
		{"inspect " + harness.ToolsImage, []string{harness.ToolsImage, "no checkpoint", "cohort images"}},
		{"restore " + ref, []string{g.ids[0], "exists", "ctr container delete", "--id-suffix"}},
		{"restore --id-suffix -x " + lost, []string{lost, "not all here", "ctr image pull"}},
		{"inspect " + lost, []string{lost, "not all here", "ctr image pull"}},
	} {
		t.Run(c.args, func(t *testing.T) {
			w := &world{T: t, in: w.in, ctx: w.ctx}
			w.untouched(func() { w.says(w.failure(strings.Fields(c.args)...), 1, c.words...) })
		})
	}
	t.Run("the image of a container is gone", func(t *testing.T) {
		w := &world{T: t, in: w.in, ctx: w.ctx}
		name := "test.local/" + w.in.Name("gone") + ":1"
		w.ctr("images", "tag", harness.ToolsImage, name)
		id, _ := w.run(harness.Container{Image: name, Args: ticker})
		w.ctr("images", "rm", name)
		w.untouched(func() { w.says(w.failure("checkpoint", "--member", id, none), 1, name, id, "pull it again") })
	})
	t.Run("cohortd does not run", func(t *testing.T) {
		w := &world{T: t, in: w.in, ctx: w.ctx}
		w.in.KillDaemon(t, harness.Cohortd)
		defer w.in.Restart(t)
		w.untouched(func() { w.says(w.failure("checkpoint", g.name, none), 1, "cohortd", "is it running") })
	})
	if list, _ := w.in.CtrOf(harness.CohortOnCohort).Containers(w.ctx); slices.Contains(list, g.ids[0]+"-x") {
		t.Error("a restore that failed has left its container")
	}
	for name, r := range g.reports() {
		if r.Writes <= before[name].Writes {
			t.Errorf("member %s stands still", name)
		}
	}
}

// damaged makes another name for a group's image, of whose content one layer's blob is missing.
func (w *world) damaged(ref string) string {
	w.Helper()
	ctx := namespaces.WithNamespace(w.ctx, w.in.Namespace())
	client := w.in.Client(w)
	img, err := client.ImageService().Get(ctx, ref+"-a")
	w.must(err)
	man, err := images.Manifest(ctx, client.ContentStore(), img.Target, nil)
	w.must(err)
	// A manifest that names a layer that is nowhere.
	man.Layers[len(man.Layers)-1].Digest = digest.FromString("lost")
	name := w.image("lost")
	b, err := json.Marshal(man)
	w.must(err)
	img.Target.Digest, img.Target.Size = digest.FromBytes(b), int64(len(b))
	w.write(ctx, img.Target, b)
	img.Name = name
	_, err = client.ImageService().Create(ctx, images.Image{Name: name, Target: img.Target})
	w.must(err)
	return name
}

func TestPreflightRefusesWhatCannotBeCheckpointed(t *testing.T) {
	w := setUp(t)
	ref := func(t *testing.T) string {
		return (&world{T: t, in: w.in, ctx: w.ctx}).image("refused")
	}
	// A healthy member is in each group: nothing must happen to it either.
	healthy, pid := w.run(harness.Container{Args: ticker})
	w.ask(pid)
	check := func(name string, prepare func(w *world) (member string, words []string)) {
		t.Run(name, func(t *testing.T) {
			w := &world{T: t, in: w.in, ctx: w.ctx}
			member, words := prepare(w)
			args := []string{"--member", healthy, "--member", member}
			err := w.refused(member, words[0], append(append([]string{"checkpoint"}, args...), ref(t))...)
			w.says(err, 3, words...)
			// The preflight alone says the same.
			w.untouched(func() { w.says(w.failure(append([]string{"check"}, args...)...), 3, words...) })
		})
	}
	check("paused", func(w *world) (string, []string) {
		id, _ := w.run(harness.Container{Args: ticker})
		w.ctr("tasks", "pause", id)
		w.Cleanup(func() { _, _ = w.in.Ctr(w.ctx, "tasks", "resume", id) })
		w.paused = true
		return id, []string{"is paused", "resume it"}
	})
	check("stopped", func(w *world) (string, []string) {
		id, pid := w.run(harness.Container{Args: ticker})
		w.must(syscall.Kill(pid, syscall.SIGKILL))
		harness.Eventually(w, recovery, func() error {
			if out := w.ctr("tasks", "ls"); !strings.Contains(out, "STOPPED") {
				return fmt.Errorf("tasks are %s", out)
			}
			return nil
		})
		return id, []string{"no running process", "start it"}
	})
	check("without a task", func(w *world) (string, []string) {
		id, _ := w.run(harness.Container{Args: ticker})
		w.ctr("tasks", "delete", "--force", id)
		return id, []string{"no running task", "start it", "COHORT_STATE"}
	})
	check("on another snapshotter", func(w *world) (string, []string) {
		id, pid := w.in.Run(w, harness.CohortOnStock, harness.Container{Image: harness.ToolsImage, Args: ticker})
		w.must(programs.WaitReady(w.ctx, pid, reportPath))
		return id, []string{"--snapshotter cohort"}
	})
	check("io_uring", func(w *world) (string, []string) {
		id, pid := w.in.Run(w, harness.CohortOnCohort, harness.Container{Image: harness.ToolsImage, Args: []string{"/bin/uring", "--report", reportPath}})
		harness.Require(w, programs.WaitReady(w.ctx, pid, reportPath) == nil, "io_uring in the kernel")
		return id, []string{"io_uring", fmt.Sprintf("process %d (uring)", pid)}
	})
	t.Run("unix stream between two members", func(t *testing.T) {
		w := &world{T: t, in: w.in, ctx: w.ctx}
		bind := "type=bind,src=" + t.TempDir() + ",dst=/shared,options=rbind:rw"
		start := func(what string) string {
			id, _ := w.in.Run(t, harness.CohortOnCohort, harness.Container{
				Image: harness.ToolsImage, Args: []string{"/bin/unixpair", what, "--path", "/shared/s.sock", "--report", reportPath}, More: []string{"--mount", bind},
			})
			return id
		}
		server, caller := start("serve"), start("call")
		for _, id := range []string{server, caller} {
			w.must(programs.WaitReady(w.ctx, w.pid(id), reportPath))
		}
		err := w.refused(server, "unix", "checkpoint", "--member", server, "--member", caller, ref(t))
		w.says(err, 3, caller, "(unixpair)")
	})
}

func TestExitCodeAndJSONOfARefusalAreForPrograms(t *testing.T) {
	w := setUp(t)
	id, pid := w.in.Run(t, harness.CohortOnStock, harness.Container{Image: harness.ToolsImage, Args: ticker})
	w.must(programs.WaitReady(w.ctx, pid, reportPath))
	path, err := w.in.LookPath("cohort")
	w.must(err)
	out, err := runCommand(w.ctx, w.in.Env, path, "check", "--json", "--member", id)
	if exitCode(err) != 3 {
		t.Errorf("exit code %d: %v", exitCode(err), err)
	}
	var r ops.CheckResult
	strict(t, out, &r)
	if len(r.Findings) != 1 || r.Findings[0].Code != "disk" || r.Findings[0].Severity != "refuse" || r.Findings[0].Member != id || r.Findings[0].Cure == "" {
		t.Errorf("findings are %+v", r.Findings)
	}
}

// smallDisk covers the directory of the captures with a file system of the given size.
func (w *world) smallDisk(size string) (undo func()) {
	w.Helper()
	dir := filepath.Join(w.in.Root, "captures")
	w.must(os.MkdirAll(dir, 0o700))
	w.must(syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,size="+size))
	undo = func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) }
	w.Cleanup(undo)
	return undo
}

func TestNoRoomOnDiskIsFoundBeforeAnythingIsFrozen(t *testing.T) {
	w := setUp(t)
	g := w.tickers(1)
	ref := w.image("disk")
	undo := w.smallDisk("1m")
	err := w.refused("MiB", "are free", "checkpoint", g.name, ref)
	w.says(err, 3, filepath.Join(w.in.Root, "captures"), "remove checkpoints")
	undo()
	g.checkpoint(ref)
}
