// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/snapshotter/backend"
	"github.com/cohort-project/cohort/snapshotter/internal/uapi"
)

// Auto lets Setup choose the backend.
const Auto = "auto"

// Volume is a root that is ready for use.
type Volume struct {
	// Root is the resolved, absolute path.
	Root string
	// Backend captures below Root.
	Backend backend.Backend
	// image is the path of the image that is mounted on Root; empty if Root is part of
	// the host's file system.
	image string
}

// Image returns the path of the image that Root is on, empty if there is none.
func (v *Volume) Image() string { return v.image }

// Resolve makes root, if it is not there, and returns its absolute path without symbolic
// links. The shim derives paths from the mount options, so there must be one name only.
func Resolve(root string) (string, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return "", err
	}
	root, err = filepath.EvalSymlinks(root)
	if err != nil {
		return "", err
	}
	if root == "/" {
		return "", fmt.Errorf("the root directory cannot be the snapshotter's root: %w", errdefs.ErrInvalidArgument)
	}
	// ":" and "," separate the options of an overlay mount.
	for _, c := range root {
		if c == ':' || c == ',' || c == '\\' {
			return "", fmt.Errorf("the root %q contains %q, which a mount option cannot: choose another: %w", root, c, errdefs.ErrInvalidArgument)
		}
	}
	return root, nil
}

// Setup readies root, a path that Resolve returned, for the backend called name, or for
// the best that it can have if name is Auto. The caller holds the root's lock.
func Setup(ctx context.Context, root, name string) (*Volume, error) {
	switch name {
	case Auto, backend.Btrfs, backend.Reflink, backend.Copy:
	default:
		return nil, fmt.Errorf("unknown backend %q, it is one of auto, btrfs, reflink and copy: %w", name, errdefs.ErrInvalidArgument)
	}
	v := &Volume{Root: root}
	img := imagePath(root)
	exists, err := hasImage(img)
	if err != nil {
		return nil, err
	}
	mounted := false
	if exists && (name == Auto || name == backend.Btrfs) {
		if err := mountImage(ctx, root, img); err != nil {
			return nil, err
		}
		mounted = true
	} else if exists {
		return nil, fmt.Errorf("%s exists, with what the btrfs backend keeps: start with --backend=btrfs, or remove it to begin anew with %s: %w", img, name, errdefs.ErrFailedPrecondition)
	}
	if !mounted {
		mounted, err = v.makeImageIfNeeded(ctx, name, img)
		if err != nil {
			return nil, err
		}
	}
	if mounted {
		v.image = img
	}
	if v.Backend, err = choose(ctx, root, name); err != nil {
		return nil, err
	}
	// Last: choosing may have put a new directory in the place of the old one.
	return v, os.Chmod(root, 0o700)
}

// makeImageIfNeeded makes and mounts an image if the root's own file system is not
// good enough for the backend asked for.
func (v *Volume) makeImageIfNeeded(ctx context.Context, name, img string) (bool, error) {
	if name == backend.Reflink || name == backend.Copy {
		return false, nil
	}
	isBtrfs, err := uapi.IsBtrfs(v.Root)
	if err != nil || isBtrfs {
		return false, err
	}
	used, err := inUse(v.Root)
	if err != nil {
		return false, err
	}
	if name == Auto {
		if ok, err := backend.CanReflink(v.Root); err != nil || ok {
			return false, err
		}
		if used {
			log.G(ctx).Warnf("%s is in use with the copy backend: it stays so; for short stops, begin anew on an empty root", v.Root)
			return false, nil
		}
	} else if used {
		return false, fmt.Errorf("%s holds the snapshots of another backend, which a btrfs mounted over it would hide: use an empty root: %w", v.Root, errdefs.ErrFailedPrecondition)
	}
	err = makeImage(ctx, img)
	if err == nil {
		err = mountImage(ctx, v.Root, img)
	}
	if err != nil && name == Auto {
		log.G(ctx).WithError(err).Warn("no btrfs image: falling back to the copy backend, with which containers stand still while their changed files are copied")
		return false, nil
	}
	return err == nil, err
}

// choose returns the backend for what is mounted at root now.
func choose(ctx context.Context, root, name string) (backend.Backend, error) {
	isBtrfs, err := uapi.IsBtrfs(root)
	if err != nil {
		return nil, err
	}
	if isBtrfs && (name == Auto || name == backend.Btrfs) {
		err := makeSubvolume(root)
		if err == nil {
			return backend.NewBtrfs(root)
		}
		if name == backend.Btrfs {
			return nil, err
		}
		log.G(ctx).WithError(err).Warn("the btrfs backend cannot be used, using reflink")
	}
	if name == backend.Btrfs {
		return nil, fmt.Errorf("%s is not on btrfs: %w", root, errdefs.ErrFailedPrecondition)
	}
	if name != backend.Copy {
		ok, err := backend.CanReflink(root)
		if err != nil {
			return nil, err
		}
		if ok {
			return backend.NewReflink(), nil
		}
		if name == backend.Reflink {
			return nil, fmt.Errorf("the file system of %s cannot share extents between files (FICLONE): XFS made with reflink=1 can, or use --backend=auto: %w", root, errdefs.ErrFailedPrecondition)
		}
	}
	return backend.NewCopy(root)
}

// makeSubvolume makes root, a directory on btrfs, a subvolume if it is not one. It
// can be replaced only while it is empty.
func makeSubvolume(root string) error {
	is, err := uapi.IsSubvolume(root)
	if err != nil || is {
		return err
	}
	if err := os.Remove(root); err != nil {
		return fmt.Errorf("%s is not a subvolume of its btrfs and cannot be replaced by one: empty it, or move it away and start again: %w", root, err)
	}
	return uapi.CreateSubvolume(root)
}

// inUse tells whether a snapshotter has worked in root.
func inUse(root string) (bool, error) {
	_, err := os.Lstat(filepath.Join(root, "metadata.db"))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Free returns the bytes that can still be written below dir, and the size of its
// file system.
func Free(dir string) (free, size uint64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, 0, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	bs := uint64(st.Bsize) //nolint:gosec // not negative
	return st.Bavail * bs, st.Blocks * bs, nil
}
