// SPDX-License-Identifier: Apache-2.0

package backend

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Wherever dirty pages lie, the copy has what the file has. On XFS the file's dirty pages have not
// been written back for it; btrfs begins to do so, but does not wait (fs/btrfs/reflink.c,
// btrfs_remap_file_range_prep: the whole file is flushed, the cloned range is waited for).
func TestCloneOfADirtyFileIsWholeAndDoesNotWaitForTheDisk(t *testing.T) {
	for name, factory := range map[string]func(testing.TB) (string, Backend){Btrfs: newBtrfs, Reflink: newReflink} {
		t.Run(name, func(t *testing.T) {
			root, _ := factory(t)
			seed := uint64(time.Now().UnixNano()) //nolint:gosec // any number will do
			r := rand.New(rand.NewPCG(seed, 0))
			for n := range 12 {
				size := 1 + r.Int64N(8<<20)
				f, err := os.Create(filepath.Join(root, fmt.Sprint("src", n)))
				must(t, err)
				defer f.Close()
				data := make([]byte, size)
				for i := range data {
					data[i] = byte(r.Uint32()) //nolint:gosec // truncated on purpose
				}
				holes := r.Int64N(2) * r.Int64N(size)
				clear(data[:holes])
				_, err = f.WriteAt(data[holes:], holes)
				must(t, err)
				must(t, f.Sync())
				var touched uint64
				for range r.IntN(6) {
					off := r.Int64N(size)
					_, err := f.WriteAt([]byte{^data[off]}, off)
					must(t, err)
					data[off] = ^data[off]
				}
				touched, err = unwritten(f, 0, size)
				must(t, err)
				d, err := os.Create(filepath.Join(root, fmt.Sprint("dst", n)))
				must(t, err)
				defer d.Close()
				must(t, cloneClean(t.Context(), d, f, size))
				got, err := os.ReadFile(d.Name())
				must(t, err)
				if !bytes.Equal(got, data) {
					t.Fatalf("seed %d: file %d of %d bytes, %d dirty pages, reads differently", seed, n, size, touched)
				}
				after, err := unwritten(f, 0, size)
				must(t, err)
				if name == Reflink && after != touched {
					t.Errorf("seed %d: file %d of %d bytes had %d dirty pages, and has %d: they were written back", seed, n, size, touched, after)
				}
			}
		})
	}
}

// The control of the test above: to clone the file whole writes its pages back.
func TestCloneOfAWholeFileWritesItBack(t *testing.T) {
	root, _ := newReflink(t)
	f, err := os.Create(filepath.Join(root, "src"))
	must(t, err)
	defer f.Close()
	_, err = f.Write(make([]byte, 1<<20))
	must(t, err)
	before, err := unwritten(f, 0, 1<<20)
	must(t, err)
	d, err := os.Create(filepath.Join(root, "dst"))
	must(t, err)
	defer d.Close()
	must(t, clone(t.Context(), d, f, 1<<20))
	after, err := unwritten(f, 0, 1<<20)
	must(t, err)
	if before == 0 || after != 0 {
		t.Fatalf("%d dirty pages before, %d after", before, after)
	}
}

// ending is a context that ends after so many looks at it.
type ending struct {
	context.Context
	looks int
}

func (c *ending) Err() error {
	if c.looks--; c.looks < 0 {
		return context.Canceled
	}
	return nil
}

// A pass that was broken off anywhere, while the tree changed, costs nothing but time.
func TestTakeIsRightAfterAPassThatWasBrokenOffAnywhere(t *testing.T) {
	for looks := range 45 {
		tr := newTree(t)
		everyKind(t, tr.src)
		if looks%2 == 0 { // the very first pass as well
			if err := tr.pass(&ending{t.Context(), looks / 2}, false); !errors.Is(err, context.Canceled) {
				must(t, err)
			}
		} else {
			must(t, tr.pass(t.Context(), false))
		}
		mutate(t, tr.src)
		if err := tr.pass(&ending{t.Context(), looks}, false); !errors.Is(err, context.Canceled) {
			must(t, err)
		}
		must(t, os.WriteFile(filepath.Join(tr.src, "dir/late"), []byte("late"), 0o600))
		must(t, os.Remove(filepath.Join(tr.src, "empty/in")))
		want := describe(t, tr.src)
		must(t, tr.pass(t.Context(), true))
		diff(t, want, describe(t, tr.dst))
		if t.Failed() {
			t.Fatalf("broken off after %d entries", looks)
		}
	}
}

// Passes in between while the container writes, then Take: as if there had been none.
func TestReadyMayFollowAContainerThatWrites(t *testing.T) {
	for name, factory := range map[string]func(testing.TB) (string, Backend){Btrfs: newBtrfs, "snapshots": newSnapshots, Reflink: newReflink, Copy: newCopy} {
		t.Run(name, func(t *testing.T) {
			root, b := factory(t)
			src, dst := filepath.Join(root, "src"), filepath.Join(root, "dst")
			must(t, os.Mkdir(src, 0o755))
			everyKind(t, src)
			c, err := b.Open(t.Context(), src, dst)
			must(t, err)
			defer c.Close()
			l := startLedger(t, src, 0)
			for i := range 10 {
				must(t, os.WriteFile(filepath.Join(src, "dir", fmt.Sprint(i)), []byte("x"), 0o600))
				must(t, c.Ready(t.Context()))
			}
			mutate(t, src)
			must(t, c.Ready(t.Context()))
			l.end(t)
			want := describe(t, src)
			must(t, c.Take(t.Context()))
			must(t, c.Ready(t.Context())) // too late, and without effect
			must(t, os.WriteFile(filepath.Join(src, "file"), []byte("later still"), 0o600))
			must(t, c.Seal(t.Context()))
			diff(t, want, describe(t, dst))
		})
	}
}

// A tree that grows beyond what can be walked through in the barrier goes over to a
// snapshot, whenever that is noticed.
func TestBtrfsGoesOverToASnapshotWhenThereAreMoreFiles(t *testing.T) {
	root, b := newBtrfs(t)
	for i, grow := range []string{"before Open", "before Ready", "before Take"} {
		src, dst := filepath.Join(root, fmt.Sprint("src", i)), filepath.Join(root, fmt.Sprint("dst", i))
		must(t, os.Mkdir(src, 0o755))
		everyKind(t, src)
		b.(*btrfs).most = len(describe(t, src)) // one more than there are in it
		more := func(at string) {
			if at == grow {
				must(t, os.WriteFile(filepath.Join(src, "one more"), nil, 0o600))
				must(t, os.WriteFile(filepath.Join(src, "another one"), nil, 0o600))
			}
		}
		more("before Open")
		c, err := b.Open(t.Context(), src, dst)
		must(t, err)
		more("before Ready")
		must(t, c.Ready(t.Context()))
		if by := c.(*btrfsCapture).tree == nil; by != (grow != "before Take") {
			t.Errorf("grown %s: by snapshot: %v", grow, by)
		}
		more("before Take")
		want := describe(t, src)
		must(t, c.Take(t.Context()))
		if c.(*btrfsCapture).tree != nil {
			t.Errorf("grown %s: taken file by file", grow)
		}
		must(t, os.WriteFile(filepath.Join(src, "file"), []byte("later"), 0o600))
		must(t, c.Seal(t.Context()))
		must(t, c.Close())
		diff(t, want, describe(t, dst))
	}
	if left, _ := filepath.Glob(filepath.Join(root, cutsDir, "*")); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}

// A file that a running writer keeps mapped is seen to change after each pass.
func TestReadySeesEachStoreThroughAMapping(t *testing.T) {
	root, b := newBtrfs(t)
	src, dst := filepath.Join(root, "src"), filepath.Join(root, "dst")
	must(t, os.Mkdir(src, 0o755))
	f, err := os.Create(filepath.Join(src, "mapped"))
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(4096))
	mem, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(t, err)
	defer func() { must(t, unix.Munmap(mem)) }()
	mem[0] = 1
	c, err := b.Open(t.Context(), src, dst)
	must(t, err)
	defer c.Close()
	for i := range byte(4) {
		mem[0] = 2 + i
		<-time.After(2 * racyWindow) // or it would be read again anyway
		must(t, c.Ready(t.Context()))
	}
	mem[0] = 9
	must(t, c.Take(t.Context()))
	must(t, c.Seal(t.Context()))
	got, err := os.ReadFile(filepath.Join(dst, "mapped"))
	must(t, err)
	if got[0] != 9 {
		t.Fatalf("got %d, the last store was missed", got[0])
	}
}
