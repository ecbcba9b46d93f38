// SPDX-License-Identifier: Apache-2.0

package memory

import (
	"encoding/json"
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
	"github.com/cohort-project/cohort/runtime/memory/engine"
	"github.com/cohort-project/cohort/runtime/ops"
)

// What "cohort check" tells is what a checkpoint does; what is asked for is done or refused.
func TestTheEngineIsToldBeforeAndDoneOrRefused(t *testing.T) {
	in := harness.Up(t)
	harness.RequireTool(t, "criu")
	ctx := harness.Context(t)
	id, pid := run(t, in, "8")
	best, err := engine.Choose(engine.Probe(), "")
	if err != nil {
		t.Fatal(err)
	}
	out, err := in.Cohort(ctx, "check", "--json", "--member", id)
	if err != nil {
		t.Fatal(err)
	}
	var check ops.CheckResult
	if err := json.Unmarshal([]byte(out), &check); err != nil {
		t.Fatal(err)
	}
	if len(check.Memory) != 1 || check.Memory[0] != (ops.CheckMemory{Member: id, Engine: string(best.Engine), Why: best.Why}) {
		t.Errorf("%+v; this host: %+v", check.Memory, best)
	}
	if out, err := in.Cohort(ctx, "check", "--member", id); err != nil || !strings.Contains(out, "ENGINE") || !strings.Contains(out, string(best.Engine)) || !strings.Contains(out, best.Why) {
		t.Errorf("%v: %s", err, out)
	}
	for _, e := range []engine.Engine{engine.Full, engine.WPAsync, engine.SoftDirty} {
		_, refused := engine.Choose(engine.Probe(), string(e))
		ref := "test.local/" + id + "-" + string(e) + ":1"
		in.RemoveImagesAfter(t, ref)
		var before programs.Ticker
		if err := programs.Ask(ctx, pid, report, &before); err != nil {
			t.Fatal(err)
		}
		out, err := in.Cohort(ctx, "checkpoint", "--json", "--memory", string(e), "--member", id, ref)
		if refused != nil {
			var failed *exec.ExitError
			if !errors.As(err, &failed) || failed.ExitCode() != 3 || !strings.Contains(err.Error(), string(e)) {
				t.Errorf("%s: %v; this host: %v", e, err, refused)
			}
			if out, err := in.Ctr(ctx, "images", "ls", "-q"); err != nil || strings.Contains(out, ref) {
				t.Errorf("%s was refused and left %s, %v", e, out, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", e, err)
			continue
		}
		var res ops.CheckpointResult
		if err := json.Unmarshal([]byte(out), &res); err != nil {
			t.Fatal(err)
		}
		if got := res.Members[0].Memory; got.Engine != string(e) {
			t.Errorf("asked for %s, got %s: %s", e, got.Engine, got.Why)
		}
		restored(t, in, id, ref, "-"+string(e), before)
	}
	if _, err := in.Cohort(ctx, "checkpoint", "--memory", "fast", "--member", id, "test.local/x:1"); err == nil || !strings.Contains(err.Error(), "wp-async") {
		t.Errorf("an engine that is none: %v", err)
	}
}
