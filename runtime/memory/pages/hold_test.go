// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"bytes"
	"os"
	"testing"
)

// What is copied after Hold is in no file before Compose, and in it afterwards: over
// what was there, behind it, and where there is no room in memory.
func TestWhatIsCopiedAfterHoldIsWrittenByDrain(t *testing.T) {
	s, err := NewStore(t.TempDir() + "/store")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Discard()
	l, err := s.Process(1).newLevel("base")
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	s.Process(1).base = l
	page := func(b byte) []byte { return bytes.Repeat([]byte{b}, int(pageSize)) }
	put := func(slot uint64, content ...byte) {
		t.Helper()
		var data []byte
		for _, b := range content {
			data = append(data, page(b)...)
		}
		l.slots = max(l.slots, slot+uint64(len(content)))
		if err := write(l, data, slot); err != nil {
			t.Fatal(err)
		}
	}
	file := func() []byte {
		t.Helper()
		b, err := os.ReadFile(l.path)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	put(0, 1, 2, 3, 4)
	before := file()
	s.Hold()
	put(1, 12, 13)
	put(1, 22)
	put(4, 5, 6)
	if !bytes.Equal(file(), before) {
		t.Error("the file has changed after Hold")
	}
	s.held.bytes.Store(maxHeld) // no more room: page 2 is in memory, pages 0 and 3 are not
	put(0, 31)
	put(2, 33, 34)
	if err := s.drain(); err != nil {
		t.Fatal(err)
	}
	var want []byte
	for _, b := range []byte{31, 22, 33, 34, 5, 6} {
		want = append(want, page(b)...)
	}
	if !bytes.Equal(file(), want) {
		t.Error("the file is not what was copied last")
	}
	put(5, 7)
	if got := file(); got[5*pageSize] != 7 {
		t.Error("what is copied after drain is not written")
	}
}
