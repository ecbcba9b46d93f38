// SPDX-License-Identifier: Apache-2.0

package overlay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/snapshotter/internal/uapi"
)

const (
	// inlineSize is the size up to which content is compared at once: btrfs keeps so
	// small a file among its metadata (max_inline, 2048 by default), where extents say
	// nothing.
	inlineSize = 2048
	// maxExtents bounds the memory that the extents of one file take, to 60 MB.
	maxExtents = 1 << 20
	chunkSize  = 1 << 20
)

// span is the range [from, to) of a file.
type span struct{ from, to uint64 }

// content compares the content of files. It is not to be used concurrently.
type content struct {
	x, y []byte
	// read counts the bytes that had to be compared.
	read uint64
	// disks remembers which two device numbers are one file system.
	disks map[[2]uint64]bool
}

// oneDisk tells whether places on the disk can be compared. The subvolumes of a btrfs
// have device numbers of their own.
func (c *content) oneDisk(a, b *Entry, x, y *os.File) bool {
	key := [2]uint64{inodeOf(&a.Stat).dev, inodeOf(&b.Stat).dev}
	if key[0] == key[1] {
		return true
	}
	one, known := c.disks[key]
	if !known {
		i, isBtrfs, err := uapi.BtrfsID(x)
		j, too, err2 := uapi.BtrfsID(y)
		one = err == nil && err2 == nil && isBtrfs && too && i == j
		if c.disks == nil {
			c.disks = map[[2]uint64]bool{}
		}
		c.disks[key] = one
	}
	return one
}

// same tells whether the regular files a and b, which have the same size, have the
// same content. Two files on one file system that share their extents are the
// same without being read.
func (c *content) same(ctx context.Context, a, b *Entry) (bool, error) {
	if a.Stat.Size == 0 {
		return true, nil
	}
	if a.Stat.Dev == b.Stat.Dev && a.Stat.Ino == b.Stat.Ino {
		return true, nil
	}
	x, err := a.Open()
	if err != nil {
		return false, err
	}
	defer x.Close()
	y, err := b.Open()
	if err != nil {
		return false, err
	}
	defer y.Close()
	size := a.bytes()
	todo := []span{{0, size}}
	if size > inlineSize && c.oneDisk(a, b, x, y) {
		todo = notShared(x, y, size)
	}
	for _, s := range todo {
		same, err := c.sameSpan(ctx, x, y, s)
		if err != nil || !same {
			return false, err
		}
	}
	return true, nil
}

// sameSpan compares by reading, except where both files have a hole.
func (c *content) sameSpan(ctx context.Context, x, y *os.File, s span) (bool, error) {
	if c.x == nil {
		c.x, c.y = make([]byte, chunkSize), make([]byte, chunkSize)
	}
	for off := s.from; off < s.to; {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		off = min(nextData(x, off), nextData(y, off))
		if off >= s.to {
			break
		}
		n := min(chunkSize, s.to-off)
		same, err := c.sameBytes(x, y, int64(off), n) //nolint:gosec // below a file's size
		if err != nil || !same {
			return false, err
		}
		off += n
	}
	return true, nil
}

func (c *content) sameBytes(x, y *os.File, off int64, n uint64) (bool, error) {
	for _, f := range []struct {
		*os.File
		buf []byte
	}{{x, c.x[:n]}, {y, c.y[:n]}} {
		_, err := f.ReadAt(f.buf, off)
		if errors.Is(err, io.EOF) {
			err = &os.PathError{Op: "read", Path: f.Name(), Err: io.ErrUnexpectedEOF}
		}
		if err != nil {
			return false, err
		}
	}
	c.read += n
	return bytes.Equal(c.x[:n], c.y[:n]), nil
}

// nextData returns where the next data at or after off may begin. A file system that
// does not know its holes has data everywhere.
func nextData(f *os.File, off uint64) uint64 {
	n, err := unix.Seek(int(f.Fd()), int64(off), unix.SEEK_DATA) //nolint:gosec // below a file's size
	switch {
	case errors.Is(err, unix.ENXIO):
		return 1<<64 - 1 // only a hole remains
	case err != nil || n < 0:
		return off
	}
	return uint64(n)
}

// notShared returns the ranges of two files of the given size on one file system that
// do not lie in the same place on the disk; everything if that cannot be known.
//
// The extents of x are read again after those of y: a file system that moves
// extents meanwhile (btrfs balance) could have put y's to where x's were.
func notShared(x, y *os.File, size uint64) []span {
	all := []span{{0, size}}
	var lists [3][]uapi.Extent
	for i, f := range []*os.File{x, y, x} {
		e, err := uapi.Extents(f, maxExtents)
		if err != nil {
			return all
		}
		lists[i] = tidy(e, size)
	}
	if !slices.Equal(lists[0], lists[2]) {
		return all
	}
	return differing(lists[0], lists[1], size)
}

// ambiguous are the flags of an extent whose place on the disk does not name its content:
// it has none, a compressed extent's place is that of all its parts
// (fs/btrfs/extent_io.c), or what is dirty in memory has not been written to it.
const ambiguous = uapi.ExtentUnknown | uapi.ExtentDelalloc | uapi.ExtentEncoded | uapi.ExtentEncrypted |
	uapi.ExtentNotAligned | uapi.ExtentInline | uapi.ExtentTail | uapi.ExtentUnwritten

// tidy cuts the extents at size, keeps only the flags that matter, and joins neighbours,
// which file systems do differently from call to call.
func tidy(in []uapi.Extent, size uint64) []uapi.Extent {
	out := in[:0]
	for _, e := range in {
		if e.Logical >= size || e.Length == 0 {
			continue
		}
		e.Length = min(e.Length, size-e.Logical)
		e.Flags &= ambiguous
		if n := len(out); n > 0 {
			p := &out[n-1]
			if p.Flags == e.Flags && e.Flags&ambiguous == 0 && p.Logical+p.Length == e.Logical && p.Physical+p.Length == e.Physical {
				p.Length += e.Length
				continue
			}
		}
		out = append(out, e)
	}
	return out
}

// differing walks two tidy lists side by side, and returns the ranges below size that are
// not in the same place. Holes are among them: whoever reads finds out at no cost, and not every
// file system shows data that it has yet to place.
func differing(a, b []uapi.Extent, size uint64) []span {
	var out []span
	for off := uint64(0); off < size; {
		a, b = passed(a, off), passed(b, off)
		end, x, inA := at(a, off, size)
		end, y, inB := at(b, off, end)
		same := inA && inB && (x.Flags|y.Flags)&ambiguous == 0 &&
			x.Physical+(off-x.Logical) == y.Physical+(off-y.Logical)
		if !same {
			if n := len(out); n > 0 && out[n-1].to == off {
				out[n-1].to = end
			} else {
				out = append(out, span{off, end})
			}
		}
		off = end
	}
	return out
}

// passed drops the extents that end at or before off.
func passed(list []uapi.Extent, off uint64) []uapi.Extent {
	for len(list) > 0 && list[0].Logical+list[0].Length <= off {
		list = list[1:]
	}
	return list
}

// at returns the extent at off, and where, at most at end, that or the hole there ends.
func at(list []uapi.Extent, off, end uint64) (uint64, uapi.Extent, bool) {
	switch {
	case len(list) == 0:
		return end, uapi.Extent{}, false
	case list[0].Logical > off:
		return min(end, list[0].Logical), uapi.Extent{}, false
	}
	return min(end, list[0].Logical+list[0].Length), list[0], true
}
