// SPDX-License-Identifier: Apache-2.0

package overlay

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// maxDepth bounds how deep directories may be nested. Each level holds a descriptor
// for each tree, and a container can nest without end.
const maxDepth = 1000

// Union is a list of trees in overlay format, newest first, read as one. It may be
// used concurrently.
type Union struct {
	roots []*os.File
}

// OpenUnion opens the trees below dirs, newest first. Without any it is empty. The
// directories themselves are trusted, their content is not.
func OpenUnion(dirs ...string) (_ *Union, err error) {
	u := &Union{}
	defer func() {
		if err != nil {
			u.Close()
		}
	}()
	for _, d := range dirs {
		f, err := openDir(unix.AT_FDCWD, d)
		if err != nil {
			return nil, err
		}
		u.roots = append(u.roots, f)
	}
	return u, nil
}

// Close closes the trees. Directories and files that were opened stay open.
func (u *Union) Close() error {
	var errs []error
	for _, f := range u.roots {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// Root opens the root directory.
func (u *Union) Root() (*Dir, error) {
	d := &Dir{}
	for _, f := range u.roots {
		root, err := openDir(int(f.Fd()), ".")
		if err != nil {
			d.Close()
			return nil, err
		}
		// The roots of layers are always merged: the kernel looks at no opaque flag there.
		if _, err := d.add(root); err != nil {
			d.Close()
			return nil, err
		}
	}
	return d, nil
}

// Dir is an open directory of a union. It may not be used concurrently.
type Dir struct {
	// Opaque says that it hides whatever has its name below the union: it carries the
	// flag, or something that is no directory, or a whiteout, lies under it in the union.
	Opaque bool
	// Covered says that nothing below the union shows in it, because it or a
	// directory above it is opaque.
	Covered bool

	parts []part
	depth int
}

// part is one directory on disk out of those that make up a Dir.
type part struct {
	f *os.File
	// xwhiteouts says that empty files may be whiteouts here.
	xwhiteouts bool
}

// Close closes it.
func (d *Dir) Close() {
	for _, r := range d.parts {
		r.f.Close()
	}
	d.parts = nil
}

// add appends the open directory f, the next older one, and tells whether it is opaque.
// f is closed on an error.
func (d *Dir) add(f *os.File) (opaque bool, err error) {
	flag, err := opaqueFlag(f)
	if err != nil {
		f.Close()
		return false, err
	}
	d.parts = append(d.parts, part{f: f, xwhiteouts: flag == opaqueXattrs})
	return flag == opaqueYes, nil
}

// Entry is one name in a Dir.
type Entry struct {
	Name string
	// Stat is that of the newest file of this name, not of one that it links to.
	Stat unix.Stat_t
	// Whiteout says that the name is hidden, whatever lies below the union.
	Whiteout bool

	at *os.File // directory on disk that it is in
}

// IsDir tells whether it is a directory.
func (e *Entry) IsDir() bool { return e.kind() == unix.S_IFDIR }

func (e *Entry) kind() uint32 { return e.Stat.Mode & unix.S_IFMT }

// bytes is the size of a regular file's content, and 0 of anything else.
func (e *Entry) bytes() uint64 {
	if e.kind() != unix.S_IFREG {
		return 0
	}
	return uint64(e.Stat.Size) //nolint:gosec // not negative
}

// Path leads to the file while the Dir is open, for system calls that do not follow
// links (lstat, lgetxattr and so on). It must not be used with others.
func (e *Entry) Path() string { return procPath(e.at) + "/" + e.Name }

// Open opens a regular file for reading; anything else is an error.
func (e *Entry) Open() (*os.File, error) {
	if e.kind() != unix.S_IFREG {
		return nil, &os.PathError{Op: "open", Path: e.Name, Err: unix.EINVAL}
	}
	const flags = unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC
	fd, err := unix.Openat(int(e.at.Fd()), e.Name, flags|unix.O_NOATIME, 0)
	if errors.Is(err, unix.EPERM) { // another owner's, and we are not root
		fd, err = unix.Openat(int(e.at.Fd()), e.Name, flags, 0)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: e.Name, Err: err}
	}
	return os.NewFile(uintptr(fd), e.Name), nil
}

// Readlink returns the target of a symbolic link.
func (e *Entry) Readlink() (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(e.at.Fd()), e.Name, buf)
	if err != nil {
		return "", &os.PathError{Op: "readlink", Path: e.Name, Err: err}
	}
	return string(buf[:n]), nil
}

// Entries lists the directory in the order of names, each name once, whiteouts
// included.
func (d *Dir) Entries() ([]Entry, error) {
	var out []Entry
	seen := map[string]struct{}{}
	for _, r := range d.parts {
		if _, err := r.f.Seek(0, 0); err != nil {
			return nil, err
		}
		names, err := r.f.Readdirnames(-1)
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			if len(d.parts) > 1 {
				if _, ok := seen[n]; ok {
					continue
				}
				seen[n] = struct{}{}
			}
			e, err := r.entry(n)
			if err != nil {
				return nil, err
			}
			out = append(out, e)
		}
	}
	slices.SortFunc(out, func(a, b Entry) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// Visible tells whether the name shows, which one under a whiteout does not.
func (d *Dir) Visible(name string) (bool, error) {
	for _, r := range d.parts {
		e, err := r.entry(name)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		return err == nil && !e.Whiteout, err
	}
	return false, nil
}

// Sub opens the subdirectory name. If there is none it is empty, which is also how
// overlayfs sees a name that is only a whiteout or a file.
func (d *Dir) Sub(name string) (_ *Dir, err error) {
	if d.depth >= maxDepth {
		return nil, fmt.Errorf("%s: directories are nested more than %d deep: %w", name, maxDepth, errdefs.ErrFailedPrecondition)
	}
	s := &Dir{depth: d.depth + 1}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	for _, r := range d.parts {
		f, err := openDir(int(r.f.Fd()), name)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) { // a file, a whiteout, a link
			s.Opaque = true
			break
		}
		if err != nil {
			return nil, err
		}
		if s.Opaque, err = s.add(f); err != nil {
			return nil, err
		}
		if s.Opaque {
			break
		}
	}
	s.Covered = s.Opaque || d.Covered
	return s, nil
}

func (r part) entry(name string) (Entry, error) {
	e := Entry{Name: name, at: r.f}
	if err := unix.Fstatat(int(r.f.Fd()), name, &e.Stat, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return e, &os.PathError{Op: "lstat", Path: name, Err: err}
	}
	switch kind := e.kind(); {
	case kind == unix.S_IFCHR && e.Stat.Rdev == 0:
		e.Whiteout = true
	case kind == unix.S_IFREG && e.Stat.Size == 0 && r.xwhiteouts:
		_, err := unix.Lgetxattr(e.Path(), xattrWhiteout, nil)
		if err != nil && !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.ENOTSUP) {
			return e, &os.PathError{Op: "getxattr " + xattrWhiteout, Path: name, Err: err}
		}
		e.Whiteout = err == nil
	}
	return e, nil
}

// openDir opens a directory below the descriptor at, not through a link.
func openDir(at int, name string) (*os.File, error) {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := unix.Openat(at, name, flags|unix.O_NOATIME, 0)
	if errors.Is(err, unix.EPERM) {
		fd, err = unix.Openat(at, name, flags, 0)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}
