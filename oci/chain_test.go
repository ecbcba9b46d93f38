// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func epochID(n int) string { return fmt.Sprintf("%032x", n) }

// epochOf is the document of the n-th epoch of a container; from the second on an increment.
func epochOf(n int) Checkpoint {
	ck := sampleCheckpoint("db")
	ck.Epoch, ck.EpochNumber, ck.Chain = epochID(n), uint64(n), n
	if n > 1 {
		ck.Parent = &ParentEpoch{Epoch: epochID(n - 1), Number: uint64(n - 1)}
	}
	return ck
}

// chain builds as many epochs as there are upper directories, each on the last; nil is
// one in which no file changed.
func chain(t testing.TB, h *host, base ocispec.Descriptor, uppers ...map[string]string) []MemberImage {
	t.Helper()
	var out []MemberImage
	for i, files := range uppers {
		in := MemberInput{Base: base, Upper: upperDir(t, files), CheckpointDir: checkpointDir(t, epochOf(i+1))}
		if i > 0 {
			in.ParentImage = &out[i-1].Manifest
		}
		img, err := BuildMember(h.ctx, h.store, in)
		must(t, err)
		out = append(out, img)
	}
	return out
}

func kinds(m *Member) string {
	var s []string
	for _, l := range m.Layers {
		s = append(s, fmt.Sprintf("%s:%d", l.Kind, l.EpochNumber))
	}
	return strings.Join(s, " ")
}

func memberOf(t testing.TB, h *host, img MemberImage) *Member {
	t.Helper()
	g, err := ReadGroup(h.ctx, h.store, img.Manifest)
	must(t, err)
	must(t, g.ReadCheckpoint(h.ctx, h.store))
	return &g.Members[0]
}

func TestIncrementAddsItsOwnLayersToItsParents(t *testing.T) {
	h := newHost(t)
	built := chain(t, h, dockerImage(t, h), map[string]string{"a": "1"}, map[string]string{"a": "2"}, nil)
	for i, want := range []string{
		"base:0 base:0 rw:1 checkpoint:1",
		"base:0 base:0 rw:1 checkpoint:1 rw:2 checkpoint:2",
		"base:0 base:0 rw:1 checkpoint:1 rw:2 checkpoint:2 checkpoint:3",
	} {
		img := built[i]
		m := memberOf(t, h, img)
		if got := kinds(m); got != want {
			t.Errorf("epoch %d has the layers %s, want %s", i+1, got, want)
		}
		if m.Chain != i+1 || m.FullEpoch() != 1 || m.BaseLayers() != 2 || (m.Parent == nil) != (i == 0) {
			t.Errorf("epoch %d: chain %d on %v, full epoch %d, %d base layers", i+1, m.Chain, m.Parent, m.FullEpoch(), m.BaseLayers())
		}
		ids, err := images.RootFS(h.ctx, h.store, img.Config)
		must(t, err)
		n := len(ids)
		if img.CheckpointChainID != identity.ChainID(ids) || img.RWChainID != identity.ChainID(ids[:n-1:n-1]) {
			t.Errorf("epoch %d: chain ids are not those of its config", i+1)
		}
		if i == 0 {
			continue
		}
		parent := readManifest(t, h, built[i-1].Manifest)
		own := readManifest(t, h, img.Manifest)
		for k, l := range parent.Layers {
			if own.Layers[k].Digest != l.Digest || own.Layers[k].MediaType != l.MediaType || own.Layers[k].Annotations[AnnotationEpoch] != l.Annotations[AnnotationEpoch] {
				t.Errorf("epoch %d: layer %d is not its parent's", i+1, k)
			}
		}
		if img.BaseChainID != built[i-1].CheckpointChainID {
			t.Errorf("epoch %d is committed on %s", i+1, img.BaseChainID)
		}
		if got := own.Annotations; got[AnnotationParent] != epochID(i) || got[AnnotationParentNumber] != fmt.Sprint(i) || got[AnnotationChain] != fmt.Sprint(i+1) {
			t.Errorf("epoch %d: annotations %v", i+1, got)
		}
		back, err := m.Image()
		must(t, err)
		if back.BaseChainID != img.BaseChainID || back.RWChainID != img.RWChainID || back.RWLayer.Digest != img.RWLayer.Digest {
			t.Errorf("epoch %d reads back as %+v", i+1, back)
		}
	}
	last := built[2]
	if last.RWLayer.Digest != "" || last.RWChainID != last.BaseChainID {
		t.Errorf("no file changed, but there is a writable layer: %+v", last)
	}
	m := memberOf(t, h, last)
	want := last.Manifest.Size + last.Config.Size + last.CkptLayer.Size
	if m.IncrementBytes != want || m.Bytes <= m.IncrementBytes {
		t.Errorf("sizes are %d of %d bytes, want %d", m.IncrementBytes, m.Bytes, want)
	}
}

func TestIncrementIsBuiltOnItsOwnParentOnly(t *testing.T) {
	h := newHost(t)
	base := dockerImage(t, h)
	first := chain(t, h, base, map[string]string{"a": "1"})[0]
	build := func(parent *ocispec.Descriptor, change func(*Checkpoint)) error {
		ck := epochOf(2)
		change(&ck)
		_, err := BuildMember(h.ctx, h.store, MemberInput{Base: base, ParentImage: parent, Upper: t.TempDir(), CheckpointDir: checkpointDir(t, ck)})
		return err
	}
	for name, change := range map[string]func(*Checkpoint){
		"another container": func(c *Checkpoint) { c.ContainerID = "db-2" },
		"another life":      func(c *Checkpoint) { c.CreatedAt = c.CreatedAt.Add(1) },
		"another epoch":     func(c *Checkpoint) { c.Parent.Epoch = epochID(9) },
		"another number":    func(c *Checkpoint) { c.EpochNumber, c.Parent.Number = 5, 3 },
		"another root":      func(c *Checkpoint) { c.Rootfs.ChainID = digest.FromString("other") },
		"another chain":     func(c *Checkpoint) { c.Chain = 3 },
	} {
		wantErr(t, build(&first.Manifest, change), errdefs.ErrFailedPrecondition, "db", "parent image "+first.Manifest.Digest.String())
		if t.Failed() {
			t.Fatal(name)
		}
	}
	wantErr(t, build(nil, func(*Checkpoint) {}), errdefs.ErrInvalidArgument, "no parent image")
	wantErr(t, build(&first.Manifest, func(c *Checkpoint) { c.Parent, c.Chain = nil, 1 }), errdefs.ErrInvalidArgument, "a full checkpoint")
	wantErr(t, build(&base, func(*Checkpoint) {}), ErrNotCheckpoint)
	must(t, h.store.Delete(h.ctx, readManifest(t, h, first.Manifest).Layers[0].Digest))
	wantErr(t, build(&first.Manifest, func(*Checkpoint) {}), errdefs.ErrNotFound, "pull the image again")
}

func TestRestoredIncrementIsCheckpointedInFull(t *testing.T) {
	h := newHost(t)
	last := chain(t, h, dockerImage(t, h), map[string]string{"a": "1"}, map[string]string{"a": "2"}, nil)[2]
	ck := sampleCheckpoint("db")
	ck.Rootfs.ChainID = last.CheckpointChainID
	img, err := BuildMember(h.ctx, h.store, MemberInput{
		Base: last.Manifest, Parent: last.CheckpointChainID, Upper: upperDir(t, map[string]string{"b": "3"}), CheckpointDir: checkpointDir(t, ck),
	})
	must(t, err)
	m := memberOf(t, h, img)
	if got := kinds(m); got != "base:0 base:0 rw:1 rw:2 rw:3 checkpoint:3" {
		t.Errorf("layers are %s", got)
	}
	if m.Chain != 1 || m.BaseLayers() != 4 || img.ParentChainID != last.CheckpointChainID {
		t.Errorf("chain %d, %d base layers, on %s", m.Chain, m.BaseLayers(), img.ParentChainID)
	}
}

func TestFullCheckpointFindsItsBaseInAnEarlierOneWhenTheNameWasMoved(t *testing.T) {
	h := newHost(t)
	base := dockerImage(t, h)
	moved := buildMemberOf(t, h, h.ctx, base, sampleCheckpoint("other")).Manifest
	built := chain(t, h, base, map[string]string{"a": "1"}, map[string]string{"a": "2"})
	in := MemberInput{
		Base: moved, Parent: epochOfChain(), Earlier: &built[1].Manifest,
		Upper: upperDir(t, map[string]string{"a": "3"}), CheckpointDir: checkpointDir(t, sampleCheckpoint("db")),
	}
	img, err := BuildMember(h.ctx, h.store, in)
	must(t, err)
	if got := kinds(memberOf(t, h, img)); got != "base:0 base:0 rw:3 checkpoint:3" {
		t.Errorf("layers are %s", got)
	}
	in.Earlier = &moved
	_, err = BuildMember(h.ctx, h.store, in)
	wantErr(t, err, errdefs.ErrNotFound, "the container runs on", "it is of container other-1")
}

// epochOfChain is the chain id that the documents here name.
func epochOfChain() digest.Digest { return sampleCheckpoint("db").Rootfs.ChainID }

func TestChainThatItsLayersContradictIsRefused(t *testing.T) {
	h := newHost(t)
	img := chain(t, h, dockerImage(t, h), map[string]string{"a": "1"}, map[string]string{"a": "2"})[1]
	for name, change := range map[string]func(*ocispec.Manifest){
		"longer":         func(m *ocispec.Manifest) { m.Annotations[AnnotationChain] = "7" },
		"no number":      func(m *ocispec.Manifest) { m.Annotations[AnnotationChain] = "\x1b[2J" },
		"no parent":      func(m *ocispec.Manifest) { delete(m.Annotations, AnnotationParent) },
		"strange parent": func(m *ocispec.Manifest) { m.Annotations[AnnotationParent] = "../x" },
		"itself":         func(m *ocispec.Manifest) { m.Annotations[AnnotationParent] = m.Annotations[AnnotationEpoch] },
		"younger parent": func(m *ocispec.Manifest) { m.Annotations[AnnotationParentNumber] = "2" },
		"parent number":  func(m *ocispec.Manifest) { m.Annotations[AnnotationParentNumber] = "-1" },
		"layer's number": func(m *ocispec.Manifest) { m.Layers[3].Annotations[AnnotationEpochNumber] = "x" },
	} {
		m := readManifest(t, h, img.Manifest)
		change(&m)
		_, err := ReadGroup(h.ctx, h.store, jsonBlob(t, h, m.MediaType, m))
		if err == nil || !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What only the document in the layer gives away.
	m := readManifest(t, h, img.Manifest)
	m.Annotations[AnnotationParent] = epochID(7)
	g, err := ReadGroup(h.ctx, h.store, jsonBlob(t, h, m.MediaType, m))
	must(t, err)
	wantErr(t, g.ReadCheckpoint(h.ctx, h.store), errdefs.ErrInvalidArgument, "annotations tell of")
}

func TestGroupTellsOfItsLongestChain(t *testing.T) {
	h := newHost(t)
	base := dockerImage(t, h)
	db := chain(t, h, base, map[string]string{"a": "1"}, nil)
	ck := sampleCheckpoint("app") // came later, so it is full
	ck.Epoch, ck.EpochNumber = epochID(2), 2
	members := []MemberImage{buildMemberOf(t, h, h.ctx, base, ck), db[1]}
	desc, err := BuildGroup(h.ctx, h.store, members, GroupInfo{Group: "shop", Epoch: epochID(2), EpochNumber: 2, CutAt: cutTime})
	must(t, err)
	h.name(t, "shop:1", desc, members)
	list, err := ListGroups(h.ctx, h.images, h.store)
	must(t, err)
	if len(list) != 1 {
		t.Fatalf("%d groups", len(list))
	}
	g := list[0].Group
	if g.Chain != 2 || g.Parent == nil || g.Parent.Number != 1 || g.FullEpoch != 1 {
		t.Errorf("chain %d on %v, full epoch %d", g.Chain, g.Parent, g.FullEpoch)
	}
	own := members[0].Manifest.Size + members[0].Config.Size + members[0].RWLayer.Size + members[0].CkptLayer.Size +
		members[1].Manifest.Size + members[1].Config.Size + members[1].CkptLayer.Size + desc.Size
	if list[0].IncrementBytes != own || list[0].Bytes <= own {
		t.Errorf("sizes are %d of %d bytes, want %d", list[0].IncrementBytes, list[0].Bytes, own)
	}
}

func TestMergedEpochIsAFullCheckpoint(t *testing.T) {
	h := newHost(t)
	built := chain(t, h, dockerImage(t, h), map[string]string{"a": "1"}, map[string]string{"b": "2"}, map[string]string{"c": "3"})
	m := memberOf(t, h, built[2])
	dir := checkpointDir(t, epochOf(3))
	file := func(name, data string) File {
		return File{Name: name, Size: int64(len(data)), Open: func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(data)), nil }}
	}
	in := MergeInput{
		Member: m, CheckpointDir: dir,
		Images: []File{file("inventory.img", "all"), file("pages-1.img", "0123456789"), file("parent/pages-1.img", "abc"), file("restore.log", "x")},
		Uppers: []string{upperDir(t, map[string]string{"c": "3", "d/e": "5"}), upperDir(t, map[string]string{"b": "2"}), upperDir(t, map[string]string{"a": "1", "b": "1"})},
		Below:  []string{t.TempDir()},
	}
	img, err := MergeMember(h.ctx, h.store, in)
	must(t, err)
	got := memberOf(t, h, img)
	if s := kinds(got); s != "base:0 base:0 rw:3 checkpoint:3" {
		t.Errorf("layers are %s", s)
	}
	ck, old := got.Checkpoint, m.Checkpoint
	if ck.Epoch != old.Epoch || ck.EpochNumber != 3 || !ck.CutAt.Equal(old.CutAt) || ck.Parent != nil || ck.Chain != 1 || ck.Version != versionFull ||
		ck.MemoryBytes != 13 || ck.StorageBytes != 4 || ck.ContainerID != old.ContainerID {
		t.Errorf("document: %+v", ck)
	}
	if m.Checkpoint.Parent == nil || m.Checkpoint.Chain != 3 {
		t.Error("the caller's document was changed")
	}
	must(t, VerifyLayer(h.ctx, h.store, img.CkptLayer, 0))
	names := map[string]string{}
	for tr := tar.NewReader(bytes.NewReader(layerTar(t, h, img.CkptLayer))); ; {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		b, err := io.ReadAll(tr)
		must(t, err)
		names[hdr.Name] = string(b)
	}
	for name, want := range map[string]string{
		".cohort/checkpoint/inventory.img": "all", ".cohort/checkpoint/pages-1.img": "0123456789", ".cohort/checkpoint/parent/pages-1.img": "abc",
		".cohort/checkpoint/descriptors.json": "[]", ".cohort/files/00-hosts": "127.0.0.1 localhost\n",
	} {
		if names[name] != want {
			t.Errorf("%s is %q, want %q", name, names[name], want)
		}
	}
	for _, gone := range []string{".cohort/checkpoint/core-1.img", ".cohort/checkpoint/restore.log"} {
		if _, ok := names[gone]; ok {
			t.Errorf("%s is there", gone)
		}
	}
	for tr := tar.NewReader(bytes.NewReader(layerTar(t, h, img.RWLayer))); ; {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		b, err := io.ReadAll(tr)
		must(t, err)
		names[hdr.Name] = string(b)
	}
	if names["a"] != "1" || names["b"] != "2" || names["c"] != "3" || names["d/e"] != "5" {
		t.Errorf("the writable layer is not all three: %v", names)
	}
	// A file that is not what it was said to be makes no image.
	in.Images[1].Size++
	_, err = MergeMember(h.ctx, h.store, in)
	wantErr(t, err, errdefs.ErrAborted, "pages-1.img changed")
	in.Images = []File{file("../spec.dump", "x")}
	_, err = MergeMember(h.ctx, h.store, in)
	wantErr(t, err, errdefs.ErrInvalidArgument, "is not below")
	left, err := h.store.ListStatuses(h.ctx)
	must(t, err)
	if len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	_, err = os.Stat(dir)
	must(t, err)
}

func TestFullCheckpointsAreReadByOlderVersions(t *testing.T) {
	for n, want := range map[int]int{1: versionFull, 2: Version} {
		got, _, err := ReadCheckpointDir(checkpointDir(t, epochOf(n)))
		must(t, err)
		if got.Version != want {
			t.Errorf("epoch %d is written as version %d, want %d", n, got.Version, want)
		}
	}
}
