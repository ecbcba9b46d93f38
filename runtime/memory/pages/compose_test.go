// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"unsafe"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/oci"
)

const testPid = 4711 // in the "container"

// arena is memory of this process that plays the tracked one.
type arena struct {
	t    *testing.T
	mem  []byte
	base uint64
	// populated, and for a page of what is mapped the content that a restore must bring.
	mapped, populated map[uint64]bool
	dirty             map[uint64]bool
}

func newArena(t *testing.T, pages int) *arena {
	t.Helper()
	mem, err := unix.Mmap(-1, 0, pages*int(pageSize), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(mem) })
	a := &arena{t: t, mem: mem, base: uint64(uintptr(unsafe.Pointer(&mem[0]))), mapped: map[uint64]bool{}, populated: map[uint64]bool{}, dirty: map[uint64]bool{}}
	return a
}

func (a *arena) addr(i int) uint64 { return a.base + uint64(i)*pageSize }

func (a *arena) page(addr uint64) []byte {
	off := addr - a.base
	return a.mem[off : off+pageSize : off+pageSize]
}

func (a *arena) write(addr, value uint64) {
	binary.LittleEndian.PutUint64(a.page(addr), value)
	a.mapped[addr], a.populated[addr], a.dirty[addr] = true, true, true
}

func (a *arena) wipe(addr uint64) {
	clear(a.page(addr))
	a.mapped[addr], a.populated[addr], a.dirty[addr] = true, true, true
}

// unmap makes a page unreadable, as munmap does, but keeps the address for us.
func (a *arena) unmap(addr uint64) {
	if err := unix.Madvise(a.page(addr), unix.MADV_DONTNEED); err != nil {
		a.t.Fatal(err)
	}
	a.mapped[addr] = false
	delete(a.populated, addr)
	delete(a.dirty, addr)
}

func (a *arena) addrs(set map[uint64]bool) []uint64 {
	var out []uint64
	for i := range len(a.mem) / int(pageSize) {
		if set[a.addr(i)] {
			out = append(out, a.addr(i))
		}
	}
	return out
}

func toRanges(addrs []uint64) []Range {
	var out []Range
	for _, a := range addrs {
		if n := len(out); n > 0 && out[n-1].End == a {
			out[n-1].End += pageSize
		} else {
			out = append(out, Range{a, a + pageSize})
		}
	}
	return out
}

func (a *arena) round(p *Process) Copied {
	a.t.Helper()
	c, err := p.Copy(context.Background(), os.Getpid(), slices.Values(toRanges(a.addrs(a.dirty))))
	if err != nil {
		a.t.Fatal(err)
	}
	clear(a.dirty)
	return c
}

func (a *arena) clean() []Range {
	var out []uint64
	for _, addr := range a.addrs(a.populated) {
		if !a.dirty[addr] {
			out = append(out, addr)
		}
	}
	return toRanges(out)
}

// verify restores the images of testPid into nothing and compares every page.
func (a *arena) verify(dir string) {
	a.t.Helper()
	r, err := openReader(dir, Object{Task, testPid})
	if err != nil {
		a.t.Fatal(err)
	}
	defer r.close()
	got := make([]byte, pageSize)
	for i := range len(a.mem) / int(pageSize) {
		addr := a.addr(i)
		ok, err := r.page(addr, got)
		switch {
		case err != nil:
			a.t.Fatal(err)
		case ok != a.populated[addr]:
			a.t.Fatalf("page %d: in the images %v, in the process %v", i, ok, a.populated[addr])
		case ok && !bytes.Equal(got, a.page(addr)):
			a.t.Fatalf("page %d: %x, in the process %x", i, got[:8], a.page(addr)[:8])
		}
	}
}

func newStore(t *testing.T, options ...Option) *Store {
	t.Helper()
	s, err := NewStore(filepath.Join(t.TempDir(), "store"), options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Discard(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func (a *arena) maps() []*vma.VmaEntry {
	return []*vma.VmaEntry{mapping(Range{a.base, a.base + uint64(len(a.mem))}, vmaRegular|vmaAnonPrivate, 0x22)}
}

// TestEveryPageIsRestoredAsItWasInTheBarrier plays random lives of a process:
// pages written, wiped, unmapped, mapped again, between any number of rounds.
func TestEveryPageIsRestoredAsItWasInTheBarrier(t *testing.T) {
	const lives, size = 60, 600
	for life := range lives {
		t.Run(fmt.Sprint(life), func(t *testing.T) {
			t.Parallel()
			rnd := rand.New(rand.NewPCG(uint64(life), 1))
			a := newArena(t, size)
			step := func(n int) {
				for range n {
					// Runs, so that extents are of all lengths.
					first, length, act := rnd.IntN(size), 1+rnd.IntN(1+rnd.IntN(60)), rnd.IntN(10)
					for i := first; i < min(first+length, size); i++ {
						switch {
						case act < 7:
							a.write(a.addr(i), rnd.Uint64())
						case act < 8:
							a.wipe(a.addr(i))
						default:
							a.unmap(a.addr(i))
						}
					}
				}
			}
			s := newStore(t)
			p := s.Process(testPid)
			step(rnd.IntN(40))
			for range rnd.IntN(6) {
				switch rnd.IntN(6) {
				case 0, 1:
					s.Hold()
				case 2: // there is no more memory for it
					s.held.full = true
				}
				a.round(p)
				step(rnd.IntN(12))
			}
			if missing, err := p.Missing(a.clean()); err != nil || len(missing) > 0 {
				t.Fatalf("missing %v, %v", missing, err)
			}
			effect := rnd.IntN(4) > 0 // of the preload library
			dumped, clean := a.addrs(a.dirty), a.clean()
			if !effect {
				dumped = a.addrs(a.populated)
			}
			dir := filepath.Join(t.TempDir(), "checkpoint")
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			writeCRIU(t, dir, testPid, a.maps(), dumped, a.page)
			held := p.Pages()
			stats, err := Compose(context.Background(), dir, s, map[int][]Range{testPid: clean})
			if err != nil {
				t.Fatal(err)
			}
			a.verify(dir)
			want := Stats{OwnPages: uint64(len(dumped)), ParentPages: count(clean)}
			if !effect {
				want.ParentPages, want.Overlap = 0, count(clean)
			}
			want.StalePages = held - want.ParentPages
			stats.Moved, stats.Processes = 0, 0
			if stats != want {
				t.Errorf("stats %+v, want %+v", stats, want)
			}
		})
	}
}

// TestACleanPageThatNobodyHasIsAnError is about the worst that could happen: a page of zeros restored.
func TestACleanPageThatNobodyHasIsAnError(t *testing.T) {
	for _, test := range []struct {
		name string
		life func(a *arena, p *Process)
	}{
		{"never copied", func(a *arena, p *Process) {
			a.round(p)
			a.write(a.addr(20), 1)
			delete(a.dirty, a.addr(20))
		}},
		{"could not be read again", func(a *arena, p *Process) {
			a.round(p)
			a.write(a.addr(5), 2)
			// A tracker has armed the page, and it cannot be read when its turn comes.
			c, err := p.Copy(context.Background(), os.Getpid(), slices.Values([]Range{{a.addr(5), a.addr(6)}}))
			if err != nil || c.Pages != 1 {
				a.t.Fatal(c, err)
			}
			p.base.gone.set(5)
			clear(a.dirty)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			a := newArena(t, 32)
			for i := range 10 {
				a.write(a.addr(i), uint64(i+1))
			}
			s := newStore(t)
			p := s.Process(testPid)
			test.life(a, p)
			missing, err := p.Missing(a.clean())
			if err != nil || count(missing) != 1 {
				t.Fatalf("missing %v, %v", missing, err)
			}
			dir := t.TempDir()
			writeCRIU(t, dir, testPid, a.maps(), nil, nil)
			if _, err := Compose(context.Background(), dir, s, map[int][]Range{testPid: a.clean()}); !errors.Is(err, ErrIncomplete) {
				t.Fatalf("composed with a page missing: %v", err)
			}
			// Copied in the barrier it is there.
			if _, err := p.Copy(context.Background(), os.Getpid(), slices.Values(missing)); err != nil {
				t.Fatal(err)
			}
			dir = t.TempDir()
			writeCRIU(t, dir, testPid, a.maps(), nil, nil)
			if _, err := Compose(context.Background(), dir, s, map[int][]Range{testPid: a.clean()}); err != nil {
				t.Fatal(err)
			}
			a.verify(dir)
		})
	}
}

// TestUnreadablePagesAreSkippedAndForbiddenOnesRead distinguishes what is not there from what may not be read.
func TestUnreadablePagesAreSkippedAndForbiddenOnesRead(t *testing.T) {
	a := newArena(t, 64)
	for i := range 64 {
		a.write(a.addr(i), uint64(i+1))
	}
	s := newStore(t)
	p := s.Process(testPid)
	hole := a.mem[10*pageSize : 20*pageSize]
	if _, _, errno := unix.Syscall6(unix.SYS_MMAP, uintptr(a.addr(10)), uintptr(len(hole)), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED, ^uintptr(0), 0); errno != 0 {
		t.Fatal(errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_MUNMAP, uintptr(a.addr(12)), uintptr(4*pageSize), 0); errno != 0 {
		t.Fatal(errno)
	}
	t.Cleanup(func() { // the whole mapping is removed afterwards
		unix.Syscall6(unix.SYS_MMAP, uintptr(a.addr(12)), uintptr(4*pageSize), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED, ^uintptr(0), 0)
	})
	closed := a.mem[30*pageSize : 35*pageSize]
	if err := unix.Mprotect(closed, unix.PROT_NONE); err != nil {
		t.Fatal(err)
	}
	c, err := p.Copy(context.Background(), os.Getpid(), slices.Values([]Range{{a.base, a.base + uint64(len(a.mem))}}))
	if err != nil {
		t.Fatal(err)
	}
	if c.Gone != 4 || c.Pages != 60 {
		t.Errorf("%+v; 4 pages are not mapped", c)
	}
	missing, err := p.Missing([]Range{{a.base, a.base + uint64(len(a.mem))}})
	if err != nil || !slices.Equal(missing, []Range{{a.addr(12), a.addr(16)}}) {
		t.Errorf("missing %v, %v", missing, err)
	}
	if err := unix.Mprotect(closed, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		t.Fatal(err)
	}
	found, _ := p.resolve([]Range{{a.addr(30), a.addr(35)}})
	for _, f := range found {
		got := make([]byte, f.End-f.Start)
		if _, err := f.level.f.ReadAt(got, int64(f.slot*pageSize)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, a.mem[f.Start-a.base:f.End-a.base]) {
			t.Errorf("%s was not read through the protection", f.Range)
		}
	}
}

// TestPagesOutsidePrivateMappingsAreLeftOut and pages of huge mappings are in the topmost file.
func TestPagesOutsidePrivateMappingsAreLeftOut(t *testing.T) {
	a := newArena(t, 100)
	for i := range 100 {
		a.write(a.addr(i), uint64(i+1))
	}
	s := newStore(t)
	a.round(s.Process(testPid))
	a.write(a.addr(45), 1000)
	part := func(from, to int) Range { return Range{a.addr(from), a.addr(to)} }
	maps := []*vma.VmaEntry{
		mapping(part(0, 20), vmaRegular|vmaAnonPrivate, 0x22),
		mapping(part(20, 30), vmaRegular|1<<8, 0x21), // shared
		mapping(part(40, 60), vmaRegular|vmaAnonPrivate, 0x22|mapHugeTLB),
		mapping(part(60, 65), vmaRegular|vmaAnonPrivate|vmaVVar, 0x22),
		mapping(part(65, 70), vmaRegular|vmaAnonPrivate, mapDroppable),
		mapping(part(70, 100), vmaRegular|vmaFilePrivate, 0x2),
		mapping(part(75, 80), vmaGuard, 0),
	}
	dir := t.TempDir()
	writeCRIU(t, dir, testPid, maps, a.addrs(a.dirty), a.page)
	stats, err := Compose(context.Background(), dir, s, map[int][]Range{testPid: a.clean()})
	if err != nil {
		t.Fatal(err)
	}
	want := Stats{ParentPages: 50, OwnPages: 20, StalePages: 50, Dropped: 30, Moved: 19, Processes: 1}
	if stats != want {
		t.Errorf("stats %+v, want %+v", stats, want)
	}
	top, err := readPagemap(imagePath(dir, "pagemap", testPid))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range top.entries {
		if e.addr < a.addr(60) && e.end() > a.addr(40) && !e.present() {
			t.Errorf("huge pages at %#x are in a parent", e.addr)
		}
	}
	for i := range 100 {
		if i >= 20 && i < 40 || i >= 60 && i < 70 {
			delete(a.populated, a.addr(i))
		}
	}
	a.verify(dir)
}

// TestWhatWasOverwrittenIsNotInTheImages: a key that the process wiped before the barrier is not kept by us.
func TestWhatWasOverwrittenIsNotInTheImages(t *testing.T) {
	a := newArena(t, 300)
	secret := []byte("the key to everything")
	for i := range 300 {
		copy(a.page(a.addr(i))[100:], secret)
		a.write(a.addr(i), uint64(i+1))
	}
	s := newStore(t)
	p := s.Process(testPid)
	a.round(p)
	for _, i := range append([]int{1, 3, 5, 299}, seq(100, 200)...) {
		a.wipe(a.addr(i))
	}
	for _, i := range seq(210, 215) {
		a.unmap(a.addr(i))
	}
	wiped := len(seq(100, 200)) + 4 + len(seq(210, 215))
	dir := t.TempDir()
	writeCRIU(t, dir, testPid, a.maps(), a.addrs(a.dirty), a.page)
	if _, err := Compose(context.Background(), dir, s, map[int][]Range{testPid: a.clean()}); err != nil {
		t.Fatal(err)
	}
	a.verify(dir)
	data, err := os.ReadFile(imagePath(filepath.Join(dir, parentDir), "pages", testPid))
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(data, secret); n != 300-wiped {
		t.Errorf("the secret is there %d times, %d pages have it", n, 300-wiped)
	}
}

// TestComposedImagesAreAValidCheckpoint asks who will read them out of an image.
func TestComposedImagesAreAValidCheckpoint(t *testing.T) {
	a := newArena(t, 100)
	for _, i := range append(seq(0, 10), seq(50, 60)...) {
		a.write(a.addr(i), 1)
	}
	s := newStore(t)
	p := s.Process(testPid)
	a.round(p)
	for _, i := range []int{30, 31, 32} {
		a.write(a.addr(i), 2)
	}
	a.round(p)
	a.write(a.addr(20), 2)
	a.round(p)
	root := t.TempDir()
	if err := os.Chmod(root, 0o700); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(root, oci.ImagesDir)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{oci.CheckpointFile, oci.SpecDumpFile} {
		if err := os.WriteFile(filepath.Join(root, name), []byte("{}"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	writeCRIU(t, dir, testPid, a.maps(), nil, nil)
	if _, err := Compose(context.Background(), dir, s, map[int][]Range{testPid: a.clean()}); err != nil {
		t.Fatal(err)
	}
	if err := s.Discard(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.dir); !os.IsNotExist(err) {
		t.Errorf("the store's directory is left: %v", err)
	}
	a.verify(dir)
	if err := oci.VerifyCheckpointDir(context.Background(), root, 0); err != nil {
		t.Error(err)
	}
}

func seq(from, to int) (out []int) {
	for i := from; i < to; i++ {
		out = append(out, i)
	}
	return out
}
