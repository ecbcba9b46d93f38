// SPDX-License-Identifier: Apache-2.0

package freezer

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// files are what a freezer keeps open of its cgroup's directory: the file that is
// written to, and one that tells more.
type files struct {
	dir             string
	control, status *os.File
	inbuf           [256]byte
}

func openFiles(dir, control, status string) (files, error) {
	c, err := os.OpenFile(filepath.Join(dir, control), os.O_RDWR, 0)
	if err != nil {
		return files{}, err
	}
	s, err := os.Open(filepath.Join(dir, status))
	if err != nil {
		c.Close()
		return files{}, err
	}
	return files{dir: dir, control: c, status: s}, nil
}

func (o *files) close() error { return errors.Join(o.control.Close(), o.status.Close()) }

// read returns one of them, trimmed; it is good until the next read.
func (o *files) read(f *os.File) ([]byte, error) {
	n, err := unix.Pread(int(f.Fd()), o.inbuf[:], 0)
	if err != nil {
		return nil, &fs.PathError{Op: "read", Path: f.Name(), Err: err}
	}
	return bytes.TrimSpace(o.inbuf[:n]), nil
}

// write writes to control.
func (o *files) write(word string) error {
	if _, err := unix.Pwrite(int(o.control.Fd()), []byte(word), 0); err != nil {
		return &fs.PathError{Op: "write " + word, Path: o.control.Name(), Err: err}
	}
	return nil
}
