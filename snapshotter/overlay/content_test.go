// SPDX-License-Identifier: Apache-2.0

package overlay_test

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/snapshotter/backend"
	"github.com/cohort-project/cohort/snapshotter/internal/testdisk"
)

// What captures share is not read: of a file of 16 MiB only what was written since.
func TestSharedContentIsNotRead(t *testing.T) {
	const size, block = 16 << 20, 64 << 10
	for _, disk := range []struct {
		name   string
		mount  func(testing.TB) string
		make   func(root string) (backend.Backend, error)
		shares bool
	}{
		{"btrfs", testdisk.Btrfs, backend.NewBtrfs, true},
		{"btrfs-snapshots", testdisk.Btrfs, backend.NewBtrfsSnapshots, true}, // compares two subvolumes
		{"xfs", testdisk.XFS, func(string) (backend.Backend, error) { return backend.NewReflink(), nil }, true},
		{"ext4", testdisk.Ext4, backend.NewCopy, false},
	} {
		t.Run(disk.name, func(t *testing.T) {
			root := disk.mount(t)
			b, err := disk.make(root)
			must(t, err)
			c := &container{dir: root, b: b}
			must(t, os.Mkdir(c.path("upper"), 0o755))
			file := filepath.Join(c.path("upper"), "f")
			data := make([]byte, size)
			for i := range data {
				data[i] = byte(i>>8) + byte(i>>16)
			}
			must(t, os.WriteFile(file, data, 0o600))
			write := func(b []byte, off int64) {
				must(t, c.modify(file, func(f *os.File, _ int64) error {
					_, err := f.WriteAt(b, off)
					must(t, err)
					must(t, f.Sync())
					return unix.Futimes(int(f.Fd()), []unix.Timeval{unix.NsecToTimeval(0), unix.NsecToTimeval(0)})
				}))
			}
			write(data[:1], 0)
			c.capture(t, "first")
			for _, e := range []struct {
				name      string
				do        func()
				unchanged bool
				most      uint64 // bytes read, where extents are shared
			}{
				{"untouched", func() {}, true, 0},
				{"the same written again", func() { write(data[1<<20:1<<20+block], 1<<20) }, true, 4 * block},
				{"one byte", func() { write([]byte{^data[9<<20]}, 9<<20) }, false, 8 * block},
			} {
				e.do()
				d := c.increment(t, e.name, []string{c.path("first")})
				if d.Empty() != e.unchanged {
					t.Errorf("%s: unchanged: %v", e.name, d.Empty())
				}
				if disk.shares && d.Compared > e.most || !disk.shares && e.unchanged && d.Compared != size {
					t.Errorf("%s: %d bytes were read", e.name, d.Compared)
				}
				t.Logf("%s: %d bytes were read", e.name, d.Compared)
			}
		})
	}
}
