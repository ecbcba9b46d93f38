// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Left out of the image: of use where the checkpoint was taken, and written anew by a restore.
var notInImage = map[string]bool{
	"restore.log":   true,
	"stats-restore": true,
	// the marker of a document that was being written
	"." + CheckpointFile + ".new": true,
	"." + SpecDumpFile + ".new":   true,
	"." + ConfigDumpFile + ".new": true,
}

// writeCheckpoint writes a checkpoint directory as a layer under ReservedDir.
// The documents come first, so that a reader stops before the memory pages. Owner, modes and
// times are fixed: the same checkpoint gives the same digest.
func writeCheckpoint(ctx context.Context, w io.Writer, dir string, cut time.Time) error {
	files, dirs, err := listCheckpoint(dir)
	if err != nil {
		return err
	}
	tw := tar.NewWriter(w)
	cut = cut.UTC().Truncate(time.Second)
	put := func(name string, typ byte, mode, size int64) error {
		return tw.WriteHeader(&tar.Header{
			Format: tar.FormatPAX, Typeflag: typ, Name: filepath.Join(ReservedDir, name) + slash(typ),
			Mode: mode, Size: size, ModTime: cut,
		})
	}
	buf := make([]byte, chunkSize)
	if err := put("", tar.TypeDir, 0o700, 0); err != nil {
		return err
	}
	file := func(name string) error {
		if err := put(name, tar.TypeReg, 0o600, files[name]); err != nil {
			return err
		}
		return copyFile(ctx, tw, filepath.Join(dir, name), files[name], buf)
	}
	head := []string{CheckpointFile, SpecDumpFile, ConfigDumpFile}
	for _, name := range head {
		if _, ok := files[name]; !ok {
			return fmt.Errorf("%s has no %s: the checkpoint is not sealed: %w", dir, name, errdefs.ErrInvalidArgument)
		}
		if err := file(name); err != nil {
			return err
		}
	}
	names := append([]string(nil), dirs...)
	for name := range files {
		if !slices.Contains(head, name) {
			names = append(names, name)
		}
	}
	// In plain order a directory comes before what is in it, being its prefix.
	sort.Strings(names)
	isDir := map[string]bool{}
	for _, d := range dirs {
		isDir[d] = true
	}
	for _, name := range names {
		if isDir[name] {
			err = put(name, tar.TypeDir, 0o700, 0)
		} else {
			err = file(name)
		}
		if err != nil {
			return err
		}
	}
	return tw.Close()
}

func slash(typ byte) string {
	if typ == tar.TypeDir {
		return "/"
	}
	return ""
}

// listCheckpoint gives the files (with their sizes) and directories of a
// checkpoint directory. What a reader would refuse is an error here already, so
// that no image is published that cannot be restored.
func listCheckpoint(dir string) (files map[string]int64, dirs []string, err error) {
	files = map[string]int64{}
	err = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, p)
		if err != nil || name == "." {
			return err
		}
		if notInImage[d.Name()] && !d.IsDir() {
			return nil
		}
		if err := checkName(name, d.IsDir()); err != nil {
			return err
		}
		if d.IsDir() {
			dirs = append(dirs, name)
			return nil
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return &os.PathError{Op: "lstat", Path: p, Err: err}
		}
		if st.Mode&unix.S_IFMT != unix.S_IFREG {
			return fmt.Errorf("%s: not a regular file: %w", p, errdefs.ErrInvalidArgument)
		}
		files[name] = st.Size
		return nil
	})
	if err != nil {
		return nil, nil, fmt.Errorf("listing the checkpoint: %w", err)
	}
	if len(files)+len(dirs) > maxEntries {
		return nil, nil, fmt.Errorf("%s has %d files, readers accept %d: %w", dir, len(files)+len(dirs), maxEntries, errdefs.ErrInvalidArgument)
	}
	return files, dirs, nil
}
