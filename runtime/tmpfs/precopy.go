// SPDX-License-Identifier: Apache-2.0

package tmpfs

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/runtime/memory/pages"
	"github.com/cohort-project/cohort/runtime/memory/shm"
)

const (
	// large is the size, in bytes, from which a file is copied before the barrier;
	// smaller ones are read in it.
	large = 64 << 10
	// maxLarge bounds how many files are kept open for that.
	maxLarge = 1024
)

// Copy has the content of the large files of one tmpfs, taken while the container
// runs. Its files stay open: the file system cannot be unmounted but lazily until
// Close. A nil Copy has none.
type Copy struct {
	store   *pages.Store
	session *shm.Session
}

// Precopy copies the large files of a tmpfs of the container whose init is pid,
// into dir, which it makes. The container runs. The result may be nil.
func Precopy(ctx context.Context, pid int, f FS, dir string) (_ *Copy, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("copy the tmpfs at %s: %w", f.Destination, err)
		}
	}()
	files, err := largeFiles(filepath.Join(fmt.Sprintf("/proc/%d/root", pid), f.Destination))
	if err != nil || len(files) == 0 {
		return nil, err
	}
	c := &Copy{}
	if c.store, err = pages.NewStore(dir); err != nil {
		for _, f := range files {
			f.Close()
		}
		return nil, err
	}
	if c.session, err = shm.StartFiles(ctx, files, c.store); err == nil {
		// What was written while the first pass was under way.
		_, err = c.session.Round(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// largeFiles opens what is large on root's own file system. Files that come or go
// meanwhile are read in the barrier.
func largeFiles(root string) (files []*os.File, err error) {
	var top unix.Stat_t
	if err := unix.Stat(root, &top); err != nil {
		return nil, err
	}
	err = filepath.WalkDir(root+"/", func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		if len(files) == maxLarge || !e.Type().IsRegular() && !e.IsDir() {
			return nil
		}
		var st unix.Stat_t
		err = unix.Lstat(path, &st)
		switch {
		case errors.Is(err, unix.ENOENT):
			return nil
		case err != nil:
			return &fs.PathError{Op: "lstat", Path: path, Err: err}
		case st.Dev != top.Dev && e.IsDir():
			return fs.SkipDir
		case st.Dev != top.Dev || e.IsDir() || st.Size < large:
			return nil
		}
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOATIME|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ELOOP) {
			return nil
		} else if err != nil {
			return err
		}
		// It may be another by now.
		if unix.Fstat(int(f.Fd()), &st) != nil || st.Dev != top.Dev || st.Mode&unix.S_IFMT != unix.S_IFREG {
			return f.Close()
		}
		files = append(files, f)
		return nil
	})
	if err != nil {
		for _, f := range files {
			f.Close()
		}
		return nil, err
	}
	return files, nil
}

// Take keeps in memory what has changed of the files. The container is frozen.
func (c *Copy) Take(ctx context.Context) error {
	if c == nil {
		return nil
	}
	return c.session.Take(ctx)
}

// size is how many bytes of data the files have.
func (c *Copy) size() uint64 {
	if c == nil {
		return 0
	}
	_, data := c.session.Held()
	return data
}

// Close drops the copy. It may be called again.
func (c *Copy) Close() error {
	if c == nil || c.store == nil {
		return nil
	}
	var err error
	if c.session != nil {
		err = c.session.Close()
	}
	return errors.Join(err, c.store.Discard())
}

// splicer notes where in an archive that is kept in memory the content of large
// files belongs. Only headers and small files are written while the container is
// frozen. A nil splicer takes nothing.
type splicer struct {
	copy  *Copy
	into  *bytes.Buffer
	files []splice
}

// splice is a file whose content, size bytes, belongs at an offset of the buffer.
type splice struct {
	at   int
	ino  uint64
	size uint64
}

func (s *splicer) has(ino uint64) bool {
	return s != nil && s.copy != nil && s.copy.session.Has(ino)
}

// splice writes a header and what follows the content. tw writes to the same
// buffer; it does not learn of this entry, whose content it would wait for.
func (s *splicer) splice(tw *tar.Writer, h *tar.Header, ino uint64) error {
	if err := tw.Flush(); err != nil {
		return err
	}
	if err := tar.NewWriter(s.into).WriteHeader(h); err != nil {
		return err
	}
	s.files = append(s.files, splice{s.into.Len(), ino, uint64(h.Size)})
	const block = 512
	_, err := s.into.Write(make([]byte, (block-h.Size%block)%block))
	return err
}

// write writes the whole archive.
func (s *splicer) write(ctx context.Context, w io.Writer) error {
	data, at := s.into.Bytes(), 0
	for _, f := range s.files {
		if _, err := w.Write(data[at:f.at]); err != nil {
			return err
		}
		if err := s.copy.session.Write(ctx, w, f.ino, f.size); err != nil {
			return err
		}
		at = f.at
	}
	_, err := w.Write(data[at:])
	return err
}

// Bytes says how many bytes of an archive were read while the container was
// frozen, and how many had been copied before and were as they are.
func (c *Contents) Bytes() (barrier, before uint64) {
	if c.later == nil {
		if fi, err := os.Stat(c.path); err == nil {
			barrier = uint64(fi.Size())
		}
		return barrier, 0
	}
	barrier = uint64(c.later.into.Len())
	if c.later.copy != nil {
		held, data := c.later.copy.session.Held()
		barrier, before = barrier+held, data-held
	}
	return barrier, before
}
