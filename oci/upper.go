// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/snapshotter/overlay"
)

// Names of the OCI layer format for what a layer takes away, image-spec layer.md.
const (
	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
)

const xattrRecord = "SCHILY.xattr."

// writeUpper is WriteUpper of one directory, on an image that is not known.
func writeUpper(ctx context.Context, w io.Writer, upper string) error {
	return WriteUpper(ctx, w, []string{upper}, nil)
}

// WriteUpper writes a writable layer, in overlay format, as an OCI layer. It may be kept as
// increments: uppers are directories of which each holds what changed since the next, as
// they are mounted, and the layer is what they are together.
//
// base are the directories of what the layer will lie on, newest first: the layers of
// the container's image and, where only the newest increment is written, the earlier ones.
// Given base, the layer takes away nothing that is not there. Merging increments needs
// that: one hides a file that an earlier one had made, and when both are one layer, the
// whiteout has nothing to hide. Overlayfs lists such a whiteout, as a name that is not
// there, in a directory that it merges with nothing. Without base every whiteout is
// written, and a file under a name that is a socket now comes back.
//
// containerd's differ is not used here, because a checkpoint must bring back
// what the processes saw: it drops all extended attributes but one, rounds times to
// seconds, does not notice a directory whose owner alone changed, and compares
// with a parent through paths in which a container's symlinks lead to the host. The
// upper directory by itself says everything: what is there is the change,
// a 0/0 character device is a deletion, an opaque directory hides the layers below
// (kernel, Documentation/filesystems/overlayfs.rst).
//
// The same content gives the same bytes, in however many increments it is kept. The
// directories must not change meanwhile; they are sealed captures or snapshots of them.
func WriteUpper(ctx context.Context, w io.Writer, uppers, base []string) error {
	top, close1, err := openUnion(uppers)
	if err != nil {
		return err
	}
	defer close1()
	var below *overlay.Dir
	if base != nil {
		var close2 func()
		if below, close2, err = openUnion(base); err != nil {
			return err
		}
		defer close2()
	}
	u := &upperWriter{ctx: ctx, tw: tar.NewWriter(w), links: map[inode]string{}, buf: make([]byte, chunkSize)}
	if err := u.dir(top, below, ""); err != nil {
		return err
	}
	return u.tw.Close()
}

func openUnion(dirs []string) (*overlay.Dir, func(), error) {
	u, err := overlay.OpenUnion(dirs...)
	if err != nil {
		return nil, nil, err
	}
	root, err := u.Root()
	if err != nil {
		u.Close()
		return nil, nil, err
	}
	return root, func() { root.Close(); u.Close() }, nil
}

type inode struct{ dev, ino uint64 }

type upperWriter struct {
	ctx   context.Context
	tw    *tar.Writer
	links map[inode]string
	buf   []byte
}

// dir writes the entries of one directory, sorted: the same tree gives the
// same digest. below is what shows through it; nil if that is not known.
func (u *upperWriter) dir(d, below *overlay.Dir, rel string) error {
	if err := u.ctx.Err(); err != nil {
		return err
	}
	entries, err := d.Entries()
	if err != nil {
		return fmt.Errorf("/%s: %w", rel, err)
	}
	for i := range entries {
		if err := u.entry(d, below, rel, &entries[i]); err != nil {
			return err
		}
	}
	return nil
}

func (u *upperWriter) entry(d, below *overlay.Dir, dir string, e *overlay.Entry) error {
	name, st := e.Name, &e.Stat
	rel := filepath.Join(dir, name)
	if rel == ReservedDir {
		return fmt.Errorf("the container has a /%s of its own, a name that the checkpoint needs: remove it in the container: %w", ReservedDir, errdefs.ErrFailedPrecondition)
	}
	if strings.HasPrefix(name, whiteoutPrefix) {
		return fmt.Errorf("/%s: a layer cannot hold a name that begins with %s: rename it in the container: %w", rel, whiteoutPrefix, errdefs.ErrFailedPrecondition)
	}
	if e.Whiteout {
		return u.hide(d, below, dir, name, below == nil)
	}
	host := e.Path()
	hdr := &tar.Header{
		Format:  tar.FormatPAX,
		Name:    rel,
		Mode:    int64(st.Mode & 0o7777),
		Uid:     int(st.Uid),
		Gid:     int(st.Gid),
		ModTime: time.Unix(st.Mtim.Unix()),
	}
	kind := st.Mode & unix.S_IFMT
	switch kind {
	case unix.S_IFCHR, unix.S_IFBLK:
		hdr.Typeflag = tar.TypeChar
		if kind == unix.S_IFBLK {
			hdr.Typeflag = tar.TypeBlock
		}
		hdr.Devmajor, hdr.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	case unix.S_IFIFO:
		hdr.Typeflag = tar.TypeFifo
	case unix.S_IFSOCK:
		// A layer cannot hold one. CRIU binds it again, which needs the name to be free.
		return u.hide(d, below, dir, name, false)
	case unix.S_IFDIR:
		hdr.Typeflag = tar.TypeDir
		hdr.Name += "/"
	case unix.S_IFLNK:
		hdr.Typeflag = tar.TypeSymlink
		target, err := e.Readlink()
		if err != nil {
			return fmt.Errorf("/%s: %w", rel, err)
		}
		hdr.Linkname = target
	default:
		hdr.Typeflag = tar.TypeReg
		hdr.Size = st.Size
	}

	if kind != unix.S_IFDIR && st.Nlink > 1 {
		id := inode{st.Dev, st.Ino}
		if first, ok := u.links[id]; ok {
			return u.tw.WriteHeader(&tar.Header{
				Format: tar.FormatPAX, Typeflag: tar.TypeLink, Name: rel, Linkname: first,
				Mode: hdr.Mode, Uid: hdr.Uid, Gid: hdr.Gid, ModTime: hdr.ModTime,
			})
		}
		u.links[id] = rel
	}
	if err := u.xattrs(host, hdr); err != nil {
		return fmt.Errorf("/%s: %w", rel, err)
	}
	if err := u.tw.WriteHeader(hdr); err != nil {
		return fmt.Errorf("/%s: %w", rel, err)
	}
	switch kind {
	case unix.S_IFREG:
		if err := copyFile(u.ctx, u.tw, host, st.Size, u.buf); err != nil {
			return fmt.Errorf("/%s: %w", rel, err)
		}
	case unix.S_IFDIR:
		return u.subdir(d, below, rel, name)
	}
	return nil
}

// hide writes a whiteout if there is something to hide; if unknown says so where that
// is not known.
func (u *upperWriter) hide(d, below *overlay.Dir, dir, name string, unknown bool) error {
	if d.Covered {
		return nil
	}
	visible := unknown
	if below != nil {
		var err error
		if visible, err = below.Visible(name); err != nil {
			return fmt.Errorf("/%s below the layer: %w", filepath.Join(dir, name), err)
		}
	}
	if !visible {
		return nil
	}
	return u.whiteout(filepath.Join(dir, whiteoutPrefix+name))
}

// subdir writes the content of the directory name of d.
func (u *upperWriter) subdir(d, below *overlay.Dir, rel, name string) (err error) {
	s, err := d.Sub(name)
	if err != nil {
		return fmt.Errorf("/%s: %w", rel, err)
	}
	defer s.Close()
	opaque := s.Opaque
	if below != nil {
		visible, err := below.Visible(name)
		if err != nil {
			return fmt.Errorf("/%s below the layer: %w", rel, err)
		}
		opaque = opaque && visible
		if s.Covered {
			below = &overlay.Dir{} // nothing shows through
		} else if below, err = below.Sub(name); err != nil {
			return fmt.Errorf("/%s below the layer: %w", rel, err)
		}
		defer below.Close()
	}
	if opaque {
		if err := u.whiteout(filepath.Join(rel, whiteoutOpaque)); err != nil {
			return err
		}
	}
	return u.dir(s, below, rel)
}

func (u *upperWriter) whiteout(name string) error {
	return u.tw.WriteHeader(&tar.Header{Format: tar.FormatPAX, Typeflag: tar.TypeReg, Name: name, ModTime: time.Unix(0, 0)})
}

// xattrs puts into hdr what belongs to the file, and leaves out what belongs to overlayfs.
// Labels of a host's security modules stay behind, they mean nothing elsewhere;
// so do trusted attributes, which containerd does not unpack.
func (u *upperWriter) xattrs(host string, hdr *tar.Header) error {
	names, err := listXattr(host)
	if err != nil {
		return err
	}
	for _, n := range names {
		switch own, _ := strings.CutPrefix(n, "trusted.overlay."); {
		case own == "redirect", own == "metacopy":
			return fmt.Errorf("overlayfs kept part of it in a lower layer (%s): mount with redirect_dir=off,metacopy=off: %w", n, errdefs.ErrFailedPrecondition)
		case strings.HasPrefix(n, "security.") && n != "security.capability", strings.HasPrefix(n, "trusted."):
		case strings.Contains(n, "="):
			return fmt.Errorf("a layer cannot hold the extended attribute %q: %w", n, errdefs.ErrFailedPrecondition)
		default:
			v, err := getXattr(host, n)
			if err != nil {
				return err
			}
			if hdr.PAXRecords == nil {
				hdr.PAXRecords = map[string]string{}
			}
			hdr.PAXRecords[xattrRecord+n] = string(v)
		}
	}
	return nil
}

func listXattr(path string) ([]string, error) {
	buf := make([]byte, 1024)
	n, err := unix.Llistxattr(path, buf)
	if errors.Is(err, unix.ERANGE) {
		buf = make([]byte, 1<<16) // XATTR_LIST_MAX
		n, err = unix.Llistxattr(path, buf)
	}
	if errors.Is(err, unix.ENOTSUP) || err == nil && n == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, &fs.PathError{Op: "listxattr", Path: path, Err: err}
	}
	names := strings.Split(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00")
	sort.Strings(names)
	return names, nil
}

func getXattr(path, name string) ([]byte, error) {
	n, err := unix.Lgetxattr(path, name, nil)
	if err != nil {
		return nil, &fs.PathError{Op: "getxattr " + name, Path: path, Err: err}
	}
	buf := make([]byte, n)
	if n, err = unix.Lgetxattr(path, name, buf); err != nil {
		return nil, &fs.PathError{Op: "getxattr " + name, Path: path, Err: err}
	}
	return buf[:n], nil
}

// copyFile copies exactly size bytes of a regular file. A file that has
// shrunk or grown since its header was written is an error, not a torn layer.
func copyFile(ctx context.Context, w io.Writer, host string, size int64, buf []byte) error {
	f, err := os.OpenFile(host, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var done int64
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := f.Read(buf)
		if done += int64(n); done > size {
			break
		}
		if _, werr := w.Write(buf[:n]); werr != nil {
			return fmt.Errorf("%s: %w", host, werr)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	if done != size {
		return fmt.Errorf("%s changed while it was packed: %w", host, errdefs.ErrAborted)
	}
	return nil
}
