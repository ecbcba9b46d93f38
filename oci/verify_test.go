// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

func file(name string, size int64) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, Size: size}
}

func TestTarThatIsNoCheckpointIsRefused(t *testing.T) {
	good := []any{
		&tar.Header{Typeflag: tar.TypeDir, Name: ".cohort/", Mode: 0o700},
		file(".cohort/cohort.json", 2), "{}", file(".cohort/spec.dump", 2), "{}",
		&tar.Header{Typeflag: tar.TypeDir, Name: ".cohort/checkpoint/", Mode: 0o700},
		file(".cohort/checkpoint/core-1.img", 1), "c",
	}
	with := func(extra ...any) []any { return append(append([]any{}, good...), extra...) }
	must(t, VerifyTar(context.Background(), bytes.NewReader(tarOf(t, good...)), 100))

	link := func(typ byte, name, to string) *tar.Header {
		return &tar.Header{Typeflag: typ, Name: name, Linkname: to, Mode: 0o600}
	}
	for name, items := range map[string][]any{
		"symlink":         with(link(tar.TypeSymlink, ".cohort/checkpoint/pages-1.img", "/etc/shadow")),
		"hardlink":        with(link(tar.TypeLink, ".cohort/checkpoint/pages-1.img", "etc/shadow")),
		"device":          with(&tar.Header{Typeflag: tar.TypeBlock, Name: ".cohort/checkpoint/pages-1.img", Mode: 0o600, Devmajor: 8}),
		"fifo":            with(link(tar.TypeFifo, ".cohort/checkpoint/pages-1.img", "")),
		"parent symlink":  with(link(tar.TypeSymlink, ".cohort/checkpoint/parent", "/etc")),
		"twice":           with(file(".cohort/checkpoint/core-1.img", 0)),
		"twice as ./":     with(file("./.cohort/checkpoint/core-1.img", 0)),
		"outside":         with(file("etc/passwd", 0)),
		"whiteout":        with(file(".cohort/.wh.cohort.json", 0)),
		"root whiteout":   with(file(".wh.bin", 0)),
		"dot dot":         with(file(".cohort/../etc/passwd", 0)),
		"dot dot image":   with(file(".cohort/checkpoint/../../x.img", 0)),
		"absolute":        with(file("/.cohort/checkpoint/x.img", 0)),
		"unknown file":    with(file(".cohort/checkpoint/run.sh", 0)),
		"unknown dir":     with(&tar.Header{Typeflag: tar.TypeDir, Name: ".cohort/checkpoint/sub/", Mode: 0o700}),
		"image as dir":    with(&tar.Header{Typeflag: tar.TypeDir, Name: ".cohort/checkpoint/x.img/", Mode: 0o700}),
		"file as dir":     with(file(".cohort/files", 0)),
		"deep":            with(file(".cohort/checkpoint/"+strings.Repeat("parent/", maxDepth)+"x.img", 0)),
		"file of user":    with(&tar.Header{Typeflag: tar.TypeReg, Name: ".cohort/files/x", Mode: 0o600, Uid: 1000}),
		"setuid":          with(&tar.Header{Typeflag: tar.TypeReg, Name: ".cohort/files/x", Mode: 0o4600}),
		"open to all":     with(&tar.Header{Typeflag: tar.TypeReg, Name: ".cohort/files/x", Mode: 0o644}),
		"xattr":           with(&tar.Header{Typeflag: tar.TypeReg, Name: ".cohort/files/x", Mode: 0o600, Format: tar.FormatPAX, PAXRecords: map[string]string{xattrRecord + "security.capability": "x"}}),
		"too large":       with(file(".cohort/checkpoint/pages-1.img", 96), strings.Repeat("x", 96)),
		"no documents":    {good[0]},
		"file called dir": {file(".cohort", 0)},
	} {
		t.Run(name, func(t *testing.T) {
			wantErr(t, VerifyTar(context.Background(), bytes.NewReader(tarOf(t, items...)), 100), errdefs.ErrInvalidArgument)
		})
	}
	raw := tarOf(t, good...)
	if VerifyTar(context.Background(), bytes.NewReader(raw[:len(raw)-2000]), 0) == nil {
		t.Error("a cut off layer is accepted")
	}
	garbage := bytes.Repeat([]byte("garbage!"), 512)
	wantErr(t, VerifyTar(context.Background(), bytes.NewReader(garbage), 0), errdefs.ErrInvalidArgument)
}

// An entry of the tar format's own kind for extended headers, which says that
// the file after it is 1 EiB of holes.
func TestHolesAreRefusedBeforeTheyAreRead(t *testing.T) {
	var record string
	for k, v := range map[string]string{"GNU.sparse.size": "1152921504606846976", "GNU.sparse.numblocks": "1", "GNU.sparse.map": "0,0", "GNU.sparse.major": "0", "GNU.sparse.minor": "1"} {
		line := fmt.Sprintf(" %s=%s\n", k, v)
		n := len(line) + 2 // every line has two digits of length
		record += fmt.Sprint(n) + line
	}
	raw := tarOf(t, file("PaxHeaders/x", int64(len(record))), record, file(".cohort/checkpoint/pages-1.img", 0))
	raw[156] = tar.TypeXHeader
	copy(raw[148:156], "        ")
	sum := 0
	for _, b := range raw[:512] {
		sum += int(b)
	}
	copy(raw[148:156], fmt.Sprintf("%06o\x00 ", sum))
	hdr, err := tar.NewReader(bytes.NewReader(raw)).Next()
	must(t, err)
	if hdr.Size != 1<<60 {
		t.Fatalf("the header claims %d bytes, the test is wrong", hdr.Size)
	}
	wantErr(t, VerifyTar(context.Background(), bytes.NewReader(raw), 0), errdefs.ErrInvalidArgument, "holes")
}

func TestCompressedBombIsStoppedByItsBound(t *testing.T) {
	h := newHost(t)
	var z bytes.Buffer
	w, err := zstd.NewWriter(&z)
	must(t, err)
	tw := tar.NewWriter(w)
	must(t, tw.WriteHeader(file(".cohort/checkpoint/pages-1.img", 64<<20)))
	_, err = tw.Write(make([]byte, 64<<20))
	must(t, err)
	must(t, tw.Close())
	must(t, w.Close())
	d := blob(t, h, ocispec.MediaTypeImageLayerZstd, z.Bytes())
	wantErr(t, VerifyLayer(h.ctx, h.store, d, 1<<20), errdefs.ErrInvalidArgument, "larger than")
	_, _, err = readLayerHead(h.ctx, h.store, d)
	wantErr(t, err, nil)
	ctx, cancel := context.WithCancel(h.ctx)
	cancel()
	wantErr(t, VerifyLayer(ctx, h.store, d, 0), context.Canceled)
}

func TestLayerHeadIsReadWithoutThePages(t *testing.T) {
	h := newHost(t)
	img := buildMemberOf(t, h, h.ctx, dockerImage(t, h), sampleCheckpoint("db"))
	raw := layerTar(t, h, img.CkptLayer)
	at := bytes.Index(raw, []byte("pagepage"))
	if at < 0 {
		t.Fatal("no pages in the layer")
	}
	cut := blob(t, h, ocispec.MediaTypeImageLayer, raw[:at])
	ck, _, err := readLayerHead(h.ctx, h.store, cut)
	must(t, err)
	if ck.Member != "db" {
		t.Errorf("%+v", ck)
	}
}

func TestHostileLayerHeadIsRefused(t *testing.T) {
	h := newHost(t)
	big := strings.Repeat(" ", maxJSON+1)
	var many []any
	for i := range maxScanHead + 1 {
		many = append(many, file(fmt.Sprintf(".cohort/checkpoint/a-%d.img", i), 0))
	}
	for name, items := range map[string][]any{
		"large":      {file(".cohort/cohort.json", int64(len(big))), big},
		"link":       {&tar.Header{Typeflag: tar.TypeSymlink, Name: ".cohort/cohort.json", Linkname: "/etc/shadow"}},
		"late":       append(many, file(".cohort/cohort.json", 2), "{}"),
		"elsewhere":  {file("cohort.json", 2), "{}"},
		"no spec":    {file(".cohort/cohort.json", 2), "{}"},
		"spec first": {file(".cohort/spec.dump", 36), `{"process":{},"root":{},"linux":{}}` + " "},
		"empty":      {},
	} {
		t.Run(name, func(t *testing.T) {
			if _, _, err := readLayerHead(h.ctx, h.store, blob(t, h, ocispec.MediaTypeImageLayer, tarOf(t, items...))); err == nil {
				t.Error("no error")
			}
		})
	}
}

func TestCheckpointDirectoryIsVerified(t *testing.T) {
	dir := checkpointDir(t, sampleCheckpoint("db"))
	must(t, os.Chmod(filepath.Join(dir, "checkpoint"), 0o755))
	must(t, os.Chmod(filepath.Join(dir, "checkpoint/core-1.img"), 0o644))
	must(t, VerifyCheckpointDir(context.Background(), dir, 1<<20))
	for name, want := range map[string]os.FileMode{"checkpoint": 0o700, "checkpoint/core-1.img": 0o600} {
		fi, err := os.Stat(filepath.Join(dir, name))
		must(t, err)
		if fi.Mode().Perm() != want {
			t.Errorf("%s has mode %v", name, fi.Mode())
		}
	}
	must(t, os.Mkdir(filepath.Join(dir, "checkpoint/parent"), 0o700))
	must(t, VerifyCheckpointDir(context.Background(), dir, 0))
}

func TestHostileCheckpointDirectoryIsRefused(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret.img")
	must(t, os.WriteFile(secret, []byte("s"), 0o644))
	for name, create := range map[string]func(dir string) error{
		"symlink":     func(d string) error { return os.Symlink(secret, filepath.Join(d, "checkpoint/x-1.img")) },
		"parent link": func(d string) error { return os.Symlink("/etc", filepath.Join(d, "checkpoint/parent")) },
		"hardlink":    func(d string) error { return os.Link(secret, filepath.Join(d, "checkpoint/x-1.img")) },
		"fifo":        func(d string) error { return unix.Mkfifo(filepath.Join(d, "checkpoint/x-1.img"), 0o600) },
		"unknown":     func(d string) error { return os.WriteFile(filepath.Join(d, "checkpoint/x.so"), nil, 0o600) },
		"unknown dir": func(d string) error { return os.Mkdir(filepath.Join(d, "volumes"), 0o700) },
		"setuid": func(d string) error {
			return os.Chmod(filepath.Join(d, "checkpoint/core-1.img"), os.ModeSetuid|0o600)
		},
		"sticky dir": func(d string) error { return os.Chmod(filepath.Join(d, "checkpoint"), os.ModeSticky|0o700) },
		"too large":  func(d string) error { return os.Truncate(filepath.Join(d, "checkpoint/core-1.img"), 1<<30) },
		"no json":    func(d string) error { return os.Remove(filepath.Join(d, CheckpointFile)) },
		"no images":  func(d string) error { return os.RemoveAll(filepath.Join(d, ImagesDir)) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := checkpointDir(t, sampleCheckpoint("db"))
			must(t, create(dir))
			wantErr(t, VerifyCheckpointDir(context.Background(), dir, 1<<20), errdefs.ErrInvalidArgument)
		})
	}
	t.Run("device and foreign owner", func(t *testing.T) {
		needRoot(t)
		dir := checkpointDir(t, sampleCheckpoint("db"))
		p := filepath.Join(dir, "checkpoint/x-1.img")
		must(t, unix.Mknod(p, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
		wantErr(t, VerifyCheckpointDir(context.Background(), dir, 0), errdefs.ErrInvalidArgument, "x-1.img")
		must(t, os.Remove(p))
		must(t, os.Chown(filepath.Join(dir, "checkpoint/core-1.img"), 1000, 0))
		wantErr(t, VerifyCheckpointDir(context.Background(), dir, 0), errdefs.ErrInvalidArgument, "user 1000")
	})
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(checkpointDir(t, sampleCheckpoint("db")), link))
	if VerifyCheckpointDir(context.Background(), link, 0) == nil {
		t.Error("a link to a checkpoint is followed")
	}
}

// Names that CRIU 4.2 gives its images, criu/image-desc.c, and runc its own.
func TestEveryImageNameOfCRIUIsKnown(t *testing.T) {
	for _, n := range []string{
		"inventory.img", "fdinfo-2.img", "pagemap-1.img", "pagemap-shmem-1234.img", "reg-files.img", "eventpoll-tfd.img", "core-17.img", "ids-1.img",
		"mm-1.img", "pipes-data.img", "unixsk.img", "inetsk.img", "sk-queues.img", "posix-timers-1.img", "ipcns-shm-10.img", "ghost-file-1f.img", "memfd.img",
		"tcp-stream-2ab.img", "mountpoints-12.img", "netns-9.img", "route6-9.img", "nftables-9.img", "tmpfs-74.tar.gz.img", "tmpfs-dev-74.tar.gz.img",
		"autofs-3.img", "tty-data.img", "pages-1.img", "signal-p-1.img", "netns-ct-9.img", "seccomp.img", "pidns-1.img", "bpfmap-data.img", "pidfd.img",
		"amdgpu-pages-0.img", "stats-dump", "irmap-cache", "descriptors.json", "dump.log",
	} {
		if err := checkName("checkpoint/"+n, false); err != nil {
			t.Error(err)
		}
	}
}
