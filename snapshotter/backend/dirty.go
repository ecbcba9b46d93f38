// SPDX-License-Identifier: Apache-2.0

package backend

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// smallestRange is how finely dirty pages are looked for, in bytes: to copy so much
	// within the page cache takes about as long as to clone it.
	smallestRange = 128 << 10
	// split is into how many ranges one with dirty pages is divided.
	split = 16
)

// cloneClean makes dst share the extents of src where src has no dirty pages, and copies
// the others within the page cache: FICLONE would write them back first and wait for the
// disk, while the container stands still.
func cloneClean(ctx context.Context, dst, src *os.File, size int64) error {
	n, err := unwritten(src, 0, size)
	if err != nil || n == 0 {
		return clone(ctx, dst, src, size)
	}
	if err := dst.Truncate(size); err != nil {
		return err
	}
	return cloneRange(ctx, dst, src, 0, size, n)
}

// cloneRange does so for one range with n pages that are not written back.
func cloneRange(ctx context.Context, dst, src *os.File, off, end int64, n uint64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	length := end - off
	if n == 0 {
		r := unix.FileCloneRange{Src_fd: int64(src.Fd()), Src_offset: uint64(off), Src_length: uint64(length), Dest_offset: uint64(off)} //nolint:gosec // not negative
		if err := unix.IoctlFileCloneRange(int(dst.Fd()), &r); err != nil {
			return fmt.Errorf("FICLONERANGE: %w", err)
		}
		return nil
	}
	if length <= smallestRange || n*uint64(os.Getpagesize()) > uint64(length)/2 { //nolint:gosec // positive
		return copyPages(dst, src, off, length)
	}
	// Neighbours that are clean are cloned together.
	step := max((length/split+smallestRange-1)/smallestRange*smallestRange, smallestRange)
	clean := off
	for at := off; at < end; at += step {
		to := min(at+step, end)
		n, err := unwritten(src, at, to)
		if err != nil {
			return err
		}
		if n == 0 {
			continue
		}
		if at > clean {
			if err := cloneRange(ctx, dst, src, clean, at, 0); err != nil {
				return err
			}
		}
		if err := cloneRange(ctx, dst, src, at, to, n); err != nil {
			return err
		}
		clean = to
	}
	if end > clean {
		return cloneRange(ctx, dst, src, clean, end, 0)
	}
	return nil
}

// unwritten counts the pages in a range that the disk does not have yet (cachestat(2), Linux
// 6.5). A store through a shared mapping makes its page dirty when it is made, since the
// page is read-only in the page table as long as it is clean (mm/memory.c, do_wp_page).
func unwritten(f *os.File, off, end int64) (uint64, error) {
	r := unix.CachestatRange{Off: uint64(off), Len: uint64(end - off)} //nolint:gosec // not negative
	var st unix.Cachestat_t
	if err := unix.Cachestat(uint(f.Fd()), &r, &st, 0); err != nil { //nolint:gosec // a descriptor
		return math.MaxUint64, fmt.Errorf("cachestat: %w", err)
	}
	return st.Dirty + st.Writeback, nil
}

var buffers = sync.Pool{New: func() any { b := make([]byte, 1<<20); return &b }}

// copyPages copies a range with read and write; copy_file_range would clone, where it can.
func copyPages(dst, src *os.File, off, length int64) error {
	b := buffers.Get().(*[]byte)
	defer buffers.Put(b)
	for length > 0 {
		n, err := src.ReadAt((*b)[:min(length, int64(len(*b)))], off)
		if n == 0 && errors.Is(err, io.EOF) {
			return nil // a hole to the end of the file was counted as a page
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if _, err := dst.WriteAt((*b)[:n], off); err != nil {
			return err
		}
		off, length = off+int64(n), length-int64(n)
	}
	return nil
}
