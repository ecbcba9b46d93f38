// SPDX-License-Identifier: Apache-2.0

package track

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestTakeReportsEverythingFirstAndThenWhatWasWritten(t *testing.T) {
	s := startSubject(t, nil)
	m := s.mapping(0, 64, "anon")
	s.do("fill 0 1 0 40") // pages 40.. are never touched
	tr := s.attach()
	expect(t, "first Take", taken(t, tr, m), pages(0, 40))
	expect(t, "second Take", taken(t, tr, m), pages(0, 0))
	expect(t, "Clean", clean(t, tr, m), pages(0, 40))
	s.do("fill 0 2 10 5")
	s.do("fill 0 2 60 2")
	expect(t, "Clean after writes", clean(t, tr, m), union(pages(0, 10), pages(15, 40)))
	expect(t, "Take after writes", taken(t, tr, m), union(pages(10, 15), pages(60, 62)))
	expect(t, "Clean after Take", clean(t, tr, m), union(pages(0, 40), pages(60, 62)))
}

func union(sets ...pageSet) pageSet {
	all := pageSet{}
	for _, s := range sets {
		for p := range s {
			all[p] = true
		}
	}
	return all
}

func TestManyScatteredPagesAreReportedOnceEach(t *testing.T) {
	const n = 20000 // more regions than one system call returns
	s, m, tr := trackedSubject(t, n)
	want := pageSet{}
	for i := 0; i < n; i += 2 {
		want[i] = true
	}
	for i := 0; i < n; i += 200 {
		for j := i; j < i+200; j += 2 {
			s.do("fill 0 2 %d 1", j)
		}
	}
	expect(t, "Take", taken(t, tr, m), want)
	for i := 0; i < n; i += 1000 {
		s.do("fill 0 3 %d 1", i)
		delete(want, i)
	}
	got := clean(t, tr, m) // pagesOf fails on a range that is out of order
	for i := range n {
		if got[i] == (i%1000 == 0) {
			t.Fatalf("page %d clean: %v", i, got[i])
		}
	}
}

func TestWhatFnDidNotAcceptStaysWritten(t *testing.T) {
	s := startSubject(t, nil)
	m := s.mapping(0, 64, "anon")
	for i := 0; i < 64; i += 2 {
		s.do("fill 0 1 %d 1", i)
	}
	tr := s.attach()
	refused := errors.New("refused")
	accepted := pageSet{}
	err := tr.Take(context.Background(), func(r Range) error {
		if overlap(r, m) == 0 {
			return nil
		}
		p := int((r.Start - m.Start) / pageSize)
		if p == 20 {
			return refused
		}
		accepted[p] = true
		return nil
	})
	if !errors.Is(err, refused) {
		t.Fatalf("Take: %v", err)
	}
	want := pageSet{}
	for i := 20; i < 64; i += 2 {
		want[i] = true
	}
	expect(t, "Clean after a refused Take", clean(t, tr, m), accepted)
	expect(t, "Take after a refused Take", taken(t, tr, m), want)
}

func TestNewMappingIsDirtyUntilRefreshedAndTaken(t *testing.T) {
	s := startSubject(t, nil)
	tr := s.attach()
	taken(t, tr, Range{})
	m := s.mapping(0, 16, "anon")
	s.do("fill 0 1")
	expect(t, "Take before Refresh", taken(t, tr, m), pages(0, 0))
	expect(t, "Clean before Refresh", clean(t, tr, m), pages(0, 0))
	if n, err := tr.Written(); err != nil || n < 16 {
		t.Errorf("Written before Refresh: %d, %v; it leaves out a mapping that is not registered", n, err)
	}
	if added := refresh(t, tr); added < 1 {
		t.Errorf("Refresh added %d", added)
	}
	if !isTracked(tr, m) {
		t.Errorf("not tracked after Refresh: %s", untrackedWhy(tr, m))
	}
	expect(t, "Clean after Refresh", clean(t, tr, m), pages(0, 0))
	expect(t, "Take after Refresh", taken(t, tr, m), pages(0, 16))
	expect(t, "Clean after Take", clean(t, tr, m), pages(0, 16))
	if added := refresh(t, tr); added != 0 {
		t.Errorf("a Refresh without news added %d", added)
	}
	expect(t, "Clean after another Refresh", clean(t, tr, m), pages(0, 16))
}

func TestHeapGrownByBrkIsDirtyUntilTaken(t *testing.T) {
	s := startSubject(t, nil)
	s.do("brk 16")
	tr := s.attach()
	taken(t, tr, Range{})
	m := asRange(s.do("brk 32"))
	m.Start += pageSize - 1
	m.Start -= m.Start % pageSize
	m.End -= m.End % pageSize
	expect(t, "Clean of new heap", clean(t, tr, m), pages(0, 0))
	refresh(t, tr)
	n := int(m.Size() / pageSize)
	expect(t, "Take of new heap", taken(t, tr, m), pages(0, n))
	expect(t, "Clean of new heap", clean(t, tr, m), pages(0, n))
}

func TestGrowingStackIsDirtyUntilTaken(t *testing.T) {
	s := startSubject(t, nil)
	tr := s.attach()
	taken(t, tr, Range{})
	before := stackOf(t, s.pid)
	s.do("stack 512")
	after := stackOf(t, s.pid)
	grown := Range{after.Start, before.Start}
	if grown.Size() < 128<<10 {
		t.Fatalf("the stack did not grow: %x then %x", before, after)
	}
	expect(t, "Clean of the grown stack", clean(t, tr, grown), pages(0, 0))
	refresh(t, tr)
	if got := taken(t, tr, grown); len(got) < 32 {
		t.Errorf("Take of the grown stack: %v", got.list())
	}
	if got := clean(t, tr, grown); len(got) < 32 {
		t.Errorf("Clean of the grown stack: %v", got.list())
	}
	s.do("stack 512")
	expect(t, "Clean after the stack was used again", clean(t, tr, Range{grown.Start + 8*pageSize, grown.End - 8*pageSize}), pages(0, 0))
}

func stackOf(t *testing.T, pid int) Range {
	t.Helper()
	areas, err := readMaps(procPath(pid, "maps"))
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range areas {
		if a.path == "[stack]" {
			return a.Range
		}
	}
	t.Fatal("no stack")
	return Range{}
}

func TestMovedMappingIsDirtyEverywhere(t *testing.T) {
	s, old, tr := trackedSubject(t, 32)
	moved := asRange(s.do("move 0"))
	for _, when := range []string{"before", "after"} {
		expect(t, "Clean of the old place "+when+" Refresh", clean(t, tr, old), pages(0, 0))
		expect(t, "Clean of the new place "+when+" Refresh", clean(t, tr, moved), pages(0, 0))
		refresh(t, tr)
	}
	expect(t, "Take of the new place", taken(t, tr, moved), pages(0, 32))
	expect(t, "Clean of the new place", clean(t, tr, moved), pages(0, 32))
}

func TestMappingGrownInPlaceIsDirtyWhereItIsNew(t *testing.T) {
	s, _, tr := trackedSubject(t, 32)
	m := asRange(s.do("resize 0 64"))
	s.do("fill 0 2 32 32")
	refresh(t, tr)
	// Its first page is given up: it was asked of it whose the mapping is (refresh).
	expect(t, "Clean after growing", clean(t, tr, m), pages(1, 32))
	expect(t, "Take after growing", taken(t, tr, m), union(pages(0, 1), pages(32, 64)))
	m = asRange(s.do("resize 0 16"))
	expect(t, "Clean after shrinking", clean(t, tr, Range{m.Start, m.Start + 64*pageSize}), pages(0, 16))
}

// The page table of the new mapping must not inherit a word about the old one.
func TestAnotherMappingAtTheSamePlaceIsNeverClean(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, 16*pageSize), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"anon", "filep", "shared", "memfd"} {
		t.Run(kind, func(t *testing.T) {
			s, m, tr := trackedSubject(t, 16)
			s.do("remap 0 %s %s", kind, file)
			expect(t, "Clean, untouched", clean(t, tr, m), pages(0, 0))
			s.do("fill 0 2")
			expect(t, "Clean, filled", clean(t, tr, m), pages(0, 0))
			expect(t, "Take before Refresh", taken(t, tr, m), pages(0, 0))
			refresh(t, tr)
			expect(t, "Clean, refreshed", clean(t, tr, m), pages(0, 0))
			want := pages(0, 16)
			if kind == "shared" || kind == "memfd" {
				want = pages(0, 0)
			}
			expect(t, "Take", taken(t, tr, m), want)
			expect(t, "Clean after Take", clean(t, tr, m), want)
		})
	}
}

func TestDroppedPagesAreNotClean(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, 16*pageSize), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"anon", "filep", "zero"} {
		t.Run(kind, func(t *testing.T) {
			s := startSubject(t, nil)
			m := s.mapping(0, 16, kind, file)
			s.do("fill 0 1")
			tr := s.attach()
			expect(t, "Take", taken(t, tr, m), pages(0, 16))
			s.do("advise 0 %d 4 4", unix.MADV_DONTNEED)
			expect(t, "Clean, dropped", clean(t, tr, m), union(pages(0, 4), pages(8, 16)))
			s.do("sum 0") // reads, so the pages are there again: zero pages, or the file's
			expect(t, "Clean, read again", clean(t, tr, m), union(pages(0, 4), pages(8, 16)))
			expect(t, "Take, read again", taken(t, tr, m), pages(0, 0))
			s.do("fill 0 2 5 1")
			expect(t, "Clean, written again", clean(t, tr, m), union(pages(0, 4), pages(8, 16)))
			expect(t, "Take, written again", taken(t, tr, m), pages(5, 6))
			expect(t, "Clean at last", clean(t, tr, m), union(pages(0, 4), pages(5, 6), pages(8, 16)))
		})
	}
}

// A page that MADV_FREE gave to the kernel is still there until memory is short;
// meanwhile its contents are what they were. When it is taken, it is not there.
func TestFreedPagesAreCleanOnlyWhileTheyAreThere(t *testing.T) {
	s, m, tr := trackedSubject(t, 16)
	s.do("advise 0 %d 4 4", unix.MADV_FREE)
	got := clean(t, tr, m)
	for p := range pages(0, 4) {
		if !got[p] {
			t.Errorf("page %d is not clean", p)
		}
	}
	// MADV_PAGEOUT of pages freed lazily drops them.
	if _, err := s.try("advise 0 %d 4 4", unix.MADV_PAGEOUT); err != nil {
		missing(t, "MADV_PAGEOUT: "+err.Error())
	}
	s.do("fill 0 9 6 1")
	got = clean(t, tr, m)
	if got[6] {
		t.Error("a page that was freed and written again is clean")
	}
	s.do("sum 0")
	got = clean(t, tr, m)
	for p := range pages(4, 8) {
		if content(t, s.pid, m.Start+uint64(p)*pageSize) != 1 && got[p] {
			t.Errorf("page %d lost its contents and is clean", p)
		}
	}
}

func content(t *testing.T, pid int, addr uint64) byte {
	t.Helper()
	mem, err := os.Open(procPath(pid, "mem"))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	var b [1]byte
	if _, err := mem.ReadAt(b[:], int64(addr)); err != nil {
		t.Fatal(err)
	}
	return b[0]
}

func TestProtectionChangesKeepTheState(t *testing.T) {
	s, m, tr := trackedSubject(t, 16)
	s.do("protect 0 %d 4 4", unix.PROT_READ)
	s.do("protect 0 %d 4 4", unix.PROT_READ|unix.PROT_WRITE)
	expect(t, "Clean", clean(t, tr, m), pages(0, 16))
	s.do("fill 0 2 5 1")
	expect(t, "Take", taken(t, tr, m), pages(5, 6))
}

func TestReservedMemoryIsTrackedFromItsFirstUse(t *testing.T) {
	s := startSubject(t, nil)
	m := s.mapping(0, 64, "none")
	tr := s.attach()
	taken(t, tr, m)
	s.do("protect 0 %d 8 8", unix.PROT_READ|unix.PROT_WRITE)
	s.do("fill 0 1 8 8")
	expect(t, "Clean", clean(t, tr, m), pages(0, 0))
	expect(t, "Take without Refresh", taken(t, tr, m), pages(8, 16))
	expect(t, "Clean after Take", clean(t, tr, m), pages(8, 16))
}

// madvGuardInstall is MADV_GUARD_INSTALL, include/uapi/asm-generic/mman-common.h, Linux 6.13.
const madvGuardInstall = 102

func TestGuardPagesHaveNoContents(t *testing.T) {
	s, m, tr := trackedSubject(t, 16)
	if _, err := s.try("advise 0 %d 4 4", madvGuardInstall); err != nil {
		missing(t, "MADV_GUARD_INSTALL: "+err.Error())
	}
	for _, guards := range []bool{true, false} { // as on kernels before 6.15, too
		tr.guards = guards
		expect(t, "Clean", clean(t, tr, m), union(pages(0, 4), pages(8, 16)))
		expect(t, "Take", taken(t, tr, m), pages(0, 0))
	}
	s.do("advise 0 %d 4 4", madvGuardInstall+1)
	s.do("fill 0 2 5 1")
	expect(t, "Take of what was a guard", taken(t, tr, m), pages(5, 6))
}

func TestVDSOAndKernelMappingsAreLeftAlone(t *testing.T) {
	s := startSubject(t, nil)
	tr := s.attach()
	areas, err := readMaps(procPath(s.pid, "maps"))
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, a := range areas {
		if a.untrackable() == whyKernel {
			found++
			if untrackedWhy(tr, a.Range) != whyKernel {
				t.Errorf("%s: %q", a.path, untrackedWhy(tr, a.Range))
			}
		}
	}
	if found == 0 {
		t.Error("no vDSO")
	}
}
