// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// Chain is the memory of a checkpoint and of those that it builds on: what
// every process had, and where each page of it is.
//
// It is safe for concurrent use until it is closed; nothing but Open of files
// that are read needs it open. What it knows is in memory: 32 bytes for each run
// of pages.
type Chain struct {
	levels  []*levelDir
	seen    map[inode]bool
	entries int  // read so far
	layouts bool // sources keep theirs
	objects map[Object]*memory
}

// memory is what a chain has of an object.
type memory struct {
	pieces []piece // by address
	has    []Range // their addresses, normalized
	// unresolved are in a parent that is not in the chain.
	unresolved []Range
	top        *source // the newest epoch's file
}

// OpenChain reads the pagemaps of checkpoints, the newest first, each of which
// builds on the next. A directory is what CRIU and [Compose] or [Dedupe] made
// of one checkpoint, with its levels parent, parent/parent and so on.
//
// What an epoch says to be in a parent is looked for in the lower levels of the
// same epoch, then in the epoch before. A page that nobody has is
// [ErrIncomplete]. Files are input from a stranger: no link beneath dirs is
// followed, and what a pagemap says is held against the size of its pages file.
func OpenChain(dirs []string) (*Chain, error) {
	c, err := openChain(dirs, false, true)
	if err != nil {
		return nil, fmt.Errorf("read the memory of a checkpoint and its parents: %w", err)
	}
	return c, nil
}

// openChain is OpenChain. A chain that is not whole ends in unresolved pages.
func openChain(dirs []string, layouts, whole bool) (_ *Chain, err error) {
	if len(dirs) == 0 {
		return nil, errors.New("no directory of images is given")
	}
	c := &Chain{seen: map[inode]bool{}, layouts: layouts, objects: map[Object]*memory{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	for i, dir := range dirs {
		if err := c.openLevels(dir, i); err != nil {
			return nil, err
		}
	}
	names, err := c.names()
	if err != nil {
		return nil, err
	}
	ids := map[string]Object{}
	for _, name := range names {
		o, ok := parseObject(name)
		if !ok {
			continue
		}
		m, err := c.resolve(o)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", o, err)
		}
		if other, ok := ids[m.top.name]; ok {
			return nil, fmt.Errorf("%s and %s are in the same file %s: %w", other, o, m.top.path(), errImage)
		}
		ids[m.top.name] = o
		if whole && len(m.unresolved) > 0 {
			return nil, fmt.Errorf("%s: %d pages, the first in %s, are in no checkpoint of the chain: %w", o, count(m.unresolved), m.unresolved[0], ErrIncomplete)
		}
		c.objects[o] = m
	}
	return c, nil
}

// names are those of the files in the newest epoch's directory, in order.
func (c *Chain) names() ([]string, error) {
	d := c.levels[0]
	fd, err := openat(d.f, ".", unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), d.path)
	defer f.Close()
	names, err := f.Readdirnames(maxFiles + 1)
	if len(names) > maxFiles {
		return nil, fmt.Errorf("%s has more than %d files: %w", d.path, maxFiles, errImage)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	slices.Sort(names)
	return names, nil
}

// resolve finds each page of an object.
func (c *Chain) resolve(o Object) (*memory, error) {
	out := &memory{}
	var want []Range
	epoch := -1
	for _, d := range c.levels {
		top := d.epoch != epoch
		epoch = d.epoch
		if d.depth > 0 && len(want) == 0 {
			break
		}
		m, src, err := c.read(d, o)
		if err != nil {
			return nil, err
		}
		if d.depth == 0 {
			if m == nil {
				return nil, fmt.Errorf("its pagemap in %s has vanished: %w", d.path, errImage)
			}
			out.top = src
			if want, err = m.addresses(); err != nil {
				return nil, err
			}
		}
		if m == nil && !top {
			continue
		}
		if m == nil {
			m = &pagemap{}
		}
		found, rest, unknown := m.take(want, src)
		// Only the top of an epoch says what a process had; below it, a page that is
		// not mentioned is deeper.
		if top && unknown > 0 {
			return nil, fmt.Errorf("%d pages that the next newer checkpoint has from %s are unknown there, in %s and others: %w", unknown, d.path, rest[0], ErrIncomplete)
		}
		out.pieces = append(out.pieces, found...)
		want = rest
	}
	out.unresolved = want
	slices.SortFunc(out.pieces, func(a, b piece) int { return cmp.Compare(a.Start, b.Start) })
	out.has = addresses(out.pieces)
	return out, nil
}

// addresses are those of all entries.
func (m *pagemap) addresses() ([]Range, error) {
	out := make([]Range, 0, len(m.entries))
	for _, e := range m.entries {
		out = append(out, Range{e.addr, e.end()})
	}
	return normalize(out)
}

// addresses are those of pieces, which are in order.
func addresses(pieces []piece) []Range {
	var out []Range
	for _, p := range pieces {
		if n := len(out); n > 0 && out[n-1].End == p.Start {
			out[n-1].End = p.End
		} else {
			out = append(out, p.Range)
		}
	}
	return out
}

// Close closes the directories.
func (c *Chain) Close() error {
	var errs []error
	for _, d := range c.levels {
		errs = append(errs, d.f.Close())
	}
	c.levels = nil
	return errors.Join(errs...)
}

// Objects are what the newest checkpoint has memory of, in order.
func (c *Chain) Objects() []Object {
	return slices.SortedFunc(maps.Keys(c.objects), func(a, b Object) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.ID, b.ID))
	})
}

// Pages are the addresses that the newest checkpoint has of an object, in order;
// not to be changed.
func (c *Chain) Pages(o Object) []Range {
	if m := c.lookup(o); m != nil {
		return m.has
	}
	return nil
}

// Segment says where a run of pages is.
type Segment struct {
	Range
	// Path is the file, and Offset where the run begins in it, in bytes.
	Path   string
	Offset int64
	// Epoch counts the checkpoints of the chain, the newest is 0.
	Epoch int
}

// Segments yields where the pages of an object are, in order.
func (c *Chain) Segments(o Object) iter.Seq[Segment] {
	return func(yield func(Segment) bool) {
		m := c.lookup(o)
		if m == nil {
			return
		}
		for _, p := range m.pieces {
			if !yield(Segment{p.Range, p.src.path(), int64(p.off), p.src.dir.epoch}) {
				return
			}
		}
	}
}

// lookup is nil for what the chain has not, and for no chain.
func (c *Chain) lookup(o Object) *memory {
	if c == nil {
		return nil
	}
	return c.objects[o]
}

// find returns where ranges, which are normalized and in m, are.
func (m *memory) find(ranges []Range) (out []piece) {
	if m == nil {
		return nil
	}
	i := 0
	for _, r := range ranges {
		for i < len(m.pieces) && m.pieces[i].End <= r.Start {
			i++
		}
		for j := i; j < len(m.pieces) && m.pieces[j].Start < r.End; j++ {
			p := m.pieces[j]
			out = append(out, p.cut(Range{max(p.Start, r.Start), min(p.End, r.End)}))
		}
	}
	return out
}

// split says which of ranges m has and which not.
func (m *memory) split(ranges []Range) (in, out []Range) {
	if m == nil {
		return nil, ranges
	}
	return intersect(ranges, m.has), subtract(ranges, m.has)
}
