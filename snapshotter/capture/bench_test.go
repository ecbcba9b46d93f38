// SPDX-License-Identifier: Apache-2.0

package capture

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/snapshotter/backend"
	"github.com/cohort-project/cohort/snapshotter/internal/testdisk"
	"github.com/cohort-project/cohort/snapshotter/overlay"
)

const bigFile = 1 << 30

// BenchmarkSeal measures, on each backend, the seal of 1 GiB of new data in one file, and
// of 20,000 files of 4 KiB of which none has changed, whole and as an increment.
func BenchmarkSeal(b *testing.B) {
	for _, disk := range []struct {
		name  string
		mount func(testing.TB) string
		make  func(root string) (backend.Backend, error)
	}{
		{"btrfs", testdisk.Btrfs, backend.NewBtrfs},
		{"reflink", testdisk.XFS, func(string) (backend.Backend, error) { return backend.NewReflink(), nil }},
		{"copy", testdisk.Ext4, backend.NewCopy},
	} {
		prepare := func(b *testing.B, fill func(dir string)) (s *Store, upper, parent string) {
			root := disk.mount(b)
			upper, parent = filepath.Join(root, "snapshots/9/fs"), filepath.Join(root, "snapshots/1/fs")
			must(b, os.MkdirAll(upper, 0o755))
			must(b, os.MkdirAll(filepath.Dir(parent), 0o755))
			fill(upper)
			be, err := disk.make(root)
			must(b, err)
			s, err = NewStore(b.Context(), root, be)
			must(b, err)
			sealOnce(b, s, upper)
			a, err := s.Adopt(id1, FS, "1", parent)
			must(b, err)
			a.Done(b.Context())
			must(b, s.Discard(id1))
			return s, upper, parent
		}
		b.Run(disk.name+"/1GiB-new", func(b *testing.B) {
			s, upper, parent := prepare(b, func(string) {})
			for b.Loop() {
				write1GiB(b, filepath.Join(upper, "big"))
				took, cpu := sealOnce(b, s, upper, parent)
				b.ReportMetric(1024/took.Seconds(), "MiB/s")
				b.ReportMetric(float64(cpu.Milliseconds()), "cpu_ms")
				must(b, s.Discard(id1))
			}
		})
		b.Run(disk.name+"/20000-files", func(b *testing.B) {
			s, upper, parent := prepare(b, func(dir string) { smallFiles(b, dir) })
			for b.Loop() {
				took, cpu := sealOnce(b, s, upper)
				b.ReportMetric(float64(took.Milliseconds()), "whole_ms")
				b.ReportMetric(float64(cpu.Milliseconds()), "whole_cpu_ms")
				must(b, s.Discard(id1))
				took, cpu = sealOnce(b, s, upper, parent)
				b.ReportMetric(float64(took.Milliseconds()), "increment_ms")
				b.ReportMetric(float64(cpu.Milliseconds()), "increment_cpu_ms")
				must(b, s.Discard(id1))
			}
		})
	}
}

// BenchmarkReduce measures what an increment's seal adds to a whole one: 20,000 files of
// 4 KiB and one of 1 GiB, none of them changed, and all of that removed.
func BenchmarkReduce(b *testing.B) {
	root := testdisk.Btrfs(b)
	be := backend.NewReflink()
	upper, parent, dst := filepath.Join(root, "upper"), filepath.Join(root, "parent"), filepath.Join(root, "dst")
	smallFiles(b, upper)
	write1GiB(b, filepath.Join(upper, "big"))
	clone := func(to string) {
		c, err := be.Open(b.Context(), upper, to)
		must(b, err)
		must(b, c.Take(b.Context()))
	}
	clone(parent)
	for b.Loop() {
		b.StopTimer()
		clone(dst)
		u, err := overlay.OpenUnion(parent)
		must(b, err)
		b.StartTimer()
		begin, cpu := time.Now(), processor(b)
		d, err := overlay.Compare(b.Context(), dst, u)
		must(b, err)
		compared := time.Since(begin)
		must(b, d.Apply(dst))
		b.ReportMetric(float64((processor(b) - cpu).Milliseconds()), "cpu_ms")
		b.ReportMetric(float64(compared.Milliseconds()), "compare_ms")
		b.ReportMetric(float64((time.Since(begin) - compared).Milliseconds()), "remove_ms")
		b.ReportMetric(float64(d.Compared), "bytes_read")
		if !d.Empty() {
			b.Fatal("something changed")
		}
		b.StopTimer()
		u.Close()
		must(b, os.RemoveAll(dst))
		b.StartTimer()
	}
}

// processor is the time that this process has used, which other processes on the machine
// change less than they change the time of day.
func processor(b *testing.B) time.Duration {
	b.Helper()
	var r unix.Rusage
	must(b, unix.Getrusage(unix.RUSAGE_SELF, &r))
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// sealOnce captures upper as id1 and tells how long the seal took, and how much of a
// processor.
func sealOnce(b *testing.B, s *Store, upper string, uppers ...string) (took, cpu time.Duration) {
	b.Helper()
	_, err := s.Open(b.Context(), id1, upper, time.Hour, nil)
	must(b, err)
	_, err = s.Take(b.Context(), id1, 0)
	must(b, err)
	begin, used := time.Now(), processor(b)
	_, err = s.Seal(b.Context(), id1, uppers...)
	must(b, err)
	return time.Since(begin), processor(b) - used
}

func smallFiles(b *testing.B, dir string) {
	b.Helper()
	data := make([]byte, 4096)
	for n := range 20_000 {
		sub := filepath.Join(dir, fmt.Sprint("d", n/100))
		if n%100 == 0 {
			must(b, os.MkdirAll(sub, 0o755))
		}
		data[0], data[1] = byte(n), byte(n>>8)
		must(b, os.WriteFile(filepath.Join(sub, fmt.Sprint("f", n)), data, 0o600))
	}
}

func write1GiB(b *testing.B, path string) {
	b.Helper()
	f, err := os.Create(path)
	must(b, err)
	defer f.Close()
	chunk := make([]byte, 1<<20)
	r := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1)) //nolint:gosec // any bytes will do
	for i := range chunk {
		chunk[i] = byte(r.Uint32())
	}
	for n := range bigFile >> 20 {
		chunk[0], chunk[1] = byte(n), byte(n>>8)
		_, err := f.Write(chunk)
		must(b, err)
	}
}
