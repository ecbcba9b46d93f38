// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
	shop "github.com/cohort-project/cohort/integration/shop/harness"
)

// reportPath is where the test programs write their reports.
const reportPath = "/report"

// ticker is what most members run: memory and a file that verify themselves.
var ticker = []string{"/bin/ticker", "--mem", "4", "--checksum", "--file", "/counter", "--report", reportPath}

// world is one test, on one containerd.
type world struct {
	*testing.T
	in  *harness.Instance
	ctx context.Context
	// paused is set where a user has paused a container: that is not ours to find.
	paused bool
}

func setUp(t *testing.T) *world {
	t.Helper()
	in := harness.Up(t)
	harness.RequireTool(t, "criu")
	in.RequireImage(t, harness.ToolsImage, harness.CohortOnCohort.Snapshotter)
	in.RequireImage(t, harness.BusyboxImage, harness.CohortOnCohort.Snapshotter)
	return &world{T: t, in: in, ctx: harness.Context(t)}
}

// longer gives a test more than the usual two minutes.
func (w *world) longer(d time.Duration) {
	ctx, cancel := context.WithTimeoutCause(context.Background(), d, fmt.Errorf("%s took longer than %v", w.Name(), d))
	w.Cleanup(cancel)
	w.ctx = ctx
}

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// ctr runs the stock client.
func (w *world) ctr(args ...string) string {
	w.Helper()
	out, err := w.in.Ctr(w.ctx, args...)
	w.must(err)
	return out
}

// cohort runs the cohort command.
func (w *world) cohort(args ...string) string {
	w.Helper()
	out, err := w.in.Cohort(w.ctx, args...)
	w.must(err)
	return out
}

// decode runs the cohort command with --json and decodes what it printed.
func decode[T any](w *world, args ...string) T {
	w.Helper()
	var v T
	w.must(decodeJSON(w.cohort(append(args[:1:1], append([]string{"--json"}, args[1:]...)...)...), &v))
	return v
}

func decodeJSON(out string, into any) error {
	if err := json.Unmarshal([]byte(out), into); err != nil {
		return fmt.Errorf("decode %q: %w", out, err)
	}
	return nil
}

// image is a name for a checkpoint, removed with its members' when the test ends.
func (w *world) image(use string) string {
	w.Helper()
	ref := "test.local/" + w.in.Name(use) + ":1"
	w.in.RemoveImagesAfter(w, ref)
	return ref
}

// images lists the names that begin with ref.
func (w *world) images(ref string) []string {
	w.Helper()
	return slices.DeleteFunc(strings.Fields(w.ctr("images", "ls", "-q")), func(name string) bool {
		return name != ref && !strings.HasPrefix(name, ref+"-")
	})
}

// run runs a container with cohort and waits for the report of its program.
func (w *world) run(c harness.Container) (id string, pid int) {
	w.Helper()
	if c.Image == "" {
		c.Image = harness.ToolsImage
	}
	id, pid = w.in.Run(w, harness.CohortOnCohort, c)
	if slices.Contains(c.Args, reportPath) {
		w.must(programs.WaitReady(w.ctx, pid, reportPath))
	}
	return id, pid
}

// resume runs a container from a checkpoint image with the stock client.
func (w *world) resume(c harness.Container) (id string, pid int) {
	w.Helper()
	c.Args = nil
	id, pid = w.in.Run(w, harness.CohortOnCohort, c)
	return id, pid
}

func (w *world) pid(id string) int {
	w.Helper()
	pid, err := w.in.CtrOf(harness.CohortOnCohort).Pid(w.ctx, id)
	w.must(err)
	return pid
}

func (w *world) remove(ids ...string) {
	w.Helper()
	for _, id := range ids {
		w.must(w.in.CtrOf(harness.CohortOnCohort).Remove(w.ctx, id))
	}
}

// ask has a ticker verify all its memory, and returns its report.
func (w *world) ask(pid int) programs.Ticker {
	w.Helper()
	r, err := w.tryAsk(pid)
	w.must(err)
	return r
}

func (w *world) tryAsk(pid int) (r programs.Ticker, err error) {
	ctx, cancel := context.WithTimeoutCause(w.ctx, 20*time.Second, errors.New("the ticker does not answer"))
	defer cancel()
	err = programs.AskVerified(ctx, pid, reportPath, &r)
	if err == nil && !r.SumOK {
		err = errors.New("the ticker's memory has changed")
	}
	return r, err
}

// goesOn expects a restored ticker to be where the checkpoint was taken, or later.
func (w *world) goesOn(pid int, before programs.Ticker) programs.Ticker {
	w.Helper()
	after := w.ask(pid)
	if after.Writes <= before.Writes || after.Counter < before.Counter || after.N <= before.N {
		w.Errorf("the restored process is at %+v, the checkpoint was taken after %+v", after, before)
	}
	return after
}

// inside reads a file as the process sees it.
func (w *world) inside(pid int, path string) string {
	w.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/%s", pid, path))
	w.must(err)
	return string(b)
}

// group is some tickers that carry the same annotation.
type group struct {
	*world
	name    string
	members []string // names within the group
	ids     []string
	pids    map[string]int // by id
	more    []string       // options of ctr run
}

// tickers starts a group of n.
func (w *world) tickers(n int, more ...string) *group {
	w.Helper()
	g := &group{world: w, name: w.in.Name("group"), pids: map[string]int{}, more: more}
	for i := range n {
		g.members = append(g.members, string(rune('a'+i)))
		g.ids = append(g.ids, w.in.Name("m"))
	}
	w.in.RemoveAfter(w, g.ids...)
	for i := range n {
		g.start(i)
	}
	return g
}

// start runs the i-th member.
func (g *group) start(i int) {
	g.Helper()
	ctr := g.in.CtrOf(harness.CohortOnCohort)
	g.must(ctr.Run(g.ctx, harness.Container{
		ID: g.ids[i], Image: harness.ToolsImage, Args: ticker, More: g.more,
		Annotations: []string{"io.cohort.group=" + g.name, "io.cohort.member=" + g.members[i]},
	}))
	g.pids[g.ids[i]] = g.pid(g.ids[i])
	g.must(programs.WaitReady(g.ctx, g.pids[g.ids[i]], reportPath))
}

// reports asks all members.
func (g *group) reports() map[string]programs.Ticker {
	g.Helper()
	out := map[string]programs.Ticker{}
	for i, id := range g.ids {
		out[g.members[i]] = g.ask(g.pids[id])
	}
	return out
}

// checkpoint checkpoints the group.
func (g *group) checkpoint(ref string, more ...string) shop.Checkpoint {
	g.Helper()
	return decode[shop.Checkpoint](g.world, append(append([]string{"checkpoint"}, more...), g.name, ref)...)
}

// restored restores a copy of the group's checkpoint, checks that every member goes on,
// and returns the ids. The copy goes when the test is over.
func (g *group) restored(ref, suffix string, before map[string]programs.Ticker, more ...string) []string {
	g.Helper()
	var ids []string
	for _, id := range g.ids {
		ids = append(ids, id+suffix)
	}
	g.in.RemoveAfter(g, ids...)
	args := append([]string{"restore", "--id-suffix", suffix, "--group", g.name + suffix}, more...)
	r := decode[shop.Restored](g.world, append(args, ref)...)
	if len(r.Members) != len(g.ids) {
		g.Errorf("%d members were restored, want %d", len(r.Members), len(g.ids))
	}
	for _, m := range r.Members {
		g.goesOn(m.Pid, before[m.Name])
	}
	return ids
}

// failure is a command that must fail.
func (w *world) failure(args ...string) *shop.CommandError {
	w.Helper()
	return w.failureIn(nil, args...)
}

// failureIn is failure with changes to the environment.
func (w *world) failureIn(env []string, args ...string) *shop.CommandError {
	w.Helper()
	path, err := w.in.LookPath("cohort")
	w.must(err)
	_, err = runCommand(w.ctx, append(slices.Clone(w.in.Env), env...), path, args...)
	var failed *shop.CommandError
	if err == nil {
		w.Fatalf("cohort %s did not fail", strings.Join(args, " "))
	}
	if !errors.As(err, &failed) {
		w.Fatal(err)
	}
	return failed
}

// epochsDir is where the shims keep the records of open epochs.
func (w *world) epochsDir() string {
	return filepath.Join(w.in.State, "epochs", w.in.Namespace())
}
