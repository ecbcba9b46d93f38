// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	metadata "github.com/checkpoint-restore/checkpointctl/lib"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func groupInfo() GroupInfo {
	return GroupInfo{Group: "shop", Epoch: epoch1, EpochNumber: 3, CutAt: cutTime}
}

func buildShop(t testing.TB, h *host, ctx context.Context) (ocispec.Descriptor, []MemberImage) {
	t.Helper()
	base := dockerImage(t, h)
	members := []MemberImage{buildMemberOf(t, h, ctx, base, sampleCheckpoint("db")), buildMemberOf(t, h, ctx, base, sampleCheckpoint("app"))}
	g, err := BuildGroup(ctx, h.store, members, groupInfo())
	must(t, err)
	return g, members
}

func readManifest(t testing.TB, h *host, d ocispec.Descriptor) (m ocispec.Manifest) {
	t.Helper()
	must(t, readJSONBlob(h.ctx, h.store, d, &m))
	return m
}

func TestMemberIsARunnableImageOnItsBase(t *testing.T) {
	h := newHost(t)
	base := dockerImage(t, h)
	img := buildMemberOf(t, h, h.ctx, base, sampleCheckpoint("db"))
	m := readManifest(t, h, img.Manifest)
	if m.MediaType != ocispec.MediaTypeImageManifest || m.Config.MediaType != ocispec.MediaTypeImageConfig || len(m.Layers) != 4 {
		t.Fatalf("manifest: %+v", m)
	}
	old := readManifest(t, h, base)
	for i, l := range m.Layers {
		want := ocispec.MediaTypeImageLayerZstd
		if i < 2 {
			want = ocispec.MediaTypeImageLayerGzip
			if l.Digest != old.Layers[i].Digest || l.Size != old.Layers[i].Size {
				t.Errorf("layer %d of the base is another one", i)
			}
		}
		if l.MediaType != want {
			t.Errorf("layer %d: media type %s", i, l.MediaType)
		}
	}
	var raw map[string]any
	must(t, readJSONBlob(h.ctx, h.store, m.Config, &raw))
	if raw["config"].(map[string]any)["Healthcheck"] == nil {
		t.Error("a field of Docker's config is lost")
	}
	if raw["container"] != nil || raw["docker_version"] != nil {
		t.Error("facts of the old image's build are kept")
	}
	var config ocispec.Image
	must(t, readJSONBlob(h.ctx, h.store, m.Config, &config))
	if config.Config.Cmd[0] != "/bin/app" || len(config.RootFS.DiffIDs) != 4 || len(config.History) != 5 || !config.Created.Equal(cutTime) {
		t.Errorf("config: %+v", config)
	}
	ids, err := images.RootFS(h.ctx, h.store, m.Config)
	must(t, err)
	if identity.ChainID(ids) != img.CheckpointChainID {
		t.Error("chain id is not that of the config")
	}
	for i, l := range m.Layers {
		if got := digest.FromBytes(layerTar(t, h, l)); got != ids[i] {
			t.Errorf("layer %d: diff id %s, content %s", i, ids[i], got)
		}
		if i >= 2 {
			info, err := h.store.Info(h.ctx, l.Digest)
			must(t, err)
			if info.Labels["containerd.io/uncompressed"] != ids[i].String() {
				t.Errorf("layer %d: labels %v", i, info.Labels)
			}
		}
	}
}

func TestManifestTellsWhatCheckpointctlAndPeopleAsk(t *testing.T) {
	h := newHost(t)
	m := readManifest(t, h, buildMemberOf(t, h, h.ctx, dockerImage(t, h), sampleCheckpoint("db")).Manifest)
	for k, want := range map[string]string{
		AnnotationGroup: "shop", AnnotationMember: "db", AnnotationEpoch: epoch1, AnnotationEpochNumber: "3", AnnotationStopped: "false",
		AnnotationNetNS: "net-1", AnnotationCutTime: "2026-03-14T15:09:26.535897932Z", AnnotationProcesses: "1", AnnotationMemory: "1048576",
		metadata.CheckpointAnnotationEngine: "containerd", metadata.CheckpointAnnotationName: "db",
		metadata.CheckpointAnnotationCriuVersion: "4.2.1", metadata.CheckpointAnnotationRootfsImageName: "docker.io/library/shop:1",
	} {
		if m.Annotations[k] != want {
			t.Errorf("%s is %q, want %q", k, m.Annotations[k], want)
		}
	}
}

func TestCheckpointOfARestoredContainerKeepsOneCheckpointLayer(t *testing.T) {
	h := newHost(t)
	first := buildMemberOf(t, h, h.ctx, dockerImage(t, h), sampleCheckpoint("db"))
	ck := sampleCheckpoint("db")
	ck.Epoch = epoch2
	second, err := BuildMember(h.ctx, h.store, MemberInput{
		Base: first.Manifest, Parent: first.CheckpointChainID, Upper: upperDir(t, map[string]string{"var/y": "second"}), CheckpointDir: checkpointDir(t, ck),
	})
	must(t, err)
	m := readManifest(t, h, second.Manifest)
	var kinds []string
	for _, l := range m.Layers {
		kinds = append(kinds, l.Annotations[AnnotationLayer])
	}
	if fmt.Sprint(kinds) != "[  rw rw checkpoint]" {
		t.Errorf("layers are %q", kinds)
	}
	if second.ParentChainID != first.CheckpointChainID || second.BaseChainID != first.RWChainID {
		t.Errorf("chains: parent %s, base %s", second.ParentChainID, second.BaseChainID)
	}
	var config ocispec.Image
	must(t, readJSONBlob(h.ctx, h.store, m.Config, &config))
	if len(config.History) != 6 || strings.Contains(fmt.Sprint(config.History[4].CreatedBy), "checkpoint") {
		t.Errorf("history: %+v", config.History)
	}
}

func TestBaseThatTheContainerDoesNotRunOnIsRefused(t *testing.T) {
	h := newHost(t)
	in := MemberInput{Base: dockerImage(t, h), Upper: t.TempDir(), CheckpointDir: checkpointDir(t, sampleCheckpoint("db")), Parent: digest.FromString("another")}
	_, err := BuildMember(h.ctx, h.store, in)
	wantErr(t, err, errdefs.ErrNotFound, "db", "the container runs on")

	old := readManifest(t, h, in.Base)
	must(t, h.store.Delete(h.ctx, old.Layers[1].Digest))
	in.Parent = ""
	_, err = BuildMember(h.ctx, h.store, in)
	wantErr(t, err, errdefs.ErrNotFound, old.Layers[1].Digest.String(), "pull the image again")
}

func TestBaseIsChosenFromAnIndexByWhatTheContainerRunsOn(t *testing.T) {
	h := newHost(t)
	one := dockerImage(t, h)
	two := buildMemberOf(t, h, h.ctx, one, sampleCheckpoint("db"))
	p := platforms.DefaultSpec()
	other := one
	other.Platform = &ocispec.Platform{OS: "linux", Architecture: "s390x"}
	one.Platform = &p
	idx := jsonBlob(t, h, ocispec.MediaTypeImageIndex, ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{other, one, two.Manifest}})
	img, err := BuildMember(h.ctx, h.store, MemberInput{Base: idx, Parent: two.CheckpointChainID, Upper: t.TempDir(), CheckpointDir: checkpointDir(t, sampleCheckpoint("db"))})
	must(t, err)
	if img.BaseChainID != two.RWChainID {
		t.Errorf("base is %s", img.BaseChainID)
	}
}

func TestIndexIsOneThatRegistriesAndClientsTake(t *testing.T) {
	h := newHost(t)
	g, members := buildShop(t, h, h.ctx)
	var idx ocispec.Index
	must(t, readJSONBlob(h.ctx, h.store, g, &idx))
	if len(idx.Manifests) != 2 || idx.Annotations[AnnotationMembers] != "db,app" || idx.SchemaVersion != 2 || idx.MediaType != ocispec.MediaTypeImageIndex {
		t.Fatalf("index: %+v", idx)
	}
	for i, d := range idx.Manifests {
		if d.MediaType != ocispec.MediaTypeImageManifest || d.Platform == nil || d.Platform.Architecture != "amd64" || d.Annotations[AnnotationMember] != members[i].Checkpoint.Member {
			t.Errorf("child %d: %+v", i, d)
		}
	}
	// ctr's pull keeps what matches the host's platform: every member does.
	p := ocispec.Platform{OS: "linux", Architecture: "amd64"}
	kept, err := images.FilterPlatforms(images.ChildrenHandler(h.store), platforms.Only(p))(h.ctx, g)
	must(t, err)
	if len(kept) != 2 {
		t.Errorf("a pull would keep %d of 2 members", len(kept))
	}
}

func TestGroupTakesMembersOfOneEpochOnly(t *testing.T) {
	h := newHost(t)
	_, members := buildShop(t, h, h.ctx)
	stranger := members[1]
	stranger.Checkpoint.Epoch = epoch2
	for _, list := range [][]MemberImage{nil, {members[0], stranger}, {members[0], members[0]}} {
		if _, err := BuildGroup(h.ctx, h.store, list, groupInfo()); err == nil {
			t.Errorf("%d members: no error", len(list))
		}
	}
}

func TestPublishedGroupSurvivesGarbageCollection(t *testing.T) {
	h := newHost(t)
	ctx, done := h.lease(t)
	g, members := buildShop(t, h, ctx)
	names, err := Publish(ctx, h.images, "registry.test/shop:v1", g, members)
	must(t, err)
	if fmt.Sprint(names) != "[registry.test/shop:v1-db registry.test/shop:v1-app]" {
		t.Errorf("names: %v", names)
	}
	done()
	collect := func() {
		t.Helper()
		_, err := h.db.GarbageCollect(h.ctx)
		must(t, err)
	}
	all := []digest.Digest{g.Digest}
	for _, m := range members {
		man := readManifest(t, h, m.Manifest)
		all = append(all, m.Manifest.Digest, man.Config.Digest)
		for _, l := range man.Layers {
			all = append(all, l.Digest)
		}
	}
	collect()
	for _, d := range all {
		if !exists(h, d) {
			t.Errorf("%s was collected", d)
		}
	}
	// A member alone keeps all it needs.
	must(t, h.images.Delete(h.ctx, "registry.test/shop:v1"))
	must(t, h.images.Delete(h.ctx, names[1]))
	collect()
	if exists(h, g.Digest) || exists(h, members[1].CkptLayer.Digest) || !exists(h, members[0].CkptLayer.Digest) {
		t.Error("wrong content was collected after the group and one member were deleted")
	}
	must(t, h.images.Delete(h.ctx, names[0]))
	collect()
	for _, d := range all {
		if exists(h, d) {
			t.Errorf("%s is still there after every name was deleted", d)
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
		h := newHost(t)
		ctx, done := h.lease(t)
		g, members := buildShop(t, h, ctx)
		n := writes
		names, err := Publish(ctx, dying{h.images, &n}, "shop:v1", g, members)
		done()
		_, gcErr := h.db.GarbageCollect(h.ctx)
		must(t, gcErr)
		list, listErr := h.images.List(h.ctx)
		must(t, listErr)
		var have []string
		for _, i := range list {
			if strings.Contains(i.Name, "shop:v1") {
				have = append(have, i.Name)
			}
		}
		// Two members, then the group, then the members for good.
		want := 0
		if writes >= 3 {
			want = 3
		}
		if len(have) != want || (err == nil) != (writes >= 5) || err == nil && len(names) != 2 {
			t.Errorf("dead after %d writes: %v, %v", writes, have, err)
		}
	}
}

func TestPublishIsAllOrNothing(t *testing.T) {
	h := newHost(t)
	ctx, done := h.lease(t)
	defer done()
	g, members := buildShop(t, h, ctx)
	_, err := Publish(ctx, failing{h.images, "docker.io/library/shop:v1"}, "shop:v1", g, members)
	wantErr(t, err, errDisk, "docker.io/library/shop:v1")
	left, err := h.images.List(ctx)
	must(t, err)
	if len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}

	_, err = Publish(ctx, h.images, "shop:v1", g, members)
	must(t, err)
	before, err := h.images.Get(ctx, "docker.io/library/shop:v1-db")
	must(t, err)
	other := []MemberImage{members[1], members[0]}
	other[1].Manifest = members[1].Manifest // db moves to another manifest ...
	_, err = Publish(ctx, failing{h.images, "docker.io/library/shop:v1"}, "shop:v1", g, other)
	wantErr(t, err, errDisk)
	after, err := h.images.Get(ctx, "docker.io/library/shop:v1-db")
	must(t, err)
	if after.Target.Digest != before.Target.Digest || after.Labels[AnnotationEpoch] != before.Labels[AnnotationEpoch] {
		t.Error("... and was not moved back")
	}
}

func TestRepublishingRemovesMembersThatAreNoMore(t *testing.T) {
	h := newHost(t)
	ctx, done := h.lease(t)
	defer done()
	g, members := buildShop(t, h, ctx)
	_, err := Publish(ctx, h.images, "shop:v1", g, members)
	must(t, err)
	_, err = h.images.Create(ctx, images.Image{Name: "docker.io/library/shop:v1-mine", Target: target(g)})
	must(t, err)
	g2, err := BuildGroup(ctx, h.store, members[:1], groupInfo())
	must(t, err)
	_, err = Publish(ctx, h.images, "shop:v1", g2, members[:1])
	must(t, err)
	got := map[string]bool{}
	list, err := h.images.List(ctx)
	must(t, err)
	for _, i := range list {
		got[i.Name] = true
	}
	if len(got) != 3 || !got["docker.io/library/shop:v1-db"] || got["docker.io/library/shop:v1-app"] || !got["docker.io/library/shop:v1-mine"] {
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

func TestGroupIsReadFromIndexAndFromMember(t *testing.T) {
	h := newHost(t)
	desc, members := buildShop(t, h, h.ctx)
	g, err := ReadGroup(h.ctx, h.store, desc)
	must(t, err)
	must(t, g.ReadCheckpoint(h.ctx, h.store))
	if g.Name != "shop" || g.Epoch != epoch1 || g.EpochNumber != 3 || !g.CutAt.Equal(cutTime) || !g.Whole || len(g.Members) != 2 {
		t.Errorf("group: %+v", g)
	}
	for i, m := range g.Members {
		img, err := m.Image()
		must(t, err)
		want := members[i]
		if m.ChainID != want.CheckpointChainID || img.RWChainID != want.RWChainID || img.Checkpoint.Member != want.Checkpoint.Member || m.Spec == nil {
			t.Errorf("member %d: %+v", i, m)
		}
		if total, own := m.Size(); own <= 0 || total <= own {
			t.Errorf("sizes %d, %d", total, own)
		}
	}
	one, err := ReadGroup(h.ctx, h.store, members[1].Manifest)
	must(t, err)
	if one.Whole || one.Name != "shop" || one.Members[0].Name != "app" || one.EpochNumber != 3 {
		t.Errorf("member: %+v", one)
	}
	_, err = json.Marshal(g)
	must(t, err)
}

func TestMembersComeInTheOrderOfRestore(t *testing.T) {
	h := newHost(t)
	desc, _ := buildShop(t, h, h.ctx)
	var idx ocispec.Index
	must(t, readJSONBlob(h.ctx, h.store, desc, &idx))
	idx.Manifests[0], idx.Manifests[1] = idx.Manifests[1], idx.Manifests[0]
	g, err := ReadGroup(h.ctx, h.store, jsonBlob(t, h, ocispec.MediaTypeImageIndex, idx))
	must(t, err)
	if g.Members[0].Name != "db" || g.Members[1].Name != "app" {
		t.Errorf("order: %s, %s", g.Members[0].Name, g.Members[1].Name)
	}
}

func TestImageKeepsItsSnapshot(t *testing.T) {
	h := newHost(t)
	img := buildMemberOf(t, h, h.ctx, dockerImage(t, h), sampleCheckpoint("db"))
	must(t, SetSnapshotRef(h.ctx, h.store, img.Config.Digest, "cohort", img.CheckpointChainID))
	info, err := h.store.Info(h.ctx, img.Config.Digest)
	must(t, err)
	if info.Labels["containerd.io/gc.ref.snapshot.cohort"] != img.CheckpointChainID.String() {
		t.Errorf("labels: %v", info.Labels)
	}
}

func TestPulledGroupCanBeNamed(t *testing.T) {
	h := newHost(t)
	ctx, done := h.lease(t)
	defer done()
	desc, _ := buildShop(t, h, ctx)
	g, err := ReadGroup(ctx, h.store, desc)
	must(t, err)
	_, err = g.Members[0].Image()
	wantErr(t, err, errdefs.ErrFailedPrecondition)
	must(t, g.ReadCheckpoint(ctx, h.store))
	var list []MemberImage
	for _, m := range g.Members {
		img, err := m.Image()
		must(t, err)
		list = append(list, img)
	}
	names, err := Publish(ctx, h.images, "shop:v1", g.Target, list)
	must(t, err)
	rec, err := h.images.Get(ctx, names[0])
	must(t, err)
	if rec.Target.Digest != g.Members[0].Manifest.Digest || rec.Target.Platform != nil || rec.Target.Annotations != nil {
		t.Errorf("record: %+v", rec)
	}
}

func TestListShowsGroupsAndMembersWithoutOne(t *testing.T) {
	h := newHost(t)
	ctx, done := h.lease(t)
	defer done()
	g, members := buildShop(t, h, ctx)
	_, err := Publish(ctx, h.images, "shop:v1", g, members)
	must(t, err)
	alone := buildMemberOf(t, h, ctx, dockerImage(t, h), sampleCheckpoint("alone"))
	for name, d := range map[string]ocispec.Descriptor{"plain:1": dockerImage(t, h), "alone:1": target(alone.Manifest), "missing:1": {MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromString("gone"), Size: 4}} {
		_, err = h.images.Create(ctx, images.Image{Name: name, Target: d})
		must(t, err)
	}
	list, err := ListGroups(ctx, h.images, h.store)
	must(t, err)
	if len(list) != 2 || list[0].Ref != "alone:1" || list[0].Group.Whole || list[1].Ref != "docker.io/library/shop:v1" || list[1].Bytes <= 0 {
		t.Errorf("list: %+v", list)
	}
}

func TestPlainImageIsNoCheckpoint(t *testing.T) {
	h := newHost(t)
	base := dockerImage(t, h)
	_, err := ReadGroup(h.ctx, h.store, base)
	wantErr(t, err, ErrNotCheckpoint, base.Digest.String())
	idx := jsonBlob(t, h, ocispec.MediaTypeImageIndex, ocispec.Index{Manifests: []ocispec.Descriptor{base}})
	_, err = ReadGroup(h.ctx, h.store, idx)
	wantErr(t, err, ErrNotCheckpoint)
}

func TestHostileImageIsRefused(t *testing.T) {
	h := newHost(t)
	desc, members := buildShop(t, h, h.ctx)
	var good ocispec.Index
	must(t, readJSONBlob(h.ctx, h.store, desc, &good))
	index := func(change func(*ocispec.Index)) ocispec.Descriptor {
		var idx ocispec.Index
		b, _ := json.Marshal(good)
		must(t, json.Unmarshal(b, &idx))
		change(&idx)
		return jsonBlob(t, h, ocispec.MediaTypeImageIndex, idx)
	}
	for name, d := range map[string]ocispec.Descriptor{
		"same member twice": index(func(i *ocispec.Index) { i.Manifests[1] = i.Manifests[0] }),
		"other group":       index(func(i *ocispec.Index) { i.Annotations[AnnotationGroup] = "other" }),
		"bad group":         index(func(i *ocispec.Index) { i.Annotations[AnnotationGroup] = "../x" }),
		"bad epoch":         index(func(i *ocispec.Index) { i.Annotations[AnnotationEpoch] = "x" }),
		"bad number":        index(func(i *ocispec.Index) { i.Annotations[AnnotationEpochNumber] = "-1" }),
		"bad time":          index(func(i *ocispec.Index) { i.Annotations[AnnotationCutTime] = "yesterday" }),
		"no members":        index(func(i *ocispec.Index) { i.Manifests = nil }),
		"itself nested":     index(func(i *ocispec.Index) { i.Manifests[0] = desc }),
		"many": index(func(i *ocispec.Index) {
			for range maxMembers {
				i.Manifests = append(i.Manifests, i.Manifests[0])
			}
		}),
		"bad digest": index(func(i *ocispec.Index) { i.Manifests[0].Digest = "sha256:../../x" }),
		"large":      blob(t, h, ocispec.MediaTypeImageIndex, []byte(`{"x":"`+strings.Repeat("x", maxJSON)+`"}`)),
		"layers and diff ids": jsonBlob(t, h, ocispec.MediaTypeImageManifest, func() ocispec.Manifest {
			m := readManifest(t, h, members[0].Manifest)
			m.Layers = m.Layers[:3]
			return m
		}()),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := ReadGroup(h.ctx, h.store, d); err == nil {
				t.Error("no error")
			}
		})
	}
	// The checkpoint of another member under this one's name.
	m := readManifest(t, h, members[0].Manifest)
	m.Annotations[AnnotationMember] = "other"
	g, err := ReadGroup(h.ctx, h.store, jsonBlob(t, h, ocispec.MediaTypeImageManifest, m))
	must(t, err)
	wantErr(t, g.ReadCheckpoint(h.ctx, h.store), errdefs.ErrInvalidArgument, "member db")
}
