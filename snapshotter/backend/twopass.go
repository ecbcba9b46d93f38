// SPDX-License-Identifier: Apache-2.0

package backend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// twoPass is the reflink and the copy backend: the whole tree in Open, what has
// changed since in Take.
type twoPass struct {
	name       string
	content    content
	trustTimes bool
}

// NewReflink returns the backend for file systems that share extents between files
// (FICLONE: XFS with reflink=1, btrfs, bcachefs). Whether root's does is for the caller to
// find out, with CanReflink.
func NewReflink() Backend {
	return &twoPass{name: Reflink, content: clone, trustTimes: true}
}

// NewCopy returns the backend that works on any file system that can hold an overlay's
// upper directory.
func NewCopy(root string) (Backend, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: root, Err: err}
	}
	// tmpfs does not stamp a store through a shared mapping (mm/shmem.c has no
	// page_mkwrite), so nothing there says that such a file changed.
	trust := st.Type != unix.TMPFS_MAGIC && st.Type != unix.RAMFS_MAGIC
	return &twoPass{name: Copy, content: copyContent, trustTimes: trust}, nil
}

func (b *twoPass) Name() string { return b.name }

func (b *twoPass) Open(ctx context.Context, src, dst string) (Capture, error) {
	// One flush of everything first: the pass below flushes file by file, which for many
	// dirty files is many waits.
	if err := Syncfs(src); err != nil {
		return nil, err
	}
	t := tree{src: src, dst: dst, content: b.content, trustTimes: b.trustTimes}
	if b.name == Reflink {
		t.lastContent = cloneClean
	}
	return openTree(ctx, t)
}

func (b *twoPass) Discard(dst string) error { return os.RemoveAll(dst) }

// passInterval is how often a capture is brought up to date between Open and Take, which
// bounds what Take finds changed. A pass over a thousand files of which none changed takes
// two milliseconds.
const passInterval = 500 * time.Millisecond

// treeCapture is a capture file by file: all of them in Open, what has changed since in
// Take, and the same in between now and then.
type treeCapture struct {
	mu    sync.Mutex // one pass at a time
	tree  tree
	taken bool
	stop  func() // ends the passes in between, and waits for one that goes on
}

func openTree(ctx context.Context, t tree) (*treeCapture, error) {
	c := &treeCapture{tree: t}
	if err := c.tree.pass(ctx, false); err != nil {
		return nil, fmt.Errorf("first pass over %s: %w", t.src, err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan struct{})
	c.stop = func() {
		cancel()
		<-ended
	}
	go func() {
		defer close(ended)
		c.follow(ctx)
	}()
	return c, nil
}

// follow repeats the pass until ctx ends, or until one fails: Take will tell why.
func (c *treeCapture) follow(ctx context.Context) {
	tick := time.NewTicker(passInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := c.Ready(ctx); err != nil {
			return
		}
	}
}

// Ready implements Capture.
func (c *treeCapture) Ready(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.taken {
		return nil
	}
	return c.tree.pass(ctx, false)
}

func (c *treeCapture) Take(ctx context.Context) error {
	c.stop()
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.tree.pass(ctx, true); err != nil {
		return fmt.Errorf("last pass over %s, with its writers stopped: %w", c.tree.src, err)
	}
	c.taken = true
	return nil
}

// Seal has nothing left to do: Take left the tree complete.
func (c *treeCapture) Seal(context.Context) error {
	if !c.taken {
		return errNotTaken
	}
	return nil
}

func (c *treeCapture) Close() error {
	c.stop()
	return nil
}

// clone makes dst share all extents of src.
func clone(_ context.Context, dst, src *os.File, _ int64) error {
	if err := unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())); err != nil {
		return fmt.Errorf("FICLONE: %w", err)
	}
	return nil
}

// copyContent copies the data of src and leaves holes as holes: a container can make a
// file of any size out of nothing.
func copyContent(ctx context.Context, dst, src *os.File, size int64) error {
	for off := int64(0); off < size; {
		start, err := unix.Seek(int(src.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // only a hole remains
		}
		if err != nil {
			return fmt.Errorf("SEEK_DATA: %w", err)
		}
		end, err := unix.Seek(int(src.Fd()), start, unix.SEEK_HOLE)
		if err != nil && !errors.Is(err, unix.ENXIO) {
			return fmt.Errorf("SEEK_HOLE: %w", err)
		}
		if err != nil || end > size {
			end = size
		}
		if err := copyRange(ctx, dst, src, start, end); err != nil {
			return err
		}
		off = max(end, start+1)
	}
	return dst.Truncate(size)
}

// copyRange copies the bytes [off, end). A file that has become shorter ends it.
func copyRange(ctx context.Context, dst, src *os.File, off, end int64) error {
	const step = 8 << 20 // so that a cancelled context is noticed
	for off < end {
		if err := ctx.Err(); err != nil {
			return err
		}
		in, out := off, off
		n, err := unix.CopyFileRange(int(src.Fd()), &in, int(dst.Fd()), &out, int(min(end-off, step)), 0)
		switch {
		case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP):
			m, err := io.Copy(io.NewOffsetWriter(dst, off), io.NewSectionReader(src, off, min(end-off, step)))
			if err != nil {
				return err
			}
			n = int(m)
		case err != nil:
			return fmt.Errorf("copy_file_range: %w", err)
		}
		if n == 0 {
			return nil
		}
		off += int64(n)
	}
	return nil
}

// CanReflink tells whether files in dir can share extents, by making two that do.
func CanReflink(dir string) (bool, error) {
	src, err := os.CreateTemp(dir, ".reflink-*")
	if err != nil {
		return false, err
	}
	defer os.Remove(src.Name())
	defer src.Close()
	dst, err := os.CreateTemp(dir, ".reflink-*")
	if err != nil {
		return false, err
	}
	defer os.Remove(dst.Name())
	defer dst.Close()
	// More than what a file system may keep inside the inode.
	if _, err := src.Write(make([]byte, 64<<10)); err != nil {
		return false, err
	}
	err = unix.IoctlFileClone(int(dst.Fd()), int(src.Fd()))
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EXDEV), errors.Is(err, unix.ENOSYS):
		return false, nil
	}
	return false, fmt.Errorf("try FICLONE in %s: %w", dir, err)
}

// errNotTaken is returned for a Seal without a Take.
var errNotTaken = fmt.Errorf("the capture was not taken: %w", errdefs.ErrFailedPrecondition)
