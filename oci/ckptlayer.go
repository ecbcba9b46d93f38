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

// File is a file of a checkpoint that is made while it is read. Name is relative
// to its directory, with slashes; Open gives exactly Size bytes.
type File struct {
	Name string
	Size int64
	Open func() (io.ReadCloser, error)
}

// contents are the files and directories of a checkpoint layer, by name.
type contents struct {
	files map[string]File
	dirs  []string
}

// writeCheckpoint writes a checkpoint directory as a layer under ReservedDir.
func writeCheckpoint(ctx context.Context, w io.Writer, dir string, cut time.Time) error {
	c, err := listCheckpoint(dir)
	if err != nil {
		return err
	}
	return c.write(ctx, w, cut)
}

// write makes the layer. The documents come first, so that a reader stops before
// the memory pages. Owner, modes and times are fixed: the same checkpoint gives the same
// digest.
func (c *contents) write(ctx context.Context, w io.Writer, cut time.Time) (err error) {
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
		if err := put(name, tar.TypeReg, 0o600, c.files[name].Size); err != nil {
			return err
		}
		return c.files[name].copy(ctx, tw, buf)
	}
	head := []string{CheckpointFile, SpecDumpFile, ConfigDumpFile}
	for _, name := range head {
		if _, ok := c.files[name]; !ok {
			return fmt.Errorf("there is no %s: the checkpoint is not sealed: %w", name, errdefs.ErrInvalidArgument)
		}
		if err := file(name); err != nil {
			return err
		}
	}
	names := append([]string(nil), c.dirs...)
	for name := range c.files {
		if !slices.Contains(head, name) {
			names = append(names, name)
		}
	}
	// In plain order a directory comes before what is in it, being its prefix.
	sort.Strings(names)
	isDir := map[string]bool{}
	for _, d := range c.dirs {
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

// copy writes the file's bytes, as many as were announced.
func (f File) copy(ctx context.Context, w io.Writer, buf []byte) error {
	r, err := f.Open()
	if err != nil {
		return fmt.Errorf("%s: %w", f.Name, err)
	}
	defer r.Close()
	// The writer is hidden, for its ReadFrom would not look at the context.
	n, err := io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{ctxReader{ctx, io.LimitReader(r, f.Size+1)}}, buf)
	if err != nil {
		return fmt.Errorf("%s: %w", f.Name, err)
	}
	if n != f.Size {
		return fmt.Errorf("%s changed while it was packed: %w", f.Name, errdefs.ErrAborted)
	}
	return nil
}

// add puts a file in, in place of one of that name.
func (c *contents) add(f File) error {
	if err := checkName(f.Name, false); err != nil {
		return err
	}
	for d := filepath.Dir(f.Name); d != "."; d = filepath.Dir(d) {
		if !slices.Contains(c.dirs, d) {
			c.dirs = append(c.dirs, d)
		}
	}
	c.files[f.Name] = f
	return nil
}

// listCheckpoint gives the files and directories of a checkpoint directory. What
// a reader would refuse is an error here already, so that no image is published that
// cannot be restored.
func listCheckpoint(dir string) (*contents, error) {
	c := &contents{files: map[string]File{}}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
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
			c.dirs = append(c.dirs, name)
			return nil
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return &os.PathError{Op: "lstat", Path: p, Err: err}
		}
		if st.Mode&unix.S_IFMT != unix.S_IFREG {
			return fmt.Errorf("%s: not a regular file: %w", p, errdefs.ErrInvalidArgument)
		}
		c.files[name] = File{Name: name, Size: st.Size, Open: func() (io.ReadCloser, error) {
			return os.OpenFile(p, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		}}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("listing the checkpoint: %w", err)
	}
	if n := len(c.files) + len(c.dirs); n > maxEntries {
		return nil, fmt.Errorf("%s has %d files, readers accept %d: %w", dir, n, maxEntries, errdefs.ErrInvalidArgument)
	}
	return c, nil
}
