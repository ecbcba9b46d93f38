// SPDX-License-Identifier: Apache-2.0

package shm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync/atomic"

	"github.com/cohort-project/cohort/runtime/memory/pages"
)

var pageSize = uint64(os.Getpagesize())

// object is one piece of shared memory. Its file keeps it, and its number, alive.
type object struct {
	ino    uint64
	file   *os.File
	store  *pages.Process
	copied bool
	// anonymous memory is not to be had but by being forked from who has it.
	anonymous bool
	// extents is where the last round found data.
	extents []pages.Range
	// sure is set in the barrier if nothing but suspects was written since then.
	sure     bool
	suspects []pages.Range
	punched  atomic.Bool // and that was wrong
	witnesses
	// Of the barrier: where it had data, and what of it the store had not.
	clean []pages.Range
	held  []piece
}

// piece is memory of an object as it was in the barrier.
type piece struct {
	off  uint64
	data []byte
}

func (p piece) end() uint64 { return p.off + uint64(len(p.data)) }

// current returns where the object has data now, and in what of it changes are to
// be looked for: in all, or where that is sure, in suspects.
func (o *object) current(sure bool, suspects []pages.Range) (all, changes []pages.Range, err error) {
	all, err = data(o.file)
	if err != nil || !sure || len(pages.Without(o.extents, all)) > 0 {
		return all, all, err
	}
	if suspects, err = pages.Union(suspects, nil); err != nil {
		return nil, nil, err
	}
	// What is data by now only because it was read is zeros, but is not in the store.
	fresh := pages.Without(all, o.extents)
	if suspects, err = pages.Union(suspects, fresh); err != nil {
		return nil, nil, err
	}
	return all, pages.Intersect(all, suspects), nil
}

// copy takes what has data and is not in the store, or not like that, and returns
// how many bytes these were.
func (o *object) copy(ctx context.Context, buf []byte, sure bool, suspects []pages.Range, witness bool) (copied uint64, err error) {
	all, ranges, err := o.current(sure, suspects)
	if err != nil {
		return 0, o.failed(err)
	}
	if o.copied {
		var changed []pages.Range
		for _, r := range ranges {
			if err := ctx.Err(); err != nil {
				return 0, err
			}
			err := o.read(r, buf, func(at uint64, data []byte) error {
				o.store.Changed(at, data, func(r pages.Range) { changed = append(changed, r) })
				return ctx.Err()
			})
			if err != nil {
				return 0, o.failed(err)
			}
		}
		ranges = changed
	}
	c, err := o.store.CopyObject(ctx, o.file, slices.Values(ranges))
	o.copied, o.extents = true, all
	if err == nil {
		err = o.store.Map()
	}
	if err == nil && witness && o.anonymous {
		err = o.call(ranges)
	}
	return c.Pages * pageSize, o.failed(err)
}

// read calls fn with the content of a range in parts, each of whole pages.
func (o *object) read(r pages.Range, buf []byte, fn func(at uint64, data []byte) error) error {
	for at := r.Start; at < r.End; {
		part := buf[:min(uint64(len(buf)), r.End-at)]
		n, err := o.file.ReadAt(part, int64(at))
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("read %d bytes at %d: %w", len(part), at, err)
		}
		whole := (uint64(n) + pageSize - 1) / pageSize * pageSize
		clear(part[n:whole])
		if err := fn(at, part[:whole]); err != nil || whole < uint64(len(part)) {
			return err // or it ends here
		}
		at += whole
	}
	return nil
}

// settle puts into the store what the barrier has left in memory.
func (o *object) settle(ctx context.Context) error {
	if len(o.held) == 0 {
		return nil
	}
	slices.SortFunc(o.held, func(a, b piece) int { return int(int64(a.off) - int64(b.off)) })
	_, err := o.store.CopyObject(ctx, held(o.held), func(yield func(pages.Range) bool) {
		for _, p := range o.held {
			if !yield(pages.Range{Start: p.off, End: p.end()}) {
				return
			}
		}
	})
	if err == nil {
		o.held = nil
	}
	return o.failed(err)
}

// heldBytes is what the barrier has left in memory.
func (o *object) heldBytes() (n uint64) {
	for _, p := range o.held {
		n += uint64(len(p.data))
	}
	return n
}

func (o *object) failed(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("copy the shared memory object %d: %w", o.ino, err)
}

// held reads pieces, which are sorted by offset.
type held []piece

func (h held) ReadAt(b []byte, off int64) (n int, err error) {
	for n < len(b) {
		at := uint64(off) + uint64(n)
		i, _ := slices.BinarySearchFunc(h, at, func(p piece, at uint64) int {
			if p.end() <= at {
				return -1
			}
			return 1
		})
		if i == len(h) || h[i].off > at {
			return n, fmt.Errorf("nothing is held at %d", at)
		}
		n += copy(b[n:], h[i].data[at-h[i].off:])
	}
	return n, nil
}

func bytesOf(ranges []pages.Range) (n uint64) {
	for _, r := range ranges {
		n += r.End - r.Start
	}
	return n
}
