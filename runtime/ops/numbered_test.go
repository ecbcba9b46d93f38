// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/cohort-project/cohort/oci"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// testHost is a host on containerd's own image store, without its daemon.
func testHost(t *testing.T) (*Host, context.Context) {
	t.Helper()
	dir := t.TempDir()
	content, err := local.NewStore(filepath.Join(dir, "content"))
	must(t, err)
	bdb, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, &bolt.Options{NoSync: true})
	must(t, err)
	t.Cleanup(func() { bdb.Close() })
	db := metadata.NewDB(bdb, content, nil)
	ctx := namespaces.WithNamespace(t.Context(), "test")
	must(t, db.Init(ctx))
	c, err := client.New("", client.WithServices(client.WithImageStore(metadata.NewImageStore(db)), client.WithContainerStore(metadata.NewContainerStore(db))))
	must(t, err)
	return &Host{Client: c, Namespace: "test"}, ctx
}

// name makes a record with the labels that oci.Publish gives, for a group and its
// members a and b.
func (h *Host) name(t *testing.T, ctx context.Context, group, ref string) {
	t.Helper()
	for _, n := range []string{ref, ref + "-a", ref + "-b"} {
		labels := map[string]string{oci.AnnotationGroup: group}
		if n != ref {
			labels[oci.LabelIndex] = ref
		}
		_, err := h.Client.ImageService().Create(ctx, images.Image{Name: n, Labels: labels, Target: ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromString(n), Size: 1,
		}})
		must(t, err)
	}
}

// groups lists the names that are no members'.
func (h *Host) groups(t *testing.T, ctx context.Context) (names []string) {
	t.Helper()
	all, err := h.Client.ImageService().List(ctx)
	must(t, err)
	for _, i := range all {
		if i.Labels[oci.LabelIndex] == "" {
			names = append(names, i.Name)
		} else if !slices.ContainsFunc(all, func(g images.Image) bool { return g.Name == i.Labels[oci.LabelIndex] }) {
			t.Errorf("member %s has no group", i.Name)
		}
	}
	return names
}

const testRef = "docker.io/library/shop:ck"

func TestPruneKeepsTheNewestByNumberAndEverythingOfOtherNames(t *testing.T) {
	h, ctx := testHost(t)
	others := []string{testRef, "docker.io/library/shop:1", testRef + ".old", testRef + ".07", "docker.io/library/shop:ck2.1"}
	for _, n := range others {
		h.name(t, ctx, "shop", n)
	}
	h.name(t, ctx, "other", testRef+".3")
	for _, n := range []int{2, 8, 9, 10, 11} {
		h.name(t, ctx, "shop", fmt.Sprintf("%s.%d", testRef, n))
	}
	// By the short name as well, as a user gives it.
	removed, err := h.PruneNumbered(ctx, "shop", "shop:ck", 3)
	must(t, err)
	if want := []string{testRef + ".8", testRef + ".2"}; !slices.Equal(removed, want) {
		t.Errorf("removed %v, want %v", removed, want)
	}
	want := append(others, testRef+".3", testRef+".9", testRef+".10", testRef+".11")
	slices.Sort(want)
	if got := h.groups(t, ctx); !slices.Equal(got, want) {
		t.Errorf("left %v, want %v", got, want)
	}
	if removed, err = h.PruneNumbered(ctx, "shop", testRef, 3); err != nil || len(removed) != 0 {
		t.Errorf("again: %v, %v", removed, err)
	}
	if _, err := h.PruneNumbered(ctx, "shop", testRef, 0); !errdefs.IsInvalidArgument(err) {
		t.Errorf("keep none: %v", err)
	}
}

func TestPruneFinishesWhatItBeganBefore(t *testing.T) {
	h, ctx := testHost(t)
	h.name(t, ctx, "shop", testRef+".1")
	h.name(t, ctx, "shop", testRef+".2")
	// Names go groups first.
	must(t, h.Client.ImageService().Delete(ctx, testRef+".1"))
	must(t, h.Client.ImageService().Delete(ctx, testRef+".1-a"))
	_, err := h.PruneNumbered(ctx, "shop", testRef, 1)
	must(t, err)
	if got := h.groups(t, ctx); !slices.Equal(got, []string{testRef + ".2"}) {
		t.Errorf("left %v", got)
	}
}

func TestPruneLeavesNamesThatAreBeingGivenAndEpochsInUse(t *testing.T) {
	h, ctx := testHost(t)
	for n := range 5 {
		h.name(t, ctx, "shop", fmt.Sprintf("%s.%d", testRef, n+1))
	}
	// Epoch 5 has its members' names, and not yet its own.
	must(t, h.Client.ImageService().Delete(ctx, testRef+".5"))
	_, err := h.Client.ContainerService().Create(ctx, containers.Container{
		ID: "copy", Image: testRef + ".2-b", Runtime: containers.RuntimeInfo{Name: Runtime}, Spec: &anypb.Any{},
	})
	must(t, err)
	removed, err := h.PruneNumbered(ctx, "shop", testRef, 1)
	must(t, err)
	if want := []string{testRef + ".3", testRef + ".1"}; !slices.Equal(removed, want) {
		t.Errorf("removed %v, want %v", removed, want)
	}
	if _, err := h.Client.ImageService().Get(ctx, testRef+".5-a"); err != nil {
		t.Errorf("a name that was being given: %v", err)
	}
}

func TestANumberLeavesRoomForEveryMember(t *testing.T) {
	list := []*Container{{Member: "a"}, {Member: strings.Repeat("m", 76)}}
	o := CheckpointOptions{Numbered: true}
	if ref, err := o.number(list, testRef, 12); err != nil || ref != testRef+".12" {
		t.Errorf("%q, %v", ref, err)
	}
	long := "docker.io/library/shop:" + strings.Repeat("x", 49)
	if _, err := o.number(list, long, 1); err != nil {
		t.Errorf("a tag of 49+2+77 characters: %v", err)
	}
	if _, err := o.number(list, long, 10); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a tag of 49+3+77 characters: %v", err)
	}
	if ref, err := (&CheckpointOptions{}).number(list, long, 10); err != nil || ref != long {
		t.Errorf("not numbered: %q, %v", ref, err)
	}
}
