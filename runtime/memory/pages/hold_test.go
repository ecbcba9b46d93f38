// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"bytes"
	"os"
	"path/filepath"
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
	s.held.full, l.late.used = true, chunkPages // no more room: page 2 is in memory, pages 0 and 3 are not
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

// Beyond what is always kept the host is asked, again and again, and what it refuses is
// written at once.
func TestMoreIsHeldAsLongAsThereIsRoom(t *testing.T) {
	s, err := NewStore(t.TempDir() + "/store")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Discard()
	asked := 0
	s.held.room = func() bool { asked++; return asked < 3 }
	s.held.taken = heldAnyway
	for mib := range 2 * askEvery >> 20 {
		c := s.held.take()
		if c == nil {
			t.Fatalf("refused after %d MiB", mib)
		}
		if err := unmapAll([][]byte{c}); err != nil {
			t.Fatal(err)
		}
	}
	if asked != 2 || s.held.take() != nil || s.held.take() != nil || asked != 3 {
		t.Errorf("asked %d times", asked)
	}
}

func TestSpareMemoryIsThatOfTheNearestLimit(t *testing.T) {
	root := t.TempDir()
	put := func(name, content string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(root, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(what string, want uint64) {
		t.Helper()
		if got := spareIn(root); got != want {
			t.Errorf("%s: %d bytes, want %d", what, got, want)
		}
	}
	expect("nothing known", 0)
	put("proc/meminfo", "MemTotal:  4096 kB\nMemFree: 1 kB\nMemAvailable:  3072 kB\n")
	put("proc/self/cgroup", "4:memory:/a/b\n0::/c\n")
	expect("no limits", 2<<20)
	put("sys/fs/cgroup/c/memory.max", "max\n")
	expect("no number", 2<<20)
	put("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "1048576\n")
	expect("unknown use", 0)
	put("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "262144\n")
	expect("the parent's limit", 512<<10)
	put("sys/fs/cgroup/c/memory.max", "1000\n")
	put("sys/fs/cgroup/c/memory.current", "900\n")
	expect("almost used", 0)
	put("proc/meminfo", "MemTotal:  4096 kB\nMemAvailable:  1024 kB\n")
	expect("a host with little", 0)
}
