// SPDX-License-Identifier: Apache-2.0

// Bench is `make bench`: it measures cohort beside stock containerd, in the same
// run, with the same program, in alternating order.
//
// A case is one or more processes (the program ticker, one container each) that
// hold random memory and write 100 random bytes of it each millisecond. They are
// checkpointed, removed, and restored:
//
//	containerd   the stock shim on overlayfs: ctr containers checkpoint --rw --task,
//	             then ctr containers restore --rw --live, for one member after the
//	             other, which is all that it can do with a group
//	cohort       cohort's shim and snapshotter: cohort checkpoint, then cohort restore
//
// What is measured, in milliseconds unless said otherwise:
//
//	stop_ms      the longest time between two ticks of a member's 1 ms ticker around
//	             the checkpoint, as the member itself feels it by CLOCK_MONOTONIC;
//	             of a group, the longest of any member. For containerd this is kind:
//	             its members stand still one after the other, and the group as a
//	             whole for the sum
//	total_ms     from the start of the command (of the first, for a group of
//	             containerd's) until the last has returned and the image exists
//	restore_ms   the same of the restore
//	image_bytes  what the checkpoint adds to the content store: the sizes of all blobs
//	             that its images refer to, without those of the containers' image
//	run_ms       ctr run --rm of /bin/true (case run_latency only)
//
// All values are medians of the repeats, but stop_ms_max. After each restore the
// members verify every byte that they hold; one that finds a wrong one makes the
// measurement fail.
//
// BENCH_OUT names the file for the results: lines of JSON, the first of which
// describes the machine and the run, each other one a row. BENCH_N is the number of
// repeats of every case, BENCH_CASES a regular expression that chooses cases.
package main

import (
	"context"
	"fmt"
	"math"
	"os"
	"os/signal"
	"regexp"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/cohort-project/cohort/integration/harness"
)

// workload is what one case checkpoints.
type workload struct {
	name    string
	members int
	mib     int
	repeats int
}

var workloads = []workload{
	{"process-16MiB", 1, 16, 5},
	{"process-256MiB", 1, 256, 5},
	{"process-1024MiB", 1, 1024, 3},
	{"group-1x256MiB", 1, 256, 5},
	{"group-2x256MiB", 2, 256, 5},
	{"group-4x256MiB", 4, 256, 3},
}

// latencyCase is the case that checkpoints nothing, and how often it runs.
const (
	latencyCase = "run_latency"
	latencyRuns = 40
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	repeats, err := number("BENCH_N")
	if err != nil {
		return err
	}
	chosen, err := regexp.Compile(os.Getenv("BENCH_CASES"))
	if err != nil {
		return fmt.Errorf("BENCH_CASES: %w", err)
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("the benchmark makes containers: run it as root")
	}
	in, err := harness.Shared()
	if err != nil {
		return err
	}
	defer func() {
		if closeErr := in.Close(); err == nil {
			err = closeErr
		}
	}()
	b := &bench{in: in, base: map[string]bool{}}
	for _, s := range systems {
		if err := in.Unpack(ctx, harness.ToolsImage, s.runtime.Snapshotter); err != nil {
			return fmt.Errorf("unpacking %s for %s: %w", harness.ToolsImage, s.name, err)
		}
	}
	if err := b.countBase(ctx); err != nil {
		return err
	}
	begin := time.Now()
	var rows []row
	for _, w := range workloads {
		if !chosen.MatchString(w.name) {
			continue
		}
		if repeats > 0 {
			w.repeats = repeats
		}
		rows = append(rows, b.compare(ctx, w)...)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	if chosen.MatchString(latencyCase) {
		n := latencyRuns
		if repeats > 0 {
			n = max(latencyRuns*repeats/5, 1)
		}
		more, err := b.latency(ctx, n)
		if err != nil {
			return err
		}
		rows = append(rows, more...)
	}
	if err := in.Leaks(); err != nil {
		return fmt.Errorf("left behind: %w", err)
	}
	printTable(os.Stdout, rows)
	fmt.Printf("\n%s; took %v\n", facts(ctx, in), time.Since(begin).Round(time.Second))
	if path := os.Getenv("BENCH_OUT"); path != "" {
		if err := write(path, facts(ctx, in), rows); err != nil {
			return err
		}
		fmt.Printf("rows: %s\n", path)
	}
	return nil
}

// number reads a positive number from the environment, 0 if there is none.
func number(name string) (int, error) {
	v := os.Getenv(name)
	if v == "" {
		return 0, nil
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 {
		return 0, fmt.Errorf("%s=%q: give a positive number", name, v)
	}
	return n, nil
}

// compare measures one workload with both systems.
func (b *bench) compare(ctx context.Context, w workload) []row {
	results := make([]results, len(checkpointing))
	for n := range w.repeats {
		order := slices.Clone(checkpointing)
		if n%2 == 1 {
			slices.Reverse(order)
		}
		for _, i := range order {
			if ctx.Err() != nil {
				return nil
			}
			fmt.Fprintf(os.Stderr, "%s, %d of %d: %s\n", w.name, n+1, w.repeats, systems[i].name)
			m, err := b.measure(ctx, systems[i], w)
			results[i].add(m, err)
			if err != nil {
				fmt.Fprintf(os.Stderr, "  failed: %v\n", err)
			}
		}
	}
	var rows []row
	for i, r := range results {
		rows = append(rows, r.row(w, systems[i].name))
	}
	return rows
}

// results are the measurements of one system in one case.
type results struct {
	stop, reported, idle, total, restore, bytes []float64
	failures                                    int
	err                                         error
}

func (r *results) add(m measurement, err error) {
	if err != nil {
		r.failures++
		r.err = err
	}
	// What came before the failure counts: a restore that fails does not make the
	// checkpoint unmeasured.
	for v, list := range map[*float64]*[]float64{
		&m.stop: &r.stop, &m.reported: &r.reported, &m.idle: &r.idle,
		&m.total: &r.total, &m.restore: &r.restore, &m.bytes: &r.bytes,
	} {
		if *v > 0 {
			*list = append(*list, *v)
		}
	}
}

func (r *results) row(w workload, system string) row {
	out := row{
		Case: w.name, System: system,
		StopP50: median(r.stop), StopMax: longest(r.stop), Total: median(r.total), Restore: median(r.restore),
		Members: w.members, MemoryMiB: w.mib, Repeats: w.repeats, Failures: r.failures,
		StopReportedP50: median(r.reported), IdleGapMax: longest(r.idle),
	}
	if m := median(r.bytes); m != nil {
		n := int64(*m)
		out.ImageBytes = &n
	}
	if r.err != nil {
		out.Error = r.err.Error()
	}
	return out
}

// median is nil of nothing; times are rounded to a hundredth.
func median(list []float64) *float64 {
	if len(list) == 0 {
		return nil
	}
	s := slices.Sorted(slices.Values(list))
	m := (s[(len(s)-1)/2] + s[len(s)/2]) / 2
	return rounded(m)
}

func longest(list []float64) *float64 {
	if len(list) == 0 {
		return nil
	}
	return rounded(slices.Max(list))
}

func rounded(v float64) *float64 {
	v = math.Round(v*100) / 100
	return &v
}
