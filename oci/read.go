// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specsgo "github.com/opencontainers/runtime-spec/specs-go"
)

// ErrNotCheckpoint is wrapped where an image is well but no checkpoint of cohort's.
var ErrNotCheckpoint = errors.New("not a cohort checkpoint image")

// Layer is one layer of a member's image.
type Layer struct {
	Descriptor ocispec.Descriptor `json:"descriptor"`
	DiffID     digest.Digest      `json:"diff_id"`
	// Kind is LayerRW or LayerCheckpoint, or "base".
	Kind string `json:"kind"`
	// EpochNumber is the epoch that the layer was made in, 0 for the base.
	EpochNumber uint64 `json:"epoch_number,omitempty"`
}

// Member is a member's image, read from the store.
type Member struct {
	Name        string             `json:"name"`
	Manifest    ocispec.Descriptor `json:"manifest"`
	Config      ocispec.Descriptor `json:"config"`
	Layers      []Layer            `json:"layers"`
	Annotations map[string]string  `json:"annotations,omitempty"`
	// ChainID is the snapshot that holds the whole image, checkpoint included.
	ChainID digest.Digest `json:"chain_id"`
	// Parent is the epoch that an increment builds on, Chain of how many epochs the
	// image consists, its own included.
	Parent *ParentEpoch `json:"parent,omitempty"`
	Chain  int          `json:"chain"`
	// Bytes of all blobs, IncrementBytes of those that are this epoch's alone.
	Bytes          int64 `json:"bytes"`
	IncrementBytes int64 `json:"increment_bytes"`
	// Checkpoint and Spec are filled by ReadCheckpoint.
	Checkpoint *Checkpoint   `json:"checkpoint,omitempty"`
	Spec       *specsgo.Spec `json:"-"`
}

// Group is a group's image, or a single member's.
type Group struct {
	Target      ocispec.Descriptor `json:"target"`
	Name        string             `json:"group"`
	Epoch       string             `json:"epoch"`
	EpochNumber uint64             `json:"epoch_number"`
	CutAt       time.Time          `json:"cut_at"`
	Stopped     bool               `json:"stopped"`
	// Parent is the epoch that members which are increments build on, nil if all are
	// full; Chain the longest of the members', and FullEpoch the number of the full
	// epoch with which that one begins (0 if it is not told).
	Parent    *ParentEpoch `json:"parent,omitempty"`
	Chain     int          `json:"chain"`
	FullEpoch uint64       `json:"full_epoch_number,omitempty"`
	// Whole is false where Target is one member's manifest.
	Whole   bool     `json:"whole"`
	Members []Member `json:"members"`
}

// ReadGroup reads a group from its index, or a group of one from a member's
// manifest. It reads manifests and configs; layers are not touched. What the
// group is said to be comes from annotations: use ReadCheckpoint for what a restore
// relies on. An image that is no checkpoint gives ErrNotCheckpoint, content that is
// not here ErrNotFound.
func ReadGroup(ctx context.Context, provider content.Provider, desc ocispec.Descriptor) (*Group, error) {
	g, err := readGroup(ctx, provider, desc)
	if err != nil {
		return nil, fmt.Errorf("reading image %s: %w", desc.Digest, err)
	}
	return g, nil
}

func readGroup(ctx context.Context, provider content.Provider, desc ocispec.Descriptor) (*Group, error) {
	g := &Group{Target: ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size}}
	children := []ocispec.Descriptor{desc}
	var annotations map[string]string
	switch {
	case images.IsIndexType(desc.MediaType):
		var idx ocispec.Index
		if err := readJSONBlob(ctx, provider, desc, &idx); err != nil {
			return nil, err
		}
		if idx.Annotations[AnnotationGroup] == "" {
			return nil, fmt.Errorf("index without %s: %w", AnnotationGroup, ErrNotCheckpoint)
		}
		children, annotations, g.Whole = idx.Manifests, idx.Annotations, true
	case !images.IsManifestType(desc.MediaType):
		return nil, fmt.Errorf("media type %q: %w", desc.MediaType, ErrNotCheckpoint)
	}
	if len(children) == 0 || len(children) > maxMembers {
		return nil, fmt.Errorf("%d members: %w", len(children), errdefs.ErrInvalidArgument)
	}
	for _, c := range children {
		m, err := readMember(ctx, provider, c)
		if err != nil {
			return nil, fmt.Errorf("member %s: %w", c.Digest, err)
		}
		g.Members = append(g.Members, *m)
	}
	if annotations == nil {
		annotations = g.Members[0].Annotations
	}
	if err := g.describe(annotations); err != nil {
		return nil, err
	}
	if err := g.agree(); err != nil {
		return nil, err
	}
	if err := g.chainOf(); err != nil {
		return nil, err
	}
	g.order(strings.Split(annotations[AnnotationMembers], ","))
	return g, nil
}

func (g *Group) describe(a map[string]string) (err error) {
	g.Name, g.Epoch = a[AnnotationGroup], a[AnnotationEpoch]
	if err := ValidGroup(g.Name); err != nil {
		return err
	}
	if !epochPattern().MatchString(g.Epoch) {
		return fmt.Errorf("epoch %q is not 32 hex digits: %w", g.Epoch, errdefs.ErrInvalidArgument)
	}
	g.Stopped = a[AnnotationStopped] == "true"
	if s := a[AnnotationEpochNumber]; s != "" {
		if g.EpochNumber, err = strconv.ParseUint(s, 10, 64); err != nil {
			return fmt.Errorf("%s: %w: %w", AnnotationEpochNumber, err, errdefs.ErrInvalidArgument)
		}
	}
	if g.CutAt, err = time.Parse(time.RFC3339Nano, a[AnnotationCutTime]); err != nil {
		return fmt.Errorf("%s: %w: %w", AnnotationCutTime, err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// order puts the members into the order of restore, which a tool that rewrote
// the index may have lost. Members that are not named stay behind those that are.
func (g *Group) order(names []string) {
	at := func(m Member) int {
		if i := slices.Index(names, m.Name); i >= 0 {
			return i
		}
		return len(names)
	}
	slices.SortStableFunc(g.Members, func(a, b Member) int { return at(a) - at(b) })
}

// agree checks that each member is there once and that all are of one epoch:
// members of two cuts do not fit together.
func (g *Group) agree() error {
	seen := map[string]bool{}
	for _, m := range g.Members {
		if seen[m.Name] {
			return fmt.Errorf("two members are called %s: %w", m.Name, errdefs.ErrInvalidArgument)
		}
		seen[m.Name] = true
		if m.Annotations[AnnotationGroup] != g.Name || m.Annotations[AnnotationEpoch] != g.Epoch {
			return fmt.Errorf("member %s is of another group or epoch (%s, %s): %w", m.Name, printable(m.Annotations[AnnotationGroup]), printable(m.Annotations[AnnotationEpoch]), errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func readMember(ctx context.Context, provider content.Provider, desc ocispec.Descriptor) (*Member, error) {
	if !images.IsManifestType(desc.MediaType) {
		return nil, fmt.Errorf("media type %q: %w", desc.MediaType, ErrNotCheckpoint)
	}
	var (
		man    ocispec.Manifest
		config ocispec.Image
	)
	if err := readJSONBlob(ctx, provider, desc, &man); err != nil {
		return nil, err
	}
	if man.Annotations[AnnotationGroup] == "" || man.Annotations[AnnotationMember] == "" {
		return nil, fmt.Errorf("manifest without %s: %w", AnnotationMember, ErrNotCheckpoint)
	}
	if err := readJSONBlob(ctx, provider, man.Config, &config); err != nil {
		return nil, err
	}
	ids := config.RootFS.DiffIDs
	if len(ids) != len(man.Layers) || len(ids) < 2 {
		return nil, fmt.Errorf("%d layers, %d diff ids: %w", len(man.Layers), len(ids), errdefs.ErrInvalidArgument)
	}
	m := &Member{Name: man.Annotations[AnnotationMember], Manifest: desc, Config: man.Config, Annotations: man.Annotations, ChainID: identity.ChainID(slices.Clone(ids))}
	if err := ValidMember(m.Name); err != nil {
		return nil, err
	}
	for i, l := range man.Layers {
		if err := errors.Join(l.Digest.Validate(), ids[i].Validate()); err != nil {
			return nil, fmt.Errorf("layer %d: %w: %w", i, err, errdefs.ErrInvalidArgument)
		}
		if l.Size < 0 {
			return nil, fmt.Errorf("layer %d: size %d: %w", i, l.Size, errdefs.ErrInvalidArgument)
		}
		kind := l.Annotations[AnnotationLayer]
		if kind != LayerRW && kind != LayerCheckpoint {
			kind = layerBase
		}
		epoch, err := optionalUint(l.Annotations, AnnotationEpochNumber)
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w: %w", i, err, errdefs.ErrInvalidArgument)
		}
		m.Layers = append(m.Layers, Layer{Descriptor: l, DiffID: ids[i], Kind: kind, EpochNumber: epoch})
	}
	if last := m.Layers[len(m.Layers)-1]; last.Kind != LayerCheckpoint {
		return nil, fmt.Errorf("its last layer is no checkpoint (%s=%s is missing): %w", AnnotationLayer, LayerCheckpoint, ErrNotCheckpoint)
	}
	if err := m.readChain(); err != nil {
		return nil, err
	}
	return m, nil
}

// CheckpointLayer is the member's last layer.
func (m *Member) CheckpointLayer() Layer { return m.Layers[len(m.Layers)-1] }

// Image gives the member as BuildMember returned it, so that a group that was
// pulled can be named by names.Publish. ReadCheckpoint has been called before.
func (m *Member) Image() (MemberImage, error) {
	if m.Checkpoint == nil {
		return MemberImage{}, fmt.Errorf("member %s: its checkpoint has not been read: %w", m.Name, errdefs.ErrFailedPrecondition)
	}
	n := len(m.Layers)
	img := MemberImage{Checkpoint: *m.Checkpoint, Manifest: m.Manifest, Config: m.Config, CkptLayer: m.Layers[n-1].Descriptor, LayerDiffIDs: m.DiffIDs()}
	if m.ownLayers() == 2 {
		img.RWLayer = m.Layers[n-2].Descriptor
	}
	for _, l := range m.Layers[:n-m.ownLayers()] {
		img.BelowBytes += l.Descriptor.Size
	}
	img.setChains()
	img.ParentChainID = img.BaseChainID
	return img, nil
}

// Size is the number of bytes of the member's blobs, and of those that are of
// this epoch alone (its writable layer, memory and documents): of an increment, what
// a push uploads to a registry that has its parent.
func (m *Member) Size() (total, own int64) {
	total = m.Manifest.Size + m.Config.Size
	own = total
	for i, l := range m.Layers {
		total += l.Descriptor.Size
		if i >= len(m.Layers)-m.ownLayers() {
			own += l.Descriptor.Size
		}
	}
	return total, own
}

// ReadCheckpoint fills Checkpoint and Spec of every member from the head of its
// checkpoint layer, without unpacking it, and checks that they say what the
// index says. For inspection and for planning a restore.
func (g *Group) ReadCheckpoint(ctx context.Context, provider content.Provider) error {
	for i := range g.Members {
		m := &g.Members[i]
		ck, spec, err := readLayerHead(ctx, provider, m.CheckpointLayer().Descriptor)
		if err != nil {
			return fmt.Errorf("reading the checkpoint of %s: %w", m.Name, err)
		}
		if ck.Member != m.Name || ck.Group != g.Name || ck.Epoch != g.Epoch {
			return fmt.Errorf("the checkpoint in image %s is of member %s, group %s, epoch %s: %w", m.Manifest.Digest, ck.Member, ck.Group, ck.Epoch, errdefs.ErrInvalidArgument)
		}
		if ck.Chain != m.Chain || (ck.Parent == nil) != (m.Parent == nil) || ck.Parent != nil && *ck.Parent != *m.Parent {
			return fmt.Errorf("the checkpoint in image %s consists of %d epochs on parent %v, its layers and annotations tell of %d on %v: %w", m.Manifest.Digest, ck.Chain, ck.Parent, m.Chain, m.Parent, errdefs.ErrInvalidArgument)
		}
		m.Checkpoint, m.Spec = ck, spec
	}
	return nil
}

// readJSONBlob reads a document of bounded size and checks its digest: a
// provider need not be containerd's own store.
func readJSONBlob(ctx context.Context, provider content.Provider, desc ocispec.Descriptor, v any) error {
	if err := desc.Digest.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w: %w", desc.Digest, err, errdefs.ErrInvalidArgument)
	}
	ra, err := provider.ReaderAt(ctx, ocispec.Descriptor{Digest: desc.Digest, MediaType: desc.MediaType, Size: desc.Size})
	if err != nil {
		return fmt.Errorf("%s: %w", desc.Digest, err)
	}
	defer ra.Close()
	if ra.Size() > maxJSON {
		return fmt.Errorf("%s: %d bytes, a document has at most %d: %w", desc.Digest, ra.Size(), maxJSON, errdefs.ErrInvalidArgument)
	}
	b, err := io.ReadAll(io.LimitReader(content.NewReader(ra), maxJSON))
	if err != nil {
		return fmt.Errorf("%s: %w", desc.Digest, err)
	}
	if desc.Digest.Algorithm().FromBytes(b) != desc.Digest {
		return fmt.Errorf("%s: content is damaged: %w", desc.Digest, errdefs.ErrDataLoss)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w: %w", desc.Digest, err, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Listed is one line of `cohort images`.
type Listed struct {
	Ref       string    `json:"ref"`
	CreatedAt time.Time `json:"created_at"`
	Group     *Group    `json:"group"`
	// Bytes of all distinct blobs, and of those that are of this epoch alone.
	Bytes          int64 `json:"bytes"`
	IncrementBytes int64 `json:"increment_bytes"`
}

// ListGroups finds the checkpoint images among an image store's records: group
// images, and members whose group has no name here. Images that are no checkpoints, or
// not all here, are passed over.
func ListGroups(ctx context.Context, store images.Store, provider content.Provider) ([]Listed, error) {
	all, err := store.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("listing images: %w", err)
	}
	var groups, single []Listed
	inGroup := map[digest.Digest]bool{}
	for _, i := range all {
		g, err := readGroup(ctx, provider, i.Target)
		if err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			continue
		}
		l := Listed{Ref: i.Name, CreatedAt: i.CreatedAt, Group: g}
		l.Bytes, l.IncrementBytes = g.bytes()
		if !g.Whole {
			single = append(single, l)
			continue
		}
		groups = append(groups, l)
		for _, m := range g.Members {
			inGroup[m.Manifest.Digest] = true
		}
	}
	for _, l := range single {
		if !inGroup[l.Group.Target.Digest] {
			groups = append(groups, l)
		}
	}
	slices.SortFunc(groups, func(a, b Listed) int { return strings.Compare(a.Ref, b.Ref) })
	return groups, nil
}

func (g *Group) bytes() (total, own int64) {
	seen := map[digest.Digest]bool{}
	add := func(d ocispec.Descriptor, mine bool) {
		if !seen[d.Digest] {
			seen[d.Digest] = true
			total += d.Size
			if mine {
				own += d.Size
			}
		}
	}
	add(g.Target, true)
	for _, m := range g.Members {
		add(m.Manifest, true)
		add(m.Config, true)
		for i, l := range m.Layers {
			add(l.Descriptor, i >= len(m.Layers)-m.ownLayers())
		}
	}
	return total, own
}
