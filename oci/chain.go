// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"context"
	"fmt"
	"slices"
	"strconv"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// An increment's image is its parent's, layer by layer, and above it a writable layer and
// a checkpoint layer with what changed since:
//
//	base…  rw checkpoint  [rw] checkpoint  [rw] checkpoint
//	       full epoch     second           third of the chain
//
// A full checkpoint has exactly one checkpoint layer (buildMember drops those of the
// image that a restored container ran on), so the number of checkpoint layers is
// the length of the chain, and the chain begins with the writable layer below the first.

// MaxChain is of how many epochs a checkpoint may consist; overlayfs takes 500 layers.
const MaxChain = 128

// validChain checks what a document says of its parent. A parent is older than its
// increment, so that no chain of documents can go in circles.
func validChain(p *ParentEpoch, chain int, epoch string, number uint64) error {
	switch {
	case p == nil && chain != 1:
		return fmt.Errorf("a chain of %d epochs without a parent", chain)
	case p == nil:
		return nil
	case chain < 2 || chain > MaxChain:
		return fmt.Errorf("an increment in a chain of %d epochs, 2 to %d are possible", chain, MaxChain)
	case !epochPattern().MatchString(p.Epoch):
		return fmt.Errorf("parent epoch %q is not 32 hex digits", p.Epoch)
	case p.Epoch == epoch:
		return fmt.Errorf("epoch %s is its own parent", epoch)
	case p.Number >= number:
		return fmt.Errorf("epoch %d builds on epoch %d, which is not older", number, p.Number)
	}
	return nil
}

// chainAnnotations are the part of a member's annotations that tells of its parent.
func chainAnnotations(c *Checkpoint, a map[string]string) {
	a[AnnotationChain] = strconv.Itoa(c.Chain)
	if c.Parent != nil {
		a[AnnotationParent] = c.Parent.Epoch
		a[AnnotationParentNumber] = strconv.FormatUint(c.Parent.Number, 10)
	}
}

// readChain reads what chainAnnotations wrote, and checks it against the layers.
func (m *Member) readChain() error {
	for _, l := range m.Layers {
		if l.Kind == LayerCheckpoint {
			m.Chain++
		}
	}
	a := m.Annotations
	bad := func(err error) error {
		return fmt.Errorf("member %s: %w: %w", m.Name, err, errdefs.ErrInvalidArgument)
	}
	if s := a[AnnotationChain]; s != "" && s != strconv.Itoa(m.Chain) {
		return bad(fmt.Errorf("%s is %q, but it has %d checkpoint layers", AnnotationChain, printable(s), m.Chain))
	}
	number, err := optionalUint(a, AnnotationEpochNumber)
	if err != nil {
		return bad(err)
	}
	if a[AnnotationParent] != "" {
		m.Parent = &ParentEpoch{Epoch: a[AnnotationParent]}
		if m.Parent.Number, err = optionalUint(a, AnnotationParentNumber); err != nil {
			return bad(err)
		}
	}
	if err := validChain(m.Parent, m.Chain, a[AnnotationEpoch], number); err != nil {
		return bad(err)
	}
	m.Bytes, m.IncrementBytes = m.Size()
	return nil
}

func optionalUint(a map[string]string, name string) (n uint64, err error) {
	if s := a[name]; s != "" {
		if n, err = strconv.ParseUint(s, 10, 64); err != nil {
			return 0, fmt.Errorf("%s %q is not a number", name, printable(s))
		}
	}
	return n, nil
}

// BaseLayers is how many of the member's layers are not of its chain: those of the
// image that the container was made from, its own writable layers of earlier
// lives included.
func (m *Member) BaseLayers() int {
	i := slices.IndexFunc(m.Layers, func(l Layer) bool { return l.Kind == LayerCheckpoint })
	if i > 0 && m.Layers[i-1].Kind == LayerRW {
		i--
	}
	return max(i, 0)
}

// FullEpoch is the number of the full epoch that the chain begins with, 0 if
// its layers do not tell.
func (m *Member) FullEpoch() uint64 {
	for _, l := range m.Layers {
		if l.Kind == LayerCheckpoint {
			return l.EpochNumber
		}
	}
	return 0
}

// ownLayers is how many of the topmost layers are of the member's own epoch.
func (m *Member) ownLayers() int {
	if n := len(m.Layers); n >= 2 && m.Layers[n-2].Kind == LayerRW {
		return 2
	}
	return 1
}

// chainOf describes the group by its members: the longest chain, and the parent that
// the increments share.
func (g *Group) chainOf() error {
	for _, m := range g.Members {
		if m.Chain > g.Chain {
			g.Chain, g.FullEpoch = m.Chain, m.FullEpoch()
		}
		if m.Parent == nil {
			continue
		}
		if g.Parent != nil && *g.Parent != *m.Parent {
			return fmt.Errorf("its members build on different epochs, %d and %d: %w", g.Parent.Number, m.Parent.Number, errdefs.ErrInvalidArgument)
		}
		g.Parent = m.Parent
	}
	return nil
}

// openParent reads the image that an increment is put on, all layers as they are, and
// checks that it is a checkpoint of the same container.
func openParent(ctx context.Context, store content.Store, desc ocispec.Descriptor, ck *Checkpoint) (*baseImage, error) {
	fail := func(err error) (*baseImage, error) {
		return nil, fmt.Errorf("parent image %s: %w", desc.Digest, err)
	}
	m, old, err := sameContainer(ctx, store, desc, ck)
	if err != nil {
		return fail(err)
	}
	switch p := ck.Parent; {
	case old.Epoch != p.Epoch || old.EpochNumber != p.Number:
		err = fmt.Errorf("it is epoch %d (%s), the increment was taken against epoch %d (%s)", old.EpochNumber, old.Epoch, p.Number, p.Epoch)
	case old.Chain != m.Chain:
		err = fmt.Errorf("its document tells of a chain of %d epochs, it has layers of %d", old.Chain, m.Chain)
	case old.Chain+1 != ck.Chain:
		err = fmt.Errorf("its chain has %d epochs, so the increment's has %d and not %d", old.Chain, old.Chain+1, ck.Chain)
	}
	if err != nil {
		return fail(fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition))
	}
	b, err := readBase(ctx, store, desc, nil)
	if err != nil {
		return fail(err)
	}
	return b, nil
}

// sameContainer reads an image that must be a checkpoint of the container that ck is of.
func sameContainer(ctx context.Context, store content.Store, desc ocispec.Descriptor, ck *Checkpoint) (*Member, *Checkpoint, error) {
	m, err := readMember(ctx, store, desc)
	if err != nil {
		return nil, nil, err
	}
	old, _, err := readLayerHead(ctx, store, m.CheckpointLayer().Descriptor)
	if err != nil {
		return nil, nil, err
	}
	switch {
	case old.ContainerID != ck.ContainerID || !old.CreatedAt.Equal(ck.CreatedAt):
		err = fmt.Errorf("it is of container %s, created %v; this is %s, created %v", old.ContainerID, old.CreatedAt, ck.ContainerID, ck.CreatedAt)
	case old.Rootfs.ChainID != ck.Rootfs.ChainID:
		err = fmt.Errorf("its container ran on %s, this one on %s", old.Rootfs.ChainID, ck.Rootfs.ChainID)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	}
	return m, old, nil
}

// openEarlier reads what the container runs on out of another checkpoint of it.
func openEarlier(ctx context.Context, store content.Store, desc ocispec.Descriptor, ck *Checkpoint) (*baseImage, error) {
	m, _, err := sameContainer(ctx, store, desc, ck)
	if err != nil {
		return nil, fmt.Errorf("earlier checkpoint %s: %w", desc.Digest, err)
	}
	below := m.BaseLayers()
	b, err := readBase(ctx, store, desc, func(i int, _ ocispec.Descriptor) bool { return i < below })
	if err != nil {
		return nil, fmt.Errorf("earlier checkpoint %s: %w", desc.Digest, err)
	}
	b.parent = ck.Rootfs.ChainID
	return b, nil
}

// DiffIDs are those of the member's layers, bottom first.
func (m *Member) DiffIDs() []digest.Digest {
	out := make([]digest.Digest, len(m.Layers))
	for i, l := range m.Layers {
		out[i] = l.DiffID
	}
	return out
}
