// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// ErrIncomplete is returned by Compose when a clean page is not in the store:
// neither CRIU nor the store has it, and the images are not restorable.
var ErrIncomplete = errors.New("a page that was not dumped is not in the page store either")

// parentDir is CRIU's name for the images that others build on
// (criu/include/image.h, CR_PARENT_LINK); here a directory, never a link.
const parentDir = "parent"

// Stats counts what images are made of, in pages.
type Stats struct {
	// ParentPages are restored from the page store.
	ParentPages uint64
	// OwnPages are restored from what CRIU dumped.
	OwnPages uint64
	// Overlap were clean and nevertheless dumped by CRIU, whose copy is used.
	// Where the preload library works these are a handful (CRIU always dumps
	// the vDSO); without its effect they are all clean pages.
	Overlap uint64
	// StalePages were copied in vain: changed or unmapped before the barrier.
	StalePages uint64
	// Dropped were clean, but outside of the private mappings that CRIU recorded.
	Dropped uint64
	// Moved were written once more: huge pages into CRIU's file, and pages that
	// appeared in several rounds into the order of their addresses.
	Moved uint64
	// Processes is how many have pages in parents.
	Processes int
}

// Compose completes the images that CRIU wrote to imagesDir with the pages of
// the store. clean has for each process, by its pid in the container, what was
// not written since the store's last round. Processes that are not in clean keep
// CRIU's images as they are.
//
// It takes the files of the store. When it has succeeded everything in
// imagesDir that is of this package is durable, unless asked otherwise, and the
// store must be discarded. When it fails, the images are unusable and so is the
// store.
func Compose(ctx context.Context, imagesDir string, store *Store, clean map[int][]Range, options ...ComposeOption) (Stats, error) {
	stats, err := compose(ctx, imagesDir, store, clean, options)
	if err != nil {
		return stats, fmt.Errorf("compose checkpoint %s: %w", imagesDir, err)
	}
	return stats, nil
}

// ComposeOption changes how Compose works.
type ComposeOption func(*composer)

// WithoutSync leaves it to the caller to make the images durable, for one who
// calls syncfs on them anyway.
func WithoutSync() ComposeOption { return func(c *composer) { c.noSync = true } }

// composeParallel is how many processes are worked on at a time; they mostly
// wait for the disk.
const composeParallel = 4

func compose(ctx context.Context, imagesDir string, store *Store, clean map[int][]Range, options []ComposeOption) (stats Stats, _ error) {
	parent := filepath.Join(imagesDir, parentDir)
	if _, err := os.Lstat(parent); !errors.Is(err, fs.ErrNotExist) {
		return stats, fmt.Errorf("it has a directory %q already; images that have a parent are not composed", parentDir)
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(composeParallel)
	composers := make([]*composer, 0, len(clean))
	for _, pid := range slices.Sorted(maps.Keys(clean)) {
		c := &composer{dir: imagesDir, pid: pid, p: store.lookup(pid)}
		for _, o := range options {
			o(c)
		}
		composers = append(composers, c)
		group.Go(func() error {
			err := ctx.Err()
			if err == nil {
				err = c.run(clean[pid])
			}
			if err != nil {
				return fmt.Errorf("process %d: %w", pid, err)
			}
			return nil
		})
	}
	err := group.Wait()
	for _, c := range composers {
		stats.add(c.stats)
	}
	for _, p := range store.all() {
		if _, ok := clean[p.pid]; !ok {
			stats.StalePages += p.Pages()
		}
	}
	if err != nil {
		return stats, err
	}
	if len(composers) == 0 || composers[0].noSync {
		return stats, nil
	}
	for _, dir := range []string{filepath.Join(parent, parentDir), parent, imagesDir} {
		if err := syncDir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return stats, err
		}
	}
	return stats, nil
}

func (s *Stats) add(o Stats) {
	s.ParentPages += o.ParentPages
	s.OwnPages += o.OwnPages
	s.Overlap += o.Overlap
	s.StalePages += o.StalePages
	s.Dropped += o.Dropped
	s.Moved += o.Moved
	s.Processes += o.Processes
}

// composer does one process.
type composer struct {
	dir    string
	pid    int
	p      *Process // nil where nothing was copied
	noSync bool
	stats  Stats

	own    *pagemap
	parent []segment // to come from parents
	inline []segment // to be copied into the topmost file
}

func (c *composer) run(clean []Range) error {
	clean, err := normalize(clean)
	if err != nil {
		return err
	}
	vmas, err := readMappings(c.dir, c.pid)
	if errors.Is(err, fs.ErrNotExist) {
		c.stats.Dropped += count(clean)
		if c.p != nil {
			c.stats.StalePages += c.p.Pages()
		}
		return nil
	}
	if err != nil {
		return err
	}
	if c.own, err = readPagemap(c.path("pagemap", c.pid)); err != nil {
		return err
	}
	for _, e := range c.own.entries {
		if !e.present() {
			return fmt.Errorf("entry of %d pages at %#x in CRIU's pagemap is not in its pages file: %w", e.nr, e.addr, errImage)
		}
	}
	if err := c.plan(clean, vmas); err != nil {
		return err
	}
	if len(c.inline) > 0 {
		if err := c.rewriteTop(); err != nil {
			return err
		}
	}
	if c.p != nil {
		if err := c.p.publish(c); err != nil {
			return err
		}
	}
	c.stats.OwnPages += c.own.bytes() / pageSize
	if len(c.parent) == 0 {
		return nil
	}
	c.stats.Processes++
	return c.writeTop()
}

// plan decides where each clean page comes from.
func (c *composer) plan(clean []Range, vmas *mappings) error {
	own, err := c.own.present()
	if err != nil {
		return err
	}
	need := subtract(clean, own)
	c.stats.Overlap += count(clean) - count(need)
	private, direct := intersect(need, vmas.private), intersect(need, vmas.direct)
	c.stats.Dropped += count(need) - count(private) - count(direct)
	if count(private)+count(direct) == 0 {
		return nil
	}
	if c.p == nil {
		return fmt.Errorf("%d pages from %s: %w", count(need), need[0], ErrIncomplete)
	}
	var missing, more []Range
	c.parent, missing = c.p.resolve(private)
	c.inline, more = c.p.resolve(direct)
	if missing = append(missing, more...); len(missing) > 0 {
		return fmt.Errorf("%d pages in %d ranges, the first %s: %w", count(missing), len(missing), missing[0], ErrIncomplete)
	}
	return nil
}

func (c *composer) path(name string, id int) string { return imagePath(c.dir, name, id) }

func imagePath(dir, name string, id int) string {
	return filepath.Join(dir, fmt.Sprintf("%s-%d.img", name, id))
}

// writeTop puts CRIU's entries and those of the parents together.
func (c *composer) writeTop() error {
	top := &pagemap{pagesID: c.own.pagesID, entries: slices.Clone(c.own.entries)}
	for _, s := range c.parent {
		c.stats.ParentPages += s.Pages()
		top.entries = append(top.entries, entry{s.Start, s.Pages(), flagParent})
	}
	top.sort()
	path := c.path("pagemap", c.pid)
	if err := c.writePagemap(path+".new", top); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// sort orders entries, and joins those in the parent that touch.
func (m *pagemap) sort() {
	slices.SortFunc(m.entries, func(a, b entry) int { return cmp.Compare(a.addr, b.addr) })
	out := m.entries[:0]
	for _, e := range m.entries {
		if n := len(out); n > 0 && e.flags == flagParent && out[n-1].flags == flagParent &&
			out[n-1].end() == e.addr && out[n-1].nr+e.nr <= maxExtent {
			out[n-1].nr += e.nr
			continue
		}
		out = append(out, e)
	}
	m.entries = out
}

// rewriteTop makes CRIU's pages file anew with the inline pages in it.
func (c *composer) rewriteTop() error {
	path := c.path("pages", int(c.own.pagesID))
	old, err := os.Open(path)
	if err != nil {
		return err
	}
	defer old.Close()
	type piece struct {
		entry
		from *os.File
		off  uint64
	}
	pieces := make([]piece, 0, len(c.own.entries)+len(c.inline))
	var off uint64
	for _, e := range c.own.entries {
		pieces = append(pieces, piece{e, old, off})
		off += e.nr * pageSize
	}
	for _, s := range c.inline {
		pieces = append(pieces, piece{entry{s.Start, s.Pages(), flagPresent}, s.level.f, s.slot * pageSize})
		c.stats.Moved += s.Pages()
	}
	slices.SortFunc(pieces, func(a, b piece) int { return cmp.Compare(a.addr, b.addr) })
	out, err := newPagesFile(path + ".new")
	if err != nil {
		return err
	}
	defer out.f.Close()
	m := &pagemap{pagesID: c.own.pagesID}
	for _, p := range pieces {
		if err := out.copy(p.from, p.off, p.nr*pageSize); err != nil {
			return err
		}
		m.entries = append(m.entries, p.entry)
	}
	if err := c.sync(out.f); err != nil {
		return err
	}
	// The pagemap and the file change together or the capture is not completed:
	// nobody reads them before Compose has returned.
	if err := c.writePagemap(c.path("pagemap", c.pid)+".new", m); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	c.own = m
	return os.Rename(c.path("pagemap", c.pid)+".new", c.path("pagemap", c.pid))
}

// publish moves the levels to the parent directories, with pagemaps.
func (p *Process) publish(c *composer) error {
	base := subtractSlots(p.base, c.parent)
	grown := subtractSlots(p.grown, c.parent)
	c.stats.StalePages += base.stale + grown.stale
	if base.used+grown.used == 0 {
		return nil
	}
	dir := filepath.Join(c.dir, parentDir)
	m := &pagemap{pagesID: uint32(p.pid)}
	for _, e := range p.base.ext {
		m.entries = append(m.entries, entry{e.addr, uint64(e.nr), flagPresent})
	}
	if grown.used > 0 {
		for _, s := range c.parent {
			if s.level == p.grown {
				m.entries = append(m.entries, entry{s.Start, s.Pages(), flagParent})
			}
		}
		m.sort()
	}
	if err := c.publish(p.base, dir, m, base.free); err != nil {
		return err
	}
	if grown.used == 0 {
		return nil
	}
	dir = filepath.Join(dir, parentDir)
	m = &pagemap{pagesID: uint32(p.pid)}
	if p.grown.ordered() {
		for _, e := range p.grown.ext {
			m.entries = append(m.entries, entry{e.addr, uint64(e.nr), flagPresent})
		}
		return c.publish(p.grown, dir, m, grown.free)
	}
	return c.publishSorted(p.grown, dir, m)
}

// publishSorted copies what is wanted of a level in the order of addresses. On
// file systems that share blocks nothing is really copied.
func (c *composer) publishSorted(l *level, dir string, m *pagemap) error {
	if err := makeDir(dir); err != nil {
		return err
	}
	out, err := newPagesFile(imagePath(dir, "pages", c.pid))
	if err != nil {
		return err
	}
	defer out.f.Close()
	for _, s := range c.parent {
		if s.level != l {
			continue
		}
		if err := out.copy(l.f, s.slot*pageSize, s.End-s.Start); err != nil {
			return err
		}
		m.entries = append(m.entries, entry{s.Start, s.Pages(), flagPresent})
		c.stats.Moved += s.Pages()
	}
	if err := c.sync(out.f); err != nil {
		return err
	}
	return c.writePagemap(imagePath(dir, "pagemap", c.pid), m)
}

// publish moves a level to dir as the pages of the process, without the
// content of the free slots.
func (c *composer) publish(l *level, dir string, m *pagemap, free []slotRange) error {
	if err := makeDir(dir); err != nil {
		return err
	}
	for _, r := range free {
		if err := l.wipe(r.first, r.nr); err != nil {
			return err
		}
	}
	if err := c.sync(l.f); err != nil {
		return err
	}
	to := imagePath(dir, "pages", c.pid)
	err := os.Rename(l.path, to)
	if errors.Is(err, unix.EXDEV) {
		err = c.copyTo(l, to)
	}
	if err != nil {
		return fmt.Errorf("move the page store's file to the images: %w", err)
	}
	if err := l.close(); err != nil {
		return err
	}
	return c.writePagemap(imagePath(dir, "pagemap", c.pid), m)
}

// copyTo is for a store that is on another file system than the images.
func (c *composer) copyTo(l *level, path string) error {
	out, err := newPagesFile(path)
	if err != nil {
		return err
	}
	defer out.f.Close()
	if err := out.copy(l.f, 0, l.slots*pageSize); err != nil {
		return err
	}
	return c.sync(out.f)
}

func (c *composer) writePagemap(path string, m *pagemap) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = m.encode(f)
	if err == nil {
		err = c.sync(f)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// sync makes a file's content durable.
func (c *composer) sync(f *os.File) error {
	if c.noSync {
		return nil
	}
	if err := unix.Fdatasync(int(f.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", f.Name(), err)
	}
	return nil
}

// slotRange is nr slots of a level.
type slotRange struct{ first, nr uint64 }

// usage says what of a level is wanted.
type usage struct {
	used, stale uint64
	free        []slotRange // the stale ones
}

func subtractSlots(l *level, wanted []segment) usage {
	if l == nil || l.f == nil {
		return usage{}
	}
	var taken []slotRange
	for _, s := range wanted {
		if s.level == l {
			taken = append(taken, slotRange{s.slot, s.Pages()})
		}
	}
	slices.SortFunc(taken, func(a, b slotRange) int { return cmp.Compare(a.first, b.first) })
	u := usage{}
	at := uint64(0)
	for _, t := range taken {
		if t.first > at {
			u.free = append(u.free, slotRange{at, t.first - at})
		}
		at = t.first + t.nr
		u.used += t.nr
	}
	if at < l.slots {
		u.free = append(u.free, slotRange{at, l.slots - at})
	}
	u.stale = l.slots - u.used
	return u
}

// pagesFile is a pages image being written, front to back.
type pagesFile struct {
	f   *os.File
	off int64
}

func newPagesFile(path string) (*pagesFile, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return &pagesFile{f: f}, nil
}

// copy appends bytes of another file; the kernel shares blocks where it can.
func (o *pagesFile) copy(from *os.File, off, size uint64) error {
	in := int64(off)
	for size > 0 {
		n, err := unix.CopyFileRange(int(from.Fd()), &in, int(o.f.Fd()), &o.off, int(min(size, 1<<30)), 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EOPNOTSUPP):
			return o.copyBytes(from, in, size)
		case err != nil:
			return fmt.Errorf("copy pages from %s to %s: %w", from.Name(), o.f.Name(), err)
		case n == 0:
			return fmt.Errorf("copy pages from %s: it ends %d bytes early: %w", from.Name(), size, errImage)
		}
		size -= uint64(n)
	}
	return nil
}

// copyBytes is copy between file systems that the kernel does not copy between.
func (o *pagesFile) copyBytes(from *os.File, off int64, size uint64) error {
	n, err := io.Copy(io.NewOffsetWriter(o.f, o.off), io.NewSectionReader(from, off, int64(size)))
	o.off += n
	if err == nil && n < int64(size) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("copy pages from %s to %s: %w", from.Name(), o.f.Name(), err)
	}
	return nil
}

func makeDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make a directory for parent images: %w", err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
