// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// A shared memory object (an anonymous shared mapping, a memfd) has its pages in
// the store as a process has: the address of a page is its offset in the object.
// CRIU has them in pagemap-shmem-ID.img, which is of the same format, and reads
// it through the same chain of parents (criu/shmem.c, do_restore_shmem_content).

// MaxObject is the largest id of an object that the store takes. CRIU keeps 32
// bits of the inode number; the upper half of them names pages images here.
const MaxObject = math.MaxInt32

// firstObjectPages is where the ids of objects' pages images in parents begin;
// below are pids.
const firstObjectPages = 1 << 31

// ObjectKey names an object where a process's pid is asked for, as in the
// argument of [Compose]. id is CRIU's shmid, the object's inode number, at most
// [MaxObject].
func ObjectKey(id uint32) int { return -1 - int(id) }

// objectOf is what a key names.
func objectOf(key int) Object {
	if key < 0 {
		return Object{Shmem, uint64(-1 - key)}
	}
	return Object{Task, uint64(key)}
}

// Shared returns the pages of one shared memory object; see [ObjectKey].
func (s *Store) Shared(id uint32) *Process { return s.Process(ObjectKey(id)) }

// CopyObject is [Process.Copy] for an object: the ranges are offsets in it, and
// src reads it. What lies behind the end of src counts as gone; the rest of its
// last page is zeros.
func (p *Process) CopyObject(ctx context.Context, src io.ReaderAt, ranges iter.Seq[Range]) (Copied, error) {
	p.source = src
	return p.Copy(ctx, 0, ranges)
}

// readSource is read for an object.
func (b *batch) readSource() error {
	segs, buf := b.segs, b.buf[:b.used]
	for len(segs) > 0 {
		size := segs[0].End - segs[0].Start
		n, err := b.p.source.ReadAt(buf[:size], int64(segs[0].Start))
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("read %d bytes at %#x: %w", size, segs[0].Start, err)
		}
		whole := (uint64(n) + pageSize - 1) / pageSize * pageSize
		clear(buf[n:whole])
		if segs, buf, err = b.keep(segs, buf, whole); err != nil {
			return err
		}
		for range (size - whole) / pageSize {
			segs, buf = b.lose(segs, buf)
		}
	}
	return nil
}

// Changed calls fn for each stretch of data that the store does not hold, or not
// like that; data are whole pages and begin at addr. It compares with the files
// of the store, which [Process.Map] has made ready for it.
func (p *Process) Changed(addr uint64, data []byte, fn func(Range)) {
	all := Range{addr, addr + uint64(len(data))}
	var run Range
	differ := func(r Range) {
		if run.End == r.Start {
			run.End = r.End
			return
		}
		if run.Start < run.End {
			fn(run)
		}
		run = r
	}
	for s := range p.parts(all) {
		mine := data[s.Start-addr : s.End-addr]
		from := s.slot * pageSize
		if s.level == nil || from+uint64(len(mine)) > uint64(len(s.level.view)) {
			differ(s.Range)
			continue
		}
		kept := s.level.view[from:][:len(mine)]
		if len(s.level.gone) == 0 && bytes.Equal(mine, kept) {
			continue
		}
		for at := uint64(0); at < uint64(len(mine)); at += pageSize {
			if s.level.gone.has(s.slot+at/pageSize) || !bytes.Equal(mine[at:at+pageSize], kept[at:at+pageSize]) {
				differ(Range{s.Start + at, s.Start + at + pageSize})
			}
		}
	}
	if run.Start < run.End {
		fn(run)
	}
}

// Union returns what is in any of two lists, by address.
func Union(a, b []Range) ([]Range, error) { return normalize(slices.Concat(a, b)) }

// Without returns what is in a and not in b; both are as Union returns them.
func Without(a, b []Range) []Range { return subtract(a, b) }

// Intersect returns what is in both; they are as Union returns them.
func Intersect(a, b []Range) []Range { return intersect(a, b) }

// View calls fn with what the store holds of a range, part by part; fn must not
// keep it. Like Changed it needs Map before.
func (p *Process) View(r Range, fn func(data []byte) error) error {
	for s := range p.parts(r) {
		from, size := s.slot*pageSize, s.End-s.Start
		if s.level == nil || from+size > uint64(len(s.level.view)) {
			return fmt.Errorf("%s: %s is not in the store: %w", p, s.Range, ErrIncomplete)
		}
		for i := range s.Pages() {
			if s.level.gone.has(s.slot + i) {
				return fmt.Errorf("%s: page %d of %s is out of date: %w", p, i, s.Range, ErrIncomplete)
			}
		}
		if err := fn(s.level.view[from:][:size]); err != nil {
			return err
		}
	}
	return nil
}

// Map maps what the store holds of p, so that Changed finds it in memory. To be
// called after each Copy.
func (p *Process) Map() error {
	for _, l := range p.levels() {
		size := l.slots * pageSize
		if uint64(len(l.view)) == size {
			continue
		}
		if err := l.unmap(); err != nil {
			return err
		}
		view, err := unix.Mmap(int(l.f.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
		if err != nil {
			return fmt.Errorf("map %d bytes of %s: %w", size, l.path, err)
		}
		l.view = view
	}
	return nil
}

func (l *level) unmap() error {
	if l.view == nil {
		return nil
	}
	err := unix.Munmap(l.view)
	l.view = nil
	return os.NewSyscallError("munmap", err)
}

// DumpedObjects says how many bytes of each shared memory object CRIU has written
// to imagesDir itself, by the object's id. Those of which it wrote none are there,
// too.
func DumpedObjects(imagesDir string) (map[uint32]uint64, error) {
	entries, err := os.ReadDir(imagesDir)
	if err != nil {
		return nil, err
	}
	out := map[uint32]uint64{}
	for _, e := range entries {
		o, ok := parseObject(e.Name())
		if !ok || o.Kind != Shmem || o.ID > math.MaxUint32 {
			continue
		}
		m, err := readPagemap(filepath.Join(imagesDir, e.Name()))
		if err != nil {
			return nil, err
		}
		out[uint32(o.ID)] = m.bytes()
	}
	return out, nil
}
