// SPDX-License-Identifier: Apache-2.0

package torture

import (
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
)

// forgetful is a shim that takes, in each process and at each checkpoint, one page
// that was written since it was copied for one that was not.
func forgetful(t *testing.T) string {
	t.Helper()
	compiler := harness.RequireTool(t, "go")
	shim := filepath.Join(t.TempDir(), "containerd-shim-cohort-v2")
	build := exec.CommandContext(harness.Context(t), compiler, "build", "-tags", "brokenmemory", "-buildvcs=false", "-o", shim,
		"github.com/cohort-project/cohort/cmd/containerd-shim-cohort-v2")
	build.Env = append(build.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building a shim that forgets pages: %v\n%s", err, out)
	}
	return shim
}

func TestOnePageOfAnotherTimeIsFound(t *testing.T) {
	in := harness.Up(t)
	harness.RequireTool(t, "criu")
	ctx := limit(t, 4*time.Minute)
	shim := forgetful(t)
	r := newRun(ctx, t, in, rand.Uint64())

	// As `ctr run`, but with this shim in place of the one on containerd's PATH.
	cmd, more := args(t, 1)
	r.id = r.group + "-a"
	in.RemoveAfter(t, r.id)
	create := append([]string{
		"containers", "create", "--runtime", harness.CohortOnCohort.Runtime, "--snapshotter", harness.CohortOnCohort.Snapshotter,
		"--annotation", "io.cohort.group=" + r.group, "--annotation", "io.cohort.member=a",
	}, more...)
	if _, err := in.Ctr(ctx, append(append(create, image, r.id), cmd...)...); err != nil {
		t.Fatal(err)
	}
	nctx := namespaces.WithNamespace(ctx, in.Namespace())
	container, err := in.Client(t).LoadContainer(nctx, r.id)
	if err != nil {
		t.Fatal(err)
	}
	task, err := container.NewTask(nctx, cio.NullIO, containerd.WithRuntimePath(shim))
	if err != nil {
		t.Fatal(err)
	}
	if err := task.Start(nctx); err != nil {
		t.Fatal(err)
	}
	r.pid = int(task.Pid())
	if err := programs.WaitReady(ctx, r.pid, reportPath); err != nil {
		t.Fatal(err)
	}

	// A page may be one that nobody looks at, of an old stack say.
	for i := range 6 {
		r.pause()
		r.checkpoint(i + 1)
		if err := r.restored(r.epochs[i]); err != nil {
			t.Logf("found out: %v", err)
			return
		}
	}
	t.Errorf("%d checkpoints with a stale page in each process were not found to be wrong", len(r.epochs))
}
