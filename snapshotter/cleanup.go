// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// removedPrefix begins the name of a directory whose snapshot is no longer in the
// metastore. Numbers of snapshots are not used again, so it is enough of a name.
const removedPrefix = "rm-"

// Cleanup implements snapshots.Cleaner: when it returns, every directory that belongs
// to no snapshot is gone.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	garbage, err := s.garbage(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range garbage {
		if err := os.RemoveAll(dir); err != nil {
			errs = append(errs, fmt.Errorf("remove %s: %w", dir, err))
		}
	}
	return errors.Join(errs...)
}

// garbage lists the directories that belong to no snapshot. Within the write
// transaction no snapshot is half made.
func (s *Snapshotter) garbage(ctx context.Context) (dirs []string, err error) {
	err = s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		ids, err := numbers(ctx)
		if err != nil {
			return err
		}
		entries, err := os.ReadDir(s.dir(""))
		if err != nil {
			return err
		}
		for _, e := range entries {
			if _, ok := ids[e.Name()]; !ok {
				dirs = append(dirs, s.dir(e.Name()))
			}
		}
		return nil
	})
	return dirs, err
}

// numbers maps the number of every snapshot to its key. ctx carries a transaction.
func numbers(ctx context.Context) (map[string]string, error) {
	ids, err := storage.IDMap(ctx)
	if errdefs.IsNotFound(err) { // a metastore that nothing was ever put into
		return nil, nil
	}
	return ids, err
}

// recover settles what an earlier process left: first the adoptions, because content
// of a capture may be in a directory that is garbage, then the garbage.
func (s *Snapshotter) recover(ctx context.Context) error {
	garbage, err := s.garbage(ctx)
	if err != nil {
		return err
	}
	var ids map[string]string
	if err := s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		ids, err = numbers(ctx)
		return err
	}); err != nil {
		return err
	}
	exists := func(id string) bool { _, ok := ids[id]; return ok }
	if err := s.captures.Recover(ctx, exists, garbage); err != nil {
		return err
	}
	for _, dir := range garbage {
		// A number may be given again when its transaction did not commit, so its
		// directory must be out of the way now; deleting it may take longer.
		if !strings.HasPrefix(filepath.Base(dir), removedPrefix) {
			if err := setAside(dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// discard gets rid of the directory of a snapshot that was removed from the metastore.
// A failure is only logged: Cleanup and the next start try again.
func (s *Snapshotter) discard(ctx context.Context, id string) {
	if err := setAside(s.dir(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		log.G(ctx).WithError(err).Warn("setting a removed snapshot aside")
		return
	}
	select {
	case s.sweep <- struct{}{}:
	default: // it is going to look anyway
	}
}

// setAside gives dir a name that says it can be deleted.
func setAside(dir string) error {
	to := filepath.Join(filepath.Dir(dir), removedPrefix+filepath.Base(dir))
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	return os.Rename(dir, to)
}

// sweeper deletes directories that were set aside, until quit is closed.
func (s *Snapshotter) sweeper() {
	defer close(s.sweepDone)
	for {
		select {
		case <-s.quit:
			return
		case <-s.sweep:
		}
		dirs, err := filepath.Glob(s.dir(removedPrefix + "*"))
		if err != nil {
			continue // the pattern is fixed
		}
		for _, dir := range dirs {
			if err := os.RemoveAll(dir); err != nil {
				log.L.WithError(err).Warnf("removing %s", dir)
			}
		}
	}
}
