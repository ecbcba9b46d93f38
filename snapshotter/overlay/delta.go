// SPDX-License-Identifier: Apache-2.0

package overlay

import (
	"context"
	"fmt"
	"path"

	"golang.org/x/sys/unix"
)

// Delta is what has to be done to a tree so that it holds only what changed since a
// union of earlier ones.
type Delta struct {
	// UnchangedBytes is the size of the regular files that did not change, each once
	// whatever its number of names.
	UnchangedBytes uint64
	// Compared are the bytes out of UnchangedBytes and of files that did change that had
	// to be read, because their extents did not tell. Both sides are read.
	Compared uint64

	root *dirPlan
}

// dirPlan says what becomes of one directory of the tree.
type dirPlan struct {
	name string
	st   unix.Stat_t

	keep     bool // also when nothing is left in it
	stays    int  // entries that are left as they are, planned directories aside
	drop     []string
	hide     []string // names to make whiteouts of
	linked   []linkedName
	dirs     []*dirPlan
	setFlag  bool // make it opaque
	dropFlag bool // make it not opaque
}

// linkedName is a name of a file with several; the group decides.
type linkedName struct {
	name  string
	group *linkGroup
}

// linkGroup is a file with several names. It stays under all of them or under none: the
// name in an upper layer and the one in a lower layer would be two files.
type linkGroup struct {
	changed  bool
	compared bool
	parent   inode  // what its names are in the parent
	size     uint64 // of its content, 0 if it is not a regular file
}

type inode struct{ dev, ino uint64 }

func inodeOf(st *unix.Stat_t) inode { return inode{uint64(st.Dev), st.Ino} } //nolint:unconvert // 32 bits elsewhere

// Compare compares the tree below dir, a captured writable layer, with the
// union of what was captured of the same container before. It changes nothing.
//
// That both belong to one container is relied upon where the layers alone do not
// tell: a name that the parent has and the tree has neither as a file nor as a whiteout is
// not in the container's image either, or removing it would have left a whiteout;
// and a directory of the image that was opaque once does not come back.
//
// A file is unchanged if type, mode, owner, device number, size, time of modification,
// number of links, attributes, link target and content are. Times of access and of
// status change do not count.
//
// Errors: ErrFailedPrecondition for a tree that this package cannot read (the error says
// what to do); the context's.
func Compare(ctx context.Context, dir string, parent *Union) (*Delta, error) {
	u, err := OpenUnion(dir)
	if err != nil {
		return nil, err
	}
	defer u.Close()
	cur, err := u.Root()
	if err != nil {
		return nil, err
	}
	defer cur.Close()
	par, err := parent.Root()
	if err != nil {
		return nil, err
	}
	defer par.Close()
	c := &comparer{ctx: ctx, links: map[inode]*linkGroup{}, delta: &Delta{}}
	c.delta.root = &dirPlan{keep: true}
	if err := unix.Fstat(int(cur.parts[0].f.Fd()), &c.delta.root.st); err != nil {
		return nil, fmt.Errorf("fstat %s: %w", dir, err)
	}
	if err := c.dir(cur, par, c.delta.root, ""); err != nil {
		return nil, fmt.Errorf("comparing %s with the layers below: %w", dir, err)
	}
	for _, g := range c.links {
		if !g.changed {
			c.delta.UnchangedBytes += g.size
		}
	}
	c.delta.Compared = c.content.read
	return c.delta, nil
}

type comparer struct {
	ctx     context.Context
	content content
	links   map[inode]*linkGroup
	delta   *Delta
}

// dir compares a directory with the one of the parent, both of which show.
func (c *comparer) dir(cur, par *Dir, plan *dirPlan, rel string) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	mine, err := cur.Entries()
	if err != nil {
		return fmt.Errorf("/%s: %w", rel, err)
	}
	theirs, err := par.Entries()
	if err != nil {
		return fmt.Errorf("/%s: %w", rel, err)
	}
	// Both are sorted.
	for len(mine) > 0 || len(theirs) > 0 {
		var e, p *Entry
		if len(theirs) == 0 || len(mine) > 0 && mine[0].Name <= theirs[0].Name {
			e = &mine[0]
		}
		if len(mine) == 0 || len(theirs) > 0 && theirs[0].Name <= mine[0].Name {
			p = &theirs[0]
		}
		if e != nil {
			mine = mine[1:]
		}
		if p != nil {
			theirs = theirs[1:]
		}
		switch {
		case e == nil:
			if !p.Whiteout {
				plan.hide = append(plan.hide, p.Name)
			}
			continue
		case e.Whiteout:
			c.whiteout(e, p, cur, par, plan)
			continue
		case e.IsDir():
			err = c.subdir(e, p, cur, par, plan, path.Join(rel, e.Name))
		default:
			err = c.leaf(e, p, plan)
		}
		if err != nil {
			return fmt.Errorf("/%s: %w", path.Join(rel, e.Name), err)
		}
	}
	return nil
}

// whiteout keeps one that hides something: an entry of the parent, or one of the
// image below, which shows where neither the parent hides it nor a directory above.
func (c *comparer) whiteout(e, p *Entry, cur, par *Dir, plan *dirPlan) {
	hidesParent := p != nil && !p.Whiteout
	hidesImage := p == nil && !par.Covered && !cur.Covered
	if hidesParent || hidesImage {
		plan.stays++
	} else {
		plan.drop = append(plan.drop, e.Name)
	}
}

// subdir compares a directory with whatever the parent has under its name.
func (c *comparer) subdir(e, p *Entry, cur, par *Dir, plan *dirPlan, rel string) error {
	s, err := cur.Sub(e.Name)
	if err != nil {
		return err
	}
	defer s.Close()
	sub := &dirPlan{name: e.Name, st: e.Stat}

	if p == nil || p.Whiteout || !p.IsDir() {
		sub.setFlag = p != nil && !s.Opaque
		return c.whole(s, sub, plan, p == nil && !s.Covered && !par.Covered)
	}
	ps, err := par.Sub(e.Name)
	if err != nil {
		return err
	}
	defer ps.Close()
	if s.Covered && !ps.Covered {
		// It hides what the parent lets through, so it must hide the parent as well.
		sub.setFlag = !s.Opaque
		return c.whole(s, sub, plan, false)
	}
	// Where it is opaque, so is the parent's: merged with that, it still is. Where
	// only the parent's is, the image has nothing there (see Compare).
	sub.dropFlag = s.Opaque
	sub.keep, err = metaDiffers(e, p)
	if err != nil {
		return err
	}
	plan.dirs = append(plan.dirs, sub)
	return c.dir(s, ps, sub, rel)
}

// whole keeps a directory with everything in it. through says that the image shows
// through; if not, whiteouts in it hide nothing, and must go: overlayfs lists the
// whiteouts of a directory that it merges with nothing (fs/overlayfs/readdir.c,
// ovl_dir_is_real).
func (c *comparer) whole(d *Dir, plan, above *dirPlan, through bool) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	plan.keep = true
	above.dirs = append(above.dirs, plan)
	entries, err := d.Entries()
	if err != nil {
		return err
	}
	for i := range entries {
		e := &entries[i]
		switch {
		case e.Whiteout && !through:
			plan.drop = append(plan.drop, e.Name)
		case e.Whiteout:
			plan.stays++
		case e.IsDir():
			s, err := d.Sub(e.Name)
			if err != nil {
				return fmt.Errorf("%s: %w", e.Name, err)
			}
			err = c.whole(s, &dirPlan{name: e.Name, st: e.Stat}, plan, through && !s.Opaque)
			s.Close()
			if err != nil {
				return fmt.Errorf("%s: %w", e.Name, err)
			}
		default:
			plan.stays++
			if e.Stat.Nlink > 1 {
				c.group(e).changed = true
			}
		}
	}
	return nil
}

// leaf compares what is no directory.
func (c *comparer) leaf(e, p *Entry, plan *dirPlan) error {
	if e.Stat.Nlink > 1 {
		g := c.group(e)
		plan.linked = append(plan.linked, linkedName{e.Name, g})
		return c.compareLinked(g, e, p)
	}
	same, err := c.unchanged(e, p)
	if err != nil {
		return err
	}
	if !same {
		plan.stays++
		return nil
	}
	plan.drop = append(plan.drop, e.Name)
	c.delta.UnchangedBytes += e.bytes()
	return nil
}

func (c *comparer) group(e *Entry) *linkGroup {
	id := inodeOf(&e.Stat)
	g := c.links[id]
	if g == nil {
		g = &linkGroup{size: e.bytes()}
		c.links[id] = g
	}
	return g
}

// compareLinked compares one name of a file with several. All of them must be names of
// one file in the parent as well, and as many.
func (c *comparer) compareLinked(g *linkGroup, e, p *Entry) error {
	switch {
	case g.changed:
		return nil
	case p == nil:
		g.changed = true
		return nil
	case g.compared:
		g.changed = inodeOf(&p.Stat) != g.parent
		return nil
	}
	same, err := c.unchanged(e, p)
	if err != nil {
		return err
	}
	g.compared, g.parent, g.changed = true, inodeOf(&p.Stat), !same
	return nil
}

// unchanged compares two entries that are no directories, as far as p is one.
func (c *comparer) unchanged(e, p *Entry) (bool, error) {
	if p == nil || p.Whiteout || e.Stat.Nlink != p.Stat.Nlink || e.Stat.Rdev != p.Stat.Rdev || e.Stat.Size != p.Stat.Size {
		return false, nil
	}
	if differs, err := metaDiffers(e, p); err != nil || differs {
		return false, err
	}
	switch e.kind() {
	case unix.S_IFREG:
		return c.content.same(c.ctx, e, p)
	case unix.S_IFLNK:
		x, err := e.Readlink()
		if err != nil {
			return false, err
		}
		y, err := p.Readlink()
		return x == y, err
	}
	return true, nil
}

// metaDiffers compares what files and directories have in common.
func metaDiffers(a, b *Entry) (bool, error) {
	x, y := &a.Stat, &b.Stat
	if x.Mode != y.Mode || x.Uid != y.Uid || x.Gid != y.Gid || x.Mtim != y.Mtim {
		return true, nil
	}
	same, err := sameXattrs(a, b)
	return !same, err
}
