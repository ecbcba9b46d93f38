// SPDX-License-Identifier: Apache-2.0

package backend

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// racyWindow is how long after a file's last change another change may still get
// the same timestamp. Kernels before 6.13 (multigrain timestamps) stamp with the
// timer tick, up to 10 ms; the rest is margin.
const racyWindow = 50 * time.Millisecond

// tree duplicates the directory src as dst, in several passes: each pass brings
// dst to what src is now, and touches only what changed since the pass before.
//
// A file is taken as unchanged when inode, size and ctime are what they were
// before the last pass read it. ctime cannot be set by a program. Three
// traps are dealt with: a change within the timestamp's granularity (racyWindow), a
// store through a shared mapping (see file), and file systems that do not stamp such
// stores at all (trustTimes false: everything is read again).
//
// src is hostile: nothing of it is reached through a path, only through
// directory descriptors and O_NOFOLLOW.
type tree struct {
	src, dst string
	// content fills the empty file dst with the content of src; where writers run, the
	// dirty pages were written back before.
	content content
	// lastContent does so in the last pass, where they may be dirty; nil for content.
	lastContent content
	trustTimes  bool
	// static says that nobody writes to src, so no flush is needed to read it.
	static bool
	// without are paths that are left out.
	without map[string]struct{}
	// most bounds the number of entries, the source itself among them; 0 for no bound.
	most int

	seen  map[string]stamp
	names map[string][]string // of each directory, as last read
	links map[uint64]string   // inode → path in dst, of files with several links, this pass
	count int                 // entries met in this pass
	again bool                // this is not the first pass: dst may hold more than is known
	now   time.Time           // begin of this pass
	// copied counts the files whose content was read in this pass, for tests.
	copied int
}

type content func(ctx context.Context, dst, src *os.File, size int64) error

// errTooMany ends a pass over more entries than were allowed.
var errTooMany = errors.New("too many files")

// stamp identifies one version of one file.
type stamp struct {
	mode       uint32
	ino, nlink uint64
	size       int64
	ctime      unix.Timespec
	racy       bool
}

func (s stamp) same(o stamp) bool {
	return !s.racy && s.mode == o.mode && s.ino == o.ino && s.nlink == o.nlink && s.size == o.size && s.ctime == o.ctime
}

func (t *tree) stamp(st *unix.Stat_t) stamp {
	return stamp{
		mode: st.Mode, ino: st.Ino, nlink: uint64(st.Nlink), size: st.Size, ctime: st.Ctim, //nolint:unconvert // 32 bits on arm64
		racy: t.now.Sub(time.Unix(st.Ctim.Unix())) < racyWindow,
	}
}

// pass brings dst to what src is now. In the last pass nobody may change src, and
// a file that vanishes is an error. After an error another pass goes on from there.
func (t *tree) pass(ctx context.Context, last bool) error {
	if t.seen == nil {
		if err := os.Mkdir(t.dst, 0o700); err != nil {
			return err
		}
		t.seen, t.names = map[string]stamp{}, map[string][]string{}
	}
	defer func() { t.again = true }()
	t.links = map[uint64]string{}
	t.now = time.Now()
	t.copied, t.count = 0, 0
	s, err := openDir(unix.AT_FDCWD, t.src)
	if err != nil {
		return err
	}
	defer s.Close()
	top := &target{name: t.dst}
	defer top.close()
	return t.dir(ctx, s, top, "", last)
}

// target is a directory of dst, opened when something is done in it: in most of them
// nothing is, in the pass that counts.
type target struct {
	in   *target // nil for the top, whose name is a path
	name string
	f    *os.File
}

func (d *target) open() (*os.File, error) {
	if d.f != nil {
		return d.f, nil
	}
	at := unix.AT_FDCWD
	if d.in != nil {
		parent, err := d.in.open()
		if err != nil {
			return nil, err
		}
		at = int(parent.Fd())
	}
	var err error
	d.f, err = openDir(at, d.name)
	return d.f, err
}

func (d *target) close() {
	if d.f != nil {
		d.f.Close()
	}
}

// dir brings one directory up to date, which is in dst. rel is its path below src, empty for src.
func (t *tree) dir(ctx context.Context, s *os.File, d *target, rel string, last bool) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(s.Fd()), &st); err != nil {
		return &os.PathError{Op: "fstat", Path: s.Name(), Err: err}
	}
	now := t.stamp(&st)
	touched := !t.seen[rel].same(now)
	unfinished := now
	unfinished.racy = true // an error before the end has the next pass do it again
	t.seen[rel] = unfinished
	names, err := t.list(s, d, rel, touched)
	if err != nil {
		return err
	}
	for _, name := range names {
		changed, err := t.entry(ctx, s, d, rel, name, last)
		switch {
		case errors.Is(err, unix.ENOENT) && !last:
			// Gone since the directory was read; the next pass sees whether it came back.
			now.racy = true
		case err != nil:
			return fmt.Errorf("%s: %w", filepath.Join(t.src, rel, name), err)
		}
		touched = touched || changed
	}
	// Last, because making entries changes the directory's times.
	if touched {
		to, err := d.open()
		if err != nil {
			return err
		}
		if err := copyMeta(s, to, &st); err != nil {
			return fmt.Errorf("%s: %w", filepath.Join(t.src, rel), err)
		}
	}
	t.seen[rel] = now
	return nil
}

// list tells the names in the directory s, and removes from d what is not among them. A
// directory that was not touched has the names that it had.
func (t *tree) list(s *os.File, d *target, rel string, touched bool) ([]string, error) {
	if names, ok := t.names[rel]; ok && !touched {
		return names, nil
	}
	names, err := s.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	t.names[rel] = names
	if !t.again {
		return names, nil
	}
	to, err := d.open()
	if err != nil {
		return nil, err
	}
	return names, t.removeGone(to, rel, names)
}

// removeGone removes the entries of the directory d that are not among names.
func (t *tree) removeGone(d *os.File, rel string, names []string) error {
	have, err := d.Readdirnames(-1)
	if err != nil {
		return err
	}
	if len(have) == 0 {
		return nil
	}
	keep := make(map[string]struct{}, len(names))
	for _, n := range names {
		keep[n] = struct{}{}
	}
	for _, n := range have {
		if _, ok := keep[n]; ok {
			continue
		}
		if err := t.remove(filepath.Join(rel, n)); err != nil {
			return err
		}
	}
	return nil
}

// remove removes the entry rel of dst, with everything below it.
func (t *tree) remove(rel string) error {
	s, ok := t.seen[rel]
	delete(t.seen, rel)
	if ok && s.mode&unix.S_IFMT == unix.S_IFDIR {
		delete(t.names, rel)
		prefix := rel + "/"
		for p := range t.seen {
			if strings.HasPrefix(p, prefix) {
				delete(t.seen, p)
				delete(t.names, p)
			}
		}
	}
	return os.RemoveAll(filepath.Join(t.dst, rel))
}

// entry brings one directory entry up to date and tells whether it made or
// replaced an entry of the directory d.
func (t *tree) entry(ctx context.Context, s *os.File, d *target, dir, name string, last bool) (bool, error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	if t.count++; t.most > 0 && t.count > t.most {
		return false, errTooMany
	}
	rel := filepath.Join(dir, name)
	if _, ok := t.without[rel]; ok {
		return false, nil
	}
	var st unix.Stat_t
	if err := unix.Fstatat(int(s.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return false, err
	}
	before, known := t.seen[rel]
	isDir := st.Mode&unix.S_IFMT == unix.S_IFDIR
	wasDir := before.mode&unix.S_IFMT == unix.S_IFDIR
	if known && isDir && wasDir {
		return false, t.subdir(ctx, s, d, rel, name, last)
	}
	if known && !isDir && before.same(t.stamp(&st)) && (t.trustTimes || st.Mode&unix.S_IFMT != unix.S_IFREG) {
		return false, nil
	}
	// Also for an unknown name: a pass that failed half way may have made it.
	if t.again {
		if err := t.remove(rel); err != nil {
			return false, err
		}
	}
	to, err := d.open()
	if err != nil {
		return false, err
	}
	if isDir {
		if err := unix.Mkdirat(int(to.Fd()), name, 0o700); err != nil {
			return false, err
		}
		t.seen[rel] = stamp{mode: unix.S_IFDIR, racy: true}
		return true, t.subdir(ctx, s, d, rel, name, last)
	}
	return true, t.leaf(ctx, s, to, rel, name, last)
}

func (t *tree) subdir(ctx context.Context, s *os.File, d *target, rel, name string, last bool) error {
	sub, err := openDir(int(s.Fd()), name)
	if err != nil {
		return err
	}
	defer sub.Close()
	to := &target{in: d, name: name}
	defer to.close()
	return t.dir(ctx, sub, to, rel, last)
}

// leaf makes the entry name of d, which does not exist, from that of s.
func (t *tree) leaf(ctx context.Context, s, d *os.File, rel, name string, last bool) error {
	// O_PATH has no effect on what it opens: a file that a container has just replaced
	// by a device is not opened as one.
	fd, err := unix.Openat(int(s.Fd()), name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	from := os.NewFile(uintptr(fd), name)
	defer from.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	kind := st.Mode & unix.S_IFMT
	if kind == unix.S_IFDIR {
		return unix.ENOENT // it was something else a moment ago; the next pass takes it
	}
	if st.Nlink > 1 {
		if first, ok := t.links[st.Ino]; ok {
			if err := os.Link(filepath.Join(t.dst, first), filepath.Join(t.dst, rel)); err != nil {
				return err
			}
			t.seen[rel] = t.seen[first]
			return nil
		}
	}
	switch kind {
	case unix.S_IFREG:
		err = t.file(ctx, from, d, name, &st, last)
	case unix.S_IFLNK:
		err = symlink(from, d, name, &st)
	default: // devices, whiteouts among them, fifos and sockets
		err = unix.Mknodat(int(d.Fd()), name, st.Mode, int(st.Rdev)) //nolint:gosec // a device number fits
		if err == nil {
			err = copyMetaAt(from, d, name, &st)
		}
	}
	if err != nil {
		return err
	}
	now := t.stamp(&st)
	if last && kind == unix.S_IFREG {
		now.racy = true // its pages were not written back: see file
	}
	t.seen[rel] = now
	if st.Nlink > 1 {
		t.links[st.Ino] = rel
	}
	return nil
}

// file makes the regular file name in d from the file behind the O_PATH
// descriptor from, whose status was st.
//
// The dirty pages are written back between the reading of the status and that
// of the content. That makes every page of a shared mapping read-only again, so the next
// store through the mapping faults and stamps the file; without it a page that is
// already writable could change after it was copied, unseen. In the last pass there is
// nobody to store anything, and no time to wait for the disk.
func (t *tree) file(ctx context.Context, from, d *os.File, name string, st *unix.Stat_t, last bool) error {
	s, err := os.OpenFile(procPath(from), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOATIME, 0)
	if err != nil {
		return err
	}
	defer s.Close()
	if !t.static && !last {
		const flags = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
		if err := unix.SyncFileRange(int(s.Fd()), 0, 0, flags); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOSYS) {
			return fmt.Errorf("flush: %w", err)
		}
	}
	fd, err := unix.Openat(int(d.Fd()), name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	dst := os.NewFile(uintptr(fd), name)
	defer dst.Close()
	t.copied++
	if st.Size > 0 {
		fill := t.content
		if last && t.lastContent != nil {
			fill = t.lastContent
		}
		if err := fill(ctx, dst, s, st.Size); err != nil {
			return err
		}
	}
	return copyMeta(s, dst, st)
}

// symlink makes the symbolic link name in d from the O_PATH descriptor from.
func symlink(from, d *os.File, name string, st *unix.Stat_t) error {
	// One more than the size, to notice a link that is longer than it was.
	buf := make([]byte, st.Size+1)
	n, err := unix.Readlinkat(int(from.Fd()), "", buf)
	if err != nil {
		return err
	}
	if int64(n) > st.Size {
		return fmt.Errorf("symbolic link of %d bytes reads as more: %w", st.Size, errdefs.ErrDataLoss)
	}
	if err := unix.Symlinkat(string(buf[:n]), int(d.Fd()), name); err != nil {
		return err
	}
	return copyMetaAt(from, d, name, st)
}

// openDir opens a directory below the descriptor at, never through a link.
func openDir(at int, name string) (*os.File, error) {
	fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// procPath names an open file for calls that take a path: it leads to the inode
// itself, also for an O_PATH descriptor of a symbolic link or a device.
func procPath(f *os.File) string {
	return "/proc/self/fd/" + strconv.Itoa(int(f.Fd()))
}
