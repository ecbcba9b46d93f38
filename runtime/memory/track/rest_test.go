// SPDX-License-Identifier: Apache-2.0

package track

import (
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"
)

// Clean asks a large mapping for what is not clean, and takes the rest. Whatever the process did
// to its memory before, that must be what it is told when it asks for the clean pages themselves:
// clean() compares the two.
func TestWhatIsLeftOfALargeMappingIsWhatIsClean(t *testing.T) {
	s := startSubject(t, nil)
	const n = 16 * 512 // pages, of 16 page tables
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	m := s.mapping(0, n, "anon")
	s.do("fill 0 1 0 %d", n*3/4) // what is behind has no page tables
	tr := s.attach()
	taken(t, tr, m)
	for range 20 {
		for range 30 {
			from := r.IntN(n)
			count := 1 + r.IntN(min(n-from, 40))
			switch r.IntN(4) {
			case 0:
				s.do("fill 0 2 %d %d", from, count)
			case 1:
				s.do("advise 0 %d %d %d", unix.MADV_DONTNEED, from, count)
			case 2: // a whole page table, which the kernel may take away
				s.do("advise 0 %d %d 512", unix.MADV_DONTNEED, from/512*512)
			case 3:
				s.do("sum 0") // zero pages where there was nothing
				s.do("fill 0 3 %d 1", from)
			}
		}
		if len(clean(t, tr, m)) == 0 {
			s.do("fill 0 1")
		}
		if r.IntN(3) == 0 {
			taken(t, tr, m)
		}
	}
	moved := asRange(s.do("move 0"))
	expect(t, "Clean of the old place", clean(t, tr, m), pages(0, 0))
	expect(t, "Clean of the new place", clean(t, tr, moved), pages(0, 0))
}

// The control: a scan of the rest takes anything for clean that the kernel does not look at, so the
// question whether it does has to come first.
func TestAMappingThatAllowsNoProtectionIsNotScannedForTheRest(t *testing.T) {
	s := startSubject(t, nil)
	tr := s.attach()
	m := s.mapping(0, 1024, "anon")
	s.do("fill 0 1")
	hole := Range{m.End + 1<<20, m.End + 2<<20}
	wrong := pagesOf(t, hole, func(fn func(Range) error) error { return tr.scanRest(hole, fn) })
	if len(wrong) == 0 {
		t.Error("a scan of the rest says nothing of memory that is not there: this test proves nothing any more")
	}
	tr.tracked = []span{{Range: Range{m.Start, hole.End}}} // as if it had been registered, and replaced
	expect(t, "Clean of an unregistered mapping", clean(t, tr, m), pages(0, 0))
	expect(t, "Clean of nothing", clean(t, tr, hole), pages(0, 0))
}
