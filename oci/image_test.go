// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

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

func TestNamedGroupSurvivesGarbageCollection(t *testing.T) {
	h := newHost(t)
	ctx, done := h.lease(t)
	g, members := buildShop(t, h, ctx)
	h.name(t, "shop:v1", g, members)
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
	must(t, h.images.Delete(h.ctx, "shop:v1"))
	must(t, h.images.Delete(h.ctx, "shop:v1-app"))
	collect()
	if exists(h, g.Digest) || exists(h, members[1].CkptLayer.Digest) || !exists(h, members[0].CkptLayer.Digest) {
		t.Error("wrong content was collected after the group and one member were deleted")
	}
	must(t, h.images.Delete(h.ctx, "shop:v1-db"))
	collect()
	for _, d := range all {
		if exists(h, d) {
			t.Errorf("%s is still there after every name was deleted", d)
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
	desc, members := buildShop(t, h, ctx)
	g, err := ReadGroup(ctx, h.store, desc)
	must(t, err)
	_, err = g.Members[0].Image()
	wantErr(t, err, errdefs.ErrFailedPrecondition)
	must(t, g.ReadCheckpoint(ctx, h.store))
	for i, m := range g.Members {
		img, err := m.Image()
		must(t, err)
		if img.Manifest.Digest != members[i].Manifest.Digest || img.Checkpoint.Member != members[i].Checkpoint.Member {
			t.Errorf("member %d: %+v", i, img)
		}
	}
}

func TestListShowsGroupsAndMembersWithoutOne(t *testing.T) {
	h := newHost(t)
	ctx, done := h.lease(t)
	defer done()
	g, members := buildShop(t, h, ctx)
	h.name(t, "shop:v1", g, members)
	alone := buildMemberOf(t, h, ctx, dockerImage(t, h), sampleCheckpoint("alone"))
	for name, d := range map[string]ocispec.Descriptor{"plain:1": dockerImage(t, h), "alone:1": alone.Manifest, "missing:1": {MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromString("gone"), Size: 4}} {
		_, err := h.images.Create(ctx, images.Image{Name: name, Target: d})
		must(t, err)
	}
	list, err := ListGroups(ctx, h.images, h.store)
	must(t, err)
	if len(list) != 2 || list[0].Ref != "alone:1" || list[0].Group.Whole || list[1].Ref != "shop:v1" || list[1].Bytes <= 0 {
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
