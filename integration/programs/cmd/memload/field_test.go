// SPDX-License-Identifier: Apache-2.0

package main

import "testing"

func testField(t *testing.T) *field {
	t.Helper()
	f, err := newField(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	f.touch(1000)
	if err := f.verify(); err != nil {
		t.Fatal(err)
	}
	return f
}

func TestAPageThatIsOldZeroOrFromElsewhereIsFound(t *testing.T) {
	const p = pageWords
	for name, damage := range map[string]func(f *field){
		"zero":      func(f *field) { clear(f.words[5*p : 6*p]) },
		"elsewhere": func(f *field) { copy(f.words[5*p:6*p], f.words[p:2*p]) },
		"one bit":   func(f *field) { f.words[77777] ^= 1 << 40 },
		"old": func(f *field) {
			before := append([]uint64(nil), f.words[5*p:6*p]...)
			f.touch(3000)
			copy(f.words[5*p:], before)
		},
		"a touch forgotten": func(f *field) { f.touched-- },
	} {
		f := testField(t)
		damage(f)
		if f.verify() == nil {
			t.Errorf("%s: not found", name)
		}
	}
}

func TestTouchesAreSpreadOverTheWholeMemory(t *testing.T) {
	f := testField(t)
	f.touch(4 * f.pages())
	untouched := 0
	for p := range f.pages() {
		if f.words[p*pageWords] == 0 {
			untouched++
		}
	}
	// Of 256 pages, each is missed by at least 1024 touches with probability e^-4 at most.
	if untouched > 20 {
		t.Errorf("%d of %d pages were never met", untouched, f.pages())
	}
}

func TestTheRateIsKeptByTimeAndNotMadeUpForAfterAStop(t *testing.T) {
	r := rate{perSecond: 250}
	var n uint64
	for range 1000 {
		n += r.due(1e6)
	}
	if n < 249 || n > 251 {
		t.Errorf("%d touches in a second of milliseconds, want 250", n)
	}
	if n := r.due(10e9); n > 2 {
		t.Errorf("%d touches at once after ten seconds of standing still", n)
	}
}
