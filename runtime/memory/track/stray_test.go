// SPDX-License-Identifier: Apache-2.0

package track

import (
	"testing"

	"github.com/cohort-project/cohort/runtime/memory/internal/uapi"
)

func strays(t *testing.T, tr *Tracker, within Range) pageSet {
	t.Helper()
	return pagesOf(t, within, func(fn func(Range) error) error { return tr.Clean(ignore, fn) })
}

// dumped is what CRIU dumps where it is to leave out what was not written: what the kernel says to be
// written, whoever tracks it (contrib/criu-preload, scan_written).
func dumped(t *testing.T, tr *Tracker, within Range) pageSet {
	t.Helper()
	vec := make([]uapi.PageRegion, 512)
	n, err := uapi.PagemapScan(int(tr.pagemap.Fd()), &uapi.PmScanArg{
		Start: within.Start, End: within.End, CategoryMask: uapi.PageIsWritten, CategoryAnyofMask: populatedAny,
	}, vec)
	if err != nil {
		t.Fatal(err)
	}
	return pagesOf(t, within, func(fn func(Range) error) error {
		for _, r := range vec[:n] {
			if err := fn(Range{r.Start, r.End}); err != nil {
				return err
			}
		}
		return nil
	})
}

// joined is a subject whose mapping of 32 pages, all written and taken, has been continued by another one
// of 8 that had no page, both registered. The kernel takes the registration from both, and leaves the marks.
func joined(t *testing.T) (*subject, Range, *Tracker) {
	t.Helper()
	s, _, tr := trackedSubject(t, 32)
	s.mapping(1, 8, "anon")
	refresh(t, tr)
	m := asRange(s.do("join 0 1"))
	if allowsWP(tr.pagemap, m.Start) {
		t.Log("this kernel keeps the registration of a mapping that another one is moved to")
	}
	return s, m, tr
}

// Every page is either dumped by one who believes the kernel, or told: as clean, or as a stray.
func TestNoPageOfAMappingThatLostItsRegistrationIsPassedOver(t *testing.T) {
	s, m, tr := joined(t)
	complete := func(when string, want pageSet) {
		t.Helper()
		c := clean(t, tr, m)
		if lost := !allowsWP(tr.pagemap, m.Start); lost && len(c) > 0 {
			t.Errorf("%s: pages %v of a mapping that is not registered are clean", when, c.list())
		}
		expect(t, when, union(union(dumped(t, tr, m), c), strays(t, tr, m)), want)
	}
	complete("joined", pages(0, 32))
	s.do("fill 0 2 5 1")
	complete("written to a page", pages(0, 32))
	if clean(t, tr, m)[5] {
		t.Error("a page that was written is clean")
	}
	s.do("fill 0 2 36 2")
	complete("written to new pages", union(pages(0, 32), pages(36, 38)))
	refresh(t, tr)
	want := union(pages(0, 32), pages(36, 38))
	if allowsWP(tr.pagemap, m.Start) {
		expect(t, "Take, registered anew", taken(t, tr, m), want)
		expect(t, "Clean, registered anew", clean(t, tr, m), want)
		expect(t, "strays, registered anew", strays(t, tr, m), pages(0, 0))
	}
}

// The control: without the strays pages are missing, on a kernel that is so.
func TestStraysAreWhatTheKernelDoesNotTell(t *testing.T) {
	s, m, tr := joined(t)
	s.do("fill 0 2")
	if allowsWP(tr.pagemap, m.Start) {
		t.Skip("this kernel keeps the registration")
	}
	if got := union(dumped(t, tr, m), clean(t, tr, m)); len(got) == 40 {
		t.Error("the kernel tells all that was written: nobody needs strays any more")
	}
}

// A tracker that comes later finds the marks of one before, of a mapping that was not registered any more
// when that one was closed.
func TestMarksThatATrackerHasLeftCountAsWritten(t *testing.T) {
	s, m, tr := joined(t)
	if err := tr.Close(); err != nil {
		t.Fatal(err)
	}
	s.do("fill 0 2 5 1")
	later := s.attach()
	expect(t, "first Take", taken(t, later, m), pages(0, 32))
	s.do("fill 0 2 5 1")
	expect(t, "second Take", taken(t, later, m), pages(5, 6))
}

// What could not be accepted counts as written, also where a mapping before it has gone meanwhile.
func TestGivingBackGoesOnBehindAGap(t *testing.T) {
	s, m, tr := trackedSubject(t, 32)
	s.do("unmap 0 10 3")
	tr.giveBack(m)
	expect(t, "Clean", clean(t, tr, m), pages(0, 0))
	expect(t, "Take", taken(t, tr, m), union(pages(0, 10), pages(13, 32)))
}
