// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"

	"github.com/cohort-project/cohort/oci"
	"github.com/cohort-project/cohort/oci/names"
)

// Images lists the checkpoint images of groups.
func (h *Host) Images(ctx context.Context) ([]oci.Listed, error) {
	return oci.ListGroups(ctx, h.Client.ImageService(), h.Client.ContentStore())
}

// Inspect reads all that a checkpoint image says of itself.
func (h *Host) Inspect(ctx context.Context, ref string) (*oci.Group, error) {
	img, err := h.image(ctx, ref)
	if err != nil {
		return nil, err
	}
	return h.readGroup(ctx, img)
}

// readGroup reads a checkpoint image with all its documents.
func (h *Host) readGroup(ctx context.Context, img images.Image) (*oci.Group, error) {
	g, err := oci.ReadGroup(ctx, h.Client.ContentStore(), img.Target)
	if err == nil {
		err = g.ReadCheckpoint(ctx, h.Client.ContentStore())
	}
	switch {
	case errors.Is(err, oci.ErrNotCheckpoint):
		return nil, fmt.Errorf("image %s is no checkpoint ('cohort images' lists those that are): %w", img.Name, err)
	case errdefs.IsNotFound(err):
		return nil, fmt.Errorf("image %s is not all here, pull it again (ctr image pull %s): %w", img.Name, img.Name, err)
	case err != nil:
		return nil, fmt.Errorf("image %s: %w", img.Name, err)
	}
	return g, nil
}

// image finds an image by the name the user gave, or by its full name.
func (h *Host) image(ctx context.Context, ref string) (images.Image, error) {
	img, err := h.Client.ImageService().Get(ctx, ref)
	if err == nil {
		return img, nil
	}
	full, nerr := names.NormalizeRef(ref)
	if nerr == nil && full != ref {
		if img, err = h.Client.ImageService().Get(ctx, full); err == nil {
			return img, nil
		}
	}
	if errdefs.IsNotFound(err) {
		return img, fmt.Errorf("no image %q in namespace %q: pull it first (ctr image pull %s); 'cohort images' lists what is here: %w", ref, h.Namespace, ref, errdefs.ErrNotFound)
	}
	return img, fmt.Errorf("look up image %q: %w", ref, err)
}
