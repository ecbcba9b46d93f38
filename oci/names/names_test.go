// SPDX-License-Identifier: Apache-2.0

package names

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"github.com/cohort-project/cohort/oci"
)

// shop is containerd's storage without its daemon, with the images of a group that
// has no names yet.
type shop struct {
	ctx     context.Context // of a lease that keeps them
	db      *metadata.DB
	store   content.Store
	images  images.Store
	group   ocispec.Descriptor
	members []oci.MemberImage
	release func()
}

func newShop(t *testing.T) *shop {
	t.Helper()
	dir := t.TempDir()
	cs, err := local.NewStore(filepath.Join(dir, "content"))
	must(t, err)
	bdb, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, &bolt.Options{NoSync: true})
	must(t, err)
	t.Cleanup(func() { bdb.Close() })
	db := metadata.NewDB(bdb, cs, nil)
	ctx := namespaces.WithNamespace(t.Context(), "test")
	must(t, db.Init(ctx))
	lm := metadata.NewLeaseManager(db)
	l, err := lm.Create(ctx, leases.WithRandomID())
	must(t, err)
	s := &shop{ctx: leases.WithLease(ctx, l.ID), db: db, store: db.ContentStore(), images: metadata.NewImageStore(db), release: func() { must(t, lm.Delete(ctx, l)) }}
	for _, name := range []string{"db", "app"} {
		m := oci.MemberImage{Manifest: s.blob(t, ocispec.MediaTypeImageManifest, name)}
		m.Manifest.Platform = &ocispec.Platform{OS: "linux", Architecture: "amd64"}
		m.Manifest.Annotations = map[string]string{oci.AnnotationMember: name}
		m.Checkpoint.Group, m.Checkpoint.Member, m.Checkpoint.Epoch = "shop", name, "1"
		s.members = append(s.members, m)
	}
	s.group = s.index(t, s.members)
	return s
}

func (s *shop) index(t *testing.T, members []oci.MemberImage) ocispec.Descriptor {
	t.Helper()
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}}
	labels := map[string]string{}
	for i, m := range members {
		index.Manifests = append(index.Manifests, m.Manifest)
		labels[fmt.Sprintf("containerd.io/gc.ref.content.m.%d", i)] = m.Manifest.Digest.String()
	}
	return s.blob(t, ocispec.MediaTypeImageIndex, index, content.WithLabels(labels))
}

func (s *shop) blob(t *testing.T, mediaType string, v any, opts ...content.Opt) ocispec.Descriptor {
	t.Helper()
	b, err := json.Marshal(v)
	must(t, err)
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	must(t, content.WriteBlob(s.ctx, s.store, d.Digest.String(), bytes.NewReader(b), d, opts...))
	return d
}

// collect runs the garbage collector after the end of the lease.
func (s *shop) collect(t *testing.T) {
	t.Helper()
	s.release()
	_, err := s.db.GarbageCollect(s.ctx)
	must(t, err)
}

func (s *shop) names(t *testing.T) map[string]images.Image {
	t.Helper()
	list, err := s.images.List(s.ctx)
	must(t, err)
	out := map[string]images.Image{}
	for _, i := range list {
		out[i.Name] = i
	}
	return out
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t *testing.T, err, class error, words ...string) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Fatalf("error %v is not of class %q", err, class)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not say %q", err, w)
		}
	}
}

func TestGroupAndMembersAreNamedAndKept(t *testing.T) {
	s := newShop(t)
	published, err := Publish(s.ctx, s.images, "registry.test/shop:v1", s.group, s.members)
	must(t, err)
	if fmt.Sprint(published) != "[registry.test/shop:v1-db registry.test/shop:v1-app]" {
		t.Errorf("names: %v", published)
	}
	s.collect(t)
	have := s.names(t)
	if len(have) != 3 || have["registry.test/shop:v1"].Target.Digest != s.group.Digest {
		t.Errorf("names: %v", have)
	}
	for i, m := range s.members {
		r := have[published[i]]
		if r.Target.Digest != m.Manifest.Digest || r.Target.Platform != nil || r.Target.Annotations != nil || r.Labels[oci.LabelIndex] != "registry.test/shop:v1" || r.Labels[labelExpire] != "" {
			t.Errorf("record: %+v", r)
		}
		if _, err := s.store.Info(s.ctx, m.Manifest.Digest); err != nil {
			t.Error(err)
		}
	}
}

// failing is an image store that refuses one name.
type failing struct {
	images.Store
	name string
}

var errDisk = errors.New("disk on fire")

func (f failing) Create(ctx context.Context, i images.Image) (images.Image, error) {
	if i.Name == f.name {
		return i, errDisk
	}
	return f.Store.Create(ctx, i)
}

func (f failing) Update(ctx context.Context, i images.Image, p ...string) (images.Image, error) {
	if i.Name == f.name {
		return i, errDisk
	}
	return f.Store.Update(ctx, i, p...)
}

// dying is the image store of a process that dies after some writes.
type dying struct {
	images.Store
	writes *int
}

func (d dying) dead() error {
	if *d.writes--; *d.writes < 0 {
		return errDisk
	}
	return nil
}

func (d dying) Create(ctx context.Context, i images.Image) (images.Image, error) {
	if err := d.dead(); err != nil {
		return i, err
	}
	return d.Store.Create(ctx, i)
}

func (d dying) Update(ctx context.Context, i images.Image, p ...string) (images.Image, error) {
	if err := d.dead(); err != nil {
		return i, err
	}
	return d.Store.Update(ctx, i, p...)
}

func (d dying) Delete(context.Context, string, ...images.DeleteOpt) error { return errDisk }

func TestNamesOfAGroupComeOrGoTogetherWhoeverDies(t *testing.T) {
	defer func(d time.Duration) { provisionalTime = d }(provisionalTime)
	provisionalTime = -time.Minute
	for writes := range 6 {
		s := newShop(t)
		n := writes
		published, err := Publish(s.ctx, dying{s.images, &n}, "shop:v1", s.group, s.members)
		s.collect(t)
		have := s.names(t)
		// Two members, then the group, then the members for good.
		want := 0
		if writes >= 3 {
			want = 3
		}
		if len(have) != want || (err == nil) != (writes >= 5) || err == nil && len(published) != 2 {
			t.Errorf("dead after %d writes: %v, %v", writes, have, err)
		}
	}
}

func TestPublishIsAllOrNothing(t *testing.T) {
	s := newShop(t)
	_, err := Publish(s.ctx, failing{s.images, "docker.io/library/shop:v1"}, "shop:v1", s.group, s.members)
	wantErr(t, err, errDisk, "docker.io/library/shop:v1")
	left, err := s.images.List(s.ctx)
	must(t, err)
	if len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}

	_, err = Publish(s.ctx, s.images, "shop:v1", s.group, s.members)
	must(t, err)
	before, err := s.images.Get(s.ctx, "docker.io/library/shop:v1-db")
	must(t, err)
	other := []oci.MemberImage{s.members[1], s.members[0]}
	other[1].Manifest = s.members[1].Manifest // db moves to another manifest ...
	_, err = Publish(s.ctx, failing{s.images, "docker.io/library/shop:v1"}, "shop:v1", s.group, other)
	wantErr(t, err, errDisk)
	after, err := s.images.Get(s.ctx, "docker.io/library/shop:v1-db")
	must(t, err)
	if after.Target.Digest != before.Target.Digest || after.Labels[oci.AnnotationEpoch] != before.Labels[oci.AnnotationEpoch] {
		t.Error("... and was not moved back")
	}
}

func TestRepublishingRemovesMembersThatAreNoMore(t *testing.T) {
	s := newShop(t)
	_, err := Publish(s.ctx, s.images, "shop:v1", s.group, s.members)
	must(t, err)
	_, err = s.images.Create(s.ctx, images.Image{Name: "docker.io/library/shop:v1-mine", Target: target(s.group)})
	must(t, err)
	_, err = Publish(s.ctx, s.images, "shop:v1", s.index(t, s.members[:1]), s.members[:1])
	must(t, err)
	got := s.names(t)
	has := func(name string) bool { return got["docker.io/library/shop:v1-"+name].Name != "" }
	if len(got) != 3 || !has("db") || has("app") || !has("mine") {
		t.Errorf("names: %v", got)
	}
}

func TestNames(t *testing.T) {
	long := strings.Repeat("t", 127)
	for _, c := range []struct{ ref, member, want, err string }{
		{"shop", "db", "docker.io/library/shop:latest-db", ""},
		{"localhost:5000/a/shop:v1", "db.0_x", "localhost:5000/a/shop:v1-db.0_x", ""},
		{"shop@sha256:" + strings.Repeat("a", 64), "db", "", "has a digest"},
		{"shop:v1@sha256:" + strings.Repeat("a", 64), "db", "", "has a digest"},
		{"Shop:v1", "db", "", "lowercase"},
		{"", "db", "", "image name"},
		{"shop:v1", "a/b", "", "member name"},
		{"shop:v1", "-b", "", "member name"},
		{"shop:" + long, "db", "", "at most 128"},
	} {
		got, err := MemberRef(c.ref, c.member)
		if c.err != "" {
			wantErr(t, err, errdefs.ErrInvalidArgument, c.err)
		} else if err != nil || got != c.want {
			t.Errorf("%s %s: %q, %v", c.ref, c.member, got, err)
		}
	}
}
