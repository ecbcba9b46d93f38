// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"os"

	"github.com/cohort-project/cohort/integration/harness"
)

// warmUp is how many runs of each system are not counted: the first finds
// programs and layers on disk, the others in memory.
const warmUp = 2

// latency measures what a container costs that is never checkpointed. Each system
// has its turn in each round, and another one begins each round.
func (b *bench) latency(ctx context.Context, runs int) ([]row, error) {
	fmt.Fprintf(os.Stderr, "%s: %d runs each\n", latencyCase, runs)
	for _, s := range systems {
		if err := b.in.Unpack(ctx, harness.BusyboxImage, s.runtime.Snapshotter); err != nil {
			return nil, fmt.Errorf("unpacking %s for %s: %w", harness.BusyboxImage, s.name, err)
		}
	}
	took := make([][]float64, len(systems))
	failed := make([]error, len(systems))
	for round := range warmUp + runs {
		for n := range systems {
			i := (n + round) % len(systems)
			ms, err := timed(ctx, func(ctx context.Context) error { return b.runTrue(ctx, systems[i].runtime) })
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			if err != nil {
				failed[i] = err
				continue
			}
			if round >= warmUp {
				took[i] = append(took[i], ms)
			}
		}
	}
	var rows []row
	for i, s := range systems {
		r := row{Case: latencyCase, System: s.name, RunP50: median(took[i]), Repeats: runs, Failures: runs + warmUp - len(took[i])}
		if failed[i] != nil {
			r.Error = failed[i].Error()
		} else {
			r.Failures = 0
		}
		rows = append(rows, r)
	}
	return rows, nil
}

func (b *bench) runTrue(ctx context.Context, r harness.Runtime) error {
	id := b.in.Name("true")
	_, err := b.in.Ctr(ctx, "run", "--rm", "--runtime", r.Runtime, "--snapshotter", r.Snapshotter, harness.BusyboxImage, id, "/bin/true")
	if err != nil {
		_ = b.in.CtrOf(r).Remove(context.WithoutCancel(ctx), id)
	}
	return err
}
