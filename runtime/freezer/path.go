// SPDX-License-Identifier: Apache-2.0

package freezer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
)

// ThawPath thaws the cgroup at dir, a value of Path that was recorded before its
// owner died. A cgroup that is gone has nothing to thaw.
func ThawPath(ctx context.Context, dir string) error {
	return withPath(dir, func(f *Freezer) error { return f.Thaw(ctx) })
}

// KillPath is Kill for a recorded Path. A cgroup that is gone has no tasks.
func KillPath(ctx context.Context, dir string) error {
	return withPath(dir, func(f *Freezer) error { return f.Kill(ctx) })
}

func withPath(dir string, do func(*Freezer) error) error {
	f, err := OpenPath(dir)
	if err != nil {
		if _, statErr := os.Stat(dir); errors.Is(statErr, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	return errors.Join(do(f), f.Close())
}

// OpenPath opens the freezer of the cgroup directory dir, in either hierarchy.
// Like Open it refuses a cgroup that holds the caller.
func OpenPath(dir string) (*Freezer, error) {
	loc := location{dir: filepath.Clean(dir)}
	if _, err := os.Stat(filepath.Join(dir, "cgroup.freeze")); err == nil {
		loc.v2 = true
	}
	f, err := open(loc)
	if err != nil {
		return nil, err
	}
	pids, err := tasks(loc.dir)
	if err == nil {
		for _, pid := range pids {
			if pid == os.Getpid() {
				err = fmt.Errorf("cgroup %s holds the calling process: %w", dir, errdefs.ErrFailedPrecondition)
			}
		}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
