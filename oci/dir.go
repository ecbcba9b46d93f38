// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	metadata "github.com/checkpoint-restore/checkpointctl/lib"
	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// WriteCheckpointDir writes the documents of a checkpoint into dir, which is
// .cohort as it stands on disk: cohort.json, spec.dump and config.dump. Files
// are 0600, replaced whole and synced; cohort.json is last, so a directory that has it
// has all. dir exists and belongs to the caller. The spec is the one the
// container runs with.
func WriteCheckpointDir(dir string, c Checkpoint, spec *specs.Spec) error {
	c.normalize()
	if err := c.Validate(); err != nil {
		return fmt.Errorf("writing the checkpoint of %s: %w", c.Member, err)
	}
	if spec == nil || spec.Process == nil || spec.Root == nil {
		return fmt.Errorf("writing the checkpoint of %s: its spec has no process or root: %w", c.Member, errdefs.ErrInvalidArgument)
	}
	docs := []struct {
		name string
		v    any
	}{
		{SpecDumpFile, spec},
		{ConfigDumpFile, configDump(&c)},
		{CheckpointFile, &c},
	}
	for _, d := range docs {
		if err := writeJSON(dir, d.name, d.v); err != nil {
			return fmt.Errorf("writing the checkpoint of %s: %w", c.Member, err)
		}
	}
	return nil
}

// configDump is what checkpointctl shows of a container.
func configDump(c *Checkpoint) metadata.ContainerConfig {
	return metadata.ContainerConfig{
		ID:              c.ContainerID,
		Name:            c.Member,
		RootfsImage:     c.Rootfs.ImageDigest.String(),
		RootfsImageRef:  c.Rootfs.ImageDigest.String(),
		RootfsImageName: c.Rootfs.ImageRef,
		OCIRuntime:      c.Runtime,
		CreatedTime:     c.CreatedAt,
		CheckpointedAt:  c.CutAt,
	}
}

// writeJSON goes through a temporary name, because a restarted shim may find
// a directory in which its predecessor died.
func writeJSON(dir, name string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	tmp := filepath.Join(dir, "."+name+".new")
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(b, '\n'))
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(tmp, filepath.Join(dir, name))
	}
	if err != nil {
		os.Remove(tmp)
	}
	return err
}

// ReadCheckpointDir reads cohort.json and spec.dump from a checkpoint directory
// that may come from a hostile image: no link is followed, sizes are bounded,
// and the document is valid when it returns without error. Callers about to restore
// run VerifyCheckpointDir first.
func ReadCheckpointDir(dir string) (*Checkpoint, *specs.Spec, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("opening the checkpoint: %w", err)
	}
	defer root.Close()

	var c Checkpoint
	b, err := readSmall(root, CheckpointFile)
	if err != nil {
		return nil, nil, err
	}
	if err := decodeCheckpoint(b, &c); err != nil {
		return nil, nil, err
	}
	b, err = readSmall(root, SpecDumpFile)
	if err != nil {
		return nil, nil, err
	}
	spec, err := decodeSpec(b)
	if err != nil {
		return nil, nil, err
	}
	return &c, spec, nil
}

func decodeCheckpoint(b []byte, c *Checkpoint) error {
	if err := json.Unmarshal(b, c); err != nil {
		return fmt.Errorf("%s: %w: %w", CheckpointFile, err, errdefs.ErrInvalidArgument)
	}
	if c.Chain == 0 && c.Parent == nil {
		c.Chain = 1 // written before there were increments
	}
	// The indentation of the file is no part of the opaque document.
	if c.Network != nil {
		var compact bytes.Buffer
		if err := json.Compact(&compact, c.Network); err != nil {
			return fmt.Errorf("%s: network: %w: %w", CheckpointFile, err, errdefs.ErrInvalidArgument)
		}
		c.Network = compact.Bytes()
	}
	return c.Validate()
}

func decodeSpec(b []byte) (*specs.Spec, error) {
	var spec specs.Spec
	if err := json.Unmarshal(b, &spec); err != nil {
		return nil, fmt.Errorf("%s: %w: %w", SpecDumpFile, err, errdefs.ErrInvalidArgument)
	}
	if spec.Process == nil || spec.Root == nil || spec.Linux == nil {
		return nil, fmt.Errorf("%s: no process, root or linux section: %w", SpecDumpFile, errdefs.ErrInvalidArgument)
	}
	return &spec, nil
}

// readSmall reads a regular file of the directory itself, at most maxJSON bytes.
// O_NONBLOCK keeps a named pipe from holding the caller before it is found out.
func readSmall(root *os.Root, name string) ([]byte, error) {
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%s: not in the checkpoint: %w", name, errdefs.ErrNotFound)
		}
		return nil, fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Size() > maxJSON {
		return nil, fmt.Errorf("%s: not a regular file of at most %d bytes: %w", name, maxJSON, errdefs.ErrInvalidArgument)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxJSON+1))
	if err == nil && len(b) > maxJSON {
		err = fmt.Errorf("%s: more than %d bytes: %w", name, maxJSON, errdefs.ErrInvalidArgument)
	}
	return b, err
}
