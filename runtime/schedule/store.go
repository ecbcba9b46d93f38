// SPDX-License-Identifier: Apache-2.0

package schedule

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// record is the content of one file, DIR/NAMESPACE/GROUP.json, mode 0600. Its name
// is safe as a path, because Spec.check is passed by namespace and group.
type record struct {
	Spec
	Progress
}

func (r *record) path(dir string) string {
	return filepath.Join(dir, r.Namespace, r.Group+".json")
}

// write puts the record into dir, whole or not at all, and on the disk.
func (r *record) write(dir string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("write the schedule of group %s: %w", r.Key(), err)
		}
	}()
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	path := r.path(dir)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	// What a kill leaves is not taken for a schedule: its name ends differently.
	tmp := filepath.Join(filepath.Dir(path), "."+r.Group+".tmp")
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(data, '\n'))
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		os.Remove(tmp)
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		os.Remove(tmp)
		return err
	}
	return errors.Join(syncDir(filepath.Dir(path)), syncDir(dir))
}

// remove takes the record from the disk; it need not be there.
func (r *record) remove(dir string) error {
	err := os.Remove(r.path(dir))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = syncDir(filepath.Dir(r.path(dir)))
	}
	if err != nil {
		return fmt.Errorf("remove the schedule of group %s: %w", r.Key(), err)
	}
	return nil
}

// load reads all records. A file that cannot be read or makes no sense is
// reported and left where it is: the others go on.
func load(dir string) (all []*record, bad error) {
	files, err := filepath.Glob(filepath.Join(dir, "*", "*.json"))
	if err != nil {
		return nil, err
	}
	for _, path := range files {
		r, err := read(path)
		if err == nil && r.path(dir) != path {
			err = fmt.Errorf("it is of group %s", r.Key())
		}
		if err != nil {
			bad = errors.Join(bad, fmt.Errorf("schedule %s is left out: %w", path, err))
			continue
		}
		all = append(all, r)
	}
	return all, bad
}

func read(path string) (*record, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := &record{}
	if err := json.Unmarshal(data, r); err != nil {
		return nil, err
	}
	return r, r.check()
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
