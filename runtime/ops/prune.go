// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/cohort-project/cohort/oci"
)

// PruneOptions say which epochs to remove.
type PruneOptions struct {
	// Group whose epochs are looked at; empty for every group that has images.
	Group string
	// Keep is how many of a group's newest epochs stay, at least 1.
	Keep int
	// DryRun tells what would be removed, and removes nothing.
	DryRun bool
}

// PruneResult is what "cohort prune --json" prints.
type PruneResult struct {
	DryRun bool         `json:"dry_run"`
	Groups []PruneGroup `json:"groups"`
}

// PruneGroup is one group's part of the result. Epochs are newest first.
type PruneGroup struct {
	Group   string       `json:"group"`
	Kept    []PruneEpoch `json:"kept"`
	Removed []PruneEpoch `json:"removed"`
}

// PruneEpoch is one epoch with the names that it has, or had.
type PruneEpoch struct {
	Epoch  string    `json:"epoch"`
	Number uint64    `json:"epoch_number"`
	CutAt  time.Time `json:"cut_at"`
	Names  []string  `json:"names"`
	// UsedBy are containers that were restored from an epoch; it is kept for
	// them, because a checkpoint of theirs needs its layers.
	UsedBy []string `json:"used_by,omitempty"`
}

// epoch is one epoch of a group with all that is to be looked at.
type epoch struct {
	PruneEpoch
	// first are the names of indexes, which go before those of members: a group that is
	// found has all its members. last are the members'.
	first, last []images.Image
}

// Prune removes the names of a group's older epochs. The space is freed by containerd's
// garbage collector, which keeps every layer that a remaining epoch builds on; it
// has run when Prune returns. An epoch is removed with every name that it has. If the
// process dies on the way, the next Prune removes what is left of the epoch.
func (h *Host) Prune(ctx context.Context, o PruneOptions) (*PruneResult, error) {
	if o.Keep < 1 {
		return nil, fmt.Errorf("keep %d epochs: keep at least 1: %w", o.Keep, errdefs.ErrInvalidArgument)
	}
	if o.Group != "" {
		if err := oci.ValidGroup(o.Group); err != nil {
			return nil, err
		}
	}
	list, err := oci.ListGroups(ctx, h.Client.ImageService(), h.Client.ContentStore())
	if err != nil {
		return nil, fmt.Errorf("list checkpoint images: %w", err)
	}
	all, err := h.Client.ImageService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	users, err := h.imageUsers(ctx)
	if err != nil {
		return nil, err
	}
	res := &PruneResult{DryRun: o.DryRun, Groups: []PruneGroup{}}
	var doomed []images.Image
	for name, epochs := range epochsOf(list, all) {
		if o.Group != "" && name != o.Group {
			continue
		}
		g, gone := choose(name, epochs, o.Keep, users)
		res.Groups = append(res.Groups, g)
		doomed = append(doomed, gone...)
	}
	slices.SortFunc(res.Groups, func(a, b PruneGroup) int { return strings.Compare(a.Group, b.Group) })
	if len(res.Groups) == 0 && o.Group != "" {
		return nil, fmt.Errorf("no checkpoint images of group %q in namespace %q ('cohort images' lists what is here): %w", o.Group, h.Namespace, errdefs.ErrNotFound)
	}
	if o.DryRun {
		return res, nil
	}
	return res, removeNames(ctx, h.Client.ImageService(), doomed)
}

// imageUsers are the containers that were made from each image, by its name.
func (h *Host) imageUsers(ctx context.Context) (map[string][]string, error) {
	list, err := h.Client.ContainerService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	out := map[string][]string{}
	for _, c := range list {
		out[c.Image] = append(out[c.Image], c.ID)
	}
	return out, nil
}

// removeNames deletes names that still mean what they did, and then has containerd
// collect.
func removeNames(ctx context.Context, store images.Store, doomed []images.Image) error {
	for i, img := range doomed {
		// One that was moved to a newer epoch meanwhile stays.
		opts := []images.DeleteOpt{images.DeleteTarget(&img.Target)}
		if i == len(doomed)-1 {
			opts = append(opts, images.SynchronousDelete())
		}
		if err := store.Delete(ctx, img.Name, opts...); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("remove image %s: %w", img.Name, err)
		}
	}
	return nil
}

// epochsOf sorts names into epochs, newest first, by group. An epoch may have more
// than one index: under several names, and before and after it was merged. Members
// without a group's name are what a Prune that was killed left, or were pulled alone.
func epochsOf(list []oci.Listed, all []images.Image) map[string][]*epoch {
	names := map[digest.Digest][]images.Image{}
	for _, img := range all {
		names[img.Target.Digest] = append(names[img.Target.Digest], img)
	}
	out := map[string][]*epoch{}
	for _, l := range list {
		g := l.Group
		i := slices.IndexFunc(out[g.Name], func(e *epoch) bool { return e.Epoch == g.Epoch })
		if i < 0 {
			i = len(out[g.Name])
			out[g.Name] = append(out[g.Name], &epoch{PruneEpoch: PruneEpoch{Epoch: g.Epoch, Number: g.EpochNumber, CutAt: g.CutAt}})
		}
		e := out[g.Name][i]
		take := func(d digest.Digest, to *[]images.Image) {
			*to = append(*to, names[d]...)
			delete(names, d) // several names of one thing are met several times
		}
		if g.Whole {
			take(g.Target.Digest, &e.first)
		}
		for _, m := range g.Members {
			take(m.Manifest.Digest, &e.last)
		}
	}
	for _, epochs := range out {
		slices.SortFunc(epochs, func(a, b *epoch) int {
			if a.Number != b.Number {
				return -compare(a.Number, b.Number)
			}
			return b.CutAt.Compare(a.CutAt)
		})
		for _, e := range epochs {
			for _, img := range append(slices.Clone(e.first), e.last...) {
				e.Names = append(e.Names, img.Name)
			}
			slices.Sort(e.Names)
		}
	}
	return out
}

// choose decides what of a group stays. Only epochs with a group's name count
// as kept.
func choose(name string, epochs []*epoch, keep int, users map[string][]string) (PruneGroup, []images.Image) {
	g := PruneGroup{Group: name, Kept: []PruneEpoch{}, Removed: []PruneEpoch{}}
	var first, last []images.Image
	whole := 0
	for _, e := range epochs {
		if len(e.first) > 0 {
			whole++
		}
		old := whole > keep || whole == keep && len(e.first) == 0
		for _, n := range e.Names {
			e.UsedBy = append(e.UsedBy, users[n]...)
		}
		slices.Sort(e.UsedBy)
		if !old || len(e.UsedBy) > 0 {
			g.Kept = append(g.Kept, e.PruneEpoch)
			continue
		}
		g.Removed = append(g.Removed, e.PruneEpoch)
		first, last = append(first, e.first...), append(last, e.last...)
	}
	return g, append(first, last...)
}
