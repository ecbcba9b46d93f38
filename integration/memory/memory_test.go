// SPDX-License-Identifier: Apache-2.0

// Package memory tests that memory is copied while members run, and that what
// comes back is what was there at the cut.
package memory

import (
	"encoding/json"
	"os"
	"testing"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
	"github.com/cohort-project/cohort/runtime/ops"
)

const report = "/report"

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

func run(t *testing.T, in *harness.Instance, mib string) (id string, pid int) {
	t.Helper()
	id, pid = in.Run(t, harness.CohortOnCohort, harness.Container{
		ID: in.Name("mem"), Image: harness.ToolsImage,
		Args: []string{"/bin/ticker", "--mem", mib, "--dirty", "1", "--checksum", "--file", "/counter", "--report", report},
	})
	if err := programs.WaitReady(harness.Context(t), pid, report); err != nil {
		t.Fatal(err)
	}
	return id, pid
}

func checkpoint(t *testing.T, in *harness.Instance, id, ref string, flags ...string) ops.CheckpointMember {
	t.Helper()
	in.RemoveImagesAfter(t, ref)
	out, err := in.Cohort(harness.Context(t), append([]string{"checkpoint", "--json", "--member", id, ref}, flags...)...)
	if err != nil {
		t.Fatal(err)
	}
	var res ops.CheckpointResult
	if err := json.Unmarshal([]byte(out), &res); err != nil || len(res.Members) != 1 {
		t.Fatalf("%v: %s", err, out)
	}
	return res.Members[0]
}

// restored brings the image back beside the original and has it verify itself.
func restored(t *testing.T, in *harness.Instance, id, ref, suffix string, before programs.Ticker) {
	t.Helper()
	ctx := harness.Context(t)
	in.RemoveAfter(t, id+suffix)
	if out, err := in.Cohort(ctx, "restore", "--id-suffix", suffix, ref); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	pid, err := in.CtrOf(harness.CohortOnCohort).Pid(ctx, id+suffix)
	if err != nil {
		t.Fatal(err)
	}
	var after programs.Ticker
	if err := programs.AskVerified(ctx, pid, report, &after); err != nil {
		t.Fatal(err)
	}
	if !after.SumOK || after.Writes < before.Writes {
		t.Errorf("it was at %+v and is at %+v after the restore", before, after)
	}
}

func TestMemoryIsCopiedWhileTheMemberRunsAndComesBackIntact(t *testing.T) {
	in := harness.Up(t)
	harness.RequireTool(t, "criu")
	id, pid := run(t, in, "96")
	for i, suffix := range []string{"-a", "-b", "-c"} {
		var before programs.Ticker
		if err := programs.Ask(harness.Context(t), pid, report, &before); err != nil {
			t.Fatal(err)
		}
		ref := "test.local/" + id + suffix + ":1"
		m := checkpoint(t, in, id, ref)
		if m.Memory.Engine != "wp-async" {
			t.Fatalf("checkpoint %d: engine %q: %s", i, m.Memory.Engine, m.Memory.Why)
		}
		// The program writes to a thousand pages a second, 4 MiB; on the busiest
		// machine that is a fraction.
		if m.Memory.PrecopiedBytes < 48<<20 || m.Memory.BarrierBytes > 48<<20 {
			t.Errorf("checkpoint %d: %+v; want most of 96 MiB copied before the barrier", i, m.Memory)
		}
		restored(t, in, id, ref, suffix, before)
	}
	in.CheckClean(t)
}

// A restored process has its memory from several files; it must be tracked and
// checkpointed like any other.
func TestRestoredMemoryIsCheckpointedAgain(t *testing.T) {
	in := harness.Up(t)
	harness.RequireTool(t, "criu")
	id, pid := run(t, in, "32")
	var before programs.Ticker
	if err := programs.Ask(harness.Context(t), pid, report, &before); err != nil {
		t.Fatal(err)
	}
	first, second := "test.local/"+id+":1", "test.local/"+id+":2"
	checkpoint(t, in, id, first)
	restored(t, in, id, first, "-x", before)
	m := checkpoint(t, in, id+"-x", second)
	if m.Memory.Engine != "wp-async" {
		t.Errorf("engine %q: %s", m.Memory.Engine, m.Memory.Why)
	}
	restored(t, in, id+"-x", second, "-y", before)
	in.CheckClean(t)
}
