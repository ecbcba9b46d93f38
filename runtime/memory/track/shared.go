// SPDX-License-Identifier: Apache-2.0

package track

import (
	"fmt"
	"slices"

	"github.com/cohort-project/cohort/runtime/memory/internal/uapi"
)

// Shared memory. A page table tells of one process's writes only, and forgets them
// where the process unmaps the memory or drops its pages; so what Take and Clean say
// of a mapping is nothing to rely on there, and they leave shared mappings out. What
// can be relied on is the opposite: pages that are marked write-protected in the page
// table of a mapping were not written through that mapping since Protect. Whoever
// knows all the mappings that a piece of memory has, and has had, puts them together.

// WatchShared registers a shared mapping; Protect is to follow. It reports whether
// the mapping was not registered already: then nothing is known of the time before.
func (t *Tracker) WatchShared(r Range) (fresh bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.alive(); err != nil {
		return false, t.failed("watching shared memory of", err)
	}
	if allowsWP(t.pagemap, r.Start) && t.watches(r) {
		return false, nil
	}
	if err := uapi.UffdRegisterWP(t.uffd, r.Start, r.End); err != nil {
		return false, t.failed("watching shared memory of", fmt.Errorf("register %#x-%#x: %w", r.Start, r.End, err))
	}
	if !t.watches(r) {
		t.shared = append(t.shared, r)
	}
	return true, nil
}

func (t *Tracker) watches(r Range) bool { return slices.Contains(t.shared, r) }

// Protect marks pages of a registered shared mapping, whether they are there or not:
// the kernel keeps a note in the page table where there is none.
func (t *Tracker) Protect(ranges []Range) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.alive(); err != nil {
		return t.failed("protecting shared memory of", err)
	}
	for _, r := range ranges {
		for part := range (span{Range: r}).pieces(takePiece) {
			if err := uapi.UffdProtect(t.uffd, part.Start, part.End); err != nil {
				return t.failed("protecting shared memory of", err)
			}
		}
	}
	return nil
}

// Untouched reports the pages of a stretch of shared memory that were not written
// through this mapping since Protect, in address order. All others may have been: also
// those of which the page table has nothing.
func (t *Tracker) Untouched(r Range, fn func(Range) error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	err := t.alive()
	if err == nil {
		err = t.scanShared(r, fn)
	}
	if err == nil {
		err = t.alive()
	}
	if err != nil {
		return t.failed("finding the untouched shared memory of", err)
	}
	return nil
}

// scanShared is scan without what private memory needs. A marker is reported as
// swapped, with its protection (fs/proc/task_mmu.c, pagemap_page_category).
func (t *Tracker) scanShared(r Range, fn func(Range) error) error {
	for at := r.Start; at < r.End; {
		arg := uapi.PmScanArg{
			Start: at, End: r.End,
			CategoryInverted:  uapi.PageIsWritten,
			CategoryMask:      uapi.PageIsWPAllowed | uapi.PageIsWritten,
			CategoryAnyofMask: populatedAny,
		}
		n, err := uapi.PagemapScan(int(t.pagemap.Fd()), &arg, t.vec)
		if err != nil {
			if t.spaceEnded() {
				return t.goneOrExec()
			}
			return fmt.Errorf("PAGEMAP_SCAN from %#x: %w", at, err)
		}
		for _, region := range t.vec[:n] {
			if err := fn(Range{region.Start, region.End}); err != nil {
				return err
			}
		}
		if n < len(t.vec) {
			return nil
		}
		at = max(arg.WalkEnd, t.vec[n-1].End)
	}
	return nil
}

// SharedMapping is a shared mapping of a file with a number.
type SharedMapping struct {
	Range
	Inode  uint64
	Offset uint64 // in the file
}

// SharedMappings lists the shared mappings whose file is on the device
// "major:minor", in hexadecimal as in /proc/PID/maps, in address order.
func (t *Tracker) SharedMappings(device string) ([]SharedMapping, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	err := t.alive()
	if err != nil {
		return nil, t.failed("reading the mappings of", err)
	}
	areas, err := t.maps()
	if err != nil {
		return nil, t.failed("reading the mappings of", err)
	}
	var out []SharedMapping
	for _, a := range areas {
		if a.shared() && a.device == device {
			out = append(out, SharedMapping{a.Range, a.inode, a.offset})
		}
	}
	return out, nil
}
