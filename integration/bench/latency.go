// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"

	"github.com/cohort-project/cohort/integration/bench/result"
	"github.com/cohort-project/cohort/integration/harness"
)

// warmUp is how many runs of each system are not counted: the first finds
// programs and layers on disk, the others in memory.
const warmUp = 2

// latencyCase measures what a container costs that is never checkpointed. Each
// system has its turn in each round, and another one begins each round.
type latencyCase struct{ runs int }

func (latencyCase) name() string   { return result.RunCase }
func (latencyCase) memoryMiB() int { return 0 }

func (c latencyCase) run(ctx context.Context, b *bench) []result.Row {
	list := []struct {
		name    string
		runtime harness.Runtime
		took    []float64
		failed  int
		err     error
	}{
		{name: result.Containerd, runtime: harness.Stock},
		{name: result.Cohort, runtime: harness.CohortOnCohort},
		{name: result.CohortOverlay, runtime: harness.CohortOnStock},
	}
	runs := b.plan.times(c.runs)
	progress("%s: %d runs each", result.RunCase, runs)
	for round := range warmUp + runs {
		for n := range list {
			s := &list[(n+round)%len(list)]
			ms, err := timed(ctx, func(ctx context.Context) error { return b.runTrue(ctx, s.runtime) })
			switch {
			case ctx.Err() != nil:
				return nil
			case err != nil:
				s.failed, s.err = s.failed+1, err
			case round >= warmUp:
				s.took = append(s.took, ms)
			}
		}
	}
	var rows []result.Row
	for _, s := range list {
		r := result.Row{Case: result.RunCase, System: s.name, RunP50: result.Median(s.took), Repeats: len(s.took), Failures: s.failed}
		if s.err != nil {
			r.Error = s.err.Error()
		}
		rows = append(rows, r)
	}
	return rows
}

func (b *bench) runTrue(ctx context.Context, r harness.Runtime) error {
	id := b.in.Name("true")
	_, err := b.in.Ctr(ctx, "run", "--rm", "--runtime", r.Runtime, "--snapshotter", r.Snapshotter, harness.BusyboxImage, id, "/bin/true")
	if err != nil {
		_ = b.in.CtrOf(r).Remove(context.WithoutCancel(ctx), id) // the first error is the one to tell
	}
	return err
}
