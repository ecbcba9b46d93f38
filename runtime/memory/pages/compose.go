// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// ErrIncomplete is returned when a page is in no image: neither CRIU nor the
// store nor a checkpoint before has it, and the images are not restorable.
var ErrIncomplete = errors.New("a page that was not dumped is neither in the page store nor in a parent checkpoint")

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
	// InheritedPages are restored from the checkpoints that this one builds on.
	InheritedPages uint64
	// Processes is how many have pages in parents; for Dedupe, pieces of shared
	// memory too.
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

// ComposeOption changes how Compose and Dedupe work.
type ComposeOption func(*composer)

// WithoutSync leaves it to the caller to make the images durable, for one who
// calls syncfs on them anyway.
func WithoutSync() ComposeOption { return func(c *composer) { c.noSync = true } }

// WithParent makes the images build on the checkpoint that chain begins with. A
// clean page that the store was never given is taken for what it is there, if
// continuous says so of the process (or object, see [ObjectKey]): then everything
// that was written since that checkpoint's barrier must have been offered to this
// store. A process that was born or tracked anew since, or whose store was
// forgotten or discarded in between, is not continuous. Neither is one that
// called execve.
//
// Such images are restored through [Link] or [Merge], never alone: CRIU takes
// shared memory that it does not find in a parent for zeros (criu/shmem.c,
// do_restore_shmem_content).
func WithParent(chain *Chain, continuous func(nsPid int) bool) ComposeOption {
	return func(c *composer) {
		if continuous(c.pid) {
			c.chain = chain
		}
	}
}

// composeParallel is how many processes are worked on at a time; they mostly
// wait for the disk.
const composeParallel = 4

func compose(ctx context.Context, imagesDir string, store *Store, clean map[int][]Range, options []ComposeOption) (stats Stats, _ error) {
	parent := filepath.Join(imagesDir, parentDir)
	if _, err := os.Lstat(parent); !errors.Is(err, fs.ErrNotExist) {
		return stats, fmt.Errorf("it has a directory %q already; images that have a parent are not composed", parentDir)
	}
	if err := store.drain(); err != nil {
		return stats, err
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
				return fmt.Errorf("%s: %w", imageName("pagemap", pid), err)
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
	s.InheritedPages += o.InheritedPages
	s.Processes += o.Processes
}

// composer does one process.
type composer struct {
	dir    string
	pid    int
	p      *Process // nil where nothing was copied
	noSync bool
	chain  *Chain // nil where nothing is inherited
	stats  Stats

	own       *pagemap
	parent    []segment // to come from parents
	inherited []Range   // to come from the chain
	inline    []inlined // to be copied into the topmost file
}

// inlined is a run of pages for the topmost file: the store's, or the chain's.
type inlined struct {
	Range
	from *os.File
	off  uint64
}

func (c *composer) run(clean []Range) error {
	clean, err := normalize(clean)
	if err != nil {
		return err
	}
	vmas, err := c.mappings()
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
	if c.own, err = readPagemap(imagePath(c.dir, "pagemap", c.pid)); err != nil {
		return err
	}
	for _, e := range c.own.entries {
		if !e.present() {
			return fmt.Errorf("entry of %d pages at %#x in CRIU's pagemap is not in its pages file: %w", e.nr, e.addr, errImage)
		}
	}
	files := sourceFiles{}
	defer files.close()
	if err := c.plan(clean, vmas, files); err != nil {
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
	if len(c.parent)+len(c.inherited) == 0 {
		return nil
	}
	c.stats.Processes++
	return c.writeTop()
}

// plan decides where each clean page comes from.
func (c *composer) plan(clean []Range, vmas *mappings, files sourceFiles) error {
	own, err := c.own.present()
	if err != nil {
		return err
	}
	need := subtract(clean, own)
	c.stats.Overlap += count(clean) - count(need)
	private, direct := intersect(need, vmas.private), intersect(need, vmas.direct)
	c.stats.Dropped += count(need) - count(private) - count(direct)
	var missing []Range
	c.parent, c.inherited, missing = c.divide(private)
	store, chain, more := c.divide(direct)
	if missing = append(missing, more...); len(missing) > 0 {
		return fmt.Errorf("%d pages in %d ranges, the first %s: %w", count(missing), len(missing), missing[0], ErrIncomplete)
	}
	for _, s := range store {
		c.inline = append(c.inline, inlined{s.Range, s.level.f, s.slot * pageSize})
	}
	for _, p := range c.chain.lookup(c.object()).find(chain) {
		f, err := files.get(p.src)
		if err != nil {
			return err
		}
		c.inline = append(c.inline, inlined{p.Range, f, p.off})
	}
	return nil
}

// mappings are those that pages are restored into; an object has one, and no
// image of it (none at all where nobody has it any more).
func (c *composer) mappings() (*mappings, error) {
	if c.object().Kind == Task {
		return readMappings(c.dir, c.pid)
	}
	if _, err := os.Lstat(imagePath(c.dir, "pagemap", c.pid)); err != nil {
		return nil, err
	}
	return &mappings{private: []Range{{0, math.MaxUint64 / pageSize * pageSize}}}, nil
}

// divide says which pages of ranges the store has, which the chain, and which
// neither.
func (c *composer) divide(ranges []Range) (store []segment, chain, missing []Range) {
	missing = ranges
	if c.p != nil {
		store, missing = c.p.resolve(ranges)
	}
	chain, missing = c.p.inherit(missing, c.chain.lookup(c.object()))
	return store, chain, missing
}

func (c *composer) object() Object { return objectOf(c.pid) }

// imagePath is an image of a process or an object; key is as in [Compose].
func imagePath(dir, name string, key int) string { return filepath.Join(dir, imageName(name, key)) }

func imageName(name string, key int) string {
	o := objectOf(key)
	switch {
	case o.Kind == Task:
		return fmt.Sprintf("%s-%d.img", name, key)
	case name == "pages":
		return pagesName(pagesID(key))
	}
	return o.pagemapName()
}

// pagesID names the pages image of a process or an object in a parent.
func pagesID(key int) uint32 {
	o := objectOf(key)
	if o.Kind == Shmem {
		return firstObjectPages + uint32(o.ID)
	}
	return uint32(o.ID)
}

// writeTop puts CRIU's entries and those of the parents together.
func (c *composer) writeTop() error {
	top := &pagemap{pagesID: c.own.pagesID, entries: slices.Clone(c.own.entries)}
	for _, s := range c.parent {
		c.stats.ParentPages += s.Pages()
		top.entries = append(top.entries, entry{s.Start, s.Pages(), flagParent})
	}
	for _, r := range c.inherited {
		c.stats.InheritedPages += r.Pages()
		top.appendParent(r)
	}
	top.sort()
	path := imagePath(c.dir, "pagemap", c.pid)
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
	path := imagePath(c.dir, "pages", int(c.own.pagesID))
	old, err := os.Open(path)
	if err != nil {
		return err
	}
	defer old.Close()
	type part struct {
		entry
		from *os.File
		off  uint64
	}
	pieces := make([]part, 0, len(c.own.entries)+len(c.inline))
	var off uint64
	for _, e := range c.own.entries {
		pieces = append(pieces, part{e, old, off})
		off += e.nr * pageSize
	}
	for _, s := range c.inline {
		pieces = append(pieces, part{entry{s.Start, s.Pages(), flagPresent}, s.from, s.off})
		c.stats.Moved += s.Pages()
	}
	slices.SortFunc(pieces, func(a, b part) int { return cmp.Compare(a.addr, b.addr) })
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
	if err := c.writePagemap(imagePath(c.dir, "pagemap", c.pid)+".new", m); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	c.own = m
	return os.Rename(imagePath(c.dir, "pagemap", c.pid)+".new", imagePath(c.dir, "pagemap", c.pid))
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
	m := &pagemap{pagesID: pagesID(p.pid)}
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
	m = &pagemap{pagesID: pagesID(p.pid)}
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
