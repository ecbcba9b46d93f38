// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
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
