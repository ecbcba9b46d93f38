// SPDX-License-Identifier: Apache-2.0

package backend

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/snapshotter/internal/testdisk"
)

func newTree(t *testing.T) *tree {
	t.Helper()
	testdisk.Root(t)
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, "src"), 0o755))
	return &tree{src: filepath.Join(dir, "src"), dst: filepath.Join(dir, "dst"), content: copyContent, trustTimes: true}
}

// What Take costs is decided here: only what changed is read again.
func TestSecondPassReadsOnlyWhatChanged(t *testing.T) {
	tr := newTree(t)
	for i := range 20 {
		must(t, os.WriteFile(filepath.Join(tr.src, fmt.Sprint(i)), []byte("a"), 0o600))
	}
	<-time.After(2 * racyWindow)
	must(t, tr.pass(t.Context(), false))
	if tr.copied != 20 {
		t.Fatalf("first pass read %d files of 20", tr.copied)
	}
	must(t, os.WriteFile(filepath.Join(tr.src, "7"), []byte("b"), 0o600))
	must(t, tr.pass(t.Context(), true))
	if tr.copied != 1 {
		t.Fatalf("second pass read %d files, 1 changed", tr.copied)
	}
}

// A file that changed just before the first pass may change again with the same
// timestamp.
func TestSecondPassReadsAgainWhatIsTooYoungToTell(t *testing.T) {
	tr := newTree(t)
	must(t, os.WriteFile(filepath.Join(tr.src, "young"), []byte("a"), 0o600))
	must(t, tr.pass(t.Context(), false))
	must(t, tr.pass(t.Context(), true))
	if tr.copied != 1 {
		t.Fatalf("second pass read %d files", tr.copied)
	}
}

// The page is dirty and writable when the first pass reads it. Only because that pass
// writes it back first does the next store show in ctime.
func TestFirstPassMakesStoresThroughAMappingVisible(t *testing.T) {
	tr := newTree(t)
	f, err := os.Create(filepath.Join(tr.src, "mapped"))
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(4096))
	mem, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(t, err)
	defer func() { must(t, unix.Munmap(mem)) }()
	mem[0] = 1
	<-time.After(2 * racyWindow)
	must(t, tr.pass(t.Context(), false))
	mem[0] = 2
	must(t, tr.pass(t.Context(), true))
	got, err := os.ReadFile(filepath.Join(tr.dst, "mapped"))
	must(t, err)
	if got[0] != 2 {
		t.Fatalf("got %d, the second store was missed", got[0])
	}
}
