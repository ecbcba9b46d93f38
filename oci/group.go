// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// GroupInfo is what only the group knows.
type GroupInfo struct {
	Group       string
	Epoch       string
	EpochNumber uint64
	CutAt       time.Time
	Stopped     bool
}

// BuildGroup writes the index over all members, in the order given, which is
// the order of restore. Every child is a runnable image with a platform, so
// registries and pull clients take them as they take a multi-platform image.
// Members of another group or epoch are refused.
func BuildGroup(ctx context.Context, store content.Store, members []MemberImage, info GroupInfo) (ocispec.Descriptor, error) {
	fail := func(err error) (ocispec.Descriptor, error) {
		return ocispec.Descriptor{}, fmt.Errorf("building the image of group %s: %w", info.Group, err)
	}
	if err := ValidGroup(info.Group); err != nil {
		return fail(err)
	}
	if len(members) == 0 || len(members) > maxMembers {
		return fail(fmt.Errorf("%d members, 1 to %d are possible: %w", len(members), maxMembers, errdefs.ErrInvalidArgument))
	}
	var (
		names    []string
		children []ocispec.Descriptor
		seen     = map[string]bool{}
	)
	for _, m := range members {
		ck := &m.Checkpoint
		switch {
		case ck.Group != info.Group || ck.Epoch != info.Epoch:
			return fail(fmt.Errorf("%s is of group %s, epoch %s: %w", ck.Member, ck.Group, ck.Epoch, errdefs.ErrInvalidArgument))
		case seen[ck.Member]:
			return fail(fmt.Errorf("two members are called %s: %w", ck.Member, errdefs.ErrAlreadyExists))
		case m.Manifest.Platform == nil:
			return fail(fmt.Errorf("%s has no platform: %w", ck.Member, errdefs.ErrInvalidArgument))
		}
		seen[ck.Member] = true
		names = append(names, ck.Member)
		children = append(children, m.Manifest)
	}
	index := ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: children,
		Annotations: map[string]string{
			AnnotationGroup:           info.Group,
			AnnotationEpoch:           info.Epoch,
			AnnotationEpochNumber:     strconv.FormatUint(info.EpochNumber, 10),
			AnnotationCutTime:         info.CutAt.UTC().Format(time.RFC3339Nano),
			AnnotationStopped:         strconv.FormatBool(info.Stopped),
			AnnotationMembers:         strings.Join(names, ","),
			ocispec.AnnotationCreated: info.CutAt.UTC().Format(time.RFC3339Nano),
		},
	}
	desc, err := writeJSONBlob(ctx, store, index.MediaType, index, gcLabels(children))
	if err != nil {
		return fail(err)
	}
	return desc, nil
}

// NormalizeRef gives the full name of a group image, as nerdctl and docker
// write it: domain and tag are added where they are missing. A digest is
// refused, because members are named by adding to the tag.
func NormalizeRef(ref string) (string, error) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return "", fmt.Errorf("image name %q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	if _, ok := named.(reference.Digested); ok {
		return "", fmt.Errorf("image name %q has a digest: name the image by a tag: %w", ref, errdefs.ErrInvalidArgument)
	}
	return named.String(), nil
}

// MemberRef names a member's image: REF-MEMBER.
func MemberRef(ref, member string) (string, error) {
	ref, err := NormalizeRef(ref)
	if err != nil {
		return "", err
	}
	if err := ValidMember(member); err != nil {
		return "", err
	}
	name := ref + "-" + member
	if _, err := reference.ParseDockerRef(name); err != nil {
		return "", fmt.Errorf("image name %q (%d characters; a tag has at most 128): %w: %w", name, len(name), err, errdefs.ErrInvalidArgument)
	}
	return name, nil
}

// Publish names the group REF and each member REF-MEMBER, members first, so
// that whoever finds REF finds the members. Names that exist are moved, as with any
// tag. On error every name is as it was, as far as the store lets it be. If the caller
// dies in the middle, containerd collects members that no REF came for (see
// provisional). Names that an earlier checkpoint under the same REF had and this one has
// not are removed.
// It returns the names of the members, in their order.
func Publish(ctx context.Context, store images.Store, ref string, group ocispec.Descriptor, members []MemberImage) (names []string, err error) {
	ref, err = NormalizeRef(ref)
	if err != nil {
		return nil, err
	}
	var records []images.Image
	for _, m := range members {
		name, err := MemberRef(ref, m.Checkpoint.Member)
		if err != nil {
			return nil, err
		}
		names = append(names, name)
		records = append(records, images.Image{Name: name, Target: target(m.Manifest), Labels: map[string]string{
			AnnotationGroup: m.Checkpoint.Group, AnnotationMember: m.Checkpoint.Member, AnnotationEpoch: m.Checkpoint.Epoch, LabelIndex: ref,
		}})
	}
	if len(members) == 0 {
		return nil, fmt.Errorf("publishing %s: no members: %w", ref, errdefs.ErrInvalidArgument)
	}
	first := members[0].Checkpoint
	whole := images.Image{Name: ref, Target: target(group), Labels: map[string]string{
		AnnotationGroup: first.Group, AnnotationEpoch: first.Epoch,
	}}
	var steps []images.Image
	for i, r := range records {
		steps = append(steps, provisional(r))
		whole.Labels[fmt.Sprintf("%s.%d", labelImageRef, i)] = r.Name
	}
	steps = append(append(steps, whole), records...)

	var undo []func(context.Context) error
	for _, r := range steps {
		u, err := put(ctx, store, r)
		if err == nil {
			undo = append(undo, u)
			continue
		}
		err = fmt.Errorf("naming %s: %w", r.Name, err)
		back, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		for i := len(undo) - 1; i >= 0; i-- {
			err = errors.Join(err, undo[i](back))
		}
		return nil, err
	}
	return names, removeStale(ctx, store, ref, names)
}

// Labels by which containerd collects images (core/metadata/gc.go): one that has
// expired stays only while another refers to it by name.
const (
	labelImageRef = "containerd.io/gc.ref.image"
	labelExpire   = "containerd.io/gc.expire"
)

// provisionalTime is far longer than giving the names of a group takes. A variable
// for tests.
var provisionalTime = 10 * time.Minute

// provisional is the record of a member while its group has no name yet. There is
// no transaction over several names; this makes them come or go together.
func provisional(r images.Image) images.Image {
	labels := map[string]string{labelExpire: time.Now().Add(provisionalTime).UTC().Format(time.RFC3339)}
	for k, v := range r.Labels {
		labels[k] = v
	}
	r.Labels = labels
	return r
}

// put creates or moves one name and returns what takes it back.
func put(ctx context.Context, store images.Store, r images.Image) (undo func(context.Context) error, err error) {
	for range 3 { // somebody else may create or delete it meanwhile
		old, err := store.Get(ctx, r.Name)
		switch {
		case errdefs.IsNotFound(err):
			_, err = store.Create(ctx, r)
			if errdefs.IsAlreadyExists(err) {
				continue
			}
			t := r.Target
			return func(ctx context.Context) error {
				err := store.Delete(ctx, r.Name, images.DeleteTarget(&t))
				if errdefs.IsNotFound(err) {
					return nil
				}
				return err
			}, err
		case err != nil:
			return nil, err
		}
		_, err = store.Update(ctx, r, "target", "labels")
		if errdefs.IsNotFound(err) {
			continue
		}
		return func(ctx context.Context) error {
			_, err := store.Update(ctx, old, "target", "labels")
			return err
		}, err
	}
	return nil, fmt.Errorf("the name is being changed by somebody else: %w", errdefs.ErrAborted)
}

func removeStale(ctx context.Context, store images.Store, ref string, keep []string) error {
	old, err := store.List(ctx, fmt.Sprintf("labels.%q==%q", LabelIndex, ref))
	if err != nil {
		return fmt.Errorf("looking for members of an earlier %s: %w", ref, err)
	}
	kept := map[string]bool{}
	for _, k := range keep {
		kept[k] = true
	}
	for _, i := range old {
		if kept[i.Name] || i.Labels[LabelIndex] != ref {
			continue
		}
		if err := store.Delete(ctx, i.Name); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("removing %s of an earlier checkpoint: %w", i.Name, err)
		}
	}
	return nil
}

// target is what an image record points to: no platform and no annotation,
// which belong to the index.
func target(d ocispec.Descriptor) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
}
