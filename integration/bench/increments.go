// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cohort-project/cohort/integration/bench/result"
	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
)

// chainLength is how many checkpoints are taken of one process, each of which but
// the first is an increment.
const chainLength = 10

// longestChain is how long cohort lets a chain of epochs become (its option
// --max-chain): the next checkpoint is merged into a full one by the same command.
const longestChain = 8

// shown are those that have a row.
var shown = []int{1, 2, longestChain, longestChain + 1, chainLength}

// incrementCase takes checkpoints of a process, all of which are kept, and between
// two of them has it dirty 1 % of its memory at once, and none otherwise. The last one
// is restored, and the one that consists of most epochs.
type incrementCase struct {
	way    string
	mib    int
	chains int
	limit  time.Duration
}

func (c incrementCase) name() string   { return "increment-" + c.way }
func (c incrementCase) memoryMiB() int { return c.mib }

// option is the option that the way needs, and whether it is given or only tells
// that there are increments at all.
func (c incrementCase) option() (name string, given bool) {
	if c.way == "tracked" {
		return "--keep-tracking", true
	}
	return "--full", false
}

func (c incrementCase) run(ctx context.Context, b *bench) []result.Row {
	option, given := c.option()
	if !b.knows(option) {
		return []result.Row{skip(c.name(), result.Cohort, fmt.Sprintf("this cohort checkpoint has no option %s", option))}
	}
	chains := b.plan.times(c.chains)
	found := make([]findings, chainLength+1)
	shares := make([][]float64, chainLength+1)
	failed := findings{}
	begin := time.Now()
	for i := range chains {
		if overrun(begin, i, b.plan.limit(c.limit)) {
			progress("%s: ends after %d of %d chains", c.name(), i, chains)
			break
		}
		progress("%s: %d checkpoints, chain %d of %d", c.name(), chainLength, i+1, chains)
		if err := c.chain(ctx, b, given, found, shares); err != nil && ctx.Err() == nil {
			progress("  failed: %v", err)
			failed.failed(err)
		}
	}
	var rows []result.Row
	for _, n := range shown {
		found[n].failures, found[n].err = failed.failures, failed.err
		r := found[n].row(workload{members: 1, mib: c.mib}, result.Cohort)
		r.Case = result.IncrementCase(c.way, n)
		r.ImageShare = result.Median(shares[n])
		for _, t := range found[n].list {
			describe(&r, t.report)
		}
		if n > 1 {
			// Of how much memory, cannot be told.
			r.SealMiBs, r.DurableMiBs = nil, nil
		}
		rows = append(rows, r)
	}
	return rows
}

// describe notes what cohort says of its increments.
func describe(r *result.Row, p *result.Report) {
	if p.Merge != nil {
		r.Merge = result.Round(p.Merge.TotalMS)
	}
	if p.MergeError != "" {
		r.Error = "merge: " + p.MergeError
		r.Failures++
	}
	for _, m := range p.Members {
		r.Increment, r.FullWhy, r.Chain = m.Memory.Increment, m.Memory.FullWhy, m.Chain
	}
}

// chain is one process with all its checkpoints.
func (c incrementCase) chain(ctx context.Context, b *bench, given bool, found []findings, shares [][]float64) (err error) {
	if err := b.room(2 * c.mib); err != nil {
		return err
	}
	g, err := b.newMembers(1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.gone(ctx, g)) }()
	if given {
		option, _ := c.option()
		g.flags = []string{option}
	}
	err = b.in.CtrOf(cohort.runtime).Run(ctx, harness.Container{
		ID: g.ids[0], Image: harness.ToolsImage,
		Args:        []string{"/bin/memload", "--mem", fmt.Sprint(c.mib), "--dirty", "0", "--step", "1", "--report", reportPath},
		Annotations: []string{"io.cohort.group=" + g.group},
	})
	if err == nil {
		err = b.ready(ctx, g)
	}
	if err != nil {
		return err
	}
	pids, err := b.tickers(ctx, g)
	if err != nil {
		return err
	}
	have, full := blobs{}, int64(0)
	have.add(b.base)
	for n := 1; n <= chainLength; n++ {
		t := turns{s: cohort}
		if n > 1 {
			g.name(n)
			var r programs.MemLoad
			if err := programs.AskStep(ctx, pids[0], reportPath, &r); err != nil {
				return err
			}
		}
		if _, err := b.once(ctx, &t, g, settled); err != nil {
			return fmt.Errorf("checkpoint %d of the chain: %w", n, err)
		}
		// Only what no earlier checkpoint has brought.
		s, err := b.blobsOf(ctx, g.ref)
		if err != nil {
			return err
		}
		added := s.beyond(have)
		have.add(s)
		if n == 1 {
			full = added
		}
		t.found.list[0].bytes = float64(added)
		found[n].list = append(found[n].list, t.found.list...)
		shares[n] = append(shares[n], 100*float64(added)/float64(full))
	}
	for _, n := range []int{chainLength, longestChain} {
		g.ref = g.refs[n-1]
		took, err := b.bringBack(ctx, cohort, g)
		if err != nil {
			return fmt.Errorf("restore of checkpoint %d: %w", n, err)
		}
		found[n].restores = append(found[n].restores, took)
	}
	return nil
}
