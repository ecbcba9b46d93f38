// SPDX-License-Identifier: Apache-2.0

package tmpfs

import (
	"bytes"
	"crypto/rand"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFilesCopiedBeforeComeBackAsTheyWereAtTheEnd changes files in every way after they were copied, and finds that only
// what changed is taken then.
func TestFilesCopiedBeforeComeBackAsTheyWereAtTheEnd(t *testing.T) {
	requireRoot(t)
	src, dir := t.TempDir(), t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(unix.Mount("tmpfs", src, "tmpfs", 0, "size=64m"))
	t.Cleanup(func() { _ = Unmount(src) })
	const size = 1<<20 + 100
	names := []string{"same", "mapped", "written", "punched", "shorter", "longer", "gone", "replaced", "name"}
	for _, n := range names {
		b := make([]byte, size)
		_, _ = rand.Read(b)
		must(os.WriteFile(filepath.Join(src, n), b, 0o600))
	}
	must(os.Link(filepath.Join(src, "name"), filepath.Join(src, "other name")))
	must(os.WriteFile(filepath.Join(src, "small"), []byte("one"), 0o600))
	open := func(name string) *os.File {
		t.Helper()
		f, err := os.OpenFile(filepath.Join(src, name), os.O_RDWR|os.O_CREATE, 0o600)
		must(err)
		t.Cleanup(func() { f.Close() })
		return f
	}
	mapped, err := unix.Mmap(int(open("mapped").Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(err)
	t.Cleanup(func() { _ = unix.Munmap(mapped) })

	f := FS{Destination: src, File: "00.tar"}
	c, err := Precopy(t.Context(), os.Getpid(), f, filepath.Join(dir, "copy"))
	must(err)
	t.Cleanup(func() { _ = c.Close() })

	mapped[5], mapped[size-1] = mapped[5]+1, mapped[size-1]+1
	_, err = open("written").WriteAt([]byte("changed"), 123456)
	must(err)
	must(unix.Fallocate(int(open("punched").Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 8192, 100<<10))
	must(open("shorter").Truncate(500_000))
	must(open("longer").Truncate(2 * size))
	_, err = open("longer").WriteAt([]byte("end"), 2*size-3)
	must(err)
	must(os.Remove(filepath.Join(src, "gone")))
	must(os.Remove(filepath.Join(src, "replaced")))
	must(os.WriteFile(filepath.Join(src, "replaced"), bytes.Repeat([]byte("new"), 50_000), 0o644))
	must(os.Remove(filepath.Join(src, "name")))
	must(os.WriteFile(filepath.Join(src, "small"), []byte("two"), 0o600))

	must(c.Take(t.Context()))
	a, err := Archive(os.Getpid(), f, dir, c)
	must(err)
	if left, _ := filepath.Glob(filepath.Join(dir, "*.tar")); len(left) != 0 {
		t.Errorf("an archive was written to disk at once: %v", left)
	}
	barrier, before := a.Bytes()
	if barrier > 200<<10 || before < 6<<20 {
		t.Errorf("%d bytes were taken at the end, %d before", barrier, before)
	}
	want := map[string][]byte{}
	entries, err := os.ReadDir(src)
	must(err)
	for _, e := range entries {
		want[e.Name()], err = os.ReadFile(filepath.Join(src, e.Name()))
		must(err)
	}
	// Running again: this belongs to nobody's checkpoint.
	mapped[7]++
	must(open("same").Truncate(0))
	must(a.Save(t.Context()))
	must(c.Close())

	archive, err := os.Open(filepath.Join(dir, f.File))
	must(err)
	defer archive.Close()
	dst := filepath.Join(t.TempDir(), "m")
	must(Mount(t.Context(), f, archive, dst))
	t.Cleanup(func() { _ = Unmount(dst) })
	got, err := os.ReadDir(dst)
	must(err)
	if len(got) != len(want) {
		t.Errorf("%d files, want %d", len(got), len(want))
	}
	for name, content := range want {
		if b, err := os.ReadFile(filepath.Join(dst, name)); err != nil || !bytes.Equal(b, content) {
			t.Errorf("%s is not as it was: %d bytes, want %d, %v", name, len(b), len(content), err)
		}
	}
}
