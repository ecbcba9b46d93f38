// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Bounds on what is read of a chain, whose files may come from a stranger.
const (
	// maxLevels is how many directories of images a chain has, all told.
	maxLevels = 256
	// maxEntries is how many pagemap entries a file, and a chain all told, has: one
	// for every second page of 256 GiB.
	maxEntries = 32 << 20
	// maxFiles is how many files a directory of images has.
	maxFiles = 1 << 20
)

// Kind says what memory an [Object] is.
type Kind uint8

const (
	// Task is the private memory of a process, by its pid in the container.
	Task Kind = iota
	// Shmem is shared memory, by CRIU's id of it; addresses are offsets into it.
	Shmem
)

// Object names memory that has a pagemap of its own.
type Object struct {
	Kind Kind
	ID   uint64
}

// Names of pagemaps (criu/image-desc.c).
const (
	taskPrefix  = "pagemap-"
	shmemPrefix = "pagemap-shmem-"
	pagesPrefix = "pages-"
	imageSuffix = ".img"
)

func (o Object) String() string {
	if o.Kind == Shmem {
		return fmt.Sprintf("shared memory %d", o.ID)
	}
	return fmt.Sprintf("process %d", o.ID)
}

// pagemapName is the name of its pagemap.
func (o Object) pagemapName() string {
	prefix := taskPrefix
	if o.Kind == Shmem {
		prefix = shmemPrefix
	}
	return prefix + strconv.FormatUint(o.ID, 10) + imageSuffix
}

func pagesName(id uint32) string { return fmt.Sprintf("%s%d%s", pagesPrefix, id, imageSuffix) }

// parseObject is the reverse of pagemapName.
func parseObject(name string) (o Object, ok bool) {
	rest, ok := strings.CutPrefix(name, shmemPrefix)
	if ok {
		o.Kind = Shmem
	} else if rest, ok = strings.CutPrefix(name, taskPrefix); !ok {
		return o, false
	}
	id, err := strconv.ParseUint(strings.TrimSuffix(rest, imageSuffix), 10, 64)
	o.ID = id
	return o, err == nil && o.pagemapName() == name
}

// inode tells directories apart.
type inode struct{ dev, ino uint64 }

// levelDir is one directory of images. An epoch has one or several, each with
// the next as its "parent".
type levelDir struct {
	path  string // without links in it
	f     *os.File
	epoch int // the newest is 0
	depth int // counted over all epochs
}

// open opens a regular file, never through a link.
func (d *levelDir) open(name string) (*os.File, error) {
	fd, err := openat(d.f, name, unix.O_NONBLOCK)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), filepath.Join(d.path, name))
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file: %w", f.Name(), errImage)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func openat(dir *os.File, name string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|flags, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOTDIR):
			return -1, fmt.Errorf("%s in %s is a link or not a directory: %w", name, dir.Name(), errImage)
		case err != nil:
			return -1, &fs.PathError{Op: "open", Path: filepath.Join(dir.Name(), name), Err: err}
		}
		return fd, nil
	}
}

// source is a pages file of a level.
type source struct {
	dir    *levelDir
	name   string
	size   uint64  // that its pagemap asks for, in bytes
	layout []entry // what is in it, in order; kept where asked for
}

// path is for messages and links.
func (s *source) path() string { return filepath.Join(s.dir.path, s.name) }

// open opens the file, and checks its size once more.
func (s *source) open() (*os.File, error) {
	f, err := s.dir.open(s.name)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && uint64(st.Size()) < s.size {
		err = fmt.Errorf("%s is %d bytes long, its pagemap has %d: %w", s.path(), st.Size(), s.size, errImage)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// piece is a run of pages of an object and where it is.
type piece struct {
	Range
	src *source
	off uint64 // in the file, bytes
}

// cut is the part r of p.
func (p piece) cut(r Range) piece { return piece{r, p.src, p.off + r.Start - p.Start} }

// sourceFiles are opened when they are first needed. Not for concurrent use.
type sourceFiles map[*source]*os.File

func (m sourceFiles) get(s *source) (*os.File, error) {
	if f := m[s]; f != nil {
		return f, nil
	}
	f, err := s.open()
	if err == nil {
		m[s] = f
	}
	return f, err
}

func (m sourceFiles) close() {
	for _, f := range m {
		f.Close()
	}
}

// openLevels opens the directories of an epoch, the top first. More than
// maxLevels of all, or a directory that is there twice, is refused.
func (c *Chain) openLevels(dir string, epoch int) error {
	abs, err := filepath.Abs(dir)
	if err == nil {
		abs, err = filepath.EvalSymlinks(abs)
	}
	if err != nil {
		return err
	}
	fd, err := unix.Open(abs, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: abs, Err: err}
	}
	for {
		d := &levelDir{path: abs, f: os.NewFile(uintptr(fd), abs), epoch: epoch, depth: len(c.levels)}
		c.levels = append(c.levels, d)
		if len(c.levels) > maxLevels {
			return fmt.Errorf("%s is level %d of the chain, more than %d; merge the older checkpoints into one first: %w", abs, len(c.levels), maxLevels, errImage)
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return fmt.Errorf("stat %s: %w", abs, err)
		}
		id := inode{st.Dev, st.Ino}
		if c.seen[id] {
			return fmt.Errorf("%s is in the chain twice: %w", abs, errImage)
		}
		c.seen[id] = true
		fd, err = openat(d.f, parentDir, unix.O_DIRECTORY)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		abs = filepath.Join(abs, parentDir)
	}
}

// read reads the pagemap of an object in a level and finds its pages file; nil
// where it has none.
func (c *Chain) read(d *levelDir, o Object) (*pagemap, *source, error) {
	name := o.pagemapName()
	f, err := d.open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	m, err := decodePagemap(f)
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", f.Name(), err)
	}
	if c.entries += len(m.entries); c.entries > maxEntries {
		return nil, nil, fmt.Errorf("%s: the chain has more than %d pagemap entries: %w", f.Name(), maxEntries, errImage)
	}
	for _, e := range m.entries {
		if inParent := e.flags&flagParent != 0; inParent == e.present() {
			return nil, nil, fmt.Errorf("%s: entry at %#x has flags %#x: %w", f.Name(), e.addr, e.flags, errImage)
		}
	}
	src := &source{dir: d, name: pagesName(m.pagesID), size: m.bytes()}
	if src.size > math.MaxInt64 {
		return nil, nil, fmt.Errorf("%s: %d bytes of pages: %w", f.Name(), src.size, errImage)
	}
	if c.layouts {
		for _, e := range m.entries {
			if e.present() {
				src.layout = append(src.layout, e)
			}
		}
	}
	if src.size > 0 {
		f, err := src.open()
		if err != nil {
			return nil, nil, err
		}
		f.Close()
	}
	return m, src, nil
}

// take looks for the pages of want, which is normalized, in a pagemap. It
// returns those that are in its file, those that are not, and how many it does
// not even mention.
func (m *pagemap) take(want []Range, src *source) (found []piece, rest []Range, unknown uint64) {
	lost := func(r Range) {
		if n := len(rest); n > 0 && rest[n-1].End == r.Start {
			rest[n-1].End = r.End
		} else {
			rest = append(rest, r)
		}
	}
	var off uint64
	i := 0
	for _, r := range want {
		for r.Start < r.End {
			for i < len(m.entries) && m.entries[i].end() <= r.Start {
				if m.entries[i].present() {
					off += m.entries[i].nr * pageSize
				}
				i++
			}
			if i == len(m.entries) || m.entries[i].addr >= r.End {
				unknown += r.Pages()
				lost(r)
				break
			}
			e := m.entries[i]
			if r.Start < e.addr {
				unknown += (e.addr - r.Start) / pageSize
				lost(Range{r.Start, e.addr})
				r.Start = e.addr
			}
			part := Range{r.Start, min(r.End, e.end())}
			if e.present() {
				found = append(found, piece{part, src, off + part.Start - e.addr})
			} else {
				lost(part)
			}
			r.Start = part.End
		}
	}
	return found, rest, unknown
}
