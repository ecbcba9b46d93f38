// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cohort-project/cohort/oci"
)

// viewOf makes snapshot directories as the snapshotter does, from the kinds of layers,
// bottom first, and the mount of a view of them.
func viewOf(t *testing.T, kinds string) (root string, mounts []mount.Mount, m *oci.Member) {
	t.Helper()
	root, m = t.TempDir(), &oci.Member{}
	var lowers []string
	for i, k := range strings.Fields(kinds) {
		dir := filepath.Join(root, fmt.Sprint(i))
		sub := []string{"fs"}
		if k == oci.LayerCheckpoint {
			sub = append(sub, "checkpoint")
		}
		for _, s := range sub {
			if err := os.MkdirAll(filepath.Join(dir, s), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		lowers = append([]string{filepath.Join(dir, "fs")}, lowers...)
		m.Layers = append(m.Layers, oci.Layer{Kind: k})
	}
	return root, []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{"index=off", "lowerdir=" + strings.Join(lowers, ":")}}}, m
}

func TestChainIsFoundInTheMountsOfItsSnapshots(t *testing.T) {
	for _, c := range []struct{ kinds, checkpoints, uppers string }{
		{"base rw checkpoint", "2", "1"},
		{"base base rw checkpoint rw checkpoint checkpoint", "6 5 3", "4 2"},
		// Writable layers of an earlier life are part of the base.
		{"base rw rw rw checkpoint rw checkpoint", "6 4", "5 3"},
		{"rw checkpoint", "1", "0"},
	} {
		root, mounts, m := viewOf(t, c.kinds)
		d, err := dirsOf(mounts, m)
		if err != nil {
			t.Errorf("%s: %v", c.kinds, err)
		}
		var want []string
		for _, n := range strings.Fields(c.checkpoints) {
			want = append(want, filepath.Join(root, n, "checkpoint"))
		}
		if !slices.Equal(d.checkpoints, want) {
			t.Errorf("%s: checkpoints are %v", c.kinds, d.checkpoints)
		}
		want = nil
		for _, n := range strings.Fields(c.uppers) {
			want = append(want, filepath.Join(root, n, "fs"))
		}
		if !slices.Equal(d.uppers, want) {
			t.Errorf("%s: writable layers are %v", c.kinds, d.uppers)
		}
		if len(d.chain) != len(d.checkpoints)+len(d.uppers) || len(d.chain)+len(d.base) != len(m.Layers) {
			t.Errorf("%s: %d directories of the chain, %d below", c.kinds, len(d.chain), len(d.base))
		}
	}
}

func TestSnapshotsThatAreNotTheImagesAreNoChain(t *testing.T) {
	root, mounts, m := viewOf(t, "base rw checkpoint checkpoint")
	for name, change := range map[string]func(){
		"a layer more": func() { m.Layers = append([]oci.Layer{{Kind: "base"}}, m.Layers...) },
		"a checkpoint less": func() {
			m.Layers = m.Layers[1:]
			if err := os.Remove(filepath.Join(root, "2/checkpoint")); err != nil {
				t.Fatal(err)
			}
		},
	} {
		change()
		if _, err := dirsOf(mounts, m); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// records are what an image store and the content store have of some epochs: of each its
// index, unless half, and two members.
func records(group string, half map[int]bool, numbers ...int) (list []oci.Listed, all []images.Image) {
	desc := func(s string) ocispec.Descriptor { return ocispec.Descriptor{Digest: digest.FromString(s)} }
	for _, n := range numbers {
		id := fmt.Sprintf("%032x", n)
		g := &oci.Group{Name: group, Epoch: id, EpochNumber: uint64(n), Whole: true, Target: desc(group + id)}
		ref := fmt.Sprintf("%s:%d", group, n)
		for _, name := range []string{"a", "b"} {
			g.Members = append(g.Members, oci.Member{Name: name, Manifest: desc(group + id + name)})
			all = append(all, images.Image{Name: ref + "-" + name, Target: desc(group + id + name)})
		}
		if !half[n] {
			all = append(all, images.Image{Name: ref, Target: g.Target})
			list = append(list, oci.Listed{Ref: ref, Group: g})
			continue
		}
		for _, m := range g.Members {
			one := &oci.Group{Name: group, Epoch: id, EpochNumber: uint64(n), Target: m.Manifest, Members: []oci.Member{m}}
			list = append(list, oci.Listed{Ref: ref + "-" + m.Name, Group: one})
		}
	}
	return list, all
}

func numbers(epochs []PruneEpoch) (out []uint64) {
	for _, e := range epochs {
		out = append(out, e.Number)
	}
	return out
}

func TestPruneChoosesWholeOldEpochsAndWhatIsLeftOfOthers(t *testing.T) {
	for _, c := range []struct {
		name    string
		half    map[int]bool
		numbers []int
		keep    int
		kept    []uint64
		removed []uint64
	}{
		{"the newest stay", nil, []int{2, 3, 1}, 2, []uint64{3, 2}, []uint64{1}},
		{"few are all kept", nil, []int{1, 2}, 5, []uint64{2, 1}, nil},
		{"a half one is finished", map[int]bool{2: true}, []int{1, 2, 3}, 1, []uint64{3}, []uint64{2, 1}},
		{"a half one does not count", map[int]bool{3: true}, []int{1, 2, 3, 4}, 2, []uint64{4, 3, 2}, []uint64{1}},
		{"members alone stay", map[int]bool{1: true, 2: true}, []int{1, 2}, 1, []uint64{2, 1}, nil},
	} {
		list, all := records("shop", c.half, c.numbers...)
		g, doomed := choose("shop", epochsOf(list, all)["shop"], c.keep, nil)
		if !slices.Equal(numbers(g.Kept), c.kept) || !slices.Equal(numbers(g.Removed), c.removed) {
			t.Errorf("%s: kept %v, removed %v", c.name, numbers(g.Kept), numbers(g.Removed))
		}
		// An index goes before any member does.
		index := true
		n := 0
		for _, img := range doomed {
			member := strings.HasSuffix(img.Name, "-a") || strings.HasSuffix(img.Name, "-b")
			if !member && !index {
				t.Errorf("%s: %s is removed after members", c.name, img.Name)
			}
			index = !member
			n++
		}
		want := 0
		for _, e := range g.Removed {
			want += len(e.Names)
		}
		if n != want {
			t.Errorf("%s: %d names are removed, the result tells of %d", c.name, n, want)
		}
	}
}

func TestPruneKeepsWhatAContainerRunsOn(t *testing.T) {
	list, all := records("shop", nil, 1, 2, 3)
	g, doomed := choose("shop", epochsOf(list, all)["shop"], 1, map[string][]string{"shop:1-b": {"db-restored"}})
	if !slices.Equal(numbers(g.Kept), []uint64{3, 1}) || !slices.Equal(g.Kept[1].UsedBy, []string{"db-restored"}) || len(doomed) != 3 {
		t.Errorf("%+v, %d names", g, len(doomed))
	}
}

func TestAllNamesOfAnEpochAreItsOwn(t *testing.T) {
	list, all := records("shop", nil, 1, 2)
	// The same epoch under another name, and another index of it (it was merged).
	again := *list[0].Group
	list = append(list, oci.Listed{Ref: "shop:again", Group: list[0].Group})
	all = append(all, images.Image{Name: "shop:again", Target: list[0].Group.Target})
	again.Target = ocispec.Descriptor{Digest: digest.FromString("merged")}
	again.Members = nil
	list = append(list, oci.Listed{Ref: "shop:merged", Group: &again})
	all = append(all, images.Image{Name: "shop:merged", Target: again.Target})
	g, doomed := choose("shop", epochsOf(list, all)["shop"], 1, nil)
	if want := []string{"shop:1", "shop:1-a", "shop:1-b", "shop:again", "shop:merged"}; len(g.Removed) != 1 || !slices.Equal(g.Removed[0].Names, want) || len(doomed) != len(want) {
		t.Errorf("%+v", g)
	}
}
