// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/runtime/pace"
)

const (
	// dedupeParallel is how many objects are compared at a time, next to a group
	// that is running.
	dedupeParallel = 2
	// dedupeWorth is which part of the pages must be equal for the rest to be
	// written once more: 1 of so many.
	dedupeWorth = 16
	// compareSize is what is compared at a time, in bytes.
	compareSize = 1 << 20
	// reflinkSize is from which size on, in bytes, a copy is left to the kernel,
	// which shares blocks where it can. A smaller one would cost more metadata than data.
	reflinkSize = 64 << 10
	// newSuffix is of files that take the place of others in the end.
	newSuffix = ".new"
)

// Dedupe takes out of the composed images in imagesDir what the checkpoint that
// parent begins with has in the same place of the same process, or of the same
// shared memory, with the same content; pages that are in a parent already stay
// so. Of each object that is changed there is one level afterwards: its pagemap
// and a pages file with what differs. Objects in which next to nothing is equal
// stay as they are, levels and all.
//
// In the result InheritedPages are in the parent, OwnPages and ParentPages in
// imagesDir and in its levels, and Moved were written once more.
//
// It reads both checkpoints once, two objects at a time. When it fails, or ctx
// ends, before it has begun to rename files, the images are as they were. It
// makes them durable, unless asked otherwise. They are restored through [Link]
// or [Merge], never alone ([WithParent] says why).
func Dedupe(ctx context.Context, imagesDir string, parent *Chain, options ...ComposeOption) (Stats, error) {
	stats, err := dedupe(ctx, imagesDir, parent, options)
	if err != nil {
		return stats, fmt.Errorf("compare checkpoint %s with the one before: %w", imagesDir, err)
	}
	return stats, nil
}

func dedupe(ctx context.Context, imagesDir string, parent *Chain, options []ComposeOption) (stats Stats, err error) {
	own, err := openChain([]string{imagesDir}, false, false)
	if err != nil {
		return stats, err
	}
	defer own.Close()
	var opts composer
	for _, o := range options {
		o(&opts)
	}
	var jobs []*deduper
	for _, o := range own.Objects() {
		d := &deduper{dir: own.levels[0], noSync: opts.noSync, object: o, own: own.lookup(o), parent: parent.lookup(o)}
		if _, lost := d.parent.split(d.own.unresolved); len(lost) > 0 {
			return stats, fmt.Errorf("%s: %d pages, the first in %s, are in no parent: %w", o, count(lost), lost[0], ErrIncomplete)
		}
		jobs = append(jobs, d)
	}
	done := false
	defer func() {
		if !done {
			for _, d := range jobs {
				d.abandon()
			}
		}
	}()
	eg, ctx := errgroup.WithContext(ctx)
	eg.SetLimit(dedupeParallel)
	for _, d := range jobs {
		eg.Go(func() error {
			if err := d.prepare(ctx); err != nil {
				return fmt.Errorf("%s: %w", d.object, err)
			}
			return nil
		})
	}
	if err := eg.Wait(); err != nil {
		return stats, err
	}
	done = true
	for _, d := range jobs {
		if err := d.commit(own.levels[1:]); err != nil {
			return stats, fmt.Errorf("%s: %w", d.object, err)
		}
		stats.add(d.stats)
	}
	for i := len(own.levels) - 1; i >= 0; i-- {
		err := error(nil)
		if i > 0 {
			err = os.Remove(own.levels[i].path)
		}
		if i == 0 || errors.Is(err, unix.ENOTEMPTY) {
			err = nil
			if !opts.noSync {
				err = own.levels[i].f.Sync()
			}
		}
		if err != nil {
			return stats, err
		}
	}
	return stats, nil
}

// deduper does one object.
type deduper struct {
	dir    *levelDir
	noSync bool
	object Object
	own    *memory
	parent *memory // nil where the parent has nothing of it
	stats  Stats
	change bool // there are new files to take the place of the old
}

func (d *deduper) path(name string) string { return filepath.Join(d.dir.path, name) }

// prepare compares, and writes new files where that is worth it.
func (d *deduper) prepare(ctx context.Context) error {
	same, err := d.compare(ctx)
	if err != nil {
		return err
	}
	total, equal := count(d.own.has), count(same)
	d.stats.InheritedPages = count(d.own.unresolved)
	if equal == 0 || equal*dedupeWorth < total {
		for _, p := range d.own.pieces {
			if p.src == d.own.top {
				d.stats.OwnPages += p.Pages()
			} else {
				d.stats.ParentPages += p.Pages()
			}
		}
	} else {
		d.change = true
		d.stats.InheritedPages += equal
		d.stats.OwnPages = total - equal
		d.stats.Moved = total - equal
		if err := d.write(ctx, same); err != nil {
			return err
		}
	}
	if d.stats.InheritedPages+d.stats.ParentPages > 0 {
		d.stats.Processes++
	}
	return nil
}

// compare returns the addresses of equal pages.
func (d *deduper) compare(ctx context.Context) (same []Range, err error) {
	if d.parent == nil {
		return nil, nil
	}
	try := intersect(d.own.has, d.parent.has)
	if d.object.Kind == Task {
		// What CRIU reads from the topmost file only must stay there.
		vmas, err := readMappings(d.dir.path, int(d.object.ID))
		if err != nil {
			return nil, err
		}
		try = subtract(try, vmas.direct)
	}
	ours, theirs := windows{}, windows{}
	defer ours.close()
	defer theirs.close()
	equal := func(r Range) {
		if n := len(same); n > 0 && same[n-1].End == r.Start {
			same[n-1].End = r.End
		} else {
			same = append(same, r)
		}
	}
	old := d.parent.find(try)
	for _, a := range d.own.find(try) {
		for a.Start < a.End {
			b := old[0]
			b.End = min(a.End, b.End, a.Start+compareSize)
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			pace.Pause(ctx)
			x, err := ours.get(a.src, a.off, b.End-b.Start)
			if err != nil {
				return nil, err
			}
			y, err := theirs.get(b.src, b.off, b.End-b.Start)
			if err != nil {
				return nil, err
			}
			if bytes.Equal(x, y) {
				equal(b.Range)
			} else {
				for i := uint64(0); i < uint64(len(x)); i += pageSize {
					if bytes.Equal(x[i:i+pageSize], y[i:i+pageSize]) {
						equal(Range{b.Start + i, b.Start + i + pageSize})
					}
				}
			}
			a = a.cut(Range{b.End, a.End})
			if b.End == old[0].End {
				old = old[1:]
			} else {
				old[0] = old[0].cut(Range{b.End, old[0].End})
			}
		}
	}
	return same, nil
}

// write makes the new pagemap and pages file.
func (d *deduper) write(ctx context.Context, same []Range) error {
	id, err := parsePagesName(d.own.top.name)
	if err != nil {
		return err
	}
	m := &pagemap{pagesID: id}
	out, err := newPagesFile(d.path(d.own.top.name + newSuffix))
	if err != nil {
		return err
	}
	defer out.f.Close()
	files := sourceFiles{}
	defer files.close()
	for _, p := range d.own.find(subtract(d.own.has, same)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		f, err := files.get(p.src)
		if err != nil {
			return err
		}
		if err := out.gather(f, p.off, p.End-p.Start); err != nil {
			return err
		}
		pace.Pause(ctx)
		m.appendPresent(p.Range)
	}
	if err := out.flush(); err != nil {
		return err
	}
	for _, list := range [][]Range{same, d.own.unresolved} {
		for _, r := range list {
			m.appendParent(r)
		}
	}
	m.sort()
	c := &composer{noSync: d.noSync}
	if err := c.sync(out.f); err != nil {
		return err
	}
	return c.writePagemap(d.path(d.object.pagemapName()+newSuffix), m)
}

// abandon removes new files.
func (d *deduper) abandon() {
	_ = os.Remove(d.path(d.own.top.name + newSuffix))
	_ = os.Remove(d.path(d.object.pagemapName() + newSuffix))
}

// commit puts the new files in place of the old ones, those of lower levels too.
func (d *deduper) commit(lower []*levelDir) error {
	if !d.change {
		return nil
	}
	for _, name := range []string{d.own.top.name, d.object.pagemapName()} {
		if err := os.Rename(d.path(name+newSuffix), d.path(name)); err != nil {
			return err
		}
	}
	for _, l := range lower {
		path := filepath.Join(l.path, d.object.pagemapName())
		m, err := readPagemap(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		err = os.Remove(filepath.Join(l.path, pagesName(m.pagesID)))
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		if err := errors.Join(err, os.Remove(path)); err != nil {
			return err
		}
	}
	return nil
}

// windows read files in large pieces where they are read in order.
type windows map[*source]*window

type window struct {
	f    *os.File
	buf  []byte
	off  uint64 // of buf
	next uint64 // how much to read when the file is read on
}

// get returns size bytes, at most compareSize, of a file, good until the next get.
func (m windows) get(s *source, off, size uint64) ([]byte, error) {
	w := m[s]
	if w == nil {
		f, err := s.open()
		if err != nil {
			return nil, err
		}
		w = &window{f: f}
		m[s] = w
	}
	end := w.off + uint64(len(w.buf))
	if off >= w.off && off+size <= end {
		return w.buf[off-w.off:][:size], nil
	}
	// As the kernel reads ahead: more each time, as long as little is passed over.
	const least = 64 << 10
	if off >= w.off && off < end+least {
		w.next = min(2*w.next, compareSize)
	} else {
		w.next = least
	}
	n := min(max(size, w.next), s.size-off)
	if uint64(cap(w.buf)) < n {
		w.buf = make([]byte, max(n, w.next))
	}
	w.buf, w.off = w.buf[:n], off
	if _, err := w.f.ReadAt(w.buf, int64(off)); err != nil {
		w.buf = w.buf[:0]
		return nil, fmt.Errorf("read pages of %s: %w", s.path(), err)
	}
	return w.buf[:size], nil
}

func (m windows) close() {
	for _, w := range m {
		w.f.Close()
	}
}
