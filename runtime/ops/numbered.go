// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cohort-project/cohort/oci"
	"github.com/cohort-project/cohort/oci/names"
)

// numberedRef names one of several epochs that go by one name: a schedule's. ref
// is complete, so it ends with a tag.
func numberedRef(ref string, number uint64) string {
	return ref + "." + strconv.FormatUint(number, 10)
}

// epochOf is the number in a name that numberedRef made of ref.
func epochOf(ref, name string) (number uint64, ok bool) {
	digits, ok := strings.CutPrefix(name, ref+".")
	if !ok {
		return 0, false
	}
	number, err := strconv.ParseUint(digits, 10, 64)
	return number, err == nil && numberedRef(ref, number) == name
}

// number chooses the name of an epoch that is to have a number in it, and refuses
// one that leaves no room for a member's.
func (o *CheckpointOptions) number(list []*Container, ref string, number uint64) (string, error) {
	if !o.Numbered {
		return ref, nil
	}
	ref = numberedRef(ref, number)
	for _, c := range list {
		if _, err := names.MemberRef(ref, c.Member); err != nil {
			return "", err
		}
	}
	return ref, nil
}

// moveTo gives a checkpoint that has a name a second one, which another may have
// had until now.
func (x *exporter) moveTo(ctx context.Context, ref string, desc ocispec.Descriptor, list []oci.MemberImage) error {
	if ref == "" || ref == x.res.Ref {
		return nil
	}
	if _, err := names.Publish(ctx, x.h.Client.ImageService(), ref, desc, list); err != nil {
		return fmt.Errorf("the checkpoint is there as %s, but %s still names an earlier one: %w", x.res.Ref, ref, err)
	}
	return nil
}

// alias gives the checkpoint that is named from a second name, which another may have
// had until now.
func (h *Host) alias(ctx context.Context, from, to string) error {
	if from == to {
		return nil
	}
	g, err := h.Inspect(ctx, from)
	if err != nil {
		return err
	}
	list := make([]oci.MemberImage, len(g.Members))
	for i := range g.Members {
		if list[i], err = g.Members[i].Image(); err != nil {
			return err
		}
	}
	_, err = names.Publish(ctx, h.Client.ImageService(), to, g.Target, list)
	return err
}

// PruneNumbered removes epochs of a group that were named by a number after ref
// (CheckpointOptions.Numbered), but for the keep newest, and returns the names of
// those. Unlike Prune it touches no other name: an epoch that has one more stays by that, and
// so does what remaining epochs build on, and an epoch from which a container was restored.
// If the process dies on the way, the next call removes the rest.
func (h *Host) PruneNumbered(ctx context.Context, group, ref string, keep int) (removed []string, err error) {
	ref, err = names.NormalizeRef(ref)
	if err != nil {
		return nil, err
	}
	if keep < 1 {
		return nil, fmt.Errorf("keep %d epochs: keep one at least: %w", keep, errdefs.ErrInvalidArgument)
	}
	all, err := h.Client.ImageService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list the epochs of group %s: %w", group, err)
	}
	containers, err := h.Client.ContainerService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	used := map[string]bool{}
	for _, c := range containers {
		used[c.Image] = true
	}
	doomed := chooseNumbered(all, group, ref, keep, used)
	for _, img := range doomed {
		if img.Labels[oci.LabelIndex] == "" {
			removed = append(removed, img.Name)
		}
	}
	return removed, removeNames(ctx, h.Client.ImageService(), doomed)
}

// chooseNumbered finds the names to remove: groups before members, so that a group that
// is found has all its members. Members without a group are what a call that died has
// left, or are being named at this moment: then they are of a newer epoch.
func chooseNumbered(all []images.Image, group, ref string, keep int, used map[string]bool) (doomed []images.Image) {
	type epoch struct {
		first, last []images.Image
		used        bool
	}
	epochs := map[uint64]*epoch{}
	for _, img := range all {
		index := img.Labels[oci.LabelIndex]
		n, ok := epochOf(ref, cmp.Or(index, img.Name))
		if !ok || img.Labels[oci.AnnotationGroup] != group {
			continue
		}
		e := epochs[n]
		if e == nil {
			e = &epoch{}
			epochs[n] = e
		}
		if index == "" {
			e.first = append(e.first, img)
		} else {
			e.last = append(e.last, img)
		}
		e.used = e.used || used[img.Name]
	}
	var last []images.Image
	whole := 0
	for _, n := range slices.Backward(slices.Sorted(maps.Keys(epochs))) {
		e := epochs[n]
		if len(e.first) > 0 {
			whole++
		}
		if whole < keep || whole == keep && len(e.first) > 0 || e.used {
			continue
		}
		doomed, last = append(doomed, e.first...), append(last, e.last...)
	}
	return append(doomed, last...)
}
