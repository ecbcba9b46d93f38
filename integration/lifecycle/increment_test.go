// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
	shop "github.com/cohort-project/cohort/integration/shop/harness"
	"github.com/cohort-project/cohort/oci"
	"github.com/cohort-project/cohort/runtime/ops"
)

// epochs is a group with several checkpoints, each under a name of its own.
type epochs struct {
	*group
	refs   []string
	done   []ops.CheckpointResult
	before []map[string]programs.Ticker
}

// several starts a group and checkpoints it n times. Between two epochs each member
// gains a file, loses one and changes one; in the last nothing but what it does by itself.
func (w *world) several(n int, ref func(int) string, options ...string) *epochs {
	w.Helper()
	w.longer(4 * time.Minute)
	e := &epochs{group: w.tickers(2)}
	for i := range n {
		for _, id := range e.ids {
			root := fmt.Sprintf("/proc/%d/root", e.pids[id])
			w.mark(e.pids[id], "/changes", fmt.Sprint("epoch ", i+1))
			w.mark(e.pids[id], fmt.Sprint("/only-", i+1), "x")
			if i > 0 {
				w.must(os.Remove(fmt.Sprint(root, "/only-", i)))
			}
		}
		e.before = append(e.before, e.reports())
		name := ref(i + 1)
		w.in.RemoveImagesAfter(w, name)
		e.refs = append(e.refs, name)
		args := append([]string{"checkpoint", "--json"}, options...)
		var r ops.CheckpointResult
		w.must(decodeJSON(w.cohort(append(args, e.name, name)...), &r))
		e.done = append(e.done, r)
	}
	return e
}

// own gives names in the registry of no host.
func (w *world) own() func(int) string {
	base := "test.local/" + w.in.Name("chain")
	return func(n int) string { return fmt.Sprintf("%s:%d", base, n) }
}

// resumes restores a copy of the i-th epoch and checks that it is that one.
func (e *epochs) resumes(i int) {
	e.Helper()
	ids := e.restored(e.refs[i], fmt.Sprintf("-%d-%d", i+1, time.Now().UnixNano()%1e6), e.before[i])
	for _, id := range ids {
		pid := e.pid(id)
		if got, want := e.inside(pid, "changes"), fmt.Sprint("epoch ", i+1); got != want {
			e.Errorf("%s of epoch %d has %q in a file that had %q", id, i+1, got, want)
		}
		for k := range len(e.refs) {
			_, err := os.Lstat(fmt.Sprintf("/proc/%d/root/only-%d", pid, k+1))
			if (err == nil) != (k == i) {
				e.Errorf("%s of epoch %d and its file of epoch %d: %v", id, i+1, k+1, err)
			}
		}
		e.hidden(pid)
	}
	e.remove(ids...)
}

func (w *world) listed(ref string) oci.Listed {
	w.Helper()
	for _, l := range decode[[]oci.Listed](w, "images") {
		if l.Ref == ref {
			return l
		}
	}
	w.Fatalf("cohort images does not list %s", ref)
	return oci.Listed{}
}

func TestEveryEpochOfAChainIsRestored(t *testing.T) {
	w := setUp(t)
	e := w.several(3, w.own())
	for i, r := range e.done {
		for _, m := range r.Members {
			if m.Chain != i+1 || (m.ParentEpoch == "") != (i == 0) || i > 0 && m.ParentEpoch != e.done[i-1].Epoch {
				t.Errorf("epoch %d of %s: chain %d on %q; %s", i+1, m.Name, m.Chain, m.ParentEpoch, m.Memory.FullWhy)
			}
			if increment := m.Memory.Increment != ""; increment != (i > 0) {
				t.Errorf("epoch %d of %s: increment by %q", i+1, m.Name, m.Memory.Increment)
			}
			if i > 0 && m.IncrementBytes >= m.Bytes/2 {
				t.Errorf("epoch %d of %s stores %d of %d bytes", i+1, m.Name, m.IncrementBytes, m.Bytes)
			}
		}
		l := w.listed(e.refs[i])
		if g := l.Group; g.Chain != i+1 || g.FullEpoch != 1 || (g.Parent == nil) != (i == 0) || g.Parent != nil && g.Parent.Number != uint64(i) || l.IncrementBytes >= l.Bytes {
			t.Errorf("cohort images shows epoch %d as %d from #%d on %v, %d of %d bytes", i+1, g.Chain, g.FullEpoch, g.Parent, l.IncrementBytes, l.Bytes)
		}
	}
	if out := w.cohort("images"); !strings.Contains(out, "3 from #1") {
		t.Errorf("cohort images does not show the chain:\n%s", out)
	}
	if out := w.cohort("inspect", e.refs[2]); !strings.Contains(out, "increment on epoch 2") || !strings.Contains(out, "#3") {
		t.Errorf("cohort inspect does not show the chain:\n%s", out)
	}
	for i := range e.refs {
		e.resumes(i)
	}
	// With the stock client, which knows of no chain.
	w.remove(e.ids...)
	_, pid := w.resume(harness.Container{ID: e.ids[0], Image: e.refs[2] + "-a"})
	w.goesOn(pid, e.before[2]["a"])
	if got := w.inside(pid, "changes"); got != "epoch 3" {
		t.Errorf("ctr run of the third epoch has %q", got)
	}
}

func TestFullIsFullAndARestoredContainerBeginsAnew(t *testing.T) {
	w := setUp(t)
	e := w.several(2, w.own(), "--full")
	for _, r := range e.done {
		for _, m := range r.Members {
			if m.Chain != 1 || m.ParentEpoch != "" || m.Memory.Increment != "" {
				t.Errorf("with --full, epoch %d of %s is %d from %q", r.Number, m.Name, m.Chain, m.ParentEpoch)
			}
		}
	}
	third := w.own()(3)
	w.in.RemoveImagesAfter(t, third)
	before := e.reports()
	if r := decode[ops.CheckpointResult](w, "checkpoint", e.name, third); r.Members[0].Chain != 2 {
		t.Errorf("the next epoch is %d on %q: %s", r.Members[0].Chain, r.Members[0].ParentEpoch, r.Members[0].Memory.FullWhy)
	}
	w.remove(e.ids...)
	r := decode[shop.Restored](w, "restore", third)
	for _, m := range r.Members {
		e.pids[m.ID] = m.Pid
		w.goesOn(m.Pid, before[m.Name])
	}
	// The name that it was restored from is given to its own next checkpoint: what it runs on
	// is found all the same, also for a full one.
	before = e.reports()
	fourth, fifth := w.own()(4), w.own()(5)
	w.in.RemoveImagesAfter(t, fourth, fifth)
	for _, c := range []struct {
		chain int
		args  []string
	}{{1, []string{third}}, {1, []string{fourth, "--full"}}, {2, []string{fifth}}} {
		args := append([]string{"checkpoint", e.name}, c.args...)
		for _, m := range decode[ops.CheckpointResult](w, args...).Members {
			if m.Chain != c.chain {
				t.Errorf("%v of %s, restored, has a chain of %d: %s", c.args, m.Name, m.Chain, m.Memory.FullWhy)
			}
		}
	}
	w.collect()
	for i, ref := range []string{third, fourth, fifth} {
		w.remove(e.restored(ref, fmt.Sprint("-again-", i), before)...)
	}
}

func TestPruneLeavesWhatIsKeptRestorable(t *testing.T) {
	w := setUp(t)
	e := w.several(3, w.own())
	names := func(i int) []string { return []string{e.refs[i], e.refs[i] + "-a", e.refs[i] + "-b"} }

	dry := decode[ops.PruneResult](w, "prune", "--keep", "1", "--dry-run", e.name)
	if !dry.DryRun || len(dry.Groups) != 1 || len(dry.Groups[0].Removed) != 2 || len(w.images(e.refs[0])) != 3 {
		t.Errorf("--dry-run: %+v", dry)
	}
	// The epoch of a container that was restored from it stays.
	used := e.restored(e.refs[0], "-used", e.before[0])
	r := decode[ops.PruneResult](w, "prune", "--keep", "1", e.name)
	if g := r.Groups[0]; len(g.Removed) != 1 || g.Removed[0].Number != 2 || !slices.Equal(g.Removed[0].Names, names(1)) ||
		len(g.Kept) != 2 || !slices.Equal(g.Kept[1].UsedBy, slices.Sorted(slices.Values(used))) {
		t.Errorf("cohort prune: %+v", g)
	}
	if left := w.images(e.refs[1]); len(left) != 0 {
		t.Errorf("%v were pruned and are there", left)
	}
	w.remove(used...)
	if out := w.cohort("prune", "--keep", "1", e.name); !strings.Contains(out, "removed 1 epochs") || !strings.Contains(out, e.refs[0]) {
		t.Errorf("cohort prune prints\n%s", out)
	}
	w.collect()
	if left := w.images(e.refs[0]); len(left) != 0 {
		t.Errorf("%v were pruned and are there", left)
	}
	e.resumes(2)

	// One that was killed after the group's name was gone is finished by the next.
	fourth := w.own()(4)
	w.in.RemoveImagesAfter(t, fourth)
	e.checkpoint(fourth)
	w.ctr("images", "rm", e.refs[2])
	w.cohort("prune", "--keep", "1", e.name)
	if left := w.images(e.refs[2]); len(left) != 0 {
		t.Errorf("%v are left of an epoch that was pruned by half", left)
	}
	// A name that was moved to a newer epoch is that epoch's.
	e.checkpoint(fourth)
	w.cohort("prune", "--keep", "1", e.name)
	if got := w.images(fourth); len(got) != 3 {
		t.Errorf("of a name that was used again %v is left", got)
	}
	w.collect()
	w.remove(e.restored(fourth, "-4", e.before[2])...)
	if f := w.failure("prune", e.name); f.ExitCode() != 2 || !strings.Contains(f.Stderr, "--keep") {
		t.Errorf("prune without --keep: exit code %d, %s", f.ExitCode(), f.Stderr)
	}
	if f := w.failure("prune", "--keep", "2", "nobody"); f.ExitCode() != 1 || !strings.Contains(f.Stderr, "nobody") {
		t.Errorf("prune of an unknown group: exit code %d, %s", f.ExitCode(), f.Stderr)
	}
}

func TestPushOfAnIncrementUploadsOnlyWhatIsNew(t *testing.T) {
	w := setUp(t)
	dir := t.TempDir()
	base := w.registryIn(dir) + "/team/" + w.in.Name("chain")
	e := w.several(2, func(n int) string { return fmt.Sprintf("%s:v%d", base, n) })
	stored := func() map[string]int64 {
		out := map[string]int64{}
		w.must(filepath.WalkDir(filepath.Join(dir, "data/docker/registry/v2/blobs/sha256"), func(p string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || d.Name() != "data" {
				return err
			}
			fi, err := d.Info()
			if err != nil {
				return err
			}
			out["sha256:"+filepath.Base(filepath.Dir(p))] = fi.Size()
			return nil
		}))
		return out
	}
	w.ctr("images", "push", "--plain-http", e.refs[0])
	before := stored()
	w.ctr("images", "push", "--plain-http", e.refs[1])
	after := stored()
	want := slices.DeleteFunc(w.digests(e.refs[1]), func(d string) bool { _, there := before[d]; return there })
	slices.Sort(want)
	want = slices.Compact(want)
	var bytes, increment int64
	got := slices.Sorted(maps.Keys(after))
	got = slices.DeleteFunc(got, func(d string) bool { _, there := before[d]; return there })
	for _, d := range got {
		bytes += after[d]
	}
	increment = w.listed(e.refs[1]).IncrementBytes
	// An index; and of each member a manifest, a config, a writable layer and a checkpoint.
	if !slices.Equal(got, want) || len(got) != 1+4*len(e.ids) || bytes != increment {
		t.Errorf("the second push uploaded %d blobs with %d bytes, the increment is %d blobs with %d bytes", len(got), bytes, len(want), increment)
	}
	// From the registry it is whole.
	w.remove(e.ids...)
	w.must(w.in.RemoveImages(w.ctx, e.refs...))
	w.collect()
	w.ctr("images", "pull", "--plain-http", e.refs[1])
	for _, m := range decode[shop.Restored](w, "restore", e.refs[1]).Members {
		w.goesOn(m.Pid, e.before[1][m.Name])
		if got := w.inside(m.Pid, "changes"); got != "epoch 2" {
			t.Errorf("%s, pulled, has %q", m.Name, got)
		}
	}
}

func TestMergedEpochAndItsNeighboursAreRestored(t *testing.T) {
	w := setUp(t)
	e := w.several(3, w.own())
	// Not under the feet of a container that runs on its layers.
	used := e.restored(e.refs[1], "-used", e.before[1])
	if f := w.failure("merge", e.refs[1]); f.ExitCode() != 1 || !strings.Contains(f.Stderr, used[0]) {
		t.Errorf("merging what %v run on: exit code %d, %s", used, f.ExitCode(), f.Stderr)
	}
	w.remove(used...)
	old := w.listed(e.refs[1])
	r := decode[ops.MergeResult](w, "merge", e.refs[1])
	now := w.listed(e.refs[1])
	if g := now.Group; g.Chain != 1 || g.Parent != nil || g.Epoch != old.Group.Epoch || !g.CutAt.Equal(old.Group.CutAt) || g.Target.Digest.String() != r.Digest {
		t.Errorf("merged: %+v", g)
	}
	for _, m := range r.Members {
		if m.Chain != 2 || m.Bytes >= m.BytesBefore {
			t.Errorf("merged member: %+v", m)
		}
	}
	if again := decode[ops.MergeResult](w, "merge", e.refs[1]); again.Digest != r.Digest {
		t.Errorf("a full checkpoint was merged: %+v", again)
	}
	w.collect()
	for i := range e.refs {
		e.resumes(i)
	}
	// The next increment can build on the merged one.
	w.cohort("prune", "--keep", "1", e.name)
	fourth := w.own()(4)
	w.in.RemoveImagesAfter(t, fourth)
	w.cohort("merge", e.refs[2])
	before := e.reports()
	for _, m := range decode[ops.CheckpointResult](w, "checkpoint", e.name, fourth).Members {
		if m.Chain != 2 || m.ParentEpoch != e.done[2].Epoch {
			t.Errorf("%s on a merged epoch: chain %d on %q: %s", m.Name, m.Chain, m.ParentEpoch, m.Memory.FullWhy)
		}
	}
	w.remove(e.restored(fourth, "-4", before)...)
}

func TestLongChainIsMergedAtOnce(t *testing.T) {
	w := setUp(t)
	e := w.several(3, w.own(), "--max-chain", "2")
	for i, r := range e.done {
		if r.MergeError != "" || (r.Merge != nil) != (i == 2) {
			t.Errorf("epoch %d: merge %+v, %s", i+1, r.Merge, r.MergeError)
		}
		if g := w.listed(e.refs[i]).Group; g.Chain != []int{1, 2, 1}[i] {
			t.Errorf("epoch %d has a chain of %d", i+1, g.Chain)
		}
	}
	for i := range e.refs {
		e.resumes(i)
	}
}

func TestKilledMergeLosesNothing(t *testing.T) {
	w := setUp(t)
	e := w.several(2, w.own())
	path, err := w.in.LookPath("cohort")
	w.must(err)
	target := func() string { return digestOf(t, w, e.refs[1]) }
	old := target()
	for _, moment := range []string{"/content/create", "/snapshot/prepare", "/images/update", ""} {
		var merged ops.MergeResult
		events, errs := w.subscribe(w.ctx, moment)
		cmd := startCommand(w.ctx, w.in.Env, path, "merge", "--json", e.refs[1])
		if moment == "" {
			// As it is meant to go.
			<-cmd.done
			w.must(json.Unmarshal(cmd.out.Bytes(), &merged))
			if target() != merged.Digest || merged.Digest == old {
				t.Errorf("%s is %s, was %s, merged %s", e.refs[1], target(), old, merged.Digest)
			}
			break
		}
		select {
		case <-events:
		case err := <-errs:
			w.must(err)
		case <-cmd.done:
			t.Fatalf("the merge ended before %s: %s", moment, cmd.errs.String())
		}
		_ = cmd.cmd.Process.Kill()
		<-cmd.done
		list := w.images(e.refs[1])
		if len(list) != 3 {
			t.Errorf("killed at %s: names %v", moment, list)
		}
		if g := w.listed(e.refs[1]).Group; g.Epoch != e.done[1].Epoch {
			t.Errorf("killed at %s: %+v", moment, g)
		}
		if target() != old && moment != "/images/update" {
			t.Errorf("killed at %s: the name was moved", moment)
		}
		e.resumes(1)
		if target() != old {
			t.Logf("killed at %s: merged already", moment)
			break
		}
	}
	w.collect()
	for i := range e.refs {
		e.resumes(i)
	}
}
