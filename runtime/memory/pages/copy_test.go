// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestAfterAnErrorThePagesNotStoredAreMissing: the tracker has forgotten that they were written, so the store
// must not pass its old content off as theirs.
func TestAfterAnErrorThePagesNotStoredAreMissing(t *testing.T) {
	const size = 3 * bufferSize
	a := newArena(t, size/int(pageSize))
	for i := range size / int(pageSize) {
		a.write(a.addr(i), uint64(i+1))
	}
	s := newStore(t)
	p := s.Process(testPid)
	a.round(p)
	for i := range size / int(pageSize) {
		if i%7 != 0 {
			a.write(a.addr(i), uint64(i+1000000))
		}
	}
	dirty := toRanges(a.addrs(a.dirty))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	given := 0
	c, err := p.Copy(ctx, os.Getpid(), func(yield func(Range) bool) {
		for _, r := range dirty {
			if given++; given == len(dirty)*2/3 {
				cancel()
			}
			if !yield(r) {
				return
			}
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if given != len(dirty) {
		t.Errorf("%d of %d ranges were taken", given, len(dirty))
	}
	if c.Pages == 0 || c.Gone == 0 || c.Pages+c.Gone != count(dirty) {
		t.Errorf("%+v of %d pages", c, count(dirty))
	}
	missing, err := p.Missing([]Range{{a.base, a.base + size}})
	if err != nil || count(missing) != c.Gone {
		t.Fatalf("%d pages missing, %v; %+v", count(missing), err, c)
	}
	// What is not missing is what the process has.
	found, _ := p.resolve([]Range{{a.base, a.base + size}})
	for _, f := range found {
		got := make([]byte, f.End-f.Start)
		if _, err := f.level.f.ReadAt(got, int64(f.slot*pageSize)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, a.mem[f.Start-a.base:f.End-a.base]) {
			t.Fatalf("%s is out of date", f.Range)
		}
	}
	if c, err := p.Copy(context.Background(), os.Getpid(), slices.Values(missing)); err != nil || c.Pages != count(missing) {
		t.Fatalf("%+v, %v", c, err)
	}
	if missing, _ := p.Missing([]Range{{a.base, a.base + size}}); len(missing) > 0 {
		t.Errorf("still missing: %v", missing)
	}
}

// TestARoundThatIsEndedHalfWayMissesNothing, if the tracker takes the rest back.
func TestARoundThatIsEndedHalfWayMissesNothing(t *testing.T) {
	const size = 4 * bufferSize / 4096
	a := newArena(t, size)
	for i := range size {
		a.write(a.addr(i), uint64(i+1))
	}
	s := newStore(t)
	p := s.Process(testPid)
	a.round(p)
	for i := range size {
		if i%5 != 0 {
			a.write(a.addr(i), uint64(i+1000000))
		}
	}
	dirty := toRanges(a.addrs(a.dirty))
	for _, rejects := range []bool{false, true} {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		ended := errors.New("the tracker ended")
		given := 0
		c, err := p.CopyFrom(ctx, os.Getpid(), func(accept func(Range) error) error {
			for i, r := range dirty {
				if i == len(dirty)/2 {
					if !rejects {
						return ended
					}
					cancel()
				}
				if err := accept(r); err != nil {
					return err
				}
				given++
				for addr := r.Start; addr < r.End; addr += pageSize {
					delete(a.dirty, addr)
				}
			}
			return nil
		})
		if want := map[bool]error{false: ended, true: context.Canceled}[rejects]; !errors.Is(err, want) {
			t.Fatal(err)
		}
		if given == 0 || given == len(dirty) || c.Pages != count(dirty[:given]) {
			t.Errorf("%d of %d ranges accepted, %+v", given, len(dirty), c)
		}
		if missing, err := p.Missing(a.clean()); err != nil || len(missing) > 0 {
			t.Errorf("missing %v, %v", missing, err)
		}
		dirty = dirty[given:]
	}
	dir := t.TempDir()
	writeCRIU(t, dir, testPid, a.maps(), a.addrs(a.dirty), a.page)
	if _, err := Compose(context.Background(), dir, s, map[int][]Range{testPid: a.clean()}); err != nil {
		t.Fatal(err)
	}
	a.verify(dir)
}

// TestAProcessThatEndedIsNoticed, also when another has its pid by then, which no copy may be taken from.
func TestAProcessThatEndedIsNoticed(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s := newStore(t)
	p := s.Process(testPid)
	ctx := context.Background()
	nothing := slices.Values([]Range{{pageSize, 2 * pageSize}})
	if c, err := p.Copy(ctx, cmd.Process.Pid, nothing); err != nil || c.Gone != 1 {
		t.Fatalf("%+v, %v", c, err)
	}
	if _, err := p.Copy(ctx, os.Getpid(), nothing); err == nil {
		t.Error("pages of two processes in one store")
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if _, err := p.Copy(ctx, cmd.Process.Pid, nothing); !errors.Is(err, ErrExited) {
		t.Error(err)
	}
	if err := s.Forget(testPid); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(s.dir); err != nil || len(left) > 0 {
		t.Errorf("left of a forgotten process: %v, %v", left, err)
	}
	if _, err := s.Process(testPid).Copy(ctx, os.Getpid(), nothing); err != nil {
		t.Error(err)
	}
}

// TestZeroPagesTakeNoRoom in the store, and are there.
func TestZeroPagesTakeNoRoom(t *testing.T) {
	const pages = 1000
	a := newArena(t, pages)
	for i := range pages {
		a.wipe(a.addr(i))
	}
	a.write(a.addr(0), 1)
	a.write(a.addr(500), 1)
	p := newStore(t).Process(testPid)
	a.round(p)
	var st unix.Stat_t
	if err := unix.Fstat(int(p.base.f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != pages*int64(pageSize) || st.Blocks*512 > 64*int64(pageSize) {
		t.Errorf("%d bytes long, %d on disk", st.Size, st.Blocks*512)
	}
	if missing, err := p.Missing(a.clean()); err != nil || len(missing) > 0 {
		t.Errorf("missing %v, %v", missing, err)
	}
}

// TestRangeArithmetic compares with sets of pages.
func TestRangeArithmetic(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	random := func() (ranges []Range, set map[uint64]bool) {
		set = map[uint64]bool{}
		for range rnd.IntN(8) {
			start := rnd.Uint64N(50)
			end := start + rnd.Uint64N(10)
			ranges = append(ranges, Range{start * pageSize, end * pageSize})
			for ; start < end; start++ {
				set[start] = true
			}
		}
		return ranges, set
	}
	check := func(what string, got []Range, want func(uint64) bool) {
		t.Helper()
		last := uint64(0)
		set := map[uint64]bool{}
		for _, r := range got {
			if r.Start < last || r.Start >= r.End {
				t.Fatalf("%s: %v is not in order", what, got)
			}
			for last = r.Start; last < r.End; last += pageSize {
				set[last/pageSize] = true
			}
		}
		for i := range uint64(64) {
			if set[i] != want(i) {
				t.Fatalf("%s: page %d in %v: %v", what, i, got, set[i])
			}
		}
	}
	for range 2000 {
		ra, a := random()
		rb, b := random()
		na, err := normalize(ra)
		if err != nil {
			t.Fatal(err)
		}
		nb, err := normalize(rb)
		if err != nil {
			t.Fatal(err)
		}
		check("normalize", na, func(i uint64) bool { return a[i] })
		check("intersect", intersect(na, nb), func(i uint64) bool { return a[i] && b[i] })
		check("subtract", subtract(na, nb), func(i uint64) bool { return a[i] && !b[i] })
	}
	if _, err := normalize([]Range{{1, pageSize}}); err == nil {
		t.Error("half a page was accepted")
	}
}
