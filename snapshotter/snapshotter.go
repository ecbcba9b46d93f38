// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"

	"github.com/cohort-project/cohort/snapshotter/capture"
)

// Snapshotter implements snapshots.Snapshotter and snapshots.Cleaner over
// overlayfs. It may be used concurrently, but by one process at a time.
type Snapshotter struct {
	root     string
	ms       *storage.MetaStore
	captures *capture.Store
	options  []string // of every overlay mount

	sweep     chan struct{} // asks the sweeper to look for removed directories
	quit      chan struct{} // closed to end the sweeper
	sweepDone chan struct{}
	closeOnce sync.Once
	closeErr  error
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
)

// New opens the snapshots below root, which exists, and clears away what a process that
// died has left half made. captures are those of the same root.
func New(ctx context.Context, root string, captures *capture.Store) (*Snapshotter, error) {
	ok, err := fs.SupportsDType(root)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, fmt.Errorf("the file system of %s does not tell the type of directory entries, which overlayfs needs (XFS: make it with ftype=1): %w", root, errdefs.ErrFailedPrecondition)
	}
	if err := os.MkdirAll(filepath.Join(root, "snapshots"), 0o700); err != nil {
		return nil, err
	}
	ms, err := storage.NewMetaStore(filepath.Join(root, "metadata.db"))
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", filepath.Join(root, "metadata.db"), err)
	}
	s := &Snapshotter{
		root: root, ms: ms, captures: captures, options: overlayOptions(),
		sweep: make(chan struct{}, 1), quit: make(chan struct{}), sweepDone: make(chan struct{}),
	}
	if err := s.recover(ctx); err != nil {
		return nil, errors.Join(err, ms.Close())
	}
	go s.sweeper()
	s.sweep <- struct{}{}
	return s, nil
}

// Close waits for removals under way and closes the metastore. Mounts stay. It may be
// called again.
func (s *Snapshotter) Close() error {
	s.closeOnce.Do(func() {
		close(s.quit)
		<-s.sweepDone
		s.closeErr = s.ms.Close()
	})
	return s.closeErr
}

// Stat implements snapshots.Snapshotter.
func (s *Snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return info, err
}

// Update implements snapshots.Snapshotter.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (updated snapshots.Info, err error) {
	err = s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		updated, err = storage.UpdateInfo(ctx, info, fieldpaths...)
		return err
	})
	return updated, err
}

// Usage implements snapshots.Snapshotter. For a committed snapshot it is read from the
// metastore; for an active one the upper directory is walked, about 2 µs a file.
// Extents that a capture shares count in full on both sides.
func (s *Snapshotter) Usage(ctx context.Context, key string) (usage snapshots.Usage, err error) {
	var (
		id   string
		info snapshots.Info
	)
	if err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		id, info, usage, err = storage.GetInfo(ctx, key)
		return err
	}); err != nil {
		return snapshots.Usage{}, err
	}
	if info.Kind != snapshots.KindActive {
		return usage, nil
	}
	return s.diskUsage(ctx, id)
}

// diskUsage measures the layer, and the checkpoint beside it if there is one.
func (s *Snapshotter) diskUsage(ctx context.Context, id string) (snapshots.Usage, error) {
	parts := []string{s.upper(id)}
	if cp := filepath.Join(s.dir(id), checkpointDir); isDir(cp) {
		parts = append(parts, cp)
	}
	du, err := fs.DiskUsage(ctx, parts...)
	if err != nil {
		return snapshots.Usage{}, fmt.Errorf("measure %s: %w", s.upper(id), err)
	}
	return snapshots.Usage(du), nil
}

// Prepare implements snapshots.Snapshotter. See LabelAdoptFS and LabelAdoptCheckpoint.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, snapshots.KindActive, key, parent, opts)
}

// View implements snapshots.Snapshotter.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return s.create(ctx, snapshots.KindView, key, parent, opts)
}

// Mounts implements snapshots.Snapshotter.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	var (
		snap storage.Snapshot
		info snapshots.Info
	)
	if err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		if snap, err = storage.GetSnapshot(ctx, key); err != nil {
			return fmt.Errorf("mounts of %s: %w", key, err)
		}
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	}); err != nil {
		return nil, err
	}
	return s.mounts(snap, info), nil
}

// Commit implements snapshots.Snapshotter. A checkpoint in the layer is moved out of
// its file system; see the package's documentation.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	return s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		id, info, _, err := storage.GetInfo(ctx, key)
		if err != nil {
			return err
		}
		if info.Kind == snapshots.KindActive {
			if err := s.takeOutCheckpoint(ctx, id, name, key); err != nil {
				return fmt.Errorf("commit %s: %w", key, err)
			}
		}
		usage, err := s.diskUsage(ctx, id)
		if err != nil {
			return err
		}
		if _, err := storage.CommitActive(ctx, key, name, usage, opts...); err != nil {
			return fmt.Errorf("commit %s: %w", key, err)
		}
		return nil
	})
}

// Remove implements snapshots.Snapshotter. The directory is deleted in the
// background; Cleanup waits for it.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	var id string
	if err := s.ms.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		if id, _, err = storage.Remove(ctx, key); err != nil {
			return fmt.Errorf("remove %s: %w", key, err)
		}
		return nil
	}); err != nil {
		return err
	}
	s.discard(ctx, id)
	return nil
}

// Walk implements snapshots.Snapshotter.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, fn, filters...)
	})
}

// ActiveUpper refuses a directory that is not the upper directory of an active
// snapshot, exactly as in the options of its mount.
func (s *Snapshotter) ActiveUpper(ctx context.Context, dir string) error {
	return s.checkUpper(ctx, dir, snapshots.KindActive, "nothing writes to it")
}

// CommittedUpper refuses a directory that is not the layer of a committed snapshot,
// exactly as in the options of the mounts above it.
func (s *Snapshotter) CommittedUpper(ctx context.Context, dir string) error {
	return s.checkUpper(ctx, dir, snapshots.KindCommitted, "it may still change")
}

func (s *Snapshotter) checkUpper(ctx context.Context, dir string, kind snapshots.Kind, otherwise string) error {
	id, ok := strings.CutPrefix(dir, filepath.Join(s.root, "snapshots")+"/")
	id, isFS := strings.CutSuffix(id, "/fs")
	if !ok || !isFS || id == "" || strings.Trim(id, "0123456789") != "" {
		return fmt.Errorf("%q is not %s/snapshots/NUMBER/fs: %w", dir, s.root, errdefs.ErrInvalidArgument)
	}
	return s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		ids, err := numbers(ctx)
		if err != nil {
			return err
		}
		key, ok := ids[id]
		if !ok {
			return fmt.Errorf("no snapshot has the upper directory %s: %w", dir, errdefs.ErrNotFound)
		}
		_, info, _, err := storage.GetInfo(ctx, key)
		if err != nil {
			return err
		}
		if info.Kind != kind {
			return fmt.Errorf("snapshot %q of %s is not %s, %s: %w", key, dir, strings.ToLower(kind.String()), otherwise, errdefs.ErrFailedPrecondition)
		}
		return nil
	})
}

// Count returns the number of snapshots by kind, for metrics.
func (s *Snapshotter) Count(ctx context.Context) (map[snapshots.Kind]int, error) {
	n := map[snapshots.Kind]int{snapshots.KindActive: 0, snapshots.KindView: 0, snapshots.KindCommitted: 0}
	err := s.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		n[i.Kind]++
		return nil
	})
	return n, err
}

func (s *Snapshotter) mounts(snap storage.Snapshot, info snapshots.Info) []mount.Mount {
	options := idMapOptions(info)
	if len(snap.ParentIDs) == 0 {
		// overlayfs needs a lower directory.
		mode := "rw"
		if snap.Kind == snapshots.KindView {
			mode = "ro"
		}
		return []mount.Mount{{Type: "bind", Source: s.upper(snap.ID), Options: append(options, mode, "rbind")}}
	}
	if snap.Kind == snapshots.KindView && len(snap.ParentIDs) == 1 {
		return []mount.Mount{{Type: "bind", Source: s.upper(snap.ParentIDs[0]), Options: append(options, "ro", "rbind")}}
	}
	if snap.Kind == snapshots.KindActive {
		options = append(options, "workdir="+s.work(snap.ID), "upperdir="+s.upper(snap.ID))
	}
	lowers := make([]string, len(snap.ParentIDs))
	for i, id := range snap.ParentIDs {
		lowers[i] = s.upper(id)
	}
	options = append(options, "lowerdir="+strings.Join(lowers, ":"))
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: append(options, s.options...)}}
}

func isDir(path string) bool {
	fi, err := os.Lstat(path)
	return err == nil && fi.IsDir()
}

func (s *Snapshotter) dir(name string) string { return filepath.Join(s.root, "snapshots", name) }
func (s *Snapshotter) upper(id string) string { return filepath.Join(s.dir(id), "fs") }
func (s *Snapshotter) work(id string) string  { return filepath.Join(s.dir(id), "work") }

// overlayOptions are the options, out of those that the kernel knows, that leave an
// upper directory readable without the mount: nothing in it refers to an inode or
// path elsewhere.
func overlayOptions() []string {
	return slices.DeleteFunc([]string{"index=off", "redirect_dir=off", "metacopy=off"}, func(o string) bool {
		name, _, _ := strings.Cut(o, "=")
		_, err := os.Stat("/sys/module/overlay/parameters/" + name)
		return err != nil
	})
}
