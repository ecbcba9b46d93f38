// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"path/filepath"
	"testing"
)

func testHeap(t *testing.T) *heap {
	t.Helper()
	h, err := newHeap(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	h.scribble(10000)
	if err := h.verify(h.chunks()); err != nil {
		t.Fatal(err)
	}
	return h
}

func TestAPageThatIsOldZeroOrFromElsewhereIsFound(t *testing.T) {
	const page = 512
	for name, damage := range map[string]func(h *heap){
		"zero":      func(h *heap) { clear(h.words[5*page : 6*page]) },
		"elsewhere": func(h *heap) { copy(h.words[5*page:6*page], h.words[page:2*page]) },
		"one bit":   func(h *heap) { h.words[77777] ^= 1 << 40 },
		"old": func(h *heap) {
			before := append([]uint64(nil), h.words[5*page:6*page]...)
			h.scribble(10000)
			copy(h.words[5*page:], before)
		},
		"exchanged": func(h *heap) { h.words[9], h.words[10] = h.words[10], h.words[9] },
	} {
		h := testHeap(t)
		damage(h)
		if h.verify(h.chunks()) == nil {
			t.Errorf("%s: not found", name)
		}
	}
}

func TestAFileOfAnotherInstantIsFound(t *testing.T) {
	l, err := openLog(filepath.Join(t.TempDir(), "log"), true)
	if err != nil {
		t.Fatal(err)
	}
	defer l.f.Close()
	for range 10 {
		if err := l.next(); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Truncate(l.f.Name(), 9*8); err != nil {
		t.Fatal(err)
	}
	if l.next() == nil {
		t.Error("an older file was not found")
	}
	l.counter.Store(8)
	if l.next() == nil {
		t.Error("a newer file was not found")
	}
}
