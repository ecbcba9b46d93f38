// SPDX-License-Identifier: Apache-2.0

package capture

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/snapshotter/backend"
	"github.com/cohort-project/cohort/snapshotter/overlay"
)

// fill completes the fs of c, which is locked. Where uppers are given, it is left with what
// changed since them, and the bytes of the files that did not are returned.
//
// A crash in between costs nothing but the capture, which is not sealed and so is
// discarded at start. An error in between is remembered: what was removed already
// would be taken for what the container removed.
func (s *Store) fill(ctx context.Context, c *capture, uppers []string) (unchanged uint64, err error) {
	switch {
	case c.torn:
		return 0, fmt.Errorf("an earlier attempt left it half reduced: discard it: %w", errdefs.ErrFailedPrecondition)
	case c.reduced != nil && !slices.Equal(c.uppers, uppers):
		return 0, fmt.Errorf("it was reduced against other layers (%v): discard it: %w", c.uppers, errdefs.ErrFailedPrecondition)
	case c.reduced != nil:
		return c.reduced.UnchangedBytes, nil
	case len(uppers) == 0:
		return 0, c.live.Seal(ctx)
	}
	for _, u := range uppers {
		if err := s.checkUpper(u); err != nil {
			return 0, err
		}
	}
	parent, err := overlay.OpenUnion(uppers...)
	if err != nil {
		return 0, err
	}
	defer parent.Close()
	d, err := c.fillChanged(ctx, parent)
	if err != nil {
		return 0, err
	}
	c.torn = true // it is removed from, which takes no account of ctx any more
	if err := d.Apply(c.part(FS)); err != nil {
		return 0, err
	}
	c.torn, c.reduced, c.uppers = false, d, slices.Clone(uppers)
	return d.UnchangedBytes, nil
}

// fillChanged completes fs, if that can be done without what did not change, and returns
// what is to be done to it yet.
func (c *capture) fillChanged(ctx context.Context, parent *overlay.Union) (d *overlay.Delta, err error) {
	whole := func() (*overlay.Delta, error) {
		if err := c.live.Seal(ctx); err != nil {
			return nil, err
		}
		return overlay.Compare(ctx, c.part(FS), parent)
	}
	r, ok := c.live.(backend.Reducer)
	if !ok {
		return whole()
	}
	err = r.SealReduced(ctx, func(src string) (map[string]struct{}, error) {
		if d, err = overlay.Compare(ctx, src, parent); err != nil {
			return nil, err
		}
		c.torn = true
		return d.Skips(), nil
	})
	if errdefs.IsNotImplemented(err) && d == nil {
		return whole()
	}
	if err == nil && d == nil {
		err = fmt.Errorf("it was completed already, without a parent: discard it: %w", errdefs.ErrFailedPrecondition)
	}
	return d, err
}

// checkUpper refuses what is not ROOT/snapshots/NUMBER/fs.
func (s *Store) checkUpper(dir string) error {
	snapshots := filepath.Join(filepath.Dir(s.dir), "snapshots")
	id, ok := strings.CutPrefix(dir, snapshots+"/")
	id, isFS := strings.CutSuffix(id, "/fs")
	if !ok || !isFS || id == "" || strings.Trim(id, "0123456789") != "" {
		return fmt.Errorf("%q is not %s/NUMBER/fs: %w", dir, snapshots, errdefs.ErrInvalidArgument)
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return fmt.Errorf("a layer of the parent: %w", &os.PathError{Op: "lstat", Path: dir, Err: err})
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return fmt.Errorf("%s is not a directory: %w", dir, errdefs.ErrInvalidArgument)
	}
	return nil
}
