// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
)

// ReservedDir is the directory, at the root of an image layer, that a checkpoint is in.
const ReservedDir = ".cohort"

// checkpointDir is what ReservedDir becomes beside fs.
const checkpointDir = "checkpoint"

// unpackKey matches the keys under which containerd unpacks image layers,
// snapshots.UnpackKeyFormat ("extract-%s %s" of something unique and the chain id), after
// "NAMESPACE/NUMBER/", which its metadata store puts in front. A container's snapshot
// cannot have such a key: it is named after the container, and those names have no blanks.
var unpackKey = regexp.MustCompile(`^(?:[^/]+/[0-9]+/)?` + snapshots.UnpackKeyPrefix + `-[^ /]+ ([^ /]+)$`)

// isUnpack tells whether the snapshot of the key is one that an image layer is unpacked
// into, to be committed under the layer's chain id.
func isUnpack(key string) bool {
	m := unpackKey.FindStringSubmatch(key)
	if m == nil {
		return false
	}
	_, err := digest.Parse(m[1])
	return err == nil
}

// takeOutCheckpoint takes ReservedDir out of the snapshot id, which is about to be
// committed under name, and keeps it beside fs if it is a checkpoint. Called again after a
// Commit that failed later, it finds nothing left to do.
func (s *Snapshotter) takeOutCheckpoint(ctx context.Context, id, name, key string) error {
	reserved := filepath.Join(s.upper(id), ReservedDir)
	fi, err := os.Lstat(reserved)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	logger := log.G(ctx).WithField("snapshot", name)
	if !isUnpack(key) {
		logger.Warnf("a container made /%s, a name that is reserved for checkpoints: removed from its snapshot", ReservedDir)
		return os.RemoveAll(reserved)
	}
	if !fi.IsDir() {
		return fmt.Errorf("/%s in the layer is not a directory (%s): the image is malformed: %w", ReservedDir, fi.Mode().Type(), errdefs.ErrInvalidArgument)
	}
	entries, err := os.ReadDir(s.upper(id))
	if err != nil {
		return err
	}
	if len(entries) != 1 {
		logger.Warnf("the layer holds /%s and other files, so it is not a checkpoint layer: removed", ReservedDir)
		return os.RemoveAll(reserved)
	}
	if err := onlyPlainFiles(reserved); err != nil {
		return err
	}
	to := filepath.Join(s.dir(id), checkpointDir)
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	// Closed before it is moved to where it is looked for.
	if err := os.Lchown(reserved, 0, 0); err != nil {
		return err
	}
	if err := os.Chmod(reserved, 0o700); err != nil {
		return err
	}
	return os.Rename(reserved, to)
}

// onlyPlainFiles refuses a checkpoint with anything in it that a reader could be led
// astray by: links, devices, pipes.
func onlyPlainFiles(dir string) error {
	return filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() || e.Type().IsRegular() {
			return nil
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		return fmt.Errorf("/%s/%s in the layer is neither a file nor a directory (%s): the image is malformed: %w", ReservedDir, rel, e.Type(), errdefs.ErrInvalidArgument)
	})
}
