// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// pagesFile is a pages image being written, front to back.
type pagesFile struct {
	f     *os.File
	off   int64
	small []byte // gathered, and not written yet
}

func newPagesFile(path string) (*pagesFile, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	return &pagesFile{f: f}, nil
}

// copy appends bytes of another file; the kernel shares blocks where it can.
func (o *pagesFile) copy(from *os.File, off, size uint64) error {
	in := int64(off)
	for size > 0 {
		n, err := unix.CopyFileRange(int(from.Fd()), &in, int(o.f.Fd()), &o.off, int(min(size, 1<<30)), 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EOPNOTSUPP):
			return o.copyBytes(from, in, size)
		case err != nil:
			return fmt.Errorf("copy pages from %s to %s: %w", from.Name(), o.f.Name(), err)
		case n == 0:
			return fmt.Errorf("copy pages from %s: it ends %d bytes early: %w", from.Name(), size, errImage)
		}
		size -= uint64(n)
	}
	return nil
}

// copyBytes is copy between file systems that the kernel does not copy between.
func (o *pagesFile) copyBytes(from *os.File, off int64, size uint64) error {
	n, err := io.Copy(io.NewOffsetWriter(o.f, o.off), io.NewSectionReader(from, off, int64(size)))
	o.off += n
	if err == nil && n < int64(size) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("copy pages from %s to %s: %w", from.Name(), o.f.Name(), err)
	}
	return nil
}

// gather is copy, for runs of all lengths: short ones are written together, at
// the latest by flush.
func (o *pagesFile) gather(from *os.File, off, size uint64) error {
	if size >= reflinkSize {
		if err := o.flush(); err != nil {
			return err
		}
		return o.copy(from, off, size)
	}
	if o.small == nil {
		o.small = make([]byte, 0, bufferSize)
	}
	if len(o.small)+int(size) > cap(o.small) {
		if err := o.flush(); err != nil {
			return err
		}
	}
	n := len(o.small)
	o.small = o.small[:n+int(size)]
	if _, err := from.ReadAt(o.small[n:], int64(off)); err != nil {
		return fmt.Errorf("read pages of %s: %w", from.Name(), err)
	}
	return nil
}

// flush writes what was gathered.
func (o *pagesFile) flush() error {
	n, err := o.f.WriteAt(o.small, o.off)
	o.off += int64(n)
	o.small = o.small[:0]
	if err != nil {
		return fmt.Errorf("write pages to %s: %w", o.f.Name(), err)
	}
	return nil
}
