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
)

// Names of the OCI layer format for what a layer takes away, image-spec layer.md.
const (
	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
)

const xattrRecord = "SCHILY.xattr."

// writeUpper writes an overlay upper directory as an OCI layer.
//
// containerd's differ is not used here, because a checkpoint must bring back
// what the processes saw: it drops all extended attributes but one, rounds times to
// seconds, does not notice a directory whose owner alone changed, and compares
// with a parent through paths in which a container's symlinks lead to the host. The
// upper directory by itself says everything: what is there is the change,
// a 0/0 character device is a deletion, an opaque directory hides the layers below
// (kernel, Documentation/filesystems/overlayfs.rst).
//
// The directory must not change meanwhile; it is a sealed capture.
func writeUpper(ctx context.Context, w io.Writer, upper string) error {
	u := &upperWriter{ctx: ctx, tw: tar.NewWriter(w), root: upper, links: map[inode]string{}, buf: make([]byte, chunkSize)}
	if err := u.dir(""); err != nil {
		return err
	}
	return u.tw.Close()
}

type inode struct{ dev, ino uint64 }

type upperWriter struct {
	ctx   context.Context
	tw    *tar.Writer
	root  string
	links map[inode]string
	buf   []byte
}

// dir writes the entries of one directory, sorted: the same tree gives the
// same digest.
func (u *upperWriter) dir(rel string) error {
	if err := u.ctx.Err(); err != nil {
		return err
	}
	f, err := os.Open(filepath.Join(u.root, rel))
	if err != nil {
		return err
	}
	names, err := f.Readdirnames(-1)
	f.Close()
	if err != nil {
		return err
	}
	sort.Strings(names)
	for _, n := range names {
		if err := u.entry(rel, n); err != nil {
			return err
		}
	}
	return nil
}

func (u *upperWriter) entry(dir, name string) error {
	rel := filepath.Join(dir, name)
	host := filepath.Join(u.root, rel)
	if rel == ReservedDir {
		return fmt.Errorf("the container has a /%s of its own, a name that the checkpoint needs: remove it in the container: %w", ReservedDir, errdefs.ErrFailedPrecondition)
	}
	if strings.HasPrefix(name, whiteoutPrefix) {
		return fmt.Errorf("/%s: a layer cannot hold a name that begins with %s: rename it in the container: %w", rel, whiteoutPrefix, errdefs.ErrFailedPrecondition)
	}
	var st unix.Stat_t
	if err := unix.Lstat(host, &st); err != nil {
		return &fs.PathError{Op: "lstat", Path: host, Err: err}
	}
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
		if kind == unix.S_IFCHR && st.Rdev == 0 {
			return u.whiteout(filepath.Join(dir, whiteoutPrefix+name))
		}
		hdr.Typeflag = tar.TypeChar
		if kind == unix.S_IFBLK {
			hdr.Typeflag = tar.TypeBlock
		}
		hdr.Devmajor, hdr.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	case unix.S_IFIFO:
		hdr.Typeflag = tar.TypeFifo
	case unix.S_IFSOCK:
		// A layer cannot hold one; CRIU binds it again.
		return nil
	case unix.S_IFDIR:
		hdr.Typeflag = tar.TypeDir
		hdr.Name += "/"
	case unix.S_IFLNK:
		hdr.Typeflag = tar.TypeSymlink
		target, err := os.Readlink(host)
		if err != nil {
			return err
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
	opaque, err := u.xattrs(host, hdr)
	if err != nil {
		return fmt.Errorf("/%s: %w", rel, err)
	}
	if err := u.tw.WriteHeader(hdr); err != nil {
		return fmt.Errorf("/%s: %w", rel, err)
	}
	switch kind {
	case unix.S_IFREG:
		if err := copyFile(u.ctx, u.tw, host, st.Size, u.buf); err != nil {
			return err
		}
	case unix.S_IFDIR:
		if opaque {
			if err := u.whiteout(filepath.Join(rel, whiteoutOpaque)); err != nil {
				return err
			}
		}
		return u.dir(rel)
	}
	return nil
}

func (u *upperWriter) whiteout(name string) error {
	return u.tw.WriteHeader(&tar.Header{Format: tar.FormatPAX, Typeflag: tar.TypeReg, Name: name, ModTime: time.Unix(0, 0)})
}

// xattrs puts into hdr what belongs to the file, and reads what belongs to overlayfs.
// Labels of a host's security modules stay behind, they mean nothing elsewhere;
// so do trusted attributes, which containerd does not unpack.
func (u *upperWriter) xattrs(host string, hdr *tar.Header) (opaque bool, err error) {
	names, err := listXattr(host)
	if err != nil {
		return false, err
	}
	for _, n := range names {
		own, isOverlay := strings.CutPrefix(n, "trusted.overlay.")
		if !isOverlay {
			own, isOverlay = strings.CutPrefix(n, "user.overlay.")
		}
		switch {
		case isOverlay && own == "opaque":
			v, err := getXattr(host, n)
			if err != nil {
				return false, err
			}
			opaque = string(v) == "y"
		case isOverlay && (own == "redirect" || own == "metacopy"):
			return false, fmt.Errorf("overlayfs kept part of it in a lower layer (%s): mount with redirect_dir=off,metacopy=off: %w", n, errdefs.ErrFailedPrecondition)
		case isOverlay:
		case strings.HasPrefix(n, "security.") && n != "security.capability", strings.HasPrefix(n, "trusted."):
		case strings.Contains(n, "="):
			return false, fmt.Errorf("a layer cannot hold the extended attribute %q: %w", n, errdefs.ErrFailedPrecondition)
		default:
			v, err := getXattr(host, n)
			if err != nil {
				return false, err
			}
			if hdr.PAXRecords == nil {
				hdr.PAXRecords = map[string]string{}
			}
			hdr.PAXRecords[xattrRecord+n] = string(v)
		}
	}
	return opaque, nil
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
