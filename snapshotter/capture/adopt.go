// SPDX-License-Identifier: Apache-2.0

package capture

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

// Adoption is a part of a capture on its way into a snapshot. Exactly one of Done
// and Undo is called; the capture is locked until then.
type Adoption struct {
	s    *Store
	c    *capture
	part Part
}

// Adopt moves one part of the sealed capture id to the path to, which does not exist
// and is on the same file system. snapshot is the number of the snapshot that takes it,
// as in ROOT/snapshots/NUMBER, and is recorded first.
func (s *Store) Adopt(id string, part Part, snapshot, to string) (_ *Adoption, err error) {
	c, err := s.lock(id)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			c.mu.Unlock()
		}
	}()
	if c.rec.State != Sealed {
		return nil, fmt.Errorf("capture %s is %s, only a sealed one can be adopted: %w", id, c.rec.State, errdefs.ErrFailedPrecondition)
	}
	if by, ok := c.rec.Adopted[part]; ok {
		return nil, fmt.Errorf("%s of capture %s was adopted by snapshot %s already: %w", part, id, by.Snapshot, errdefs.ErrFailedPrecondition)
	}
	var st unix.Stat_t
	if err := unix.Lstat(c.part(part), &st); err != nil {
		return nil, &os.PathError{Op: "lstat", Path: c.part(part), Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, fmt.Errorf("%s is not a directory: %w", c.part(part), errdefs.ErrFailedPrecondition)
	}
	a := &Adoption{s: s, c: c, part: part}
	if err := a.record(&adoption{Snapshot: snapshot}); err != nil {
		return nil, err
	}
	if err := os.Rename(c.part(part), to); err != nil {
		return nil, fmt.Errorf("adopt %s of capture %s: %w", part, id, joined(err, a.record(nil)))
	}
	return a, nil
}

// Done says that the snapshot is in the metastore. A capture whose parts are both
// adopted is removed.
func (a *Adoption) Done(ctx context.Context) {
	defer a.c.mu.Unlock()
	by := a.c.rec.Adopted[a.part]
	by.Done = true
	// Not written is not lost: Recover finds the snapshot in the metastore.
	if err := a.record(&by); err != nil {
		log.G(ctx).WithError(err).WithField("capture", a.c.rec.ID).Warn("recording a finished adoption")
	}
	a.s.removeEmpty(ctx, a.c)
}

// Undo moves the part back from the path from.
func (a *Adoption) Undo(from string) error {
	defer a.c.mu.Unlock()
	if err := os.Rename(from, a.c.part(a.part)); err != nil {
		return fmt.Errorf("give %s back to capture %s: %w", a.part, a.c.rec.ID, err)
	}
	return a.record(nil)
}

// record writes who adopted the part, or nobody.
func (a *Adoption) record(by *adoption) error {
	next := a.c.rec
	next.Adopted = map[Part]adoption{}
	for p, o := range a.c.rec.Adopted {
		next.Adopted[p] = o
	}
	delete(next.Adopted, a.part)
	if by != nil {
		next.Adopted[a.part] = *by
	}
	if err := next.write(a.c.dir); err != nil {
		return err
	}
	a.c.rec = next
	return nil
}

// removeEmpty discards c, which is locked, when nothing of it is left.
func (s *Store) removeEmpty(ctx context.Context, c *capture) {
	for _, p := range []Part{FS, Checkpoint} {
		if !c.rec.Adopted[p].Done {
			return
		}
	}
	if err := s.discard(c); err != nil {
		log.G(ctx).WithError(err).WithField("capture", c.rec.ID).Warn("removing a capture that was fully adopted")
	}
}

// Recover settles the adoptions that an earlier process did not finish. exists tells
// whether a snapshot number is in the metastore; candidates are the directories of
// snapshots, ROOT/snapshots/NAME, that are not and are about to be removed.
func (s *Store) Recover(ctx context.Context, exists func(snapshot string) bool, candidates []string) error {
	for _, i := range s.List() {
		c, err := s.lock(i.ID)
		if err != nil {
			continue
		}
		err = s.recover(ctx, c, exists, candidates)
		c.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) recover(ctx context.Context, c *capture, exists func(string) bool, candidates []string) error {
	for part, by := range c.rec.Adopted {
		if by.Done {
			continue
		}
		a := &Adoption{s: s, c: c, part: part}
		if exists(by.Snapshot) {
			by.Done = true
			if err := a.record(&by); err != nil {
				return err
			}
			continue
		}
		if _, err := os.Lstat(c.part(part)); err == nil { // the rename did not happen
			if err := a.record(nil); err != nil {
				return err
			}
			continue
		}
		back := false
		for _, dir := range candidates {
			base := filepath.Base(dir)
			if base != by.Snapshot && base != StagingName(c.rec.ID, part) {
				continue
			}
			if err := os.Rename(filepath.Join(dir, string(part)), c.part(part)); err != nil {
				return fmt.Errorf("give %s back to capture %s: %w", part, c.rec.ID, err)
			}
			if err := a.record(nil); err != nil {
				return err
			}
			back = true
			log.G(ctx).WithField("capture", c.rec.ID).Infof("took %s back from a snapshot that was never finished", part)
			break
		}
		if !back {
			log.G(ctx).WithField("capture", c.rec.ID).Warnf("%s was adopted by snapshot %s, which is gone", part, by.Snapshot)
		}
	}
	s.removeEmpty(ctx, c)
	return nil
}

// StagingName is the name in ROOT/snapshots under which an adopting snapshot is made
// before it gets its number, so that Recover finds it.
func StagingName(id string, part Part) string {
	return "new-" + id + "-" + string(part)
}

func joined(err, other error) error {
	if other == nil {
		return err
	}
	return fmt.Errorf("%w (and %w)", err, other)
}
