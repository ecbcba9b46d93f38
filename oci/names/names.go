// SPDX-License-Identifier: Apache-2.0

// Package names gives a group's image its names in an image store: REF for the
// group and REF-MEMBER for each member, which come or go together.
//
// It is apart from package oci because the shim, which starts once for every
// container, needs that one and names nothing: to know what a reference is takes
// regular expressions that are compiled when a program starts.
//
// Functions are safe for concurrent use on different names.
package names

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cohort-project/cohort/oci"
)

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
	if err := oci.ValidMember(member); err != nil {
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
func Publish(ctx context.Context, store images.Store, ref string, group ocispec.Descriptor, members []oci.MemberImage) (names []string, err error) {
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
			oci.AnnotationGroup: m.Checkpoint.Group, oci.AnnotationMember: m.Checkpoint.Member, oci.AnnotationEpoch: m.Checkpoint.Epoch, oci.LabelIndex: ref,
		}})
	}
	if len(members) == 0 {
		return nil, fmt.Errorf("publishing %s: no members: %w", ref, errdefs.ErrInvalidArgument)
	}
	first := members[0].Checkpoint
	whole := images.Image{Name: ref, Target: target(group), Labels: map[string]string{
		oci.AnnotationGroup: first.Group, oci.AnnotationEpoch: first.Epoch,
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
	old, err := store.List(ctx, fmt.Sprintf("labels.%q==%q", oci.LabelIndex, ref))
	if err != nil {
		return fmt.Errorf("looking for members of an earlier %s: %w", ref, err)
	}
	kept := map[string]bool{}
	for _, k := range keep {
		kept[k] = true
	}
	for _, i := range old {
		if kept[i.Name] || i.Labels[oci.LabelIndex] != ref {
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
