// SPDX-License-Identifier: Apache-2.0

package shm

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/runtime/memory/pages"
)

// BenchmarkTake is what the barrier pays for shared memory of which 1 % has changed.
func BenchmarkTake(b *testing.B) {
	needRoot(b)
	for _, mib := range []int{16, 128, 1024} {
		b.Run(fmt.Sprintf("%dMiB", mib), func(b *testing.B) {
			memory, err := unix.Mmap(-1, 0, mib<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = unix.Munmap(memory) }()
			for i := 0; i < len(memory); i += 8 {
				memory[i] = byte(i>>12) | 1
			}
			store, err := pages.NewStore(filepath.Join(b.TempDir(), "store"))
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = store.Discard() }()
			s, err := Start(context.Background(), []Writer{{Pid: os.Getpid()}}, store)
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			for i := 0; i < len(memory); i += 100 * int(pageSize) {
				memory[i]++
			}
			b.SetBytes(int64(len(memory)))
			b.ResetTimer()
			for range b.N {
				if err := s.Take(context.Background()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkBarrier is the same for the memory of other processes, 1 % of it written since the last round, and with the
// writers known or not. Reported is processor time, which a busy machine does not change: of Scan, for which everything
// waits, and of Take, which goes on beside CRIU.
func BenchmarkBarrier(b *testing.B) {
	needRoot(b, "gcc")
	for _, mib := range []int{128, 1024} {
		for _, watched := range []bool{false, true} {
			b.Run(fmt.Sprintf("%dMiB/watched=%v", mib, watched), func(b *testing.B) {
				c := begin(b, start(b, fmt.Sprint(mib), "2", "quiet"), watched)
				c.round()
				var scan, take time.Duration
				b.ResetTimer()
				for range b.N {
					c.subject.freeze()
					before := processorTime()
					c.session.Scan(false)
					scanned := processorTime()
					if err := c.session.Take(context.Background()); err != nil {
						b.Fatal(err)
					}
					scan, take = scan+scanned-before, take+processorTime()-scanned
					if err := unix.Kill(-c.subject.pid, unix.SIGCONT); err != nil {
						b.Fatal(err)
					}
					c.round()
				}
				b.ReportMetric(float64(scan.Microseconds())/1000/float64(b.N), "scan-ms/op")
				b.ReportMetric(float64(take.Microseconds())/1000/float64(b.N), "take-ms/op")
				b.ReportMetric(float64(c.session.compared>>20), "compared-MiB")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}

func processorTime() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
