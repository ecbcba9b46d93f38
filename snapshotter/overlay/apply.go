// SPDX-License-Identifier: Apache-2.0

package overlay

import (
	"errors"
	"fmt"
	"os"
	"path"

	"golang.org/x/sys/unix"
)

// Empty tells whether nothing changed: Apply leaves an empty directory.
func (d *Delta) Empty() bool { return !d.root.filled() }

// Skips returns the paths, relative to the tree, that Apply would remove. Whoever makes a
// copy of the tree can leave them out, a directory with all that is in it, and then call Apply.
func (d *Delta) Skips() map[string]struct{} {
	out := map[string]struct{}{}
	var walk func(p *dirPlan, rel string)
	walk = func(p *dirPlan, rel string) {
		for _, n := range p.drop {
			out[path.Join(rel, n)] = struct{}{}
		}
		for _, l := range p.linked {
			if !l.group.changed {
				out[path.Join(rel, l.name)] = struct{}{}
			}
		}
		for _, s := range p.dirs {
			if sub := path.Join(rel, s.name); s.keep || s.filled() {
				walk(s, sub)
			} else {
				out[sub] = struct{}{}
			}
		}
	}
	walk(d.root, "")
	return out
}

// Apply removes from the tree below dir what did not change, and hides what is gone. The
// tree is the one that was compared, not touched since, or a copy of it, with or without
// what Skips lists. An error leaves it in between: it must then be thrown away, for
// what Apply removed looks like something that the container removed. Nothing is flushed.
func (d *Delta) Apply(dir string) error {
	f, err := openDir(unix.AT_FDCWD, dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := d.root.apply(f); err != nil {
		return fmt.Errorf("removing what did not change from %s: %w", dir, err)
	}
	return nil
}

// filled tells whether something is in the directory in the end.
func (p *dirPlan) filled() bool {
	if p.stays > 0 || len(p.hide) > 0 {
		return true
	}
	for _, l := range p.linked {
		if l.group.changed {
			return true
		}
	}
	for _, s := range p.dirs {
		if s.keep || s.filled() {
			return true
		}
	}
	return false
}

// apply does to the directory d what is planned.
func (p *dirPlan) apply(d *os.File) error {
	fd := int(d.Fd())
	touched := false
	for _, s := range p.dirs {
		gone, err := s.applyIn(d)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		touched = touched || gone
	}
	drop := p.drop
	for _, l := range p.linked {
		if !l.group.changed {
			drop = append(drop, l.name)
		}
	}
	for _, n := range drop {
		if err := unix.Unlinkat(fd, n, 0); err != nil && !errors.Is(err, unix.ENOENT) {
			return &os.PathError{Op: "unlink", Path: n, Err: err}
		}
	}
	for _, n := range p.hide {
		if err := unix.Mknodat(fd, n, unix.S_IFCHR, 0); err != nil {
			return &os.PathError{Op: "make the whiteout", Path: n, Err: err}
		}
	}
	if touched || len(drop)+len(p.hide) > 0 {
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, procPath(d), []unix.Timespec{p.st.Atim, p.st.Mtim}, 0); err != nil {
			return fmt.Errorf("set times: %w", err)
		}
	}
	return nil
}

// applyIn does to the directory p of d what is planned, and tells whether it was removed.
func (p *dirPlan) applyIn(d *os.File) (gone bool, err error) {
	if !p.busy() {
		return false, nil
	}
	f, err := openDir(int(d.Fd()), p.name)
	if errors.Is(err, unix.ENOENT) && !p.keep && !p.filled() {
		return true, nil // it was left out
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	if err := p.apply(f); err != nil {
		return false, err
	}
	if !p.keep && !p.filled() {
		if err := unix.Unlinkat(int(d.Fd()), p.name, unix.AT_REMOVEDIR); err != nil {
			return false, &os.PathError{Op: "rmdir", Path: p.name, Err: err}
		}
		return true, nil
	}
	switch {
	case p.setFlag:
		err = unix.Fsetxattr(int(f.Fd()), xattrOpaque, []byte(opaqueYes), 0)
	case p.dropFlag:
		err = unix.Fremovexattr(int(f.Fd()), xattrOpaque)
	}
	if err != nil {
		return false, fmt.Errorf("attribute %s: %w", xattrOpaque, err)
	}
	return false, nil
}

// busy tells whether anything is to be done to the directory at all.
func (p *dirPlan) busy() bool {
	if p.setFlag || p.dropFlag || !p.keep || len(p.drop)+len(p.hide)+len(p.linked) > 0 {
		return true
	}
	for _, s := range p.dirs {
		if s.busy() {
			return true
		}
	}
	return false
}
