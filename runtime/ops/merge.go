// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/cohort-project/cohort/oci"
	"github.com/cohort-project/cohort/oci/names"
	"github.com/cohort-project/cohort/runtime/memory/pages"
)

// MergeOptions say what to merge.
type MergeOptions struct {
	// Ref names the group's image.
	Ref string
	// Progress is told what is going on; may be nil.
	Progress func(what string)
}

// MergeResult is what "cohort merge --json" prints. Times are milliseconds, sizes
// bytes.
type MergeResult struct {
	Group   string        `json:"group"`
	Ref     string        `json:"ref"`
	Epoch   string        `json:"epoch"`
	Number  uint64        `json:"epoch_number"`
	Digest  string        `json:"digest"`
	TotalMS float64       `json:"total_ms"`
	Members []MergeMember `json:"members"`
}

// MergeMember is one member's part of the result.
type MergeMember struct {
	Name   string `json:"name"`
	Image  string `json:"image"`
	Digest string `json:"digest"`
	// Chain is of how many epochs it consisted; 1 was left as it is.
	Chain int `json:"chain"`
	// Bytes of the member's image now, BytesBefore as a chain.
	Bytes       int64 `json:"bytes"`
	BytesBefore int64 `json:"bytes_before"`
}

// Merge makes an epoch that consists of increments a full one, while its group may
// run: each member's image is built anew out of its chain, and then the names are
// moved, all or none. The epoch stays the same one, other epochs are not touched. If
// the process dies on the way, what it made goes with its lease.
//
// It reads the members' memory from the snapshots and writes it once, as new blobs; they
// are then unpacked into snapshots as after a pull.
func (h *Host) Merge(ctx context.Context, o MergeOptions) (*MergeResult, error) {
	start := time.Now()
	step := o.Progress
	if step == nil {
		step = func(string) {}
	}
	img, err := h.image(ctx, o.Ref)
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*MergeResult, error) { return nil, fmt.Errorf("merge %s: %w", img.Name, err) }
	ctx, done, err := h.Client.WithLease(ctx)
	if err != nil {
		return fail(fmt.Errorf("take a lease in containerd: %w", err))
	}
	// A lease that cannot be given back ends by itself.
	defer func() { _ = done(context.WithoutCancel(ctx)) }()
	if err := h.leaseContent(ctx, img.Target); err != nil {
		return fail(err)
	}
	g, err := h.readGroup(ctx, img)
	if err != nil {
		return nil, err
	}
	if !g.Whole {
		return fail(fmt.Errorf("it is one member's image: name the group's: %w", errdefs.ErrInvalidArgument))
	}
	res := &MergeResult{Group: g.Name, Ref: img.Name, Epoch: g.Epoch, Number: g.EpochNumber, Digest: g.Target.Digest.String()}
	if g.Chain > 1 {
		if err := h.unused(ctx, img.Name, g); err != nil {
			return fail(err)
		}
	}
	members := make([]oci.MemberImage, len(g.Members))
	for i := range g.Members {
		m := &g.Members[i]
		step("merging " + m.Name)
		if members[i], err = h.mergeMember(ctx, m); err != nil {
			return fail(err)
		}
		name, err := names.MemberRef(img.Name, m.Name)
		if err != nil {
			return fail(err)
		}
		res.Members = append(res.Members, MergeMember{Name: m.Name, Image: name, Digest: members[i].Manifest.Digest.String(), Chain: m.Chain, Bytes: m.Bytes, BytesBefore: m.Bytes})
	}
	if g.Chain == 1 {
		res.TotalMS = ms(time.Since(start))
		return res, nil
	}
	desc, err := oci.BuildGroup(ctx, h.Client.ContentStore(), members, oci.GroupInfo{Group: g.Name, Epoch: g.Epoch, EpochNumber: g.EpochNumber, CutAt: g.CutAt, Stopped: g.Stopped})
	if err != nil {
		return fail(err)
	}
	for i, m := range members {
		step("unpacking " + m.Checkpoint.Member)
		named := client.NewImage(h.Client, images.Image{Name: res.Members[i].Image, Target: m.Manifest})
		if err := named.Unpack(ctx, Snapshotter); err != nil {
			return fail(fmt.Errorf("unpack member %s: %w", m.Checkpoint.Member, err))
		}
	}
	// The store cannot compare and move in one step; what is between is as long as
	// one call.
	now, err := h.Client.ImageService().Get(ctx, img.Name)
	if err != nil {
		return fail(err)
	}
	if now.Target.Digest != img.Target.Digest {
		return fail(fmt.Errorf("the name was given to another checkpoint meanwhile: %w", errdefs.ErrAborted))
	}
	step("naming the images")
	if _, err := names.Publish(ctx, h.Client.ImageService(), img.Name, desc, members); err != nil {
		return fail(err)
	}
	res.Digest = desc.Digest.String()
	if g, err = oci.ReadGroup(ctx, h.Client.ContentStore(), desc); err != nil {
		return fail(err)
	}
	for i, m := range g.Members {
		res.Members[i].Bytes = m.Bytes
	}
	res.TotalMS = ms(time.Since(start))
	return res, nil
}

// unused refuses an epoch that containers were restored from: a checkpoint of theirs
// needs the layers that they run on, and finds them by the name.
func (h *Host) unused(ctx context.Context, ref string, g *oci.Group) error {
	users, err := h.imageUsers(ctx)
	if err != nil {
		return err
	}
	for _, m := range g.Members {
		name, err := names.MemberRef(ref, m.Name)
		if err != nil {
			return err
		}
		if ids := users[name]; len(ids) > 0 && m.Chain > 1 {
			return fmt.Errorf("container %s was restored from %s and runs on its layers: merge a newer epoch, or delete the container first: %w", ids[0], name, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// mergeMember builds the full image of one member, or gives the one it has.
func (h *Host) mergeMember(ctx context.Context, m *oci.Member) (_ oci.MemberImage, retErr error) {
	if m.Chain == 1 {
		return m.Image()
	}
	if err := h.unpack(ctx, m); err != nil {
		return oci.MemberImage{}, err
	}
	var view string
	defer func() {
		if view != "" {
			retErr = errors.Join(retErr, h.Client.SnapshotService(Snapshotter).Remove(context.WithoutCancel(ctx), view))
		}
	}()
	dirs, err := h.viewChain(ctx, "cohort-merge-"+newEpochID(), m, &view)
	if err != nil {
		return oci.MemberImage{}, err
	}
	files, closeFiles, err := mergedImages(dirs.checkpoints)
	if err != nil {
		return oci.MemberImage{}, fmt.Errorf("member %s: put the memory of %d epochs together: %w", m.Name, m.Chain, err)
	}
	img, err := oci.MergeMember(ctx, h.Client.ContentStore(), oci.MergeInput{
		Member: m, CheckpointDir: dirs.checkpoints[0], Images: files, Uppers: dirs.uppers, Below: dirs.base,
	})
	if err = errors.Join(err, closeFiles()); err != nil {
		return oci.MemberImage{}, err
	}
	return img, nil
}

// mergedImages lists CRIU's images of a chain of checkpoints, newest first, as one
// full checkpoint has them. They can be read until closed is called.
func mergedImages(checkpoints []string) (files []oci.File, closed func() error, err error) {
	dirs := make([]string, len(checkpoints))
	for i, dir := range checkpoints {
		dirs[i] = filepath.Join(dir, oci.ImagesDir)
	}
	chain, err := pages.OpenChain(dirs)
	if err != nil {
		return nil, nil, err
	}
	merged, err := pages.Merge(chain)
	if err != nil {
		return nil, nil, errors.Join(err, chain.Close())
	}
	for _, f := range merged.Files {
		files = append(files, oci.File{Name: f.Name, Size: f.Size, Open: f.Open})
	}
	return files, chain.Close, nil
}

// unpack makes the snapshots of a member's image, unless they are there.
func (h *Host) unpack(ctx context.Context, m *oci.Member) error {
	_, err := h.Client.SnapshotService(Snapshotter).Stat(ctx, m.ChainID.String())
	if err == nil {
		return nil
	}
	if !errdefs.IsNotFound(err) {
		return fmt.Errorf("member %s: %w", m.Name, err)
	}
	return h.apply(ctx, m, len(m.Layers))
}

// unpackBase makes the snapshot of the lowest layers of a member's image, those whose
// chain id is given.
func (h *Host) unpackBase(ctx context.Context, m *oci.Member, chain digest.Digest) error {
	ids := m.DiffIDs()
	for n := range ids {
		if identity.ChainID(ids[:n:n]) == chain && n > 0 {
			return h.apply(ctx, m, n)
		}
	}
	return fmt.Errorf("member %s: no layers have the chain id %s: %w", m.Name, chain, errdefs.ErrNotFound)
}

func (h *Host) apply(ctx context.Context, m *oci.Member, n int) error {
	layers := make([]rootfs.Layer, n)
	for i, l := range m.Layers[:n] {
		layers[i].Blob = l.Descriptor
		layers[i].Diff.MediaType, layers[i].Diff.Digest = "application/vnd.oci.image.layer.v1.tar", l.DiffID
	}
	if _, err := rootfs.ApplyLayers(ctx, layers, h.Client.SnapshotService(Snapshotter), h.Client.DiffService()); err != nil {
		return fmt.Errorf("member %s: unpack its layers: %w", m.Name, err)
	}
	return nil
}
