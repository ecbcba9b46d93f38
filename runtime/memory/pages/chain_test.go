// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var (
	testTask  = Object{Task, testPid}
	testShmem = Object{Shmem, 99}
)

// group is a process and shared memory, with a chain of checkpoints.
type group struct {
	*arena
	rnd   *rand.Rand
	shmem map[uint64][]byte
	root  string
	dirs  []string // of checkpoints, the newest first
}

func newGroup(t *testing.T, pages int, seed uint64) *group {
	return &group{arena: newArena(t, pages), rnd: rand.New(rand.NewPCG(seed, 7)), shmem: map[uint64][]byte{}, root: t.TempDir()}
}

// live changes memory n times.
func (g *group) live(n int) {
	size := len(g.mem) / int(pageSize)
	for range n {
		first, length, act := g.rnd.IntN(size), 1+g.rnd.IntN(1+g.rnd.IntN(60)), g.rnd.IntN(12)
		for i := first; i < min(first+length, size); i++ {
			switch {
			case act < 6:
				g.write(g.addr(i), g.rnd.Uint64())
			case act < 8: // with what may be there already
				g.write(g.addr(i), uint64(i+1))
			case act < 9:
				g.wipe(g.addr(i))
			case act < 11:
				g.unmap(g.addr(i))
			default:
				page := make([]byte, pageSize)
				binary.LittleEndian.PutUint64(page, g.rnd.Uint64N(3))
				g.shmem[uint64(i)*pageSize] = page
			}
		}
	}
}

// openChain is that of the checkpoints so far; nil where there is none.
func (g *group) chain() *Chain {
	g.t.Helper()
	if len(g.dirs) == 0 {
		return nil
	}
	return openTestChain(g.t, g.dirs)
}

func openTestChain(t *testing.T, dirs []string) *Chain {
	t.Helper()
	c, err := OpenChain(dirs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// checkpoint adds one. Tracked goes on from the last, another copies all anew; with deduped it is compared.
func (g *group) checkpoint(tracked, precopied, deduped bool) Stats {
	g.t.Helper()
	t := g.t
	chain := g.chain()
	dir := filepath.Join(g.root, fmt.Sprint(len(g.dirs)))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s := newStore(t)
	p := s.Process(testPid)
	if !tracked {
		for _, addr := range g.addrs(g.populated) {
			g.dirty[addr] = true
		}
	}
	if precopied {
		for range 1 + g.rnd.IntN(3) {
			g.round(p)
			g.live(g.rnd.IntN(5))
		}
	}
	options := []ComposeOption{WithoutSync()}
	if tracked {
		options = append(options, WithParent(chain, func(pid int) bool { return pid == testPid }))
		if missing, err := p.MissingFrom(chain, g.clean()); err != nil || len(missing) > 0 {
			t.Fatalf("missing %v, %v", missing, err)
		}
	}
	writeCRIU(t, dir, testPid, g.maps(), g.addrs(g.dirty), g.page)
	shared := make([]uint64, 0, len(g.shmem))
	for i := range len(g.mem) / int(pageSize) {
		if g.shmem[uint64(i)*pageSize] != nil {
			shared = append(shared, uint64(i)*pageSize)
		}
	}
	writePages(t, dir, testShmem, 8, shared, func(addr uint64) []byte { return g.shmem[addr] })
	stats, err := Compose(context.Background(), dir, s, map[int][]Range{testPid: g.clean()}, options...)
	if err != nil {
		t.Fatal(err)
	}
	if deduped {
		if stats, err = Dedupe(context.Background(), dir, chain, WithoutSync()); err != nil {
			t.Fatal(err)
		}
	}
	g.dirs = slices.Insert(g.dirs, 0, dir)
	return stats
}

// verifyAll restores the newest checkpoint through links and merged.
func (g *group) verifyAll() {
	g.t.Helper()
	for _, dir := range []string{g.link(), g.merge()} {
		g.verify(dir)
		r, err := openReader(dir, testShmem)
		if err != nil {
			g.t.Fatal(err)
		}
		got := make([]byte, pageSize)
		for i := range len(g.mem) / int(pageSize) {
			addr := uint64(i) * pageSize
			ok, err := r.page(addr, got)
			if err != nil || ok != (g.shmem[addr] != nil) || ok && !bytes.Equal(got, g.shmem[addr]) {
				g.t.Fatalf("shared page %d: in the images %v, in the process %v, %v", i, ok, g.shmem[addr] != nil, err)
			}
		}
		r.close()
	}
}

func (g *group) link() string {
	g.t.Helper()
	dst := filepath.Join(g.t.TempDir(), "linked")
	if err := Link(dst, g.dirs); err != nil {
		g.t.Fatal(err)
	}
	return dst
}

func (g *group) merge() string {
	g.t.Helper()
	dst := filepath.Join(g.t.TempDir(), "merged")
	materialise(g.t, g.chain(), dst)
	return dst
}

// materialise writes a merged checkpoint to dst.
func materialise(t testing.TB, c *Chain, dst string) {
	t.Helper()
	if err := os.Mkdir(dst, 0o700); err != nil {
		t.Fatal(err)
	}
	m, err := Merge(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range m.Files {
		r, err := f.Open()
		if err != nil {
			t.Fatal(err)
		}
		out, err := os.Create(filepath.Join(dst, f.Name))
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(out, r)
		if err := errors.Join(err, r.Close(), out.Close()); err != nil {
			t.Fatal(err)
		}
		if n != f.Size {
			t.Fatalf("%s has %d bytes, announced as %d", f.Name, n, f.Size)
		}
	}
}

func mergedSum(t *testing.T, dirs []string) (sum [32]byte) {
	t.Helper()
	m, err := Merge(openTestChain(t, dirs))
	if err != nil {
		t.Fatal(err)
	}
	h := sha256.New()
	for _, f := range m.Files {
		r, err := f.Open()
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(h, f.Name, f.Size)
		if _, err := io.Copy(h, r); err != nil {
			t.Fatal(err)
		}
		r.Close()
	}
	return [32]byte(h.Sum(nil))
}

// TestEveryCheckpointOfAChainIsRestored plays random lives over chains made in every way, and looks again at each
// checkpoint when others build on it.
func TestEveryCheckpointOfAChainIsRestored(t *testing.T) {
	const lives, epochs, size = 12, 12, 300
	for life := range lives {
		t.Run(fmt.Sprint(life), func(t *testing.T) {
			t.Parallel()
			g := newGroup(t, size, uint64(life))
			g.live(30)
			var sums [][32]byte
			for epoch := range epochs {
				tracked := epoch > 0 && g.rnd.IntN(3) > 0
				stats := g.checkpoint(tracked, g.rnd.IntN(4) > 0, epoch > 0 && (!tracked || g.rnd.IntN(2) > 0))
				g.verifyAll()
				t.Logf("%+v", stats)
				sums = append(sums, mergedSum(t, g.dirs))
				g.live(g.rnd.IntN(10))
			}
			for i, want := range sums {
				if got := mergedSum(t, g.dirs[len(g.dirs)-1-i:]); got != want {
					t.Errorf("checkpoint %d is not what it was", i)
				}
			}
		})
	}
}

// TestAnIncrementHoldsWhatChanged and nothing else, made in either way.
func TestAnIncrementHoldsWhatChanged(t *testing.T) {
	for _, tracked := range []bool{true, false} {
		t.Run(fmt.Sprintf("tracked=%v", tracked), func(t *testing.T) {
			const size = 1000
			g := newGroup(t, size, 1)
			for i := range size {
				g.write(g.addr(i), uint64(i+1))
				g.shmem[uint64(i)*pageSize] = bytes.Repeat([]byte{byte(i)}, int(pageSize))
			}
			g.checkpoint(false, true, false)
			for _, i := range seq(100, 110) {
				g.write(g.addr(i), uint64(i+100000))
			}
			g.dirty = map[uint64]bool{}
			for _, i := range seq(100, 110) {
				g.dirty[g.addr(i)] = true
			}
			g.rnd = rand.New(rand.NewPCG(2, 2))
			stats := g.checkpoint(tracked, false, true)
			if stats.OwnPages != 10 || stats.InheritedPages != 2*size-10 || stats.ParentPages != 0 {
				t.Errorf("%+v", stats)
			}
			g.verifyAll()
			for _, name := range []string{parentDir, taskPrefix + "1" + newSuffix} {
				if _, err := os.Lstat(filepath.Join(g.dirs[0], name)); !os.IsNotExist(err) {
					t.Errorf("%s is there: %v", name, err)
				}
			}
			// No page changed: nothing is held, and it can be built upon.
			g.dirty = map[uint64]bool{}
			stats = g.checkpoint(true, false, true)
			if stats.OwnPages != 0 || stats.InheritedPages != 2*size {
				t.Errorf("%+v", stats)
			}
			g.verifyAll()
		})
	}
}

// TestAPageThatCouldNotBeReadIsNotTakenFromAnOlderCheckpoint: what is there is out of date.
func TestAPageThatCouldNotBeReadIsNotTakenFromAnOlderCheckpoint(t *testing.T) {
	g := newGroup(t, 40, 1)
	for i := range 40 {
		g.write(g.addr(i), uint64(i+1))
	}
	g.checkpoint(false, true, false)
	chain := g.chain()
	s := newStore(t)
	p := s.Process(testPid)
	g.write(g.addr(5), 1000)
	g.write(g.addr(20), 1000)
	g.round(p)
	// The tracker gives 5 and 30 out as written, and the round ends before they are read.
	g.write(g.addr(5), 2000)
	g.write(g.addr(30), 2000)
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := p.Copy(ended, os.Getpid(), slices.Values(toRanges(g.addrs(g.dirty)))); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	clear(g.dirty)
	missing, err := p.MissingFrom(chain, g.clean())
	want := []Range{{g.addr(5), g.addr(6)}, {g.addr(30), g.addr(31)}}
	if err != nil || !slices.Equal(missing, want) {
		t.Fatalf("missing %v, %v; want %v", missing, err, want)
	}
	inherit := WithParent(chain, func(int) bool { return true })
	compose := func() error {
		dir := filepath.Join(t.TempDir(), "images")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		writeCRIU(t, dir, testPid, g.maps(), nil, nil)
		writePages(t, dir, testShmem, 8, nil, nil)
		_, err := Compose(context.Background(), dir, s, map[int][]Range{testPid: g.clean()}, inherit)
		if err == nil {
			g.dirs = slices.Insert(g.dirs, 0, dir)
		}
		return err
	}
	if err := compose(); !errors.Is(err, ErrIncomplete) {
		t.Fatalf("composed with pages missing: %v", err)
	}
	if _, err := p.Copy(context.Background(), os.Getpid(), slices.Values(missing)); err != nil {
		t.Fatal(err)
	}
	if missing, err := p.MissingFrom(chain, g.clean()); err != nil || len(missing) > 0 {
		t.Fatalf("missing %v, %v", missing, err)
	}
	if err := compose(); err != nil {
		t.Fatal(err)
	}
	g.verifyAll()
}

// TestWithoutTrackingNothingIsInherited: a pid that another process has by now must not get the old one's memory.
func TestWithoutTrackingNothingIsInherited(t *testing.T) {
	g := newGroup(t, 40, 1)
	g.live(20)
	g.checkpoint(false, true, false)
	dir := t.TempDir()
	writeCRIU(t, dir, testPid, g.maps(), nil, nil)
	_, err := Compose(context.Background(), dir, newStore(t), map[int][]Range{testPid: g.clean()}, WithParent(g.chain(), func(int) bool { return false }))
	if !errors.Is(err, ErrIncomplete) {
		t.Error(err)
	}
}

// TestSharedMemoryIsInherited, if whoever watches it knows that it did not change.
func TestSharedMemoryIsInherited(t *testing.T) {
	g := newGroup(t, 40, 1)
	g.write(g.addr(0), 1)
	for i := range uint64(30) {
		g.shmem[i*pageSize] = bytes.Repeat([]byte{byte(i + 1)}, int(pageSize))
	}
	g.checkpoint(false, true, false)
	key := ObjectKey(uint32(testShmem.ID))
	s := newStore(t)
	object := s.Shared(uint32(testShmem.ID))
	g.shmem[5*pageSize] = bytes.Repeat([]byte{200}, int(pageSize))
	changed := []Range{{5 * pageSize, 6 * pageSize}}
	clean := []Range{{0, 30 * pageSize}}
	if _, err := object.CopyObject(context.Background(), bytes.NewReader(append(make([]byte, 5*pageSize), g.shmem[5*pageSize]...)), slices.Values(changed)); err != nil {
		t.Fatal(err)
	}
	if missing, err := object.MissingFrom(g.chain(), clean); err != nil || len(missing) > 0 {
		t.Fatalf("missing %v, %v", missing, err)
	}
	dir := filepath.Join(t.TempDir(), "images")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	writeCRIU(t, dir, testPid, g.maps(), g.addrs(g.populated), g.page)
	writePages(t, dir, testShmem, 8, nil, nil)
	stats, err := Compose(context.Background(), dir, s, map[int][]Range{key: clean}, WithParent(g.chain(), func(k int) bool { return k == key }))
	if err != nil || stats.InheritedPages != 29 || stats.ParentPages != 1 {
		t.Fatalf("%+v, %v", stats, err)
	}
	g.dirs = slices.Insert(g.dirs, 0, dir)
	g.verifyAll()
}

// TestHugePagesStayInTheTopmostFile, those of the checkpoint before too.
func TestHugePagesStayInTheTopmostFile(t *testing.T) {
	g := newGroup(t, 100, 1)
	for i := range 100 {
		g.write(g.addr(i), uint64(i+1))
	}
	g.checkpoint(false, true, false)
	for _, deduped := range []bool{false, true} {
		g.write(g.addr(45), g.rnd.Uint64())
		chain := g.chain()
		dir := filepath.Join(t.TempDir(), "images")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		maps := g.maps()
		huge := mapping(Range{g.addr(40), g.addr(60)}, vmaRegular|vmaAnonPrivate, 0x22|mapHugeTLB)
		maps = append(maps[:0:0], mapping(Range{g.addr(0), g.addr(40)}, vmaRegular|vmaAnonPrivate, 0x22), huge, mapping(Range{g.addr(60), g.addr(100)}, vmaRegular|vmaAnonPrivate, 0x22))
		s := newStore(t)
		g.round(s.Process(testPid))
		writeCRIU(t, dir, testPid, maps, nil, nil)
		writePages(t, dir, testShmem, 8, nil, nil)
		stats, err := Compose(context.Background(), dir, s, map[int][]Range{testPid: g.clean()}, WithParent(chain, func(int) bool { return true }))
		if err == nil && deduped {
			stats, err = Dedupe(context.Background(), dir, chain)
		}
		if err != nil {
			t.Fatal(err)
		}
		if stats.InheritedPages+stats.ParentPages != 80 || stats.OwnPages != 20 {
			t.Errorf("%+v", stats)
		}
		g.dirs = slices.Insert(g.dirs, 0, dir)
		g.verifyAll()
	}
	// CRIU would read them from a wrong place.
	top := filepath.Join(g.dirs[0], testTask.pagemapName())
	m, err := readPagemap(top)
	if err != nil {
		t.Fatal(err)
	}
	for i, e := range m.entries {
		if e.present() {
			m.entries[i].flags = flagParent
		}
	}
	rewrite(t, top, m)
	if err := Link(filepath.Join(t.TempDir(), "linked"), g.dirs); !errors.Is(err, errImage) {
		t.Errorf("huge pages from a parent were linked: %v", err)
	}
}

func rewrite(t *testing.T, path string, m *pagemap) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := (&composer{}).writePagemap(path, m); err != nil {
		t.Fatal(err)
	}
}

// TestACancelledDedupeLeavesTheImages as they were.
func TestACancelledDedupeLeavesTheImages(t *testing.T) {
	g := newGroup(t, 300, 1)
	g.live(40)
	g.checkpoint(false, true, false)
	g.live(2)
	g.checkpoint(false, true, false)
	before := tree(t, g.dirs[0])
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Dedupe(ctx, g.dirs[0], openTestChain(t, g.dirs[1:])); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if after := tree(t, g.dirs[0]); !slices.Equal(before, after) {
		t.Errorf("before %v, after %v", before, after)
	}
	g.verifyAll()
}

func tree(t *testing.T, dir string) (out []string) {
	t.Helper()
	err := filepath.Walk(dir, func(path string, st os.FileInfo, err error) error {
		out = append(out, fmt.Sprint(strings.TrimPrefix(path, dir), st.Size(), st.ModTime()))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestLinksLeadThroughEveryRoot: CRIU follows them when the process has another root directory already.
func TestLinksLeadThroughEveryRoot(t *testing.T) {
	g := newGroup(t, 100, 1)
	g.live(20)
	g.checkpoint(false, true, false)
	g.live(2)
	g.checkpoint(true, true, true)
	err := filepath.Walk(g.link(), func(path string, st os.FileInfo, err error) error {
		if err == nil && st.Mode()&os.ModeSymlink != 0 {
			if target, err := os.Readlink(path); err != nil || filepath.IsAbs(target) {
				t.Errorf("%s leads to %s, %v", path, target, err)
			}
			_, err = os.Stat(path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if needs, err := NeedsLink(g.dirs); !needs || err != nil {
		t.Errorf("the newest: %v, %v", needs, err)
	}
	if needs, err := NeedsLink(g.dirs[1:]); needs || err != nil {
		t.Errorf("the oldest: %v, %v", needs, err)
	}
	if err := Link(g.dirs[0], g.dirs); err == nil {
		t.Error("linked over a directory that exists")
	}
}
