// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// maxWindow bounds what a zstd frame may make the reader allocate. The encoder
// here uses 4 MiB at its fastest level; 128 MiB is what zstd's own tool accepts.
const maxWindow = 128 << 20

// decompress follows the content, not the media type: an image tool may have
// recompressed the layer.
func decompress(r io.Reader) (io.ReadCloser, error) {
	br := bufio.NewReaderSize(r, 1<<16)
	magic, err := br.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		return gzip.NewReader(br)
	}
	return io.NopCloser(br), nil
}

func openLayer(ctx context.Context, provider content.Provider, desc ocispec.Descriptor) (io.ReadCloser, error) {
	ra, err := provider.ReaderAt(ctx, desc)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	r, err := decompress(content.NewReader(ra))
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", desc.Digest, errors.Join(err, ra.Close()))
	}
	return struct {
		io.Reader
		io.Closer
	}{ctxReader{ctx, r}, closers{r, ra}}, nil
}

// ctxReader lets a context end the reading of a layer that unpacks to far more
// than it is.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(b []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(b)
}

type closers []io.Closer

func (c closers) Close() (err error) {
	for _, x := range c {
		err = errors.Join(err, x.Close())
	}
	return err
}

// readLayerHead reads cohort.json and spec.dump from a checkpoint layer, the
// former from its first entries. It does not verify the rest.
func readLayerHead(ctx context.Context, provider content.Provider, desc ocispec.Descriptor) (*Checkpoint, *specs.Spec, error) {
	r, err := openLayer(ctx, provider, desc)
	if err != nil {
		return nil, nil, err
	}
	defer r.Close()
	var ck Checkpoint
	tr := tar.NewReader(io.LimitReader(r, maxHead))
	for i := 0; ; i++ {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil && ctx.Err() == nil {
			return nil, nil, fmt.Errorf("layer %s: %w: %w", desc.Digest, err, errdefs.ErrInvalidArgument)
		}
		if err != nil {
			return nil, nil, err
		}
		if i >= maxScanHead && ck.Version == 0 {
			break
		}
		name := path.Clean(hdr.Name)
		doc := strings.TrimPrefix(name, ReservedDir+"/")
		if doc == name || doc != CheckpointFile && doc != SpecDumpFile {
			continue
		}
		if hdr.Typeflag != tar.TypeReg || hdr.Size > maxJSON {
			return nil, nil, fmt.Errorf("%s: not a regular file of at most %d bytes: %w", name, maxJSON, errdefs.ErrInvalidArgument)
		}
		b, err := io.ReadAll(io.LimitReader(tr, maxJSON))
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", name, err)
		}
		if doc == CheckpointFile {
			if err := decodeCheckpoint(b, &ck); err != nil {
				return nil, nil, err
			}
			continue
		}
		spec, err := decodeSpec(b)
		if err == nil && ck.Version == 0 {
			break
		}
		return &ck, spec, err
	}
	return nil, nil, fmt.Errorf("layer %s: no %s and %s at its head: %w", desc.Digest, CheckpointFile, SpecDumpFile, ErrNotCheckpoint)
}

// VerifyLayer reads a checkpoint layer of the store to its end, see VerifyTar.
// maxBytes bounds its uncompressed size; 0 is no bound.
func VerifyLayer(ctx context.Context, provider content.Provider, desc ocispec.Descriptor, maxBytes int64) error {
	r, err := openLayer(ctx, provider, desc)
	if err != nil {
		return err
	}
	defer r.Close()
	if err := VerifyTar(ctx, r, maxBytes); err != nil {
		return fmt.Errorf("checkpoint layer %s: %w", desc.Digest, err)
	}
	return nil
}

// VerifyTar checks that a tar stream is a checkpoint layer and nothing else:
// regular files and directories under ReservedDir, with names that a
// checkpoint has, each once, and maxBytes of content at the most (0: no
// bound). Errors are ErrInvalidArgument.
func VerifyTar(ctx context.Context, r io.Reader, maxBytes int64) error {
	refuse := func(name, why string) error {
		return fmt.Errorf("%q: %s: %w", name, why, errdefs.ErrInvalidArgument)
	}
	tr := tar.NewReader(r)
	seen := map[string]bool{}
	var total int64
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
		}
		name := strings.TrimSuffix(strings.TrimPrefix(hdr.Name, "./"), "/")
		dir := hdr.Typeflag == tar.TypeDir
		switch {
		case hdr.Typeflag != tar.TypeReg && !dir:
			return refuse(hdr.Name, "neither a regular file nor a directory")
		case seen[name]:
			return refuse(hdr.Name, "is there twice")
		case len(seen) > maxEntries:
			return refuse(hdr.Name, "too many files")
		case hdr.Uid != 0 || hdr.Gid != 0:
			return refuse(hdr.Name, "does not belong to root")
		case hdr.Mode&0o7077 != 0:
			return refuse(hdr.Name, "is open to others, or set-id")
		}
		for k := range hdr.PAXRecords {
			// A sparse entry may claim any size without a byte behind it.
			if strings.HasPrefix(k, xattrRecord) || strings.HasPrefix(k, "GNU.sparse") {
				return refuse(hdr.Name, "has extended attributes or holes")
			}
		}
		seen[name] = true
		if rel, ok := strings.CutPrefix(name, ReservedDir+"/"); ok {
			if err := checkName(rel, dir); err != nil {
				return err
			}
		} else if name != ReservedDir || !dir {
			return refuse(hdr.Name, "is not below "+ReservedDir)
		}
		// Known from the header, before a byte of it is read.
		if total += hdr.Size; total < 0 || maxBytes > 0 && total > maxBytes {
			return refuse(hdr.Name, fmt.Sprintf("makes the checkpoint larger than %d bytes", maxBytes))
		}
		if _, err := io.Copy(io.Discard, tr); err != nil {
			return fmt.Errorf("%q: %w: %w", hdr.Name, err, errdefs.ErrInvalidArgument)
		}
	}
	for _, f := range []string{CheckpointFile, SpecDumpFile} {
		if !seen[ReservedDir+"/"+f] {
			return refuse(f, "is missing")
		}
	}
	return nil
}

// VerifyCheckpointDir checks a checkpoint directory before anything else looks at
// it, and before CRIU, which trusts its images, opens a file in it: regular
// files with one name and directories only, known names, owned by the caller's
// user (root), no set-id bits, maxBytes at the most (0: no bound). Modes are
// tightened to 0600 and 0700. Nothing is followed: each directory is opened
// below the last without links. Errors are ErrInvalidArgument.
func VerifyCheckpointDir(ctx context.Context, dir string, maxBytes int64) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("verifying checkpoint %s: %w", dir, err)
	}
	f := os.NewFile(uintptr(fd), dir)
	defer f.Close()
	v := &dirVerifier{ctx: ctx, max: maxBytes, uid: uint32(os.Geteuid()), seen: map[string]bool{}}
	if err = v.mode(fd, "."); err == nil {
		err = v.walk(f, "")
	}
	for _, name := range []string{CheckpointFile, SpecDumpFile, ImagesDir} {
		if err == nil && !v.seen[name] {
			err = fmt.Errorf("no %s in it: %w", name, errdefs.ErrInvalidArgument)
		}
	}
	if err != nil {
		return fmt.Errorf("verifying checkpoint %s: %w", dir, err)
	}
	return nil
}

type dirVerifier struct {
	ctx   context.Context
	max   int64
	total int64
	uid   uint32
	seen  map[string]bool
}

func (v *dirVerifier) walk(d *os.File, rel string) error {
	for {
		names, err := d.Readdirnames(1024)
		for _, n := range names {
			if err := v.entry(d, path.Join(rel, n), n); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (v *dirVerifier) entry(parent *os.File, rel, name string) error {
	if err := v.ctx.Err(); err != nil {
		return err
	}
	if v.seen[rel] = true; len(v.seen) > maxEntries {
		return fmt.Errorf("more than %d files: %w", maxEntries, errdefs.ErrInvalidArgument)
	}
	// O_NONBLOCK: a named pipe must not hold us. O_NOFOLLOW: a link is ELOOP. A
	// device is opened by this, though, so the type is looked at first.
	pfd := int(parent.Fd())
	var st unix.Stat_t
	if err := unix.Fstatat(pfd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("%s: %w", rel, err)
	}
	kind := st.Mode & unix.S_IFMT
	if kind != unix.S_IFREG && kind != unix.S_IFDIR {
		return fmt.Errorf("%s: neither a regular file nor a directory: %w", rel, errdefs.ErrInvalidArgument)
	}
	dir := kind == unix.S_IFDIR
	if err := checkName(rel, dir); err != nil {
		return err
	}
	fd, err := unix.Openat(pfd, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", rel, err)
	}
	f := os.NewFile(uintptr(fd), rel)
	defer f.Close()
	if err := v.mode(fd, rel); err != nil {
		return err
	}
	if dir {
		return v.walk(f, rel)
	}
	return nil
}

func (v *dirVerifier) mode(fd int, rel string) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("%s: %w", rel, err)
	}
	want := uint32(0o600)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		want = 0o700
	case unix.S_IFREG:
		if st.Nlink != 1 {
			return fmt.Errorf("%s: has %d names: %w", rel, st.Nlink, errdefs.ErrInvalidArgument)
		}
		if v.total += st.Size; v.max > 0 && v.total > v.max {
			return fmt.Errorf("%s: makes the checkpoint larger than %d bytes: %w", rel, v.max, errdefs.ErrInvalidArgument)
		}
	default:
		return fmt.Errorf("%s: neither a regular file nor a directory: %w", rel, errdefs.ErrInvalidArgument)
	}
	if st.Uid != v.uid {
		return fmt.Errorf("%s: belongs to user %d: %w", rel, st.Uid, errdefs.ErrInvalidArgument)
	}
	if st.Mode&(syscall.S_ISUID|syscall.S_ISGID|syscall.S_ISVTX) != 0 {
		return fmt.Errorf("%s: has set-id bits: %w", rel, errdefs.ErrInvalidArgument)
	}
	if st.Mode&0o7777 != want {
		if err := unix.Fchmod(fd, want); err != nil {
			return fmt.Errorf("%s: %w", rel, err)
		}
	}
	return nil
}
