// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	memberAPI "github.com/cohort-project/cohort/api/member/v1"
	"github.com/cohort-project/cohort/oci"
	"github.com/cohort-project/cohort/oci/names"
	"github.com/cohort-project/cohort/runtime/undo"
	"github.com/cohort-project/cohort/snapshotter"
)

// exporter turns the sealed captures of a group into images.
type exporter struct {
	h       *Host
	members []*member
	res     *CheckpointResult
	info    oci.GroupInfo
	// newest is a second name for the group, if it is another than res.Ref.
	newest string
	// views are snapshots that hold the parent epoch's files meanwhile.
	views []string
}

// run is the export phase. What it leaves behind when it fails is under the
// lease of ctx and goes with it, but for the captures, which the members discard
// when the epoch ends.
func (x *exporter) run(ctx context.Context) error {
	images := make([]oci.MemberImage, len(x.members))
	var eg errgroup.Group
	for i, m := range x.members {
		if m.sealed == nil {
			return fmt.Errorf("member %s: %w", m.ID(), errNotSealed)
		}
		eg.Go(func() (err error) {
			images[i], err = x.member(ctx, m)
			return err
		})
	}
	if err := eg.Wait(); err != nil {
		return err
	}
	for _, img := range images {
		if img.Checkpoint.CutAt.After(x.info.CutAt) {
			x.info.CutAt = img.Checkpoint.CutAt
		}
	}
	if x.info.CutAt.IsZero() {
		x.info.CutAt = time.Now()
	}
	desc, err := oci.BuildGroup(ctx, x.h.Client.ContentStore(), images, x.info)
	if err != nil {
		return err
	}
	x.res.Digest = desc.Digest.String()
	published, err := names.Publish(ctx, x.h.Client.ImageService(), x.res.Ref, desc, images)
	if err != nil {
		return err
	}
	if err := x.moveTo(ctx, x.newest, desc, images); err != nil {
		return err
	}
	for i, m := range x.members {
		parts := map[string]float64{}
		for k, v := range m.capture.GetPartsNs() {
			parts[k] = float64(v) / 1e6
		}
		img := &images[i]
		r := CheckpointMember{
			ID: m.c.ID(), Name: m.c.Member, Processes: len(img.Checkpoint.Processes),
			MemoryBytes: m.sealed.MemoryBytes, StorageBytes: m.sealed.StorageBytes,
			Image: published[i], Digest: img.Manifest.Digest.String(), PartsMS: parts,
			Chain: img.Checkpoint.Chain, IncrementBytes: img.Manifest.Size + img.Config.Size + img.RWLayer.Size + img.CkptLayer.Size,
			Memory: memoryResult(m.sealed.GetMemory()),
		}
		r.Bytes = r.IncrementBytes + img.BelowBytes
		if p := img.Checkpoint.Parent; p != nil {
			r.ParentEpoch = p.Epoch
		} else if r.Memory.FullWhy == "" {
			r.Memory.FullWhy = m.fullWhy
		}
		x.res.Members = append(x.res.Members, r)
	}
	return nil
}

// member builds one member's image, and commits what was captured as the
// snapshots that a restore on this host starts from.
func (x *exporter) member(ctx context.Context, m *member) (oci.MemberImage, error) {
	store := x.h.Client.ContentStore()
	in := oci.MemberInput{
		Base: m.image.target, Parent: digest.Digest(m.image.chainID),
		Upper: m.sealed.FsDir, CheckpointDir: m.sealed.CheckpointDir,
	}
	if m.earlier != nil {
		in.Earlier = &m.earlier.Manifest
	}
	if m.increment() {
		if m.parent == nil {
			return oci.MemberImage{}, fmt.Errorf("member %s made an increment, but was given no parent epoch: is its shim of another version? %w", m.ID(), errdefs.ErrInternal)
		}
		in.ParentImage, in.Below = &m.parent.image.Manifest, m.parent.below
	}
	img, err := oci.BuildMember(ctx, store, in)
	if err != nil {
		return img, err
	}
	capture := m.sealed.Capture
	if err := x.h.ensureSnapshot(ctx, img, img.BaseChainID); err != nil {
		return img, fmt.Errorf("member %s: the snapshot below the writable layer: %w", m.ID(), err)
	}
	if img.RWLayer.Digest != "" {
		if err := x.adopt(ctx, snapshotter.LabelAdoptFS, capture, img.BaseChainID, img.RWChainID); err != nil {
			return img, fmt.Errorf("member %s: commit the writable layer: %w", m.ID(), err)
		}
	}
	if err := x.adopt(ctx, snapshotter.LabelAdoptCheckpoint, capture, img.RWChainID, img.CheckpointChainID); err != nil {
		return img, fmt.Errorf("member %s: commit the checkpoint layer: %w", m.ID(), err)
	}
	if err := oci.SetSnapshotRef(ctx, store, img.Config.Digest, Snapshotter, img.CheckpointChainID); err != nil {
		return img, err
	}
	// What it held is in snapshots now.
	return img, undo.Discard(ctx, m.c.inspect.StorageAddress, capture, dialTimeout)
}

// adopt commits a part of a capture as the snapshot of a chain id. It is no
// error if that exists: its content is the same by construction.
func (x *exporter) adopt(ctx context.Context, label, capture string, parent, chain digest.Digest) error {
	sn := x.h.Client.SnapshotService(Snapshotter)
	if _, err := sn.Stat(ctx, chain.String()); err == nil {
		return nil
	}
	key := fmt.Sprintf("cohort-%s-%s", capture, chain.Encoded()[:12])
	if _, err := sn.Prepare(ctx, key, parent.String(), snapshots.WithLabels(map[string]string{label: capture})); err != nil {
		return err
	}
	if err := sn.Commit(ctx, chain.String(), key); err != nil {
		rerr := sn.Remove(context.WithoutCancel(ctx), key)
		if errdefs.IsAlreadyExists(err) {
			return rerr
		}
		return err
	}
	return nil
}

func memoryResult(m *memberAPI.Memory) MemoryResult {
	return MemoryResult{
		Engine: m.GetEngine(), Why: m.GetWhy(), Rounds: m.GetRounds(), CopiedBytes: m.GetCopiedBytes(), End: m.GetEnd(),
		BarrierBytes: m.GetBarrierBytes(), PrecopiedBytes: m.GetPrecopiedBytes(), Untracked: m.GetUntracked(),
		Increment: m.GetIncrement(), FullWhy: m.GetFullWhy(), ParentBytes: m.GetParentBytes(),
		SharedPrecopiedBytes: m.GetSharedPrecopiedBytes(), SharedBarrierBytes: m.GetSharedBarrierBytes(), SharedWhy: m.GetSharedWhy(),
	}
}
