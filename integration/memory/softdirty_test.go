// SPDX-License-Identifier: Apache-2.0

package memory

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
	"github.com/cohort-project/cohort/runtime/criu/criutest"
	"github.com/cohort-project/cohort/runtime/memory/engine"
	"github.com/cohort-project/cohort/runtime/memory/track"
)

// runOn is run with another shim than containerd's, in an environment of its own.
func runOn(t *testing.T, in *harness.Instance, shim, mib string, env ...string) (id string, pid int) {
	t.Helper()
	ctx := harness.Context(t)
	// The name that a shim is started by is part of its answer.
	wrapper := filepath.Join(t.TempDir(), "containerd-shim-cohort-v2")
	script := "#!/bin/sh\n"
	for _, v := range env {
		script += fmt.Sprintf("export '%s'\n", v)
	}
	if err := os.WriteFile(wrapper, []byte(script+"exec '"+shim+"' \"$@\"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	id = in.Name("mem")
	in.RemoveAfter(t, id)
	if _, err := in.Ctr(ctx, "containers", "create", "--runtime", harness.CohortOnCohort.Runtime, "--snapshotter", harness.CohortOnCohort.Snapshotter,
		harness.ToolsImage, id, "/bin/ticker", "--mem", mib, "--dirty", "1", "--checksum", "--file", "/counter", "--report", report); err != nil {
		t.Fatal(err)
	}
	nctx := namespaces.WithNamespace(ctx, in.Namespace())
	container, err := in.Client(t).LoadContainer(nctx, id)
	if err != nil {
		t.Fatal(err)
	}
	task, err := container.NewTask(nctx, cio.NullIO, containerd.WithRuntimePath(wrapper))
	if err != nil {
		t.Fatal(err)
	}
	if err := task.Start(nctx); err != nil {
		t.Fatal(err)
	}
	pid = int(task.Pid())
	if err := programs.WaitReady(ctx, pid, report); err != nil {
		t.Fatal(err)
	}
	return id, pid
}

// The whole way of the engine, on a kernel that need not have soft-dirty bits: first of a
// process all of whose pages count as dirty at each look, then of one that is tracked.
func TestMemoryIsCopiedBySoftDirtyBitsAndComesBackIntact(t *testing.T) {
	in := harness.Up(t)
	compiler := harness.RequireTool(t, "go")
	ctx := harness.Context(t)
	criu := criutest.SoftDirty(t, func(what string) { harness.Require(t, false, what) })
	shim := filepath.Join(t.TempDir(), "shim")
	build := exec.CommandContext(ctx, compiler, "build", "-tags", "softdirtystandin", "-buildvcs=false", "-o", shim,
		"github.com/cohort-project/cohort/cmd/containerd-shim-cohort-v2")
	build.Env = append(build.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building a shim that believes in soft-dirty bits: %v\n%s", err, out)
	}
	const size = 48 << 20
	id, pid := runOn(t, in, shim, "48", "COHORT_CRIU="+criu, engine.Env+"="+string(engine.SoftDirty))

	take := func(n int) (m uint64) {
		t.Helper()
		var before programs.Ticker
		if err := programs.Ask(ctx, pid, report, &before); err != nil {
			t.Fatal(err)
		}
		ref := fmt.Sprintf("test.local/%s:%d", id, n)
		got := checkpoint(t, in, id, ref)
		if got.Memory.Engine != string(engine.SoftDirty) || got.Memory.Rounds < 2 || got.Memory.CopiedBytes < size {
			t.Fatalf("checkpoint %d: %+v", n, got.Memory)
		}
		if (got.Memory.Increment != "") != (n > 1) {
			t.Errorf("checkpoint %d: increment by %q: %s", n, got.Memory.Increment, got.Memory.FullWhy)
		}
		if got.Memory.PrecopiedBytes+got.Memory.BarrierBytes < size {
			t.Errorf("checkpoint %d: less than there is: %+v", n, got.Memory)
		}
		t.Logf("checkpoint %d: %+v", n, got.Memory)
		// By plain CRIU.
		restored(t, in, id, ref, fmt.Sprintf("-%d", n), before)
		return got.Memory.PrecopiedBytes
	}
	if n := take(1); n > size/2 {
		t.Errorf("%d bytes were not taken anew of a process that nobody tracks", n)
	}
	tracker, err := track.Attach(ctx, pid)
	if err != nil {
		t.Fatal(err)
	}
	defer tracker.Close()
	for n := range 2 {
		if n := take(2 + n); n < size/2 {
			t.Errorf("only %d bytes were left to the pre-dumps", n)
		}
	}
	in.CheckClean(t)
}

// What the shim's environment insists on and the host does not have is refused before
// anything is done.
func TestSoftDirtyBitsThatAreNotThereAreRefusedByName(t *testing.T) {
	in := harness.Up(t)
	harness.RequireTool(t, "criu")
	if engine.Probe().SoftDirty {
		t.Skip("this kernel has soft-dirty bits")
	}
	ctx := harness.Context(t)
	shim, err := in.LookPath("containerd-shim-cohort-v2")
	if err != nil {
		t.Fatal(err)
	}
	id, pid := runOn(t, in, shim, "8", engine.Env+"="+string(engine.SoftDirty))
	for _, args := range [][]string{{"check", "--member", id}, {"checkpoint", "--member", id, "test.local/" + id + ":1"}} {
		_, err := in.Cohort(ctx, args...)
		var failed *exec.ExitError
		if !errors.As(err, &failed) || failed.ExitCode() != 3 {
			t.Errorf("cohort %s: %v", args[0], err)
			continue
		}
		for _, word := range []string{"COHORT_MEMORY=soft-dirty", "CONFIG_MEM_SOFT_DIRTY", "choose another"} {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("cohort %s does not say %q: %v", args[0], word, err)
			}
		}
	}
	if err := programs.WaitReady(ctx, pid, report); err != nil {
		t.Errorf("the container was touched: %v", err)
	}
	in.CheckClean(t)
}
