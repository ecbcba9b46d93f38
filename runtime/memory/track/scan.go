// SPDX-License-Identifier: Apache-2.0

package track

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/cohort-project/cohort/runtime/memory/internal/uapi"
	"golang.org/x/sys/unix"
)

var pageSize = uint64(unix.Getpagesize())

// probeAddress is valid to ask about and mapped by nobody: above vm.mmap_min_addr,
// below where programs are linked to and the kernel places anything.
const probeAddress = 1 << 20

// selection says which pages a scan wants, in the terms of struct pm_scan_arg.
type selection struct {
	with    uint64 // all of these
	without uint64 // none of these
}

// populatedAny: a populated page has contents of its own. It is present or on swap,
// and (see scan) not the zero page, not a page of the file that a private mapping
// shows until it is written to, and not a marker in the page table.
const populatedAny = uapi.PageIsPresent | uapi.PageIsSwapped

// Take reports the pages written since the last Take and begins to watch them
// again, each in one step of the kernel: a write that Take does not report is
// reported by the next one. The first Take reports every populated page. The
// process may run.
//
// Ranges come in address order. If fn fails, or ctx ends, what fn did not
// accept stays written.
func (t *Tracker) Take(ctx context.Context, fn func(Range) error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.alive(); err != nil {
		return t.failed("taking the written pages of", err)
	}
	sel := selection{with: uapi.PageIsWPAllowed | uapi.PageIsWritten}
	for _, s := range t.tracked {
		// No PM_SCAN_CHECK_WPASYNC: it fails half way where a mapping was replaced
		// meanwhile, and what was armed until there would be lost. Without it the
		// kernel passes over such a mapping, which then counts as written.
		for r := range s.pieces(takePiece) {
			if err := t.scan(ctx, span{Range: r, file: s.file}, sel, uapi.PmScanWPMatching, fn); err != nil {
				return t.failed("taking the written pages of", err)
			}
		}
	}
	if err := t.alive(); err != nil {
		return t.failed("taking the written pages of", err)
	}
	return nil
}

// Clean reports the populated pages that were not written since the last Take, in
// address order; it arms nothing. Meant for a process that is frozen: of a
// running one it is out of date when it returns.
//
// Only mappings that are private and trackable now can be clean, and only if they
// have been registered since they exist. For a GiB of clean pages it takes half a millisecond.
//
// stray gets, in address order too, the populated pages of private mappings that are not clean
// although the kernel says of them that they were not written. Whoever believes the kernel
// passes them over. They are there where a mapping has lost its registration, and the page table has
// its marks still: a registered mapping that has no page yet, moved by mremap(2) to where it
// continues another registered one, becomes one with it, and the kernel takes all of it for
// the one that was moved (mm/mremap.c, copy_vma and then mremap_userfaultfd_prep, Linux 6.18).
func (t *Tracker) Clean(fn, stray func(Range) error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	sel := selection{with: uapi.PageIsWPAllowed, without: uapi.PageIsWritten}
	err := t.eachPrivate(func(s span, tracked bool) error {
		switch {
		case !tracked:
			return t.marked(s, 0, stray)
		case s.alone && allowsWP(t.pagemap, s.Start):
			return t.scanRest(s.Range, fn)
		}
		if err := t.scan(context.Background(), s, sel, 0, fn); err != nil {
			return err
		}
		return t.marked(s, uapi.PageIsWPAllowed, stray)
	})
	if err != nil {
		return t.failed("finding the unchanged pages of", err)
	}
	return nil
}

// marked gives fn the populated pages that the kernel does not say to be written, but for those
// of mappings of a kind (PAGE_IS_WPALLOWED, or 0), which the kernel passes over as a whole.
func (t *Tracker) marked(s span, without uint64, fn func(Range) error) error {
	sel := selection{without: without | uapi.PageIsWritten}
	if s.file {
		// Mostly there are none, and then it need not be asked which are the file's: see scan.
		some, err := found(func(fn func(Range) error) error {
			return t.scan(context.Background(), span{Range: s.Range}, sel, 0, fn)
		})
		if err != nil || !some {
			return err
		}
	}
	return t.scan(context.Background(), s, sel, 0, fn)
}

// Written counts the populated pages that would have to be copied now: written
// since the last Take, or in private mappings that are not tracked. It changes
// nothing.
func (t *Tracker) Written() (pages uint64, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	err = t.eachPrivate(func(s span, tracked bool) error {
		sel := selection{}
		if tracked {
			sel.with = uapi.PageIsWritten
		}
		return t.scan(context.Background(), s, sel, 0, func(r Range) error {
			pages += r.Size() / pageSize
			return nil
		})
	})
	if err != nil {
		return 0, t.failed("counting the written pages of", err)
	}
	return pages, nil
}

// eachPrivate calls fn for every stretch of private mappings there is now, in
// address order, apart for what was tracked at the last Refresh and what was not.
func (t *Tracker) eachPrivate(fn func(s span, tracked bool) error) error {
	if err := t.alive(); err != nil {
		return err
	}
	areas, err := t.maps()
	if err != nil {
		return err
	}
	var stretches []span
	for _, a := range areas {
		if a.untrackable() == "" {
			stretches = join(stretches, span{a.Range, a.file(), !a.file() && a.Size() >= t.alone})
		}
	}
	for _, s := range stretches {
		err := split(s.Range, t.tracked, func(r Range, tracked bool) error {
			return fn(span{r, s.file, s.alone}, tracked)
		})
		if err != nil {
			return err
		}
	}
	return t.alive()
}

// scan walks one range and gives fn the populated pages of a selection.
func (t *Tracker) scan(ctx context.Context, s span, sel selection, flags uint64, fn func(Range) error) error {
	for at := s.Start; at < s.End; {
		if err := ctx.Err(); err != nil {
			return err
		}
		without := sel.without | uapi.PageIsPfnZero
		if s.file {
			// Asked for only where it matters: the kernel then looks into each page's
			// struct page, which takes twenty times as long.
			without |= uapi.PageIsFile
		}
		if t.guards {
			without |= uapi.PageIsGuard
		}
		arg := uapi.PmScanArg{
			Flags: flags, Start: at, End: s.End,
			CategoryInverted:  without,
			CategoryMask:      sel.with | without,
			CategoryAnyofMask: populatedAny,
			ReturnMask:        uapi.PageIsSwapped,
		}
		n, again, err := t.ask(&arg)
		if again {
			continue
		}
		if err != nil {
			return err
		}
		for i, region := range t.vec[:n] {
			if err := t.report(region, fn); err != nil {
				if flags&uapi.PmScanWPMatching != 0 {
					for _, left := range t.vec[i:n] {
						t.giveBack(Range{left.Start, left.End})
					}
				}
				return err
			}
		}
		if n < len(t.vec) {
			return nil
		}
		// walk_end alone does not tell: when the walk reaches the end, the kernel
		// leaves in it where it last refilled its own buffer of 512 regions (6.7 to 6.18,
		// do_pagemap_scan).
		at = max(arg.WalkEnd, t.vec[n-1].End)
	}
	return nil
}

// ask has the kernel fill t.vec, and tells how many regions it found, or that it does not
// know guard pages and is to be asked again without them.
func (t *Tracker) ask(arg *uapi.PmScanArg) (n int, again bool, err error) {
	n, err = uapi.PagemapScan(int(t.pagemap.Fd()), arg, t.vec)
	switch {
	case err == nil:
		return n, false, nil
	case errors.Is(err, unix.EINVAL) && t.guards:
		t.guards = false // before Linux 6.15
		return 0, true, nil
	case errors.Is(err, unix.ESRCH) || t.spaceEnded():
		return 0, false, t.goneOrExec()
	}
	return 0, false, fmt.Errorf("PAGEMAP_SCAN from %#x: %w", arg.Start, err)
}

// scanRest gives fn the clean pages of (a part of) one anonymous mapping that allows
// asynchronous write protection, by asking for all others. The kernel takes 2 ns for a page
// that it passes over and 11 for one that it reports, alone or in a range
// (fs/proc/task_mmu.c, pagemap_scan_output). Unlike scan it takes what is not reported for
// clean: that the kernel looks at the mapping at all is for the caller to have made sure of,
// and that it stays mapped.
func (t *Tracker) scanRest(r Range, fn func(Range) error) error {
	for at := r.Start; at < r.End; {
		not := uint64(uapi.PageIsWritten | uapi.PageIsPfnZero)
		if t.guards {
			not |= uapi.PageIsGuard
		}
		arg := uapi.PmScanArg{
			Start: at, End: r.End,
			CategoryInverted:  uapi.PageIsPresent,
			CategoryAnyofMask: not | uapi.PageIsPresent,
			ReturnMask:        not | uapi.PageIsPresent | uapi.PageIsSwapped,
		}
		n, again, err := t.ask(&arg)
		if again {
			continue
		}
		if err != nil {
			return err
		}
		for _, region := range t.vec[:n] {
			if region.Start > at {
				if err := fn(Range{at, region.Start}); err != nil {
					return err
				}
			}
			// On swap, as it was: clean, too.
			if region.Categories&not == 0 && region.Categories&uapi.PageIsSwapped != 0 {
				if err := t.report(region, fn); err != nil {
					return err
				}
			}
			at = region.End
		}
		if n < len(t.vec) {
			if at < r.End {
				return fn(Range{at, r.End})
			}
			return nil
		}
	}
	return nil
}

// report gives one region to fn, without the page table markers that look like
// swapped pages: what they stand for has no contents of its own.
func (t *Tracker) report(region uapi.PageRegion, fn func(Range) error) error {
	r := Range{region.Start, region.End}
	if region.Categories&uapi.PageIsSwapped == 0 {
		return fn(r)
	}
	const batch = 512
	var buf [8 * batch]byte
	var run Range
	var unsure []Range
	defer func() {
		for _, r := range unsure {
			t.giveBack(r)
		}
	}()
	for at := r.Start; at < r.End; {
		n := min((r.End-at)/pageSize, batch)
		if _, err := t.pagemap.ReadAt(buf[:8*n], int64(at/pageSize*8)); err != nil {
			return fmt.Errorf("reading the page map at %#x: %w", at, err)
		}
		for i := range n {
			page := Range{at + i*pageSize, at + (i+1)*pageSize}
			entry := binary.NativeEndian.Uint64(buf[8*i:])
			if uapi.PagemapIsMarker(entry) {
				continue
			}
			if entry&(uapi.PagemapPresent|uapi.PagemapSwapped) == 0 {
				// Dropped since the scan; or of hugetlb, for which the page map does not
				// tell a marker from a page on its way to another place. Making it count as
				// written is right for both.
				unsure = append(unsure, page)
				continue
			}
			if run.End == page.Start {
				run.End = page.End
				continue
			}
			if run.End != 0 {
				if err := fn(run); err != nil {
					return err
				}
			}
			run = page
		}
		at += n * pageSize
	}
	if run.End == 0 {
		return nil
	}
	return fn(run)
}

// largestPage is the largest that any architecture has, in bytes.
const largestPage = 16 << 30

// giveBack makes pages count as written again.
func (t *Tracker) giveBack(r Range) {
	err := uapi.UffdUnprotect(t.uffd, r.Start, r.End)
	switch {
	case errors.Is(err, unix.EINVAL):
		// Of explicit huge pages the kernel takes whole ones only.
		for size := 2 * pageSize; size <= largestPage && errors.Is(err, unix.EINVAL); size *= 2 {
			err = uapi.UffdUnprotect(t.uffd, r.Start/size*size, (r.End+size-1)/size*size)
		}
	case errors.Is(err, unix.ENOENT) && r.Size() > pageSize:
		// It ends where a page is not registered any more, but others behind may be.
		half := r.Start + r.Size()/2/pageSize*pageSize
		t.giveBack(Range{r.Start, half})
		t.giveBack(Range{half, r.End})
	}
}

// hasPrivatePages reports whether a mapping of a file has pages of its own.
func (t *Tracker) hasPrivatePages(s span) (bool, error) {
	return found(func(fn func(Range) error) error {
		return t.scan(context.Background(), s, selection{}, 0, fn)
	})
}

// found reports whether there is anything that a scan gives to its function.
func found(scan func(fn func(Range) error) error) (bool, error) {
	stop := errors.New("found")
	err := scan(func(Range) error { return stop })
	if errors.Is(err, stop) {
		return true, nil
	}
	return false, err
}

// Tracked lists what is registered, as of the last Refresh.
func (t *Tracker) Tracked() []Range {
	t.mu.Lock()
	defer t.mu.Unlock()
	var ranges []Range
	for _, s := range t.tracked {
		if n := len(ranges); n > 0 && ranges[n-1].End == s.Start {
			ranges[n-1].End = s.End
			continue
		}
		ranges = append(ranges, s.Range)
	}
	return ranges
}

// Untracked lists the mappings that are not, as of the last Refresh. Their pages
// count as written.
func (t *Tracker) Untracked() []Mapping {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.untracked)
}
