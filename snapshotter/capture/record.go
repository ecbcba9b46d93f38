// SPDX-License-Identifier: Apache-2.0

package capture

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/containerd/errdefs"
)

// State of a capture, as List shows it.
type State string

// The states, in their only order.
const (
	Open   State = "open"
	Taken  State = "taken"
	Sealed State = "sealed"
)

// Part is what a snapshot can adopt of a capture; also the name of its directory.
type Part string

// The parts.
const (
	FS         Part = "fs"
	Checkpoint Part = "checkpoint"
)

const recordName = "capture.json"

// record is the content of capture.json.
type record struct {
	ID      string            `json:"id"`
	State   State             `json:"state"`
	Upper   string            `json:"upperdir"`
	Labels  map[string]string `json:"labels,omitempty"`
	Created time.Time         `json:"created"`
	// StorageBytes is the size of the regular files in fs, known once sealed.
	StorageBytes uint64 `json:"storage_bytes,omitempty"`
	// UnchangedBytes is the size of those that were left to the layers below.
	UnchangedBytes uint64 `json:"unchanged_bytes,omitempty"`
	// Adopted says which snapshot took which part.
	Adopted map[Part]adoption `json:"adopted,omitempty"`
}

// adoption is done once the snapshot is known to be in the metastore.
type adoption struct {
	Snapshot string `json:"snapshot"`
	Done     bool   `json:"done"`
}

var validID = regexp.MustCompile(`^[0-9a-f]{32}$`)

// CheckID refuses everything but 32 lower-case hexadecimal digits.
func CheckID(id string) error {
	if !validID.MatchString(id) {
		return fmt.Errorf("capture id %q is not 32 lower-case hexadecimal digits: %w", id, errdefs.ErrInvalidArgument)
	}
	return nil
}

// write puts the record into dir, whole or not at all, and on the disk.
func (r *record) write(dir string) (err error) {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, recordName+".*") // 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	_, err = f.Write(append(data, '\n'))
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write the record of capture %s: %w", r.ID, err)
	}
	if err := os.Rename(f.Name(), filepath.Join(dir, recordName)); err != nil {
		return err
	}
	return syncDir(dir)
}

func readRecord(dir string) (*record, error) {
	data, err := os.ReadFile(filepath.Join(dir, recordName))
	if err != nil {
		return nil, err
	}
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, recordName), err)
	}
	if r.ID != filepath.Base(dir) {
		return nil, fmt.Errorf("%s is the record of %q: %w", filepath.Join(dir, recordName), r.ID, errdefs.ErrDataLoss)
	}
	return &r, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
