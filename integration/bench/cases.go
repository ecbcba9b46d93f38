// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"time"

	"github.com/cohort-project/cohort/integration/bench/result"
)

// benchCase is one case of the benchmark. run measures all its systems, leaves
// nothing behind, and reports failures in its rows rather than ending the run.
type benchCase interface {
	name() string
	memoryMiB() int
	run(ctx context.Context, b *bench) []result.Row
}

// times is how often each system is measured. The others write many times as
// much as their stop is long: they are measured less often where they take minutes.
type times struct{ cohort, containerd, criu int }

// cases is all that is measured, in order. Limits are for a run of defaultMinutes.
func cases() []benchCase {
	const target = 1 // percent a second, which the targets are about
	var out []benchCase
	for _, w := range []struct {
		mib    int
		target times
		limit  time.Duration
		others times
		// otherLimit is that of each other rate.
		otherLimit time.Duration
	}{
		{16, times{20, 5, 5}, 40 * time.Second, times{5, 2, 2}, 15 * time.Second},
		{256, times{20, 4, 4}, 80 * time.Second, times{5, 2, 2}, 30 * time.Second},
		{1024, times{20, 3, 3}, 150 * time.Second, times{3, 1, 1}, 40 * time.Second},
		// What containerd and CRIU do does not depend on the rate, for they
		// stand still meanwhile: at this size that is not shown again.
		{4096, times{20, 2, 2}, 240 * time.Second, times{2, 0, 0}, 40 * time.Second},
	} {
		for _, percent := range []float64{0, target, 10} {
			c := workload{
				title: result.ProcessCase(w.mib, percent), members: 1, mib: w.mib, percent: percent,
				times: w.others, limit: w.otherLimit,
			}
			if percent == target {
				c.times, c.limit, c.restores = w.target, w.limit, mostRestores
			}
			out = append(out, c)
		}
	}
	for _, w := range []struct {
		members, mib int
		times        times
		limit        time.Duration
	}{
		{1, 256, times{8, 2, 2}, 35 * time.Second},
		{2, 256, times{8, 2, 2}, 50 * time.Second},
		{4, 256, times{8, 2, 2}, 70 * time.Second},
		{8, 256, times{5, 1, 1}, 80 * time.Second},
		{4, 1024, times{20, 1, 1}, 210 * time.Second},
	} {
		out = append(out, workload{
			title: result.GroupCase(w.members, w.mib), members: w.members, mib: w.mib, percent: target,
			times: w.times, limit: w.limit, restores: mostRestores,
		})
	}
	out = append(out,
		shopCase{checkpoints: 20, limit: 90 * time.Second},
		postgresCase{times: times{cohort: 6, criu: 3}, limit: 150 * time.Second})
	for _, way := range result.Ways {
		out = append(out, incrementCase{way: way, mib: 1024, chains: 2, limit: time.Minute})
	}
	return append(out, latencyCase{runs: 40})
}
