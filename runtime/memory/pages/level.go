// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"sort"

	"golang.org/x/sys/unix"
)

// extent says that nr pages from address addr are in nr slots from slot.
type extent struct {
	addr uint64
	slot uint32 // 2^32 slots are 16 TiB
	nr   uint32
}

func (e extent) end() uint64 { return e.addr + uint64(e.nr)*pageSize }

// maxExtent bounds an extent, and with it a pagemap entry: CRIU computes with
// int for the pages of one entry (criu/mem.c, restore_priv_vma_content).
const maxExtent = math.MaxInt32

// level is one file of page slots and the map to it. A page keeps its slot: a
// later copy of it overwrites the earlier.
type level struct {
	path  string
	f     *os.File
	ext   []extent // by address, disjoint
	slots uint64   // used so far; the file's length is this many pages
	// gone has a bit for each slot whose page could not be read when it was
	// its turn. What the slot holds is older than it seems.
	gone bitmap
	// view is the file as Map has last mapped it.
	view []byte
	late late
	held *held // of the store; nil where nothing is kept
}

func newLevel(path string) (*level, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make a file of the page store: %w", err)
	}
	return &level{path: path, f: f}, nil
}

// find returns the index of the first extent that ends behind addr.
func (l *level) find(addr uint64) int {
	return sort.Search(len(l.ext), func(i int) bool { return l.ext[i].end() > addr })
}

// addresses are those of all slots.
func (l *level) addresses() (out []Range) {
	for _, e := range l.ext {
		if n := len(out); n > 0 && out[n-1].End == e.addr {
			out[n-1].End = e.end()
		} else {
			out = append(out, Range{e.addr, e.end()})
		}
	}
	return out
}

// end is the address behind the last page.
func (l *level) end() uint64 {
	if len(l.ext) == 0 {
		return 0
	}
	return l.ext[len(l.ext)-1].end()
}

// take reserves nr slots at the file's end.
func (l *level) take(nr uint64) (uint64, error) {
	slot := l.slots
	if slot+nr > math.MaxUint32 {
		return 0, fmt.Errorf("the page store %s is full with %d pages: %w", l.path, slot, unix.EFBIG)
	}
	l.slots += nr
	return slot, nil
}

// appendExtent adds to list an extent that lies behind all others, joined to
// the last where both address and slot follow on.
func appendExtent(list []extent, addr, slot, nr uint64) []extent {
	if n := len(list); n > 0 {
		last := &list[n-1]
		if last.end() == addr && uint64(last.slot)+uint64(last.nr) == slot && uint64(last.nr)+nr <= maxExtent {
			last.nr += uint32(nr)
			return list
		}
	}
	return append(list, extent{addr, uint32(slot), uint32(nr)})
}

// merge takes extents, by address and apart from all that the level has.
func (l *level) merge(more []extent) {
	switch {
	case len(more) == 0:
		return
	case len(l.ext) == 0 || more[0].addr >= l.end():
		for _, e := range more {
			l.ext = appendExtent(l.ext, e.addr, uint64(e.slot), uint64(e.nr))
		}
		return
	}
	out := make([]extent, 0, len(l.ext)+len(more))
	for i, j := 0, 0; i < len(l.ext) || j < len(more); {
		var e extent
		if j == len(more) || i < len(l.ext) && l.ext[i].addr < more[j].addr {
			e, i = l.ext[i], i+1
		} else {
			e, j = more[j], j+1
		}
		out = appendExtent(out, e.addr, uint64(e.slot), uint64(e.nr))
	}
	l.ext = out
}

// ordered says whether slots follow the addresses, as CRIU reads them.
func (l *level) ordered() bool {
	return slices.IsSortedFunc(l.ext, func(a, b extent) int { return cmp.Compare(a.slot, b.slot) })
}

// size makes the file as long as its slots, which zero pages at its end need.
func (l *level) size() error {
	if err := l.f.Truncate(int64(l.slots * pageSize)); err != nil {
		return fmt.Errorf("set the length of %s: %w", l.path, err)
	}
	return nil
}

// wipe removes the content of nr slots: they read as zeros and take no room.
func (l *level) wipe(slot, nr uint64) error {
	// A hole of few pages costs the file system more than their bytes.
	const hole = 16
	off, size := int64(slot*pageSize), int64(nr*pageSize)
	if nr >= hole {
		err := unix.Fallocate(int(l.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, size)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("remove stale pages of %s: %w", l.path, err)
		}
	}
	for size > 0 {
		n, err := l.f.WriteAt(zeros[:min(size, int64(len(zeros)))], off)
		if err != nil {
			return fmt.Errorf("remove stale pages of %s: %w", l.path, err)
		}
		off, size = off+int64(n), size-int64(n)
	}
	return nil
}

func (l *level) close() error {
	if l == nil || l.f == nil {
		return nil
	}
	err := errors.Join(l.unmap(), l.f.Close(), unmapAll(l.late.chunks))
	l.f, l.late = nil, late{}
	return err
}

var zeros [64 << 10]byte

// bitmap grows with the bits set; the zero value is empty.
type bitmap []uint64

func (b bitmap) has(i uint64) bool {
	return i/64 < uint64(len(b)) && b[i/64]&(1<<(i%64)) != 0
}

func (b *bitmap) set(i uint64) {
	for i/64 >= uint64(len(*b)) {
		*b = append(*b, 0)
	}
	(*b)[i/64] |= 1 << (i % 64)
}

func (b bitmap) clear(i, nr uint64) {
	for end := min(i+nr, uint64(len(b))*64); i < end; i++ {
		b[i/64] &^= 1 << (i % 64)
	}
}
