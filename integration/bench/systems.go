// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cohort-project/cohort/integration/bench/result"
	"github.com/cohort-project/cohort/integration/harness"
)

// system is one of those that are compared.
type system struct {
	name    string
	runtime harness.Runtime
	// checkpoint leaves the members running.
	checkpoint func(b *bench, ctx context.Context, g *members) error
	// bytes is the size of what the checkpoint made; drop removes that.
	bytes func(b *bench, ctx context.Context, g *members) (float64, error)
	drop  func(b *bench, ctx context.Context, g *members) error
	// end ends the members so that restore, which is timed, can bring them back.
	end     func(b *bench, ctx context.Context, g *members) error
	restore func(b *bench, ctx context.Context, g *members) error
	// pids are those of the restored members.
	pids func(b *bench, ctx context.Context, g *members) ([]int, error)
}

var (
	stock = &system{
		result.Containerd, harness.Stock, (*bench).stockCheckpoint, (*bench).imageBytes, (*bench).dropImages,
		(*bench).remove, (*bench).stockRestore, (*bench).tickers,
	}
	plainCRIU = &system{
		result.CRIU, harness.Stock, (*bench).criuCheckpoint, (*bench).folderBytes, (*bench).dropFolder,
		(*bench).criuEnd, (*bench).criuRestore, (*bench).criuPids,
	}
	cohort = &system{
		result.Cohort, harness.CohortOnCohort, (*bench).cohortCheckpoint, (*bench).imageBytes, (*bench).dropImages,
		(*bench).remove, (*bench).cohortRestore, (*bench).tickers,
	}
)

// members are the containers of one measurement.
type members struct {
	group string
	ids   []string
	// ticking are those of ids that run memload; the others are applications.
	ticking []string
	// ref names the next checkpoint, refs all that there have been.
	ref  string
	refs []string
	// dir is a folder of this measurement alone.
	dir string
	// flags are further ones of cohort checkpoint, and of runc checkpoint.
	flags, runcFlags []string

	// report is what cohort said of its last checkpoint.
	report *result.Report
	// ended: the members were ended for plain CRIU, which leaves their bundles.
	ended bool
}

// newMembers are n containers that do not exist yet; call gone when it is over.
func (b *bench) newMembers(n int) (*members, error) {
	g := &members{group: b.in.Name("bench")}
	g.name(1)
	for i := range n {
		g.ids = append(g.ids, fmt.Sprintf("%s-%d", g.group, i))
	}
	g.ticking = g.ids
	g.dir = filepath.Join(b.in.Dir, "bench", g.group)
	return g, os.MkdirAll(g.dir, 0o700)
}

// name gives the next checkpoint the nth name.
func (g *members) name(n int) {
	g.ref = fmt.Sprintf("bench.local/%s:%d", g.group, n)
	g.refs = append(g.refs, g.ref)
}

// gone removes everything of the members, whatever state they are in. What
// another attempt may still remove is tried in any case.
func (b *bench) gone(ctx context.Context, g *members) error {
	// The run is being ended, or a step took too long: this has its own time.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Minute)
	defer cancel()
	var err error
	if g.ended {
		err = b.criuDelete(ctx, g)
	}
	err = errors.Join(err, b.remove(ctx, g), b.in.RemoveImages(ctx, g.refs...), b.in.RemoveTemp(), os.RemoveAll(g.dir))
	if err != nil {
		return fmt.Errorf("cleaning up: %w", err)
	}
	return nil
}

func (b *bench) remove(ctx context.Context, g *members) error {
	var errs []error
	for _, id := range g.ids {
		errs = append(errs, b.in.CtrOf(harness.Stock).Remove(ctx, id))
	}
	return errors.Join(errs...)
}

// tickers are the first processes of those members that run memload, as the host
// counts. pids is the same for the restored ones, however they were restored.
func (b *bench) tickers(ctx context.Context, g *members) ([]int, error) {
	var pids []int
	for _, id := range g.ticking {
		pid, err := b.in.CtrOf(harness.Stock).Pid(ctx, id)
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// image is the name of what stock containerd makes of the nth member.
func (g *members) image(n int) string { return fmt.Sprintf("%s-%d", g.ref, n) }

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
	args := append([]string{"checkpoint", "--json"}, g.flags...)
	out, err := b.in.Cohort(ctx, append(args, g.group, g.ref)...)
	if err != nil {
		return err
	}
	g.report = &result.Report{}
	if err := json.Unmarshal([]byte(out), g.report); err != nil {
		return fmt.Errorf("cohort checkpoint --json printed %q: %w", out, err)
	}
	return nil
}

func (b *bench) cohortRestore(ctx context.Context, g *members) error {
	_, err := b.in.Cohort(ctx, "restore", g.ref)
	return err
}

func (b *bench) dropImages(ctx context.Context, g *members) error {
	return errors.Join(b.in.RemoveImages(ctx, g.ref), b.in.RemoveTemp())
}

// Where the stock shim keeps runc's state and the containers' bundles: RuncRoot of
// containerd's cmd/containerd-shim-runc-v2/process/utils.go, and below containerd's
// own state folder, see containerd's core/runtime/v2.
func (b *bench) shimRunc() string { return filepath.Join("/run/containerd/runc", b.in.Namespace()) }

func (b *bench) bundle(id string) string {
	return filepath.Join(filepath.Dir(b.in.Address), "containerd", "state", "io.containerd.runtime.v2.task", b.in.Namespace(), id)
}

// Places in the folder of a measurement with plain CRIU.
func (g *members) criuImages(id string) string { return filepath.Join(g.dir, "images", id) }
func (g *members) criuWork(id string) string   { return filepath.Join(g.dir, "work", id) }
func (g *members) criuRoot() string            { return filepath.Join(g.dir, "runc") }
func (g *members) criuPid(id string) string    { return filepath.Join(g.dir, id+".pid") }

func (b *bench) criuCheckpoint(ctx context.Context, g *members) error {
	for _, id := range g.ids {
		// runc makes the folders themselves, but not those above.
		for _, dir := range []string{g.criuImages(id), g.criuWork(id)} {
			if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
				return err
			}
		}
		args := []string{
			"--root", b.shimRunc(), "checkpoint", "--leave-running", "--file-locks",
			"--image-path", g.criuImages(id), "--work-path", g.criuWork(id),
		}
		if _, err := b.in.Command(ctx, "runc", append(append(args, g.runcFlags...), id)...); err != nil {
			return errors.Join(err, criuError(g.criuWork(id), "dump.log"))
		}
	}
	return nil
}

// criuEnd kills the members and leaves their bundles, whose root file systems are
// still mounted.
func (b *bench) criuEnd(ctx context.Context, g *members) error {
	g.ended = true
	for _, id := range g.ids {
		if _, err := b.in.Ctr(ctx, "tasks", "kill", "--signal", "SIGKILL", id); err != nil {
			return err
		}
	}
	for _, id := range g.ids {
		if err := b.stopped(ctx, id); err != nil {
			return err
		}
	}
	// The files stay as they became after the checkpoint. A report from then must
	// not be taken for one of the restored process, which counts from earlier.
	for _, id := range g.ticking {
		if err := os.WriteFile(filepath.Join(b.bundle(id), "rootfs", reportPath), []byte(`{"n":0}`), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// stopped returns when a task has ended. ctr has no command that waits for one
// without deleting it.
func (b *bench) stopped(ctx context.Context, id string) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		out, err := b.in.Ctr(ctx, "tasks", "ls")
		if err != nil {
			return err
		}
		for line := range strings.Lines(out) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == id && f[2] == "STOPPED" {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for container %s to end: %w", id, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// criuRestore restores into the old bundles, by a runc whose state is of this
// measurement alone: the shim still has the ended containers in its own.
func (b *bench) criuRestore(ctx context.Context, g *members) error {
	for _, id := range g.ids {
		// The container inherits its output, and must not keep ours open.
		_, err := b.in.Command(ctx, "sh", "-c", `exec runc "$@" </dev/null >/dev/null 2>"$0"`, filepath.Join(g.dir, id+".log"),
			"--root", g.criuRoot(), "restore", "--detach", "--file-locks", "--bundle", b.bundle(id),
			"--image-path", g.criuImages(id), "--work-path", g.criuWork(id), "--pid-file", g.criuPid(id), id)
		if err != nil {
			said, _ := os.ReadFile(filepath.Join(g.dir, id+".log"))
			return errors.Join(err, errors.New(strings.TrimSpace(string(said))), criuError(g.criuWork(id), "restore.log"))
		}
	}
	return nil
}

func (b *bench) criuPids(_ context.Context, g *members) ([]int, error) {
	var pids []int
	for _, id := range g.ticking {
		text, err := os.ReadFile(g.criuPid(id))
		if err != nil {
			return nil, err
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil {
			return nil, fmt.Errorf("the pid file of %s: %w", id, err)
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

func (b *bench) criuDelete(ctx context.Context, g *members) error {
	var errs []error
	for _, id := range g.ids {
		if _, err := os.Stat(filepath.Join(g.criuRoot(), id)); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		_, err := b.in.Command(ctx, "runc", "--root", g.criuRoot(), "delete", "--force", id)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// criuError is the first line of CRIU's log that says what was wrong.
func criuError(dir, log string) error {
	text, err := os.ReadFile(filepath.Join(dir, log))
	if err != nil {
		return nil // CRIU was never started
	}
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, "Error") {
			return errors.New("criu: " + strings.TrimSpace(line))
		}
	}
	return nil
}

func (b *bench) folderBytes(_ context.Context, g *members) (float64, error) {
	var sum int64
	err := filepath.WalkDir(filepath.Join(g.dir, "images"), func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			sum += info.Size()
		}
		return err
	})
	return float64(sum), err
}

func (b *bench) dropFolder(_ context.Context, g *members) error {
	return errors.Join(os.RemoveAll(filepath.Join(g.dir, "images")), os.RemoveAll(filepath.Join(g.dir, "work")))
}
