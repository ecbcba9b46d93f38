// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
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
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	rspec "github.com/opencontainers/runtime-spec/specs-go"
	bolt "go.etcd.io/bbolt"
)

const (
	epoch1 = "00112233445566778899aabbccddeeff"
	epoch2 = "ffeeddccbbaa99887766554433221100"
)

var cutTime = time.Date(2026, 3, 14, 15, 9, 26, 535897932, time.UTC)

// host is containerd's storage without its daemon: the same content, image and
// lease code, with its garbage collector.
type host struct {
	ctx    context.Context
	db     *metadata.DB
	store  content.Store
	images images.Store
}

func newHost(t testing.TB) *host {
	t.Helper()
	dir := t.TempDir()
	cs, err := local.NewStore(filepath.Join(dir, "content"))
	must(t, err)
	bdb, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, &bolt.Options{NoSync: true})
	must(t, err)
	t.Cleanup(func() { bdb.Close() })
	db := metadata.NewDB(bdb, cs, nil)
	ctx := namespaces.WithNamespace(context.Background(), "test")
	must(t, db.Init(ctx))
	return &host{ctx: ctx, db: db, store: db.ContentStore(), images: metadata.NewImageStore(db)}
}

// lease gives a context whose content is kept until done is called.
func (h *host) lease(t testing.TB) (ctx context.Context, done func()) {
	t.Helper()
	lm := metadata.NewLeaseManager(h.db)
	l, err := lm.Create(h.ctx, leases.WithRandomID())
	must(t, err)
	return leases.WithLease(h.ctx, l.ID), func() { must(t, lm.Delete(h.ctx, l)) }
}

// name names a group and its members.
func (h *host) name(t testing.TB, ref string, group ocispec.Descriptor, members []MemberImage) {
	t.Helper()
	_, err := h.images.Create(h.ctx, images.Image{Name: ref, Target: group})
	must(t, err)
	for _, m := range members {
		_, err := h.images.Create(h.ctx, images.Image{Name: ref + "-" + m.Checkpoint.Member, Target: m.Manifest})
		must(t, err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// needRoot skips a test that makes devices, owners and trusted attributes.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("COHORT_REQUIRE") == "1" {
		t.Fatal("root is missing, and COHORT_REQUIRE=1")
	}
	t.Skip("root is missing: the test makes devices, owners and trusted attributes")
}

func blob(t testing.TB, h *host, mediaType string, b []byte) ocispec.Descriptor {
	t.Helper()
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	must(t, content.WriteBlob(h.ctx, h.store, d.Digest.String(), bytes.NewReader(b), d))
	return d
}

func jsonBlob(t testing.TB, h *host, mediaType string, v any) ocispec.Descriptor {
	t.Helper()
	b, err := json.Marshal(v)
	must(t, err)
	return blob(t, h, mediaType, b)
}

// baseLayer makes a gzip layer with one file.
func baseLayer(t testing.TB, h *host, mediaType, name, data string) (ocispec.Descriptor, digest.Digest) {
	t.Helper()
	raw := tarOf(t, &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(data))}, data)
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	w.Write(raw)
	w.Close()
	return blob(t, h, mediaType, z.Bytes()), digest.FromBytes(raw)
}

// tarOf takes headers, each followed by its content as a string where it has one.
func tarOf(t testing.TB, items ...any) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, i := range items {
		switch i := i.(type) {
		case *tar.Header:
			must(t, tw.WriteHeader(i))
		case string:
			_, err := io.WriteString(tw, i)
			must(t, err)
		}
	}
	must(t, tw.Close())
	return b.Bytes()
}

// dockerImage is an image as Docker's tools push it.
func dockerImage(t testing.TB, h *host) ocispec.Descriptor {
	t.Helper()
	l1, d1 := baseLayer(t, h, images.MediaTypeDockerSchema2LayerGzip, "etc/os-release", "ID=one\n")
	l2, d2 := baseLayer(t, h, images.MediaTypeDockerSchema2LayerGzip, "bin/app", "#!\n")
	config := jsonBlob(t, h, images.MediaTypeDockerSchema2Config, map[string]any{
		"architecture": "amd64", "os": "linux", "container": "0123", "docker_version": "27.0",
		"config":  map[string]any{"Cmd": []string{"/bin/app"}, "Healthcheck": map[string]any{"Test": []string{"CMD", "/bin/ok"}}},
		"rootfs":  map[string]any{"type": "layers", "diff_ids": []digest.Digest{d1, d2}},
		"history": []any{map[string]any{"created_by": "one"}, map[string]any{"created_by": "ENV A=b", "empty_layer": true}, map[string]any{"created_by": "two"}},
	})
	return jsonBlob(t, h, images.MediaTypeDockerSchema2Manifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: images.MediaTypeDockerSchema2Manifest, Config: config, Layers: []ocispec.Descriptor{l1, l2},
	})
}

func sampleCheckpoint(member string) Checkpoint {
	return Checkpoint{
		Group: "shop", Member: member, ContainerID: member + "-1", Epoch: epoch1, EpochNumber: 3,
		CreatedAt: cutTime.Add(-time.Hour), CutAt: cutTime,
		Host: Host{Hostname: "alpha", Kernel: "6.18.0", Arch: "amd64", CPUVendor: "AuthenticAMD", CPUModel: "EPYC", CPUFlags: digest.FromString("fpu vme").Encoded(), PageSize: 4096, Cgroup: "v2"},

		CRIUVersion: "4.2.1", Runtime: "io.containerd.cohort.v2", OCIRuntime: "runc 1.5.2",
		Stdio:  Stdio{Stdin: StdioNull, Stdout: StdioPipe, Stderr: StdioPipe},
		Rootfs: Rootfs{ImageRef: "docker.io/library/shop:1", ImageDigest: digest.FromString("image"), ChainID: digest.FromString("chain")},
		Mounts: []Mount{
			{Destination: "/proc", Type: "proc", Kind: MountInternal},
			{Destination: "/dev/shm", Type: "tmpfs", Kind: MountTmpfs},
			{Destination: "/etc/hosts", Type: "bind", Kind: MountFile, File: "00-hosts", Source: "/var/lib/x/hosts"},
			{Destination: "/data", Type: "bind", Kind: MountLeftOut, Source: "/srv/data"},
		},
		Namespaces: []Namespace{{Type: "pid", Kind: NamespacePrivate}, {Type: "network", Kind: NamespacePath}},
		NetNS:      "net-1", Network: json.RawMessage(`{"links":[{"name":"eth0"}]}`),
		Processes:   []Process{{PID: 1, PPID: 0, Comm: "app", Threads: 4, RSS: 1 << 20}},
		MemoryBytes: 1 << 20, StorageBytes: 4096,
	}
}

func sampleSpec() *rspec.Spec {
	return &rspec.Spec{
		Version: "1.2.0",
		Process: &rspec.Process{Args: []string{"/bin/app"}, Cwd: "/"},
		Root:    &rspec.Root{Path: "rootfs"},
		Linux:   &rspec.Linux{Namespaces: []rspec.LinuxNamespace{{Type: rspec.PIDNamespace}, {Type: rspec.MountNamespace}}},
	}
}

// checkpointDir makes .cohort as a capture has it.
func checkpointDir(t testing.TB, ck Checkpoint) string {
	t.Helper()
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o700))
	for name, data := range map[string]string{
		"checkpoint/inventory.img": "inv", "checkpoint/pages-1.img": strings.Repeat("page", 4096), "checkpoint/core-1.img": "core",
		"checkpoint/tmpfs-dev-74.tar.gz.img": "t", "checkpoint/descriptors.json": "[]", "dump.log": "log", "files/00-hosts": "127.0.0.1 localhost\n",
	} {
		p := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(p), 0o700))
		must(t, os.WriteFile(p, []byte(data), 0o600))
	}
	must(t, WriteCheckpointDir(dir, ck, sampleSpec()))
	return dir
}

func upperDir(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, data := range files {
		p := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(p), 0o755))
		must(t, os.WriteFile(p, []byte(data), 0o644))
	}
	return dir
}

func buildMemberOf(t testing.TB, h *host, ctx context.Context, base ocispec.Descriptor, ck Checkpoint) MemberImage {
	t.Helper()
	img, err := BuildMember(ctx, h.store, MemberInput{Base: base, Upper: upperDir(t, map[string]string{"var/x": ck.Member}), CheckpointDir: checkpointDir(t, ck)})
	must(t, err)
	return img
}

func layerTar(t testing.TB, h *host, d ocispec.Descriptor) []byte {
	t.Helper()
	r, err := openLayer(h.ctx, h.store, d)
	must(t, err)
	defer r.Close()
	b, err := io.ReadAll(r)
	must(t, err)
	return b
}

func exists(h *host, d digest.Digest) bool {
	_, err := h.store.Info(h.ctx, d)
	return err == nil
}

func wantErr(t testing.TB, err, class error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one with %q", words)
	}
	if class != nil && !errors.Is(err, class) {
		t.Errorf("error %q is not of class %q", err, class)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not say %q", err, w)
		}
	}
}
