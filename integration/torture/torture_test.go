// SPDX-License-Identifier: Apache-2.0

package torture

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
	"github.com/cohort-project/cohort/runtime/ops"
)

const (
	// checkpoints is how many a run takes unless TORTURE_N says otherwise, and budget
	// the time after which it takes no more: 200 are the promise, and a run with
	// TORTURE_N=200 takes them all; CI has not the time for so many. With fewer than
	// enough the test fails.
	checkpoints = 60
	budget      = 4 * time.Minute
	enough      = 20
	// restoreEvery tells which checkpoints are restored at once.
	restoreEvery = 10
	// keep is how many epochs are there to be restored.
	keep = 6
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

func number(t *testing.T, name string, otherwise uint64) uint64 {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(s, 0, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// epoch is a checkpoint, and between which steps of the program it was taken.
type epoch struct {
	n             int
	ref, kind     string
	chain         int
	before, after uint64
}

func (e epoch) String() string {
	return fmt.Sprintf("checkpoint %d (%s, chain of %d)", e.n, e.kind, e.chain)
}

// run is one torture.
type run struct {
	*testing.T
	in    *harness.Instance
	ctx   context.Context
	rng   *rand.Rand
	group string
	subject
	steps  uint64
	epochs []epoch
	kinds  map[string]int
	copies int
	stops  []float64
	merge  chan error // of a merge under way
}

func TestEverythingComesBackFromEveryCheckpoint(t *testing.T) {
	in := harness.Up(t)
	harness.RequireTool(t, "criu")
	n := int(number(t, "TORTURE_N", checkpoints))
	end := time.Now().Add(budget)
	if os.Getenv("TORTURE_N") != "" {
		end = end.Add(time.Duration(n) * time.Minute)
	}
	seed := number(t, "TORTURE_SEED", rand.Uint64())
	t.Logf("again: TORTURE_N=%d TORTURE_SEED=%d go test ./integration/torture -run '^%s$'", n, seed, t.Name())

	r := newRun(limit(t, 2*time.Minute+time.Duration(n)*20*time.Second), t, in, seed)
	cmd, more := args(t, seed)
	r.id, r.pid = in.Run(t, harness.CohortOnCohort, harness.Container{
		ID: r.group + "-a", Image: image, Args: cmd, More: more,
		Annotations: []string{"io.cohort.group=" + r.group, "io.cohort.member=a"},
	})
	if err := programs.WaitReady(r.ctx, r.pid, reportPath); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		if i >= enough && time.Now().After(end) {
			t.Logf("%d of %d checkpoints in %v: that has to do", i, n, budget)
			break
		}
		r.pause()
		r.checkpoint(i + 1)
		r.merged()
		if (i+1)%restoreEvery == 0 {
			r.restore(r.epochs[len(r.epochs)-1])
			r.restore(r.epochs[r.rng.IntN(len(r.epochs))])
		}
		r.tidy(i + 1)
		r.startMerge(i + 1)
	}
	r.merged()
	r.summary()
}

func newRun(ctx context.Context, t *testing.T, in *harness.Instance, seed uint64) *run {
	t.Helper()
	loadImage(ctx, t, in)
	group := in.Name("torture")
	in.RemoveImagesAfter(t, "test.local/"+group)
	return &run{T: t, in: in, ctx: ctx, rng: rand.New(rand.NewPCG(seed, 0)), group: group, kinds: map[string]int{}}
}

// pause lets the program work for a time that is seldom the same.
func (r *run) pause() {
	time.Sleep(time.Duration(r.rng.IntN(300)) * time.Millisecond)
}

// mustBeWhole verifies the original.
func (r *run) mustBeWhole(when string) report {
	r.Helper()
	rep, err := r.verify(r.ctx)
	if err != nil {
		r.Fatalf("the original %s: %v", when, err)
	}
	return rep
}

// ways are what may be asked of a checkpoint, with how often it is.
var ways = []struct {
	kind  string
	often int
	flags []string
}{
	{"increment", 8, nil},
	{"keep-tracking", 8, []string{"--keep-tracking"}},
	{"long-chain", 3, []string{"--max-chain", "40"}},
	{"parent", 2, []string{"--parent"}}, // and which
	{"memory-full", 1, []string{"--memory", "full"}},
	{"full", 1, []string{"--full"}},
}

// way draws one. The first few are always the same, so that nothing is left out of a
// short run.
func (r *run) way(n int) (kind string, flags []string) {
	if first := []int{0, 1, 0, 0}; n <= len(first) {
		return ways[first[n-1]].kind, ways[first[n-1]].flags
	}
	sum := 0
	for _, w := range ways {
		sum += w.often
	}
	at := r.rng.IntN(sum)
	for _, w := range ways {
		if at -= w.often; at >= 0 {
			continue
		}
		if w.kind != "parent" {
			return w.kind, w.flags
		}
		if len(r.epochs) > 0 {
			return w.kind, append(slices.Clone(w.flags), r.epochs[r.rng.IntN(len(r.epochs))].ref)
		}
	}
	return ways[0].kind, ways[0].flags
}

func (r *run) checkpoint(n int) {
	r.Helper()
	e := epoch{n: n, ref: fmt.Sprintf("test.local/%s-%d:1", r.group, n), before: r.steps}
	var flags []string
	e.kind, flags = r.way(n)
	out, err := r.in.Cohort(r.ctx, append(append([]string{"checkpoint", "--json"}, flags...), r.group, e.ref)...)
	if err != nil {
		_, now := r.verify(r.ctx)
		r.Fatalf("checkpoint %d %q: %v; the original: %v\n%s", n, flags, err, now, logOf(err))
	}
	var res ops.CheckpointResult
	if err := json.Unmarshal([]byte(out), &res); err != nil || len(res.Members) != 1 || res.MergeError != "" {
		r.Fatalf("checkpoint %d %q: %v: %s", n, flags, err, out)
	}
	rep := r.mustBeWhole(fmt.Sprintf("after checkpoint %d %q", n, flags))
	m := res.Members[0]
	e.after, e.chain, r.steps = rep.Steps, m.Chain, rep.Steps
	r.epochs = append(r.epochs, e)
	r.kinds[e.kind]++
	if res.Merge != nil {
		r.kinds["merge by itself"]++
	}
	r.stops = append(r.stops, res.StopMS)
	how := m.Memory.Increment
	if how != "" {
		r.kinds["by "+how]++
	}
	r.Logf("%3d %-13s stop %6.1f ms, %2d processes, chain %d, %s: %d of %d KiB, increment %s: %d KiB from parents %s", n, e.kind, res.StopMS, m.Processes, m.Chain,
		m.Memory.Engine, m.Memory.BarrierBytes>>10, (m.Memory.BarrierBytes+m.Memory.PrecopiedBytes)>>10, how, m.Memory.ParentBytes>>10,
		m.Memory.Why+m.Memory.FullWhy)
}

// logOf is the end of the log that an error names.
func logOf(err error) []byte {
	_, path, _ := strings.Cut(err.Error(), "(log: ")
	path, _, _ = strings.Cut(path, ")")
	log, readErr := os.ReadFile(path)
	if readErr != nil {
		return []byte(readErr.Error())
	}
	return log[max(0, len(log)-4096):]
}

// startMerge makes now and then a full checkpoint of one that is not, while the next
// is taken.
func (r *run) startMerge(n int) {
	var chains []int
	for i, e := range r.epochs {
		if e.chain > 1 {
			chains = append(chains, i)
		}
	}
	if len(chains) == 0 || n%6 != 4 {
		return
	}
	e := &r.epochs[chains[len(chains)-1]]
	if r.rng.IntN(3) == 0 {
		e = &r.epochs[chains[r.rng.IntN(len(chains))]]
	}
	r.kinds["merge"]++
	r.Logf("    merging %v", e)
	e.kind, e.chain = e.kind+", merged", 1
	done := make(chan error, 1)
	r.merge = done
	ref := e.ref
	go func() {
		_, err := r.in.Cohort(r.ctx, "merge", ref)
		done <- err
	}()
}

// merged waits for a merge that is under way.
func (r *run) merged() {
	r.Helper()
	if r.merge == nil {
		return
	}
	if err := <-r.merge; err != nil {
		r.Fatal(err)
	}
	r.merge = nil
}

// restore has an epoch prove that it is whole.
func (r *run) restore(e epoch) {
	r.Helper()
	if err := r.restored(e); err != nil {
		r.Fatal(err)
	}
}

// restored brings an epoch back beside the original, has it verify itself and work
// on, and removes it.
func (r *run) restored(e epoch) error {
	r.Helper()
	r.copies++
	suffix := fmt.Sprintf("-r%d", r.copies)
	c := subject{id: r.id + suffix}
	r.in.RemoveAfter(r, c.id)
	if _, err := r.in.Cohort(r.ctx, "restore", "--id-suffix", suffix, "--group", r.group+suffix, e.ref); err != nil {
		return fmt.Errorf("restoring %v: %w", e, err)
	}
	var err error
	if c.pid, err = r.in.CtrOf(harness.CohortOnCohort).Pid(r.ctx, c.id); err != nil {
		return err
	}
	rep, err := c.goesOn(r.ctx)
	if err != nil {
		return fmt.Errorf("%v, restored: %w", e, err)
	}
	// It has worked for some steps before it was asked.
	if rep.Steps < e.before {
		return fmt.Errorf("%v was taken between steps %d and %d, and is at %d", e, e.before, e.after, rep.Steps)
	}
	r.Logf("    %v restored: %d processes at step %d", e, rep.Processes, rep.Steps)
	return r.in.CtrOf(harness.CohortOnCohort).Remove(r.ctx, c.id)
}

// tidy removes old epochs: the oldest by prune, or any by its name.
func (r *run) tidy(n int) {
	r.Helper()
	if len(r.epochs) <= keep {
		return
	}
	if n%4 != 3 {
		if r.rng.IntN(4) > 0 {
			return
		}
		i := r.rng.IntN(len(r.epochs) - 1)
		if err := r.in.RemoveImages(r.ctx, r.epochs[i].ref, strings.TrimSuffix(r.epochs[i].ref, ":1")); err != nil {
			r.Fatal(err)
		}
		r.epochs = slices.Delete(r.epochs, i, i+1)
		r.kinds["remove"]++
		return
	}
	if _, err := r.in.Cohort(r.ctx, "prune", "--keep", strconv.Itoa(keep), r.group); err != nil {
		r.Fatal(err)
	}
	r.epochs = slices.Delete(r.epochs, 0, len(r.epochs)-keep)
	r.kinds["prune"]++
}

// summary fails for what was never done: then it was not tested.
func (r *run) summary() {
	r.Helper()
	rep := r.mustBeWhole("in the end")
	for op, n := range rep.Ops {
		if n == 0 && op != "hugetlb" {
			r.Errorf("the program has never done %q", op)
		}
	}
	for _, kind := range []string{"increment", "keep-tracking", "by content", "by tracking", "merge", "prune"} {
		if r.kinds[kind] == 0 {
			r.Errorf("no %q in %d checkpoints: another seed", kind, len(r.stops))
		}
	}
	slices.Sort(r.stops)
	r.Logf("%v; stop: median %.1f ms, longest %.1f ms; %d steps, %d pages verified, %d processes", r.kinds,
		r.stops[len(r.stops)/2], r.stops[len(r.stops)-1], rep.Steps, rep.Verified, rep.Processes)
	r.Logf("%v", rep.Ops)
	r.in.CheckClean(r)
}
