// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
)

const (
	// stepLimit is the longest that any one command may take.
	stepLimit = 2 * time.Minute
	// settled is how long members run undisturbed before the checkpoint.
	settled = 300 * time.Millisecond

	reportPath = "/report"
)

// system is one of those that are compared.
type system struct {
	name       string
	runtime    harness.Runtime
	checkpoint func(b *bench, ctx context.Context, g *members) error
	restore    func(b *bench, ctx context.Context, g *members) error
}

var systems = []system{
	{"containerd", harness.Stock, (*bench).stockCheckpoint, (*bench).stockRestore},
	{"cohort", harness.CohortOnCohort, (*bench).cohortCheckpoint, (*bench).cohortRestore},
	{"cohort-shim-overlayfs", harness.CohortOnStock, nil, nil},
}

// checkpointing are those of systems that can checkpoint.
var checkpointing = []int{0, 1}

type bench struct {
	in *harness.Instance
	// base is the blobs of the containers' own image.
	base map[string]bool
}

// members are the containers of one measurement.
type members struct {
	group string
	ids   []string
	ref   string

	reported float64 // the stop that cohort itself reports
}

// images are the names of what a checkpoint makes of stock containerd.
func (g *members) image(n int) string { return fmt.Sprintf("%s-%d", g.ref, n) }

// measurement is one checkpoint and one restore; 0 is what was not measured.
type measurement struct {
	stop, reported, idle, total, restore, bytes float64
}

// measure does all of one repeat and leaves nothing behind.
func (b *bench) measure(ctx context.Context, s system, w workload) (m measurement, err error) {
	g := &members{group: b.in.Name("bench")}
	g.ref = "bench.local/" + g.group + ":1"
	for n := range w.members {
		g.ids = append(g.ids, fmt.Sprintf("%s-%d", g.group, n))
	}
	defer func() {
		clean := context.WithoutCancel(ctx)
		if cleanErr := errors.Join(b.remove(clean, g), b.in.RemoveImages(clean, g.ref), b.in.RemoveTemp()); cleanErr != nil {
			err = errors.Join(err, fmt.Errorf("cleaning up: %w", cleanErr))
		}
	}()

	pids, err := b.start(ctx, s, g, w)
	if err != nil {
		return m, err
	}
	// Nobody's dirty pages but the members' own.
	unix.Sync()
	if _, err := b.gaps(ctx, pids); err != nil {
		return m, err
	}
	select {
	case <-time.After(settled):
	case <-ctx.Done():
		return m, context.Cause(ctx)
	}
	if m.idle, err = b.gaps(ctx, pids); err != nil {
		return m, err
	}
	total, err := timed(ctx, func(ctx context.Context) error { return s.checkpoint(b, ctx, g) })
	if err != nil {
		return m, fmt.Errorf("checkpoint: %w", err)
	}
	if m.stop, err = b.gaps(ctx, pids); err != nil {
		return m, fmt.Errorf("after the checkpoint: %w", err)
	}
	m.total, m.reported = total, g.reported
	if m.bytes, err = b.added(ctx, g.ref); err != nil {
		return m, err
	}
	if err := b.remove(ctx, g); err != nil {
		return m, err
	}
	unix.Sync()
	restore, err := timed(ctx, func(ctx context.Context) error { return s.restore(b, ctx, g) })
	if err != nil {
		return m, fmt.Errorf("restore: %w", err)
	}
	if err := b.verify(ctx, s, g); err != nil {
		return m, fmt.Errorf("after the restore: %w", err)
	}
	m.restore = restore
	return m, nil
}

// timed returns how many milliseconds f took.
func timed(ctx context.Context, f func(context.Context) error) (float64, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, stepLimit, fmt.Errorf("took longer than %v", stepLimit))
	defer cancel()
	begin := time.Now()
	err := f(ctx)
	return float64(time.Since(begin)) / 1e6, err
}

// start runs the members and returns when they have filled their memory.
func (b *bench) start(ctx context.Context, s system, g *members, w workload) ([]int, error) {
	ctr := b.in.CtrOf(s.runtime)
	for _, id := range g.ids {
		err := ctr.Run(ctx, harness.Container{
			ID: id, Image: harness.ToolsImage,
			Args:        []string{"/bin/ticker", "--mem", fmt.Sprint(w.mib), "--dirty", "100", "--report", reportPath},
			Annotations: []string{"io.cohort.group=" + g.group},
		})
		if err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	pids, err := b.pids(ctx, s, g)
	for _, pid := range pids {
		err = errors.Join(err, programs.WaitReady(ctx, pid, reportPath))
	}
	return pids, err
}

func (b *bench) pids(ctx context.Context, s system, g *members) ([]int, error) {
	var pids []int
	for _, id := range g.ids {
		pid, err := b.in.CtrOf(s.runtime).Pid(ctx, id)
		if err != nil {
			return pids, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// gaps returns the longest gap that any member has felt since the last call.
func (b *bench) gaps(ctx context.Context, pids []int) (float64, error) {
	var longest float64
	for _, pid := range pids {
		var r programs.Ticker
		_, err := timed(ctx, func(ctx context.Context) error { return programs.Ask(ctx, pid, reportPath, &r) })
		if err != nil {
			return 0, err
		}
		longest = max(longest, r.MaxGapMS)
	}
	return longest, nil
}

// verify has every restored member verify all of its memory, all at once.
func (b *bench) verify(ctx context.Context, s system, g *members) error {
	pids, err := b.pids(ctx, s, g)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	for _, pid := range pids {
		group.Go(func() error {
			var r programs.Ticker
			if err := programs.AskVerified(ctx, pid, reportPath, &r); err != nil {
				return err
			}
			if !r.SumOK {
				return fmt.Errorf("process %d found its memory changed", pid)
			}
			return nil
		})
	}
	return group.Wait()
}

func (b *bench) remove(ctx context.Context, g *members) error {
	var errs []error
	for _, id := range g.ids {
		errs = append(errs, b.in.CtrOf(harness.Stock).Remove(ctx, id))
	}
	return errors.Join(errs...)
}

func (b *bench) stockCheckpoint(ctx context.Context, g *members) error {
	for n, id := range g.ids {
		if _, err := b.in.Ctr(ctx, "containers", "checkpoint", "--rw", "--task", id, g.image(n)); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) stockRestore(ctx context.Context, g *members) error {
	for n, id := range g.ids {
		if _, err := b.in.Ctr(ctx, "containers", "restore", "--rw", "--live", id, g.image(n)); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) cohortCheckpoint(ctx context.Context, g *members) error {
	out, err := b.in.Cohort(ctx, "checkpoint", "--json", g.group, g.ref)
	if err != nil {
		return err
	}
	var r struct {
		StopMS float64 `json:"stop_ms"`
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return fmt.Errorf("cohort checkpoint --json printed %q: %w", out, err)
	}
	g.reported = r.StopMS
	return nil
}

func (b *bench) cohortRestore(ctx context.Context, g *members) error {
	_, err := b.in.Cohort(ctx, "restore", g.ref)
	return err
}

// countBase notes the blobs of the containers' image.
func (b *bench) countBase(ctx context.Context) error {
	return b.walk(ctx, harness.ToolsImage, func(d ocispec.Descriptor) { b.base[d.Digest.String()] = true })
}

// added is the size of all blobs of the images whose names begin with ref, each
// once, without those of the containers' image.
func (b *bench) added(ctx context.Context, ref string) (float64, error) {
	out, err := b.in.Ctr(ctx, "images", "ls", "-q")
	if err != nil {
		return 0, err
	}
	var sum int64
	seen := map[digest.Digest]bool{}
	for _, name := range strings.Fields(out) {
		if !strings.HasPrefix(name, ref) {
			continue
		}
		err := b.walk(ctx, name, func(d ocispec.Descriptor) {
			if !seen[d.Digest] && !b.base[d.Digest.String()] {
				seen[d.Digest] = true
				sum += d.Size
			}
		})
		if err != nil {
			return 0, err
		}
	}
	if sum == 0 {
		return 0, fmt.Errorf("there is no image %s after its checkpoint", ref)
	}
	return float64(sum), nil
}

func (b *bench) walk(ctx context.Context, ref string, visit func(ocispec.Descriptor)) error {
	client, err := b.in.Connect()
	if err != nil {
		return err
	}
	image, err := client.ImageService().Get(ctx, ref)
	if err != nil {
		return err
	}
	children := images.ChildrenHandler(client.ContentStore())
	return images.Walk(ctx, images.HandlerFunc(func(ctx context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		visit(d)
		return children(ctx, d)
	}), image.Target)
}
