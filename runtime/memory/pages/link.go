// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// restoreStats is written by CRIU next to the images it restores, and must not
// be a link to something that is kept.
const restoreStats = "stats-restore"

// NeedsLink says whether CRIU needs [Link] to restore the newest checkpoint of a
// chain: it has pages that only an older one holds.
func NeedsLink(dirs []string) (bool, error) {
	c, err := OpenChain(dirs)
	if err != nil {
		return false, err
	}
	defer c.Close()
	for _, m := range c.objects {
		for _, p := range m.pieces {
			if p.src.dir.epoch > 0 {
				return true, nil
			}
		}
	}
	return false, nil
}

// Link makes dst, which must not exist, a directory from which CRIU restores
// the newest checkpoint of a chain. No memory is copied: dst has links to the
// files of dirs, pagemaps that are made for it, and as many levels parent,
// parent/parent and so on as the object with the most files needs. The caller
// removes it after the restore; nothing in it is made durable. After an error
// there is no dst.
//
// The links are relative. CRIU reads pages when the process has its own root
// already, in which an absolute path means another file (criu/cr-restore.c,
// prepare_mappings comes after prepare_namespace); from an open directory, ".."
// leads out of it all the same. Neither dst nor dirs can be moved therefore.
//
// The i-th file that has pages of an object, the newest being the first, is in
// the i-th level. Its pagemap there lists all that the file holds, wanted or
// not, since CRIU counts its way through the file by it (criu/pagemap.c,
// skip_pagemap_pages); and between these what is deeper as being in the parent.
func Link(dst string, dirs []string) (err error) {
	c, err := openChain(dirs, true, true)
	if err != nil {
		return fmt.Errorf("link the images of a chain: %w", err)
	}
	defer c.Close()
	if err := os.Mkdir(dst, 0o700); err != nil {
		return fmt.Errorf("make a directory for links to images: %w", err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("link the images of a chain to %s: %w", dst, errors.Join(err, os.RemoveAll(dst)))
		}
	}()
	top, err := filepath.Abs(dst)
	if err == nil {
		top, err = filepath.EvalSymlinks(top)
	}
	if err != nil {
		return err
	}
	f := &farm{levels: []*farmLevel{{dir: top}}}
	if err := f.linkTop(c); err != nil {
		return err
	}
	for _, o := range c.Objects() {
		if err := f.add(c, o); err != nil {
			return fmt.Errorf("%s: %w", o, err)
		}
	}
	return nil
}

// farm is a directory of links being made.
type farm struct{ levels []*farmLevel }

type farmLevel struct {
	dir    string
	lastID uint32 // of the pages files linked so far
}

// linkTop links everything in the newest checkpoint but pagemaps.
func (f *farm) linkTop(c *Chain) error {
	names, err := c.names()
	if err != nil {
		return err
	}
	for _, name := range names {
		if _, ok := parseObject(name); ok || name == parentDir || name == restoreStats || strings.HasSuffix(name, newSuffix) {
			continue
		}
		var st unix.Stat_t
		if err := unix.Fstatat(int(c.levels[0].f.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("stat %s in %s: %w", name, c.levels[0].path, err)
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
		case unix.S_IFDIR:
			continue // CRIU has none but parent
		default:
			return fmt.Errorf("%s in %s is not a regular file: %w", name, c.levels[0].path, errImage)
		}
		if err := f.link(f.levels[0], name, filepath.Join(c.levels[0].path, name)); err != nil {
			return err
		}
	}
	return nil
}

func (f *farm) link(l *farmLevel, name, target string) error {
	rel, err := filepath.Rel(l.dir, target)
	if err != nil {
		return err
	}
	return os.Symlink(rel, filepath.Join(l.dir, name))
}

// level returns the i-th level; all before it exist.
func (f *farm) level(i int) (*farmLevel, error) {
	if i == len(f.levels) {
		l := &farmLevel{dir: filepath.Join(f.levels[i-1].dir, parentDir)}
		if err := os.Mkdir(l.dir, 0o700); err != nil {
			return nil, err
		}
		f.levels = append(f.levels, l)
	}
	return f.levels[i], nil
}

// add makes the pagemaps of an object, and links the files that they need.
func (f *farm) add(c *Chain, o Object) error {
	m := c.lookup(o)
	if err := c.checkDirect(o, m); err != nil {
		return err
	}
	sources := m.sources()
	for i, s := range sources {
		l, err := f.level(i)
		if err != nil {
			return err
		}
		pm := &pagemap{entries: slices.Clone(s.layout)}
		if i == 0 {
			pm.pagesID, err = parsePagesName(s.name)
		} else {
			l.lastID++
			pm.pagesID = l.lastID
			err = f.link(l, pagesName(pm.pagesID), s.path())
		}
		if err != nil {
			return err
		}
		for _, p := range m.pieces {
			if p.src.dir.depth > s.dir.depth {
				pm.appendParent(p.Range)
			}
		}
		pm.sort()
		w := &composer{noSync: true}
		if err := w.writePagemap(filepath.Join(l.dir, o.pagemapName()), pm); err != nil {
			return err
		}
	}
	return nil
}

// sources are the files that m needs, the newest checkpoint's first in any case.
func (m *memory) sources() []*source {
	seen := map[*source]bool{m.top: true}
	out := []*source{m.top}
	for _, p := range m.pieces {
		if !seen[p.src] {
			seen[p.src] = true
			out = append(out, p.src)
		}
	}
	slices.SortFunc(out, func(a, b *source) int { return cmp.Compare(a.dir.depth, b.dir.depth) })
	return out
}

// checkDirect refuses pages in a parent that CRIU would take from the topmost
// file, at a place that means nothing.
func (c *Chain) checkDirect(o Object, m *memory) error {
	if o.Kind != Task || len(m.sources()) == 1 {
		return nil
	}
	f, err := c.levels[0].open(fmt.Sprintf("mm-%d.img", o.ID))
	if err != nil {
		return err
	}
	defer f.Close()
	vmas, err := decodeMappings(f)
	if err != nil {
		return fmt.Errorf("read %s: %w", f.Name(), err)
	}
	for _, p := range m.find(intersect(m.has, vmas.direct)) {
		if p.src != m.top {
			return fmt.Errorf("pages %s of a huge mapping are in %s, where CRIU does not look for them: %w", p.Range, p.src.path(), errImage)
		}
	}
	return nil
}
