// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/snapshotter/capture"
)

// Labels of Prepare that make the new active snapshot out of a sealed capture, whose id
// is the value. At most one of them is given. The client then commits the snapshot.
//
// They are in the name space of labels that containerd's unpacker copies from the
// annotations of image layers, because only such labels reach a snapshotter. An
// image can therefore carry them, but cannot know the id of a capture.
const (
	// LabelAdoptFS makes the captured files the new snapshot's.
	LabelAdoptFS = "containerd.io/snapshot/cohort.adopt-fs"
	// LabelAdoptCheckpoint makes a snapshot without files that has the capture's
	// checkpoint, like a committed checkpoint layer.
	LabelAdoptCheckpoint = "containerd.io/snapshot/cohort.adopt-checkpoint"
)

func (s *Snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) (_ []mount.Mount, err error) {
	var wanted snapshots.Info
	for _, o := range opts {
		if err := o(&wanted); err != nil {
			return nil, err
		}
	}
	id, part, err := adoptLabel(wanted.Labels)
	if err != nil {
		return nil, err
	}
	if id != "" && kind != snapshots.KindActive {
		return nil, fmt.Errorf("a view cannot adopt a capture: %w", errdefs.ErrInvalidArgument)
	}

	var (
		snap     storage.Snapshot
		info     snapshots.Info
		dir      string // where the new snapshot's directory is just now
		adoption *capture.Adoption
	)
	defer func() {
		if err == nil {
			if adoption != nil {
				adoption.Done(ctx)
			}
			return
		}
		if adoption != nil {
			if uerr := adoption.Undo(filepath.Join(dir, string(part))); uerr != nil {
				// The capture's content is still in dir: keep it, the next start gives it back.
				err = errors.Join(err, uerr)
				return
			}
		}
		if dir != "" {
			if rerr := os.RemoveAll(dir); rerr != nil {
				log.G(ctx).WithError(rerr).Warnf("removing the half-made snapshot %s", dir)
			}
		}
	}()
	err = s.ms.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		if snap, err = storage.CreateSnapshot(ctx, kind, key, parent, opts...); err != nil {
			return fmt.Errorf("create snapshot %s: %w", key, err)
		}
		if _, info, _, err = storage.GetInfo(ctx, key); err != nil {
			return err
		}
		if dir, err = s.stage(id, part); err != nil {
			return err
		}
		if id != "" {
			if adoption, err = s.captures.Adopt(id, part, snap.ID, filepath.Join(dir, string(part))); err != nil {
				return err
			}
		}
		if err := s.fill(dir, kind, snap, info, part != capture.FS); err != nil {
			return err
		}
		if err := os.Rename(dir, s.dir(snap.ID)); err != nil {
			return fmt.Errorf("put snapshot %s into place: %w", snap.ID, err)
		}
		dir = s.dir(snap.ID)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return s.mounts(snap, info), nil
}

// stage makes the directory that becomes a new snapshot's.
func (s *Snapshotter) stage(id string, part capture.Part) (string, error) {
	if id == "" {
		return os.MkdirTemp(s.dir(""), "new-")
	}
	dir := s.dir(capture.StagingName(id, part))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	return dir, nil
}

// fill makes the directories of a new snapshot in dir; fs only if makeFS.
func (s *Snapshotter) fill(dir string, kind snapshots.Kind, snap storage.Snapshot, info snapshots.Info, makeFS bool) error {
	if kind == snapshots.KindActive {
		if err := os.Mkdir(filepath.Join(dir, "work"), 0o711); err != nil {
			return err
		}
	}
	if !makeFS {
		return nil
	}
	upper := filepath.Join(dir, "fs")
	if err := os.Mkdir(upper, 0o755); err != nil {
		return err
	}
	uid, gid, mapped, err := mappedRoot(info)
	if err != nil {
		return err
	}
	if len(snap.ParentIDs) > 0 {
		// The root directory of an overlay has the owner and mode of its topmost layer's.
		var st unix.Stat_t
		below := s.upper(snap.ParentIDs[0])
		if err := unix.Lstat(below, &st); err != nil {
			return &os.PathError{Op: "lstat", Path: below, Err: err}
		}
		if !mapped {
			uid, gid = int(st.Uid), int(st.Gid)
		}
		if err := os.Lchown(upper, uid, gid); err != nil {
			return err
		}
		return unix.Chmod(upper, st.Mode&0o7777)
	}
	if mapped {
		return os.Lchown(upper, uid, gid)
	}
	return nil
}

// adoptLabel returns the capture and the part that the labels name, if any.
func adoptLabel(labels map[string]string) (string, capture.Part, error) {
	fs, hasFS := labels[LabelAdoptFS]
	cp, hasCP := labels[LabelAdoptCheckpoint]
	switch {
	case hasFS && hasCP:
		return "", "", fmt.Errorf("labels %s and %s exclude each other: %w", LabelAdoptFS, LabelAdoptCheckpoint, errdefs.ErrInvalidArgument)
	case hasFS:
		return fs, capture.FS, capture.CheckID(fs)
	case hasCP:
		return cp, capture.Checkpoint, capture.CheckID(cp)
	}
	return "", "", nil
}

// idMapOptions are the mount options by which containerd mounts the layers with mapped
// owners (its capability "remap-ids").
func idMapOptions(info snapshots.Info) []string {
	var o []string
	if v, ok := info.Labels[snapshots.LabelSnapshotUIDMapping]; ok {
		o = append(o, "uidmap="+v)
	}
	if v, ok := info.Labels[snapshots.LabelSnapshotGIDMapping]; ok {
		o = append(o, "gidmap="+v)
	}
	return o
}

// mappedRoot returns the host's ids of the container's root, when labels map them.
func mappedRoot(info snapshots.Info) (uid, gid int, mapped bool, err error) {
	u, hasU := info.Labels[snapshots.LabelSnapshotUIDMapping]
	g, hasG := info.Labels[snapshots.LabelSnapshotGIDMapping]
	if !hasU && !hasG {
		return 0, 0, false, nil
	}
	if uid, err = hostRoot(u); err != nil {
		return 0, 0, false, fmt.Errorf("label %s: %w", snapshots.LabelSnapshotUIDMapping, err)
	}
	if gid, err = hostRoot(g); err != nil {
		return 0, 0, false, fmt.Errorf("label %s: %w", snapshots.LabelSnapshotGIDMapping, err)
	}
	return uid, gid, true, nil
}

// hostRoot finds the host's id of container id 0 in "CONTAINER:HOST:SIZE[,…]".
func hostRoot(mapping string) (int, error) {
	for m := range strings.SplitSeq(mapping, ",") {
		f := strings.Split(m, ":")
		if len(f) != 3 {
			return 0, fmt.Errorf("%q is not CONTAINER:HOST:SIZE: %w", m, errdefs.ErrInvalidArgument)
		}
		var n [3]uint64
		for i := range f {
			v, err := strconv.ParseUint(f[i], 10, 32)
			if err != nil {
				return 0, fmt.Errorf("%q is not CONTAINER:HOST:SIZE: %w", m, errdefs.ErrInvalidArgument)
			}
			n[i] = v
		}
		if n[0] == 0 && n[2] > 0 {
			return int(n[1]), nil //nolint:gosec // 32 bits
		}
	}
	return 0, fmt.Errorf("%q does not map the container's root: %w", mapping, errdefs.ErrInvalidArgument)
}
