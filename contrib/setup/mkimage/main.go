// SPDX-License-Identifier: Apache-2.0

// Mkimage packs a folder into a container image: one layer, as an OCI layout in a tar file that
// `ctr image import` and `docker load` read. It exists because the set-up has neither a registry nor
// an image builder. The same folder always gives the same image: entries are sorted and their times
// are set to zero.
package main

import (
	"archive/tar"
	"bytes"
	_ "crypto/sha256" // the digest package finds its algorithms by what is linked in
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// containerdImageName is the annotation by which containerd's importer names an image in full
// (containerd, core/images/annotations.go).
const containerdImageName = "io.containerd.image.name"

func main() {
	ref := flag.String("ref", "", "full name of the image, such as docker.io/library/name:latest")
	config := flag.String("config", "", "JSON file with the image's run configuration (the config object of the OCI image configuration)")
	root := flag.String("root", "", "folder that becomes the image's file system")
	out := flag.String("out", "", "archive to write")
	flag.Parse()
	if *ref == "" || *root == "" || *out == "" || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(*ref, *config, *root, *out); err != nil {
		fmt.Fprintf(os.Stderr, "mkimage: %v\n", err)
		os.Exit(1)
	}
}

// run writes the archive beside its final place and renames it, so a reader sees a whole image or none.
func run(ref, configFile, root, out string) (err error) {
	var runConfig ocispec.ImageConfig
	if configFile != "" {
		data, err := os.ReadFile(configFile)
		if err != nil {
			return err
		}
		decoder := json.NewDecoder(bytes.NewReader(data))
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(&runConfig); err != nil {
			return fmt.Errorf("read image configuration %s: %w", configFile, err)
		}
	}

	layer, err := os.CreateTemp(filepath.Dir(out), ".layer-*")
	if err != nil {
		return err
	}
	defer os.Remove(layer.Name())
	defer layer.Close()
	layerDescriptor, diffID, err := writeLayer(layer, root)
	if err != nil {
		return fmt.Errorf("pack %s: %w", root, err)
	}

	archive, err := os.CreateTemp(filepath.Dir(out), ".image-*")
	if err != nil {
		return err
	}
	defer func() {
		archive.Close()
		if err != nil {
			os.Remove(archive.Name())
		}
	}()
	if err := writeArchive(archive, ref, runConfig, layer, layerDescriptor, diffID); err != nil {
		return fmt.Errorf("write %s: %w", out, err)
	}
	if err := archive.Chmod(0o644); err != nil {
		return err
	}
	if err := archive.Close(); err != nil {
		return err
	}
	return os.Rename(archive.Name(), out)
}

// writeLayer writes root as a gzip-compressed tar and returns its descriptor and the digest of the
// uncompressed stream, which the image configuration names it by.
func writeLayer(w io.Writer, root string) (ocispec.Descriptor, digest.Digest, error) {
	compressed := digest.Canonical.Digester()
	counter := &countingWriter{w: io.MultiWriter(w, compressed.Hash())}
	zip, err := gzip.NewWriterLevel(counter, gzip.BestSpeed)
	if err != nil {
		return ocispec.Descriptor{}, "", err
	}
	plain := digest.Canonical.Digester()
	archive := tar.NewWriter(io.MultiWriter(zip, plain.Hash()))
	if err := addTree(archive, root); err != nil {
		return ocispec.Descriptor{}, "", err
	}
	if err := errors.Join(archive.Close(), zip.Close()); err != nil {
		return ocispec.Descriptor{}, "", err
	}
	return ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageLayerGzip,
		Digest:    compressed.Digest(),
		Size:      counter.n,
	}, plain.Digest(), nil
}

// addTree adds everything below root, in the order of fs.WalkDir, which is sorted. Hard links are
// kept; sockets are left out, as every image builder does.
func addTree(archive *tar.Writer, root string) error {
	type inode struct{ dev, ino uint64 }
	first := map[inode]string{}

	return filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil || name == "." {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		if info.Mode()&fs.ModeSocket != 0 {
			return nil
		}
		var target string
		if info.Mode()&fs.ModeSymlink != 0 {
			if target, err = os.Readlink(path); err != nil {
				return err
			}
		}
		header, err := tar.FileInfoHeader(info, target)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		header.Name = name
		if info.IsDir() {
			header.Name += "/"
		}
		// The builder's user names mean nothing inside the image; the numbers count.
		header.Uname, header.Gname = "", ""
		header.ModTime, header.AccessTime, header.ChangeTime = time.Unix(0, 0), time.Time{}, time.Time{}
		header.Format = tar.FormatPAX

		if stat, ok := info.Sys().(*syscall.Stat_t); ok && info.Mode().IsRegular() && stat.Nlink > 1 {
			key := inode{stat.Dev, stat.Ino}
			if original, seen := first[key]; seen {
				header.Typeflag, header.Linkname, header.Size = tar.TypeLink, original, 0
				return archive.WriteHeader(header)
			}
			first[key] = name
		}
		if err := archive.WriteHeader(header); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if !info.Mode().IsRegular() {
			return nil
		}
		file, err := os.Open(path)
		if err != nil {
			return err
		}
		defer file.Close()
		_, err = io.Copy(archive, file)
		return err
	})
}

// writeArchive writes the OCI layout: the layer, its configuration, the manifest, and an index that
// carries the image's name.
func writeArchive(w io.Writer, ref string, runConfig ocispec.ImageConfig, layer io.ReadSeeker, layerDescriptor ocispec.Descriptor, diffID digest.Digest) error {
	archive := tar.NewWriter(w)
	platform := ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}

	if err := addBlob(archive, layer, layerDescriptor); err != nil {
		return err
	}
	config, err := addJSON(archive, ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: platform,
		Config:   runConfig,
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{diffID}},
	})
	if err != nil {
		return err
	}
	manifest, err := addJSON(archive, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    config,
		Layers:    []ocispec.Descriptor{layerDescriptor},
	})
	if err != nil {
		return err
	}
	manifest.Platform = &platform
	manifest.Annotations = map[string]string{containerdImageName: ref, ocispec.AnnotationRefName: "latest"}

	index, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{manifest},
	})
	if err != nil {
		return err
	}
	layout, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return err
	}
	return errors.Join(
		addFile(archive, ocispec.ImageIndexFile, int64(len(index)), bytes.NewReader(index)),
		addFile(archive, ocispec.ImageLayoutFile, int64(len(layout)), bytes.NewReader(layout)),
		archive.Close(),
	)
}

func addBlob(archive *tar.Writer, content io.ReadSeeker, descriptor ocispec.Descriptor) error {
	if _, err := content.Seek(0, io.SeekStart); err != nil {
		return err
	}
	name := filepath.Join(ocispec.ImageBlobsDir, descriptor.Digest.Algorithm().String(), descriptor.Digest.Encoded())
	return addFile(archive, name, descriptor.Size, content)
}

func addJSON(archive *tar.Writer, mediaType string, value any) (ocispec.Descriptor, error) {
	data, err := json.Marshal(value)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	descriptor := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	return descriptor, addBlob(archive, bytes.NewReader(data), descriptor)
}

func addFile(archive *tar.Writer, name string, size int64, content io.Reader) error {
	if err := archive.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o644}); err != nil {
		return err
	}
	_, err := io.Copy(archive, content)
	return err
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
