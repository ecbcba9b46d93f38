// SPDX-License-Identifier: Apache-2.0

package backend

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/cohort-project/cohort/snapshotter/internal/testdisk"
)

func newBtrfs(tb testing.TB) (string, Backend) {
	root := testdisk.Btrfs(tb)
	b, err := NewBtrfs(root)
	if err != nil {
		tb.Fatal(err)
	}
	return root, b
}

// newSnapshots is the btrfs backend as it is where there are many files.
func newSnapshots(tb testing.TB) (string, Backend) {
	root := testdisk.Btrfs(tb)
	b, err := NewBtrfsSnapshots(root)
	if err != nil {
		tb.Fatal(err)
	}
	return root, b
}

func newReflink(tb testing.TB) (string, Backend) {
	root := testdisk.XFS(tb)
	if ok, err := CanReflink(root); err != nil || !ok {
		tb.Fatalf("CanReflink on XFS: %v, %v", ok, err)
	}
	return root, NewReflink()
}

func newCopy(tb testing.TB) (string, Backend) {
	testdisk.Root(tb)
	root := tb.TempDir()
	b, err := NewCopy(root)
	if err != nil {
		tb.Fatal(err)
	}
	return root, b
}

func TestBtrfs(t *testing.T)          { conformance(t, newBtrfs) }
func TestBtrfsSnapshots(t *testing.T) { conformance(t, newSnapshots) }
func TestReflink(t *testing.T)        { conformance(t, newReflink) }
func TestCopy(t *testing.T)           { conformance(t, newCopy) }

// A file system that shares no extents must not be taken for one that does.
func TestCanReflinkTellsTheFileSystemsApart(t *testing.T) {
	for _, c := range []struct {
		name string
		dir  func(testing.TB) string
		want bool
	}{{"btrfs", testdisk.Btrfs, true}, {"xfs", testdisk.XFS, true}, {"ext4", testdisk.Ext4, false}} {
		t.Run(c.name, func(t *testing.T) {
			dir := c.dir(t)
			got, err := CanReflink(dir)
			if err != nil || got != c.want {
				t.Fatalf("got %v, %v; want %v", got, err, c.want)
			}
			left, err := filepath.Glob(filepath.Join(dir, ".reflink*"))
			if err != nil || len(left) > 0 {
				t.Fatalf("left behind: %v, %v", left, err)
			}
		})
	}
}

func TestNewBtrfsRefusesAPlainDirectory(t *testing.T) {
	dir := filepath.Join(testdisk.Btrfs(t), "plain")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := NewBtrfs(dir); err == nil {
		t.Fatal("accepted")
	}
}

// The captures of a group that are taken together share snapshots, and the snapshot
// goes with the last of them, whatever became of the others.
func TestBtrfsCapturesShareSnapshotsAndTheLastRemovesThem(t *testing.T) {
	root, b := newSnapshots(t)
	snapshots := func() int {
		e, err := os.ReadDir(filepath.Join(root, cutsDir))
		must(t, err)
		return len(e)
	}
	const n = 12
	var captures [n]Capture
	for i := range n {
		src := filepath.Join(root, fmt.Sprintf("src%d", i))
		must(t, os.Mkdir(src, 0o755))
		must(t, os.WriteFile(filepath.Join(src, "f"), []byte("early"), 0o600))
		c, err := b.Open(t.Context(), src, src+".dst")
		must(t, err)
		must(t, os.WriteFile(filepath.Join(src, "f"), []byte(src), 0o600))
		captures[i] = c
	}
	var all sync.WaitGroup
	errs := make([]error, n)
	for i, c := range captures {
		all.Go(func() { errs[i] = c.Take(t.Context()) })
	}
	all.Wait()
	must(t, errors.Join(errs...))
	if got := snapshots(); got < 1 || got >= n {
		t.Errorf("%d captures made %d snapshots", n, got)
	}
	for i, c := range captures {
		if i%3 == 0 { // discarded, as when a lease ends
			must(t, c.Close())
			continue
		}
		must(t, c.Seal(t.Context()))
		src := filepath.Join(root, fmt.Sprintf("src%d", i))
		if got, err := os.ReadFile(filepath.Join(src+".dst", "f")); err != nil || string(got) != src {
			t.Errorf("capture %d holds %q, %v", i, got, err)
		}
	}
	if got := snapshots(); got != 0 {
		t.Errorf("%d snapshots are left", got)
	}
}

func TestBtrfsStartRemovesSnapshotsOfAProcessThatDied(t *testing.T) {
	root, b := newSnapshots(t)
	src := filepath.Join(root, "src")
	must(t, os.Mkdir(src, 0o755))
	c, err := b.Open(t.Context(), src, src+".dst")
	must(t, err)
	must(t, c.Take(t.Context()))
	if _, err := NewBtrfs(root); err != nil { // the first process is dead now
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(root, cutsDir, "*")); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}
