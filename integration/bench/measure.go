// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/integration/bench/result"
	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
)

const (
	// stepLimit is the longest that any one step may take: stock containerd
	// needs minutes for 4 GiB on a slow disk.
	stepLimit = 5 * time.Minute
	// askLimit is the longest that a member may take to report.
	askLimit = 30 * time.Second
	// settled is how long members run undisturbed before each checkpoint.
	settled = 300 * time.Millisecond
	// mostRounds is how often it is each system's turn in a case, if it is
	// measured that often.
	mostRounds = 5
	// mostRestores of each system in a case.
	mostRestores = 3

	reportPath = "/report"
)

// bench is what all cases share.
type bench struct {
	in   *harness.Instance
	plan plan
	// base is the blobs of the containers' own images.
	base blobs
	// options are those that this cohort checkpoint knows.
	options string
}

// prepare does once what the first container would pay for.
func (b *bench) prepare(ctx context.Context) (err error) {
	b.base = blobs{}
	for _, image := range []string{harness.ToolsImage, harness.DataImage, harness.BusyboxImage} {
		for _, r := range []harness.Runtime{harness.Stock, harness.CohortOnCohort} {
			if err := b.in.Unpack(ctx, image, r.Snapshotter); err != nil {
				return fmt.Errorf("unpacking %s for %s: %w", image, r.Snapshotter, err)
			}
		}
		s, err := b.walk(ctx, image)
		if err != nil {
			return err
		}
		b.base.add(s)
	}
	b.options, err = b.in.Cohort(ctx, "checkpoint", "--help")
	return err
}

// knows tells whether cohort checkpoint has an option.
func (b *bench) knows(option string) bool {
	return slices.ContainsFunc(strings.Fields(b.options), func(w string) bool { return strings.TrimRight(w, ",") == option })
}

// whole are the options for a checkpoint that builds on no earlier one.
func (b *bench) whole() []string {
	if b.knows("--full") {
		return []string{"--full"}
	}
	return nil
}

// workload is a case of one or more equal processes.
type workload struct {
	title   string
	members int
	mib     int
	percent float64
	times   times
	// limit is how long the case may take, see rotate.
	limit time.Duration
	// restores is how often each system restores.
	restores int
}

func (w workload) name() string   { return w.title }
func (w workload) memoryMiB() int { return w.members * w.mib }

// turns is how often a system is still to be measured, and what was found.
type turns struct {
	s                    *system
	want, done, restores int
	found                findings
}

func (b *bench) turnsOf(t times, restores int) []*turns {
	var list []*turns
	for _, x := range []struct {
		s *system
		n int
	}{{stock, t.containerd}, {plainCRIU, t.criu}, {cohort, t.cohort}} {
		if n := b.plan.times(x.n); n > 0 {
			list = append(list, &turns{s: x.s, want: n, restores: restores})
		}
	}
	return list
}

// rotate gives each system its turns, in which do measures it n times. After the first
// round it goes on as long as the limit allows, judged by the rounds before.
func rotate(ctx context.Context, title string, limit time.Duration, list []*turns, do func(t *turns, n int) error) {
	rounds := 1
	for _, t := range list {
		rounds = max(rounds, min(t.want, mostRounds))
	}
	begin := time.Now()
	for round := range rounds {
		if overrun(begin, round, limit) {
			progress("%s: ends after %d of %d rounds, for it may take no longer than %v", title, round, rounds, limit)
			return
		}
		for i := range list {
			// Another one begins each round.
			t := list[(i+round)%len(list)]
			// Those that are measured less often have their turns spread.
			n := (t.want*(round+1)+rounds-1)/rounds - t.done
			if n <= 0 || ctx.Err() != nil {
				continue
			}
			progress("%s: %s, %d to %d of %d", title, t.s.name, t.done+1, t.done+n, t.want)
			t.done += n
			if err := do(t, n); err != nil && ctx.Err() == nil {
				t.found.failed(err)
				progress("  failed: %v", err)
			}
		}
	}
}

// overrun tells whether one more round, after those that have been done since
// begin, would take longer than the limit.
func overrun(begin time.Time, done int, limit time.Duration) bool {
	took := time.Since(begin)
	return done > 0 && took+took/time.Duration(done) > limit
}

func (w workload) run(ctx context.Context, b *bench) []result.Row {
	list := b.turnsOf(w.times, w.restores)
	rotate(ctx, w.title, b.plan.limit(w.limit), list, func(t *turns, n int) error { return b.turn(ctx, w, t, n) })
	var rows []result.Row
	for _, t := range list {
		rows = append(rows, t.found.row(w, t.s.name))
	}
	return rows
}

// turn starts the members, takes n checkpoints of them, restores the last one if
// that is still wanted, and leaves nothing behind.
func (b *bench) turn(ctx context.Context, w workload, t *turns, n int) (err error) {
	if err := b.room(w.memoryMiB()); err != nil {
		return err
	}
	g, err := b.newMembers(w.members)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.gone(ctx, g)) }()
	if t.s == cohort {
		g.flags = b.whole()
	}
	if err := b.start(ctx, t.s, g, w); err != nil {
		return err
	}
	for i := range n {
		if i > 0 {
			if err := t.s.drop(b, ctx, g); err != nil {
				return fmt.Errorf("removing what a checkpoint made: %w", err)
			}
		}
		if _, err := b.once(ctx, t, g, settled); err != nil {
			return fmt.Errorf("checkpoint %d of %d: %w", i+1, n, err)
		}
	}
	if t.restores == 0 {
		return nil
	}
	t.restores--
	took, err := b.bringBack(ctx, t.s, g)
	if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	t.found.restores = append(t.found.restores, took)
	return nil
}

// room makes sure that a case does not fill the disk: a checkpoint is there once
// as sealed and once as exported, and stock containerd has a temporary copy too.
func (b *bench) room(mib int) error {
	var s unix.Statfs_t
	if err := unix.Statfs(b.in.Dir, &s); err != nil {
		return err
	}
	free, need := int64(s.Bavail)*s.Bsize>>20, int64(4*mib+2048)
	if free < need {
		return fmt.Errorf("%s has %d MiB free and this case may need %d: make room, or leave it out with BENCH_CASES", b.in.Dir, free, need)
	}
	return nil
}

// start runs the members and returns when they have filled their memory.
func (b *bench) start(ctx context.Context, s *system, g *members, w workload) error {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	ctr := b.in.CtrOf(s.runtime)
	for _, id := range g.ids {
		err := ctr.Run(ctx, harness.Container{
			ID: id, Image: harness.ToolsImage,
			Args:        []string{"/bin/memload", "--mem", fmt.Sprint(w.mib), "--dirty", fmt.Sprint(w.percent), "--report", reportPath},
			Annotations: []string{"io.cohort.group=" + g.group},
		})
		if err != nil {
			return err
		}
	}
	return b.ready(ctx, g)
}

func (b *bench) ready(ctx context.Context, g *members) error {
	pids, err := b.tickers(ctx, g)
	for _, pid := range pids {
		err = errors.Join(err, programs.WaitReady(ctx, pid, reportPath))
	}
	return err
}

// once takes one checkpoint of members that have been at rest for a while, and
// notes what was measured. It returns when the checkpoint began and ended.
func (b *bench) once(ctx context.Context, t *turns, g *members, rest time.Duration) (w window, err error) {
	pids, err := b.tickers(ctx, g)
	if err != nil {
		return w, err
	}
	// Nobody's dirty pages but the members' own.
	unix.Sync()
	if _, err := b.gaps(ctx, pids); err != nil {
		return w, err
	}
	if err := pause(ctx, rest); err != nil {
		return w, err
	}
	idle, err := b.gaps(ctx, pids)
	if err != nil {
		return w, err
	}
	g.report = nil
	w.from = time.Now()
	total, err := timed(ctx, func(ctx context.Context) error { return t.s.checkpoint(b, ctx, g) })
	w.to = time.Now()
	if err != nil {
		return w, err
	}
	stop, err := b.gaps(ctx, pids)
	if err != nil {
		return w, fmt.Errorf("after the checkpoint: %w", err)
	}
	size, err := t.s.bytes(b, ctx, g)
	if err != nil {
		return w, err
	}
	t.found.list = append(t.found.list, taken{stop: stop, idle: idle, total: total, bytes: size, report: g.report})
	return w, nil
}

// window is a stretch of time.
type window struct{ from, to time.Time }

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// bringBack ends the members and restores them; it returns the milliseconds that
// the restore took.
func (b *bench) bringBack(ctx context.Context, s *system, g *members) (float64, error) {
	ending, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	if err := s.end(b, ending, g); err != nil {
		return 0, err
	}
	unix.Sync()
	took, err := timed(ctx, func(ctx context.Context) error { return s.restore(b, ctx, g) })
	if err != nil {
		return 0, err
	}
	pids, err := s.pids(b, ctx, g)
	if err != nil {
		return 0, err
	}
	return took, b.verify(ctx, pids)
}

// timed returns how many milliseconds f took.
func timed(ctx context.Context, f func(context.Context) error) (float64, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, stepLimit, fmt.Errorf("took longer than %v", stepLimit))
	defer cancel()
	begin := time.Now()
	err := f(ctx)
	return float64(time.Since(begin)) / 1e6, err
}

// gaps returns the longest gap that any member has felt since the last call.
func (b *bench) gaps(ctx context.Context, pids []int) (float64, error) {
	var longest float64
	for _, pid := range pids {
		var r programs.MemLoad
		asking, cancel := context.WithTimeout(ctx, askLimit)
		err := programs.Ask(asking, pid, reportPath, &r)
		cancel()
		if err != nil {
			return 0, err
		}
		longest = max(longest, r.MaxGapMS)
	}
	return longest, nil
}

// verify has every restored member verify all of its memory, all at once.
func (b *bench) verify(ctx context.Context, pids []int) error {
	ctx, cancel := context.WithTimeout(ctx, 2*askLimit)
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	for _, pid := range pids {
		group.Go(func() error {
			var r programs.MemLoad
			if err := programs.AskVerified(ctx, pid, reportPath, &r); err != nil {
				return fmt.Errorf("verifying the restored memory: %w", err)
			}
			return nil
		})
	}
	return group.Wait()
}

// taken is one checkpoint; stop is 0 where no member could tell.
type taken struct {
	stop, idle, total, bytes float64
	report                   *result.Report
}

// findings are what was measured of one system in one case.
type findings struct {
	list     []taken
	restores []float64
	failures int
	err      error
}

func (f *findings) failed(err error) {
	f.failures++
	f.err = err
}

func (f *findings) row(w workload, system string) result.Row {
	r := result.Row{Case: w.title, System: system, Members: w.members, MemoryMiB: w.mib, DirtyPercent: w.percent}
	f.fill(&r)
	return r
}

// fill fills a row in from what was found, whatever failed after it.
func (f *findings) fill(r *result.Row) {
	r.Repeats, r.Failures = len(f.list), f.failures
	if f.err != nil {
		r.Error = f.err.Error()
	}
	r.Restore = result.Median(f.restores)
	if len(f.list) == 0 {
		return
	}
	if f.list[0].stop > 0 {
		r.Stops = each(f.list, func(t taken) float64 { return *result.Round(t.stop) })
		r.StopP50, r.StopMax = result.Median(r.Stops), result.Longest(r.Stops)
		r.IdleGapMax = result.Longest(each(f.list, func(t taken) float64 { return t.idle }))
	}
	r.Total = result.Median(each(f.list, func(t taken) float64 { return t.total }))
	bytes := int64(*result.Median(each(f.list, func(t taken) float64 { return t.bytes })))
	r.ImageBytes = &bytes
	if f.list[0].report == nil {
		return
	}
	reports := each(f.list, func(t taken) *result.Report { return t.report })
	r.StopReportedP50 = result.Median(each(reports, func(p *result.Report) float64 { return p.StopMS }))
	r.SkewMax = result.Longest(each(reports, func(p *result.Report) float64 { return p.SkewMS }))
	r.Phases = result.Medians(each(reports, func(p *result.Report) map[string]float64 { return p.PhasesMS }))
	var parts []map[string]float64
	for _, p := range reports {
		for _, m := range p.Members {
			parts = append(parts, m.PartsMS)
			r.Engine = m.Memory.Engine
		}
	}
	r.Parts = result.Medians(parts)
	r.BarrierBytes = result.Median(each(reports, func(p *result.Report) (sum float64) {
		for _, m := range p.Members {
			sum += float64(m.Memory.BarrierBytes)
		}
		return sum
	}))
	if export, ok := r.Phases["export"]; ok {
		r.Export = &export
	}
	if memory := float64(r.Members * r.MemoryMiB); memory > 0 {
		r.SealMiBs = result.Per(memory, r.Phases["seal"])
		durable := 0.0
		for _, p := range result.Phases[:len(result.Phases)-1] {
			durable += r.Phases[p]
		}
		r.DurableMiBs = result.Per(memory, durable)
	}
	if r.StopP50 != nil {
		r.Sample = reports[result.Nearest(r.Stops, *r.StopP50)]
	}
}

func each[T, V any](list []T, f func(T) V) []V {
	out := make([]V, len(list))
	for i, t := range list {
		out[i] = f(t)
	}
	return out
}
