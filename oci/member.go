// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"time"

	metadata "github.com/checkpoint-restore/checkpointctl/lib"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/converter"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// MemberInput is what BuildMember makes an image of.
type MemberInput struct {
	// Base is the image the container ran on: a manifest, or an index of which
	// one manifest is chosen. Config and layers are in the content store.
	Base ocispec.Descriptor
	// Parent is the chain id of the container's snapshot's parent. Where it is
	// given, a base with another chain id is refused: an image's name may have
	// moved on since the container was created.
	Parent digest.Digest
	// ParentImage is the member manifest of the epoch that the checkpoint builds on. Where
	// it is given, Base and Parent are not used: all of its layers become the new
	// image's, Upper and CheckpointDir hold what changed since. It must be given exactly
	// if the checkpoint's document names a parent.
	ParentImage *ocispec.Descriptor
	// Earlier is another checkpoint's image of the same container, or nil: the layers
	// below its chain are taken where Base is not what the container runs on any more,
	// because its name was moved.
	Earlier *ocispec.Descriptor
	// Upper is the captured writable layer in overlay format.
	Upper string
	// Below are the directories of the layers that Upper was captured on, newest first;
	// nil if they are not known (see WriteUpper).
	Below []string
	// CheckpointDir is .cohort on disk, complete (see WriteCheckpointDir).
	CheckpointDir string
	// Compression of the two new layers; zero is Zstd.
	Compression Compression
}

// MemberImage is a member's image in the content store.
type MemberImage struct {
	Checkpoint Checkpoint
	// Manifest carries platform and annotations, as the index has it.
	Manifest ocispec.Descriptor
	Config   ocispec.Descriptor
	// LayerDiffIDs are all layers, bottom first; the last two are the writable
	// layer and the checkpoint.
	LayerDiffIDs []digest.Digest
	// RWLayer is zero in an increment in which no file changed: it has no such layer.
	RWLayer   ocispec.Descriptor
	CkptLayer ocispec.Descriptor
	// BelowBytes are those of the layers below.
	BelowBytes int64
	// BaseChainID is the parent under which the writable layer is committed. It
	// differs from the container's own parent where that was a checkpoint
	// image: the old checkpoint layer is not part of the new image. An increment's is
	// its parent's CheckpointChainID.
	BaseChainID digest.Digest
	// RWChainID is the parent under which the checkpoint layer is committed:
	// BaseChainID where there is no RWLayer.
	RWChainID         digest.Digest
	CheckpointChainID digest.Digest
	// ParentChainID is the chain of the base image as it is, old checkpoint
	// layers included: the parent of the container's snapshot.
	ParentChainID digest.Digest
}

// baseImage is an image, or those of its layers that a new one is put on.
type baseImage struct {
	config   ocispec.Image
	raw      map[string]json.RawMessage
	layers   []ocispec.Descriptor
	diffIDs  []digest.Digest
	history  []ocispec.History
	platform ocispec.Platform
	parent   digest.Digest // chain id of all layers, also those that are left out
}

// BuildMember writes a member's image into the store: the base image's layers,
// the writable layer, the checkpoint layer, a config and a manifest. It reads
// Upper and CheckpointDir once, in one pass, and needs the container no more.
// The caller's context carries a lease until the image has a name.
//
// Errors: ErrNotFound where the base image or one of its layers is not in the store,
// ErrFailedPrecondition where the writable layer cannot be a layer (the error says
// what to change), ErrInvalidArgument for a checkpoint that is not whole.
func BuildMember(ctx context.Context, store content.Store, in MemberInput) (MemberImage, error) {
	ck, _, err := ReadCheckpointDir(in.CheckpointDir)
	if err != nil {
		return MemberImage{}, fmt.Errorf("building a checkpoint image from %s: %w", in.CheckpointDir, err)
	}
	img, err := buildMember(ctx, store, in, ck)
	if err != nil {
		return MemberImage{}, fmt.Errorf("building the checkpoint image of %s: %w", ck.Member, err)
	}
	return img, nil
}

func buildMember(ctx context.Context, store content.Store, in MemberInput, ck *Checkpoint) (MemberImage, error) {
	var (
		base *baseImage
		err  error
	)
	switch {
	case in.ParentImage != nil && ck.Parent == nil:
		return MemberImage{}, fmt.Errorf("it is a full checkpoint, but a parent image is given: %w", errdefs.ErrInvalidArgument)
	case in.ParentImage == nil && ck.Parent != nil:
		return MemberImage{}, fmt.Errorf("it builds on epoch %d, but no parent image is given: %w", ck.Parent.Number, errdefs.ErrInvalidArgument)
	case in.ParentImage != nil:
		base, err = openParent(ctx, store, *in.ParentImage, ck)
	default:
		base, err = openBase(ctx, store, in.Base, in.Parent)
		if errdefs.IsNotFound(err) && in.Earlier != nil {
			var eerr error
			if base, eerr = openEarlier(ctx, store, *in.Earlier, ck); eerr == nil {
				err = nil
			} else {
				err = errors.Join(err, eerr)
			}
		}
	}
	if err != nil {
		return MemberImage{}, err
	}
	var layers []layer
	changed := true
	if ck.Parent != nil {
		if changed, err = hasEntries(in.Upper); err != nil {
			return MemberImage{}, err
		}
	}
	if changed {
		rw, err := writeLayer(ctx, store, in.Compression, LayerRW, ck, func(w io.Writer) error {
			return WriteUpper(ctx, w, []string{in.Upper}, in.Below)
		})
		if err != nil {
			return MemberImage{}, err
		}
		layers = append(layers, rw)
	}
	cl, err := writeLayer(ctx, store, in.Compression, LayerCheckpoint, ck, func(w io.Writer) error {
		return writeCheckpoint(ctx, w, in.CheckpointDir, ck.CutAt)
	})
	if err != nil {
		return MemberImage{}, err
	}
	return base.assemble(ctx, store, ck, append(layers, cl))
}

// hasEntries says whether there is anything in a directory.
func hasEntries(dir string) (bool, error) {
	f, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer f.Close()
	_, err = f.Readdirnames(1)
	if errors.Is(err, io.EOF) {
		return false, nil
	}
	return err == nil, err
}

// layer is a new layer in the store.
type layer struct {
	desc   ocispec.Descriptor
	diffID digest.Digest
}

// assemble writes config and manifest of an image that consists of the base and the
// layers of a checkpoint, which are in the store: a writable one, or none, and the
// checkpoint's.
func (b *baseImage) assemble(ctx context.Context, store content.Store, ck *Checkpoint, layers []layer) (MemberImage, error) {
	out := MemberImage{Checkpoint: *ck, LayerDiffIDs: slices.Clone(b.diffIDs), ParentChainID: b.parent}
	if ck.Parent != nil {
		out.ParentChainID = ck.Rootfs.ChainID
	}
	cut := ck.CutAt.UTC()
	descs := slices.Clone(b.layers)
	history := slices.Clone(b.history)
	for _, l := range b.layers {
		out.BelowBytes += l.Size
	}
	for _, l := range layers {
		what := "checkpoint"
		if l.desc.Annotations[AnnotationLayer] == LayerRW {
			what, out.RWLayer = "writable layer", l.desc
		} else {
			out.CkptLayer = l.desc
		}
		out.LayerDiffIDs = append(out.LayerDiffIDs, l.diffID)
		descs = append(descs, l.desc)
		history = append(history, ocispec.History{Created: &cut, CreatedBy: "cohort: " + what + " of " + ck.Member, Comment: "epoch " + ck.Epoch})
	}
	out.setChains()
	config, err := b.newConfig(out.LayerDiffIDs, history, cut)
	if err != nil {
		return MemberImage{}, err
	}
	if out.Config, err = writeJSONBlob(ctx, store, ocispec.MediaTypeImageConfig, config, nil); err != nil {
		return MemberImage{}, err
	}
	manifest := ocispec.Manifest{
		Versioned:   specs.Versioned{SchemaVersion: 2},
		MediaType:   ocispec.MediaTypeImageManifest,
		Config:      out.Config,
		Layers:      descs,
		Annotations: memberAnnotations(ck),
	}
	out.Manifest, err = writeJSONBlob(ctx, store, manifest.MediaType, manifest, gcLabels(append([]ocispec.Descriptor{manifest.Config}, manifest.Layers...)))
	if err != nil {
		return MemberImage{}, err
	}
	out.Manifest.Platform = &b.platform
	out.Manifest.Annotations = childAnnotations(ck)
	return out, nil
}

func (m *MemberImage) setChains() {
	n := len(m.LayerDiffIDs)
	m.CheckpointChainID = identity.ChainID(m.LayerDiffIDs)
	m.RWChainID = identity.ChainID(m.LayerDiffIDs[:n-1])
	m.BaseChainID = m.RWChainID
	if m.RWLayer.Digest != "" {
		m.BaseChainID = identity.ChainID(m.LayerDiffIDs[:n-2])
	}
}

// openBase reads the base image, drops its checkpoint layers and checks that
// every other one is there: an image with a hole can be neither pushed nor
// restored elsewhere.
func openBase(ctx context.Context, store content.Store, desc ocispec.Descriptor, parent digest.Digest) (*baseImage, error) {
	candidates, err := manifests(ctx, store, desc)
	if err != nil {
		return nil, fmt.Errorf("reading the base image: %w", err)
	}
	var tried []error
	for _, c := range candidates {
		b, err := readBase(ctx, store, c, func(_ int, l ocispec.Descriptor) bool {
			return l.Annotations[AnnotationLayer] != LayerCheckpoint
		})
		if err == nil && parent != "" && b.parent != parent {
			err = fmt.Errorf("its layers unpack to %s, but the container runs on %s: %w", b.parent, parent, errdefs.ErrNotFound)
		}
		if err == nil {
			return b, nil
		}
		tried = append(tried, fmt.Errorf("base image %s: %w", c.Digest, err))
	}
	return nil, errors.Join(tried...)
}

// manifests lists the manifests that desc can mean here, the best one first.
func manifests(ctx context.Context, store content.Provider, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	if !images.IsIndexType(desc.MediaType) {
		return []ocispec.Descriptor{desc}, nil
	}
	var idx ocispec.Index
	if err := readJSONBlob(ctx, store, desc, &idx); err != nil {
		return nil, err
	}
	match := platforms.Default()
	var out []ocispec.Descriptor
	for _, m := range idx.Manifests {
		if images.IsManifestType(m.MediaType) && (m.Platform == nil || match.Match(*m.Platform)) {
			out = append(out, m)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("index %s has no manifest for %s: %w", desc.Digest, platforms.DefaultString(), errdefs.ErrNotFound)
	}
	slices.SortStableFunc(out, func(a, b ocispec.Descriptor) int {
		switch {
		case a.Platform == nil || b.Platform == nil:
			return 0
		case match.Less(*a.Platform, *b.Platform):
			return -1
		case match.Less(*b.Platform, *a.Platform):
			return 1
		}
		return 0
	})
	return out, nil
}

// readBase reads an image with those of its layers that keep chooses; nil keeps all.
func readBase(ctx context.Context, store content.Store, desc ocispec.Descriptor, keep func(int, ocispec.Descriptor) bool) (*baseImage, error) {
	var m ocispec.Manifest
	if err := readJSONBlob(ctx, store, desc, &m); err != nil {
		return nil, err
	}
	b := &baseImage{}
	if err := readJSONBlob(ctx, store, m.Config, &b.config); err != nil {
		return nil, err
	}
	if err := readJSONBlob(ctx, store, m.Config, &b.raw); err != nil {
		return nil, err
	}
	ids := b.config.RootFS.DiffIDs
	if len(ids) != len(m.Layers) {
		return nil, fmt.Errorf("%d layers but %d diff ids: %w", len(m.Layers), len(ids), errdefs.ErrInvalidArgument)
	}
	b.parent = identity.ChainID(ids)
	drop := map[int]bool{}
	for i, l := range m.Layers {
		if keep != nil && !keep(i, l) {
			drop[i] = true
			continue
		}
		if _, err := store.Info(ctx, l.Digest); err != nil {
			return nil, fmt.Errorf("layer %s is not in the content store, pull the image again (with its layers kept, discard_unpacked_layers = false): %w", l.Digest, err)
		}
		// The same bytes have the same name in both formats, and a manifest that mixes
		// them is refused by some tools.
		l.MediaType = converter.ConvertDockerMediaTypeToOCI(l.MediaType)
		b.layers = append(b.layers, l)
		b.diffIDs = append(b.diffIDs, ids[i])
	}
	b.history = keepHistory(b.config.History, len(m.Layers), drop)
	b.platform = platforms.Normalize(b.config.Platform)
	b.platform.OSVersion, b.platform.OSFeatures = b.config.OSVersion, b.config.OSFeatures
	if b.platform.OS == "" || b.platform.Architecture == "" {
		b.platform = platforms.DefaultSpec()
	}
	return b, nil
}

// keepHistory drops the entries of dropped layers. A history that does not tell
// of as many layers as there are is dropped whole: it is optional, and a wrong one misleads.
func keepHistory(h []ocispec.History, layers int, drop map[int]bool) []ocispec.History {
	var out []ocispec.History
	i := 0
	for _, e := range h {
		if e.EmptyLayer {
			out = append(out, e)
			continue
		}
		if !drop[i] {
			out = append(out, e)
		}
		i++
	}
	if i != layers {
		out = nil
		for k := range layers {
			if !drop[k] {
				out = append(out, ocispec.History{CreatedBy: "unknown"})
			}
		}
	}
	return out
}

// newConfig keeps every field of the base's config, also those that the OCI
// types do not know (Docker's Healthcheck), and replaces what a new image has.
func (b *baseImage) newConfig(ids []digest.Digest, history []ocispec.History, created time.Time) (map[string]json.RawMessage, error) {
	out := map[string]json.RawMessage{}
	for k, v := range b.raw {
		out[k] = v
	}
	for _, k := range []string{"container", "container_config", "docker_version", "parent", "id"} {
		delete(out, k) // of Docker's builder, about the image that was
	}
	for k, v := range map[string]any{
		"created": created, "history": history, "architecture": b.platform.Architecture, "os": b.platform.OS,
		"rootfs": ocispec.RootFS{Type: "layers", DiffIDs: ids},
	} {
		enc, err := json.Marshal(v)
		if err != nil {
			return nil, err
		}
		out[k] = enc
	}
	return out, nil
}

func memberAnnotations(c *Checkpoint) map[string]string {
	a := childAnnotations(c)
	for k, v := range map[string]string{
		AnnotationVersion:                            strconv.Itoa(c.Version),
		AnnotationTerminal:                           strconv.FormatBool(c.Terminal),
		AnnotationContainer:                          c.ContainerID,
		AnnotationProcesses:                          strconv.Itoa(len(c.Processes)),
		AnnotationMemory:                             strconv.FormatUint(c.MemoryBytes, 10),
		AnnotationStorage:                            strconv.FormatUint(c.StorageBytes, 10),
		ocispec.AnnotationCreated:                    c.CutAt.UTC().Format(time.RFC3339Nano),
		metadata.CheckpointAnnotationEngine:          "containerd",
		metadata.CheckpointAnnotationName:            c.Member,
		metadata.CheckpointAnnotationRootfsImageName: c.Rootfs.ImageRef,
		metadata.CheckpointAnnotationRootfsImageSha:  c.Rootfs.ImageDigest.String(),
		metadata.CheckpointAnnotationRuntimeName:     c.Runtime,
		metadata.CheckpointAnnotationRuntimeVersion:  c.OCIRuntime,
		metadata.CheckpointAnnotationCriuVersion:     c.CRIUVersion,
		metadata.CheckpointAnnotationHostArch:        c.Host.Arch,
		metadata.CheckpointAnnotationHostKernel:      c.Host.Kernel,
		metadata.CheckpointAnnotationCgroupVersion:   c.Host.Cgroup,
		metadata.CheckpointAnnotationPod:             c.Group,
		metadata.CheckpointAnnotationRawImageName:    c.Rootfs.ImageRef,
	} {
		if v != "" {
			a[k] = v
		}
	}
	return a
}

// childAnnotations are on a member's descriptor in the index, for whoever looks
// at the index alone.
func childAnnotations(c *Checkpoint) map[string]string {
	a := map[string]string{
		AnnotationGroup:       c.Group,
		AnnotationMember:      c.Member,
		AnnotationEpoch:       c.Epoch,
		AnnotationEpochNumber: strconv.FormatUint(c.EpochNumber, 10),
		AnnotationCutTime:     c.CutAt.UTC().Format(time.RFC3339Nano),
		AnnotationStopped:     strconv.FormatBool(c.Stopped),
	}
	if c.NetNS != "" {
		a[AnnotationNetNS] = c.NetNS
	}
	chainAnnotations(c, a)
	return a
}

// gcLabels make containerd's collector keep the children of a document as long as the
// document itself.
func gcLabels(children []ocispec.Descriptor) map[string]string {
	out := map[string]string{}
	next := map[string]int{}
	for _, c := range children {
		for _, key := range images.ChildGCLabels(c) {
			n := next[key]
			next[key] = n + 1
			if n > 0 || key[len(key)-1] == '.' {
				key += strconv.Itoa(n)
			}
			out[key] = c.Digest.String()
		}
	}
	return out
}

// SetSnapshotRef makes the garbage collector keep a snapshot as long as the
// image, as containerd does for what it unpacks: config is the image's config,
// chain the name of the committed snapshot (MemberImage.CheckpointChainID).
func SetSnapshotRef(ctx context.Context, m content.Manager, config digest.Digest, snapshotter string, chain digest.Digest) error {
	label := "containerd.io/gc.ref.snapshot." + snapshotter
	_, err := m.Update(ctx, content.Info{Digest: config, Labels: map[string]string{label: chain.String()}}, "labels."+label)
	if err != nil {
		return fmt.Errorf("keeping snapshot %s with config %s: %w", chain, config, err)
	}
	return nil
}
