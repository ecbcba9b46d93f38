// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// blobs are blobs of images, with their sizes.
type blobs map[digest.Digest]int64

func (s blobs) add(more blobs) {
	for d, n := range more {
		s[d] = n
	}
}

// beyond is the size of those that are not in others.
func (s blobs) beyond(others blobs) (sum int64) {
	for d, n := range s {
		if _, ok := others[d]; !ok {
			sum += n
		}
	}
	return sum
}

// imageBytes is what a checkpoint adds to the content store.
func (b *bench) imageBytes(ctx context.Context, g *members) (float64, error) {
	s, err := b.blobsOf(ctx, g.ref)
	return float64(s.beyond(b.base)), err
}

// blobsOf are the blobs of a checkpoint's images: those named ref, or ref, a dash
// and more.
func (b *bench) blobsOf(ctx context.Context, ref string) (blobs, error) {
	out, err := b.in.Ctr(ctx, "images", "ls", "-q")
	if err != nil {
		return nil, err
	}
	sum := blobs{}
	for _, name := range strings.Fields(out) {
		if name != ref && !strings.HasPrefix(name, ref+"-") {
			continue
		}
		s, err := b.walk(ctx, name)
		if err != nil {
			return nil, err
		}
		sum.add(s)
	}
	if len(sum) == 0 {
		return nil, fmt.Errorf("there is no image %s after its checkpoint", ref)
	}
	return sum, nil
}

func (b *bench) walk(ctx context.Context, name string) (blobs, error) {
	client, err := b.in.Connect()
	if err != nil {
		return nil, err
	}
	image, err := client.ImageService().Get(ctx, name)
	if err != nil {
		return nil, err
	}
	found := blobs{}
	children := images.ChildrenHandler(client.ContentStore())
	err = images.Walk(ctx, images.HandlerFunc(func(ctx context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		found[d.Digest] = d.Size
		return children(ctx, d)
	}), image.Target)
	return found, err
}
