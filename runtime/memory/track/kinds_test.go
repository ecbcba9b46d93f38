// SPDX-License-Identifier: Apache-2.0

package track

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSharedMemoryIsReportedAsUntracked(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, 16*pageSize), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"shared", "memfd", "files"} {
		t.Run(kind, func(t *testing.T) {
			s := startSubject(t, nil)
			m := s.mapping(0, 16, kind, file)
			s.do("fill 0 1")
			tr := s.attach()
			if why := untrackedWhy(tr, m); why != whyShared {
				t.Errorf("untracked because %q", why)
			}
			expect(t, "Take", taken(t, tr, m), pages(0, 0))
			expect(t, "Clean", clean(t, tr, m), pages(0, 0))
		})
	}
}

func TestPrivateFileMappingIsTrackedWhereItWasCopied(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, 32*pageSize), 0o644); err != nil {
		t.Fatal(err)
	}
	s := startSubject(t, nil)
	m := s.mapping(0, 32, "filep", file)
	s.do("sum 0") // all pages are there, and the file's
	s.do("fill 0 1 8 8")
	tr := s.attach()
	expect(t, "first Take", taken(t, tr, m), pages(8, 16))
	expect(t, "Clean", clean(t, tr, m), pages(8, 16))
	s.do("fill 0 2 12 8")
	expect(t, "Clean after writes", clean(t, tr, m), pages(8, 12))
	expect(t, "Take after writes", taken(t, tr, m), pages(12, 20))
	// Read only now: stays tracked, because it has pages of its own.
	s.do("protect 0 %d 0 32", unix.PROT_READ)
	refresh(t, tr)
	expect(t, "Clean when read only", clean(t, tr, m), pages(8, 20))
}

func TestLockedMemoryIsTracked(t *testing.T) {
	s := startSubject(t, nil)
	m := s.mapping(0, 16, "lock") // populated at once, with written-looking zeros or the zero page
	s.do("fill 0 1")
	tr := s.attach()
	expect(t, "Take", taken(t, tr, m), pages(0, 16))
	s.do("fill 0 2 3 2")
	expect(t, "Clean", clean(t, tr, m), union(pages(0, 3), pages(5, 16)))
	s.do("lock 0")
	// mlock touches every page as a write would: more is dirty than need be.
	expect(t, "Take after mlock", taken(t, tr, m), pages(0, 16))
	expect(t, "Clean after mlock", clean(t, tr, m), pages(0, 16))
}

func TestWritesOfTheKernelForTheProcessAreSeen(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, 16*pageSize), 0o644); err != nil {
		t.Fatal(err)
	}
	s, m, tr := trackedSubject(t, 32)
	s.do("read 0 4 4 %s", file)
	expect(t, "Take after read(2)", taken(t, tr, m), pages(4, 8))
	// As process_vm_writev of a debugger or of a neighbour would.
	mem, err := os.OpenFile(procPath(s.pid, "mem"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	if _, err := mem.WriteAt([]byte{7}, int64(m.Start+9*pageSize)); err != nil {
		t.Fatal(err)
	}
	expect(t, "Take after a write from outside", taken(t, tr, m), pages(9, 10))
}

func TestTransparentHugePagesAreTrackedPageByPage(t *testing.T) {
	mode, err := os.ReadFile("/sys/kernel/mm/transparent_hugepage/enabled")
	if err != nil || strings.Contains(string(mode), "[never]") {
		missing(t, "transparent huge pages")
	}
	s := startSubject(t, nil)
	m := s.mapping(0, 2048, "thp")
	s.do("fill 0 1")
	if !hasHuge(t, s.pid, m) {
		missing(t, "a transparent huge page")
	}
	tr := s.attach()
	expect(t, "first Take", taken(t, tr, m), pages(0, 2048))
	expect(t, "Clean", clean(t, tr, m), pages(0, 2048))
	s.do("fill 0 2 700 2")
	expect(t, "Clean after writes", clean(t, tr, m), union(pages(0, 700), pages(702, 2048)))
	expect(t, "Take after writes", taken(t, tr, m), pages(700, 702))
	s.do("advise 0 %d 512 512", unix.MADV_DONTNEED)
	s.do("fill 0 3 512 512") // a huge page anew
	expect(t, "Clean after a new huge page", clean(t, tr, m), union(pages(0, 512), pages(1024, 2048)))
	expect(t, "Take of a new huge page", taken(t, tr, m), pages(512, 1024))
	moved := asRange(s.do("move 0"))
	expect(t, "Clean after moving huge pages", clean(t, tr, moved), pages(0, 0))
}

func hasHuge(t *testing.T, pid int, m Range) bool {
	t.Helper()
	data, err := os.ReadFile(procPath(pid, "smaps"))
	if err != nil {
		t.Fatal(err)
	}
	inside := false
	for line := range strings.Lines(string(data)) {
		if a, err := parseArea(strings.TrimSpace(line)); err == nil {
			inside = overlap(a.Range, m) > 0
		}
		if value, ok := strings.CutPrefix(line, "AnonHugePages:"); ok && inside && !strings.HasPrefix(strings.TrimSpace(value), "0 ") {
			return true
		}
	}
	return false
}

func TestHugetlbPagesAreTrackedWhole(t *testing.T) {
	const knob = "/proc/sys/vm/nr_hugepages"
	before, err := os.ReadFile(knob)
	if err != nil {
		missing(t, "hugetlb pages: "+err.Error())
	}
	count, _ := strconv.Atoi(strings.TrimSpace(string(before)))
	if err := os.WriteFile(knob, []byte(strconv.Itoa(count+8)), 0); err != nil {
		missing(t, "hugetlb pages: "+err.Error())
	}
	t.Cleanup(func() { _ = os.WriteFile(knob, before, 0) })
	s := startSubject(t, nil)
	const pages2M = 512
	numbers, err := s.try("map 0 %d huge", 4*pages2M)
	if err != nil {
		missing(t, "hugetlb pages: "+err.Error())
	}
	m := asRange(numbers)
	s.do("fill 0 1 0 %d", 3*pages2M)
	tr := s.attach()
	if !isTracked(tr, m) {
		t.Fatalf("not tracked: %s", untrackedWhy(tr, m))
	}
	expect(t, "first Take", taken(t, tr, m), pages(0, 3*pages2M))
	expect(t, "Clean", clean(t, tr, m), pages(0, 3*pages2M))
	s.do("fill 0 2 %d 1", pages2M+7)
	expect(t, "Clean after a write", clean(t, tr, m), union(pages(0, pages2M), pages(2*pages2M, 3*pages2M)))
	expect(t, "Take after a write", taken(t, tr, m), pages(pages2M, 2*pages2M))
	s.do("advise 0 %d 0 %d", unix.MADV_DONTNEED, pages2M)
	expect(t, "Clean after dropping one", clean(t, tr, m), pages(pages2M, 3*pages2M))
	s.do("fill 0 3 0 %d", pages2M)
	expect(t, "Clean after filling it anew", clean(t, tr, m), pages(pages2M, 3*pages2M))
	// The kernel takes nothing but whole ones.
	tr.giveBack(Range{m.Start + (2*pages2M+9)*pageSize, m.Start + (2*pages2M+10)*pageSize})
	expect(t, "Clean after giving back a part of one", clean(t, tr, m), pages(pages2M, 2*pages2M))
	// As if it had been registered by a Refresh that was not finished.
	tr.tracked = tr.tracked[:1]
	refresh(t, tr)
	if !isTracked(tr, m) {
		t.Errorf("not tracked any more: %s", untrackedWhy(tr, m))
	}
}

func TestSwappedPagesKeepTheirState(t *testing.T) {
	swapFile(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, 64*pageSize), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"anon", "filep"} {
		t.Run(kind, func(t *testing.T) {
			s := startSubject(t, nil)
			m := s.mapping(0, 64, kind, file)
			s.do("fill 0 1")
			s.do("advise 0 %d 0 32", unix.MADV_PAGEOUT)
			if swapped(t, s.pid, m) == 0 {
				missing(t, "a page that goes to swap when asked to")
			}
			tr := s.attach()
			expect(t, "first Take, partly on swap", taken(t, tr, m), pages(0, 64))
			expect(t, "Clean, partly on swap", clean(t, tr, m), pages(0, 64))
			s.do("advise 0 %d 32 32", unix.MADV_PAGEOUT)
			expect(t, "Clean, on swap", clean(t, tr, m), pages(0, 64))
			s.do("sum 0") // back
			expect(t, "Clean, back from swap", clean(t, tr, m), pages(0, 64))
			s.do("advise 0 %d 0 64", unix.MADV_PAGEOUT)
			s.do("fill 0 2 10 4")
			s.do("advise 0 %d 0 64", unix.MADV_PAGEOUT)
			expect(t, "Clean, written and on swap again", clean(t, tr, m), union(pages(0, 10), pages(14, 64)))
			s.do("advise 0 %d 40 4", unix.MADV_DONTNEED)
			expect(t, "Clean, some dropped from swap", clean(t, tr, m), union(pages(0, 10), pages(14, 40), pages(44, 64)))
			expect(t, "Take", taken(t, tr, m), pages(10, 14))
		})
	}
}

func swapped(t *testing.T, pid int, m Range) int {
	t.Helper()
	f, err := os.Open(procPath(pid, "pagemap"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n := 0
	for at := m.Start; at < m.End; at += pageSize {
		var entry [8]byte
		if _, err := f.ReadAt(entry[:], int64(at/pageSize*8)); err != nil {
			t.Fatal(err)
		}
		if entry[7]&0x40 != 0 {
			n++
		}
	}
	return n
}

// swapFile adds swap for the time of a test. The file is written in full: a hole
// cannot be swapped to.
func swapFile(t *testing.T) {
	t.Helper()
	needTracking(t)
	file := filepath.Join(t.TempDir(), "swap")
	if err := os.WriteFile(file, make([]byte, 16<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	mkswap, err := exec.LookPath("mkswap")
	if err != nil {
		if mkswap = "/sbin/mkswap"; !exists(mkswap) {
			missing(t, "mkswap")
		}
	}
	if out, err := exec.Command(mkswap, file).CombinedOutput(); err != nil {
		missing(t, "mkswap: "+string(out))
	}
	swapon := filepath.Join(filepath.Dir(mkswap), "swapon")
	if out, err := exec.Command(swapon, file).CombinedOutput(); err != nil {
		missing(t, "swapon: "+string(out))
	}
	t.Cleanup(func() {
		if out, err := exec.Command(filepath.Join(filepath.Dir(mkswap), "swapoff"), file).CombinedOutput(); err != nil {
			t.Errorf("swapoff: %s", out)
		}
	})
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
