// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	memberAPI "github.com/cohort-project/cohort/api/member/v1"
	"github.com/cohort-project/cohort/oci"
)

// DefaultMaxChain is how many epochs a checkpoint consists of at the most before it
// is merged into a full one.
const DefaultMaxChain = 8

// chainReserve is by how much a chain may outgrow its limit when merging fails
// again and again; the next checkpoint is full then.
const chainReserve = 8

// checkpointDir is where cohort's snapshotter keeps a layer's checkpoint, beside its
// file system (package snapshotter).
const checkpointDir = "checkpoint"

// parentOf is what an increment of one member is taken against.
type parentOf struct {
	// image is the member's in the parent epoch.
	image *oci.Member
	// api is what its shim is told.
	api *memberAPI.Parent
	// below are the directories of all its layers, newest first.
	below []string
}

// parents chooses the epoch that each member's checkpoint builds on and keeps its
// files until done is called. A member for which there is none, or which cannot use it, has
// a full checkpoint; its fullWhy says why where that is not plain.
//
// ctx carries the lease of the checkpoint: what is made here goes with it if this
// process dies.
func (x *exporter) parents(ctx context.Context, o CheckpointOptions, list []oci.Listed) (done func(context.Context) error, err error) {
	done = func(ctx context.Context) error {
		var errs []error
		for _, key := range x.views {
			err := x.h.Client.SnapshotService(Snapshotter).Remove(ctx, key)
			if err != nil && !errdefs.IsNotFound(err) {
				errs = append(errs, fmt.Errorf("remove the view of the parent epoch: %w", err))
			}
		}
		return errors.Join(errs...)
	}
	g, err := x.parentEpoch(ctx, o, list)
	if err != nil || g == nil {
		return done, err
	}
	for _, m := range x.members {
		pm := m.match(g)
		switch {
		case pm == nil:
			m.fullWhy = fmt.Sprintf("epoch %d is not of this container", g.EpochNumber)
			continue
		case o.Full:
			m.earlier = pm
			continue
		case pm.Chain >= o.longestChain():
			m.earlier = pm
			m.fullWhy = fmt.Sprintf("the chain of epoch %d has %d epochs already, and was not merged", g.EpochNumber, pm.Chain)
			continue
		}
		p := &parentOf{image: pm}
		m.parent, m.earlier = p, pm
		var view string
		dirs, err := x.h.viewChain(ctx, fmt.Sprintf("cohort-view-%s-%s", x.info.Epoch, m.c.ID()), pm, &view)
		if view != "" {
			x.views = append(x.views, view)
		}
		if errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) {
			m.fullWhy, m.parent = err.Error(), nil
			continue
		}
		if err != nil {
			return done, errors.Join(err, done(context.WithoutCancel(ctx)))
		}
		p.below = slices.Concat(dirs.chain, dirs.base)
		p.api = &memberAPI.Parent{Epoch: pm.Checkpoint.Epoch, Number: pm.Checkpoint.EpochNumber, Checkpoints: dirs.checkpoints, Uppers: dirs.uppers}
	}
	return done, nil
}

func (o *CheckpointOptions) maxChain() int {
	if o.MaxChain == 0 {
		return DefaultMaxChain
	}
	return o.MaxChain
}

// longestChain is what no increment is put on.
func (o *CheckpointOptions) longestChain() int {
	if o.maxChain() < 0 {
		return oci.MaxChain
	}
	return min(o.maxChain()+chainReserve, oci.MaxChain)
}

// parentEpoch finds the newest epoch of the group in which any of the members was
// as it is now. With o.Parent only that one is looked at.
func (x *exporter) parentEpoch(ctx context.Context, o CheckpointOptions, list []oci.Listed) (*oci.Group, error) {
	if o.Parent != "" {
		img, err := x.h.image(ctx, o.Parent)
		if err != nil {
			return nil, fmt.Errorf("parent: %w", err)
		}
		g, err := x.h.readGroup(ctx, img)
		if err != nil {
			return nil, fmt.Errorf("parent: %w", err)
		}
		if g.Name != x.info.Group || !x.anyMatches(g) {
			return nil, fmt.Errorf("%s holds no checkpoint of these containers as they are now; leave the parent out, or take a full one: %w", img.Name, errdefs.ErrFailedPrecondition)
		}
		return g, x.keep(ctx, g)
	}
	var older []*oci.Group
	for _, l := range list {
		if g := l.Group; g.Name == x.info.Group && g.EpochNumber < x.info.EpochNumber && x.anyMayMatch(g) {
			older = append(older, g)
		}
	}
	// The newest first; among names of one epoch the one that was merged.
	slices.SortStableFunc(older, func(a, b *oci.Group) int {
		if a.EpochNumber != b.EpochNumber {
			return -compare(a.EpochNumber, b.EpochNumber)
		}
		return a.Chain - b.Chain
	})
	for _, g := range older {
		err := g.ReadCheckpoint(ctx, x.h.Client.ContentStore())
		if err == nil && x.anyMatches(g) {
			err = x.keep(ctx, g)
			if err == nil {
				return g, nil
			}
		}
		// An image that is damaged, or was deleted meanwhile, is nobody's parent.
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	return nil, nil
}

func compare[T uint64 | int](a, b T) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// anyMayMatch looks at annotations alone, so that no layer is opened in vain.
func (x *exporter) anyMayMatch(g *oci.Group) bool {
	for _, m := range x.members {
		for _, pm := range g.Members {
			if pm.Name == m.c.Member && pm.Annotations[oci.AnnotationContainer] == m.c.ID() {
				return true
			}
		}
	}
	return false
}

func (x *exporter) anyMatches(g *oci.Group) bool {
	return slices.ContainsFunc(x.members, func(m *member) bool { return m.match(g) != nil })
}

// match finds the member's checkpoint in a group: of the same container in the same
// life, on the same image.
func (m *member) match(g *oci.Group) *oci.Member {
	for i := range g.Members {
		ck := g.Members[i].Checkpoint
		if ck.Member == m.c.Member && ck.ContainerID == m.c.ID() && ck.CreatedAt.Equal(m.c.Info.CreatedAt) && ck.Rootfs.ChainID.String() == m.image.chainID {
			return &g.Members[i]
		}
	}
	return nil
}

// keep puts a group's content under the lease of ctx: its name may be moved or
// pruned while the increment is made.
func (x *exporter) keep(ctx context.Context, g *oci.Group) error {
	return x.h.leaseContent(ctx, g.Target)
}

func (h *Host) leaseContent(ctx context.Context, d ocispec.Descriptor) error {
	id, ok := leases.FromContext(ctx)
	if !ok {
		return fmt.Errorf("keep %s: no lease in the context: %w", d.Digest, errdefs.ErrInvalidArgument)
	}
	err := h.Client.LeasesService().AddResource(ctx, leases.Lease{ID: id}, leases.Resource{ID: d.Digest.String(), Type: "content"})
	if err != nil {
		return fmt.Errorf("keep %s: %w", d.Digest, err)
	}
	// What is there now stays; it may have gone before.
	if _, err := h.Client.ContentStore().Info(ctx, d.Digest); err != nil {
		return fmt.Errorf("keep %s: %w", d.Digest, err)
	}
	return nil
}

// chainDirs are the directories of a member's checkpoint, each list newest first.
type chainDirs struct {
	// checkpoints of the chain, and its writable layers in overlay format.
	checkpoints, uppers []string
	// chain are the file systems of all layers of the chain, base those below.
	chain, base []string
}

// viewChain makes a view of a member's whole checkpoint and tells from it where the
// parts of its chain are. *view is set once the view is there. The error is
// ErrNotFound where the snapshots are not here.
func (h *Host) viewChain(ctx context.Context, key string, m *oci.Member, view *string) (chainDirs, error) {
	mounts, err := h.Client.SnapshotService(Snapshotter).View(ctx, key, m.ChainID.String())
	if errdefs.IsNotFound(err) {
		return chainDirs{}, fmt.Errorf("the snapshot of epoch %d is not on this host any more: %w", m.Checkpoint.EpochNumber, err)
	} else if err != nil {
		return chainDirs{}, fmt.Errorf("member %s: look at the snapshot of epoch %d: %w", m.Name, m.Checkpoint.EpochNumber, err)
	}
	*view = key
	dirs, err := dirsOf(mounts, m)
	if err != nil {
		return chainDirs{}, fmt.Errorf("member %s: the snapshots of epoch %d: %w", m.Name, m.Checkpoint.EpochNumber, err)
	}
	return dirs, nil
}

// dirsOf finds a chain's checkpoints and writable layers in the mounts of a view. Each
// layer of an image is one lower directory, the last layer the first.
func dirsOf(mounts []mount.Mount, m *oci.Member) (d chainDirs, err error) {
	lowers := lowerDirs(mounts)
	n := len(m.Layers)
	if len(lowers) != n {
		return d, fmt.Errorf("%d lower directories for %d layers: %w", len(lowers), n, errdefs.ErrFailedPrecondition)
	}
	d.chain, d.base = lowers[:n-m.BaseLayers()], lowers[n-m.BaseLayers():]
	for i, dir := range d.chain {
		ck := filepath.Join(filepath.Dir(dir), checkpointDir)
		fi, err := os.Lstat(ck)
		has := err == nil && fi.IsDir()
		switch want := m.Layers[n-1-i].Kind == oci.LayerCheckpoint; {
		case err != nil && !errors.Is(err, os.ErrNotExist):
			return d, err
		case has != want:
			return d, fmt.Errorf("%s: a checkpoint is there: %t, in the image: %t: %w", ck, has, want, errdefs.ErrFailedPrecondition)
		case has:
			d.checkpoints = append(d.checkpoints, ck)
		default:
			d.uppers = append(d.uppers, dir)
		}
	}
	return d, nil
}

// lowerDirs of a read-only mount, the uppermost first.
func lowerDirs(mounts []mount.Mount) []string {
	if len(mounts) != 1 {
		return nil
	}
	if mounts[0].Type == "bind" {
		return []string{mounts[0].Source}
	}
	for _, o := range mounts[0].Options {
		if dirs, ok := strings.CutPrefix(o, "lowerdir="); ok {
			return strings.Split(dirs, ":")
		}
	}
	return nil
}

// ensureSnapshot unpacks the layers that chain consists of, unless it is there:
// an image that drops the checkpoint layers of a restored increment has a base that
// nobody has unpacked yet.
func (h *Host) ensureSnapshot(ctx context.Context, img oci.MemberImage, chain digest.Digest) error {
	if chain == "" {
		return nil // an image without layers
	}
	sn := h.Client.SnapshotService(Snapshotter)
	_, err := sn.Stat(ctx, chain.String())
	if err == nil || !errdefs.IsNotFound(err) {
		return err
	}
	g, err := oci.ReadGroup(ctx, h.Client.ContentStore(), img.Manifest)
	if err != nil {
		return err
	}
	return h.unpackBase(ctx, &g.Members[0], chain)
}
