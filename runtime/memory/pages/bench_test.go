// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// benchPages is the memory of the measured process: COHORT_BENCH_MIB, 256 MiB if not set.
func benchPages(b *testing.B) int {
	mib := 256
	if v := os.Getenv("COHORT_BENCH_MIB"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil {
			b.Fatal(err)
		}
		mib = n
	}
	return mib << 20 / int(pageSize)
}

// benchDir is on a disk, where images are: COHORT_BENCH_DIR, the system's temporary folder if not set.
func benchDir(b *testing.B) string {
	dir, err := os.MkdirTemp(os.Getenv("COHORT_BENCH_DIR"), "pages")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// BenchmarkCheckpoint measures each part of one checkpoint, with pre-copy and as CRIU does it alone.
func BenchmarkCheckpoint(b *testing.B) {
	needRoot(b, "gcc", "criu")
	pages := benchPages(b)
	mib := float64(pages) * float64(pageSize) / (1 << 20) * 3 / 4 // populated at the start
	for _, composed := range []bool{true, false} {
		b.Run(fmt.Sprintf("composed=%v", composed), func(b *testing.B) {
			for range b.N {
				m := startMutator(b, pages, pages/5000+1)
				root := benchDir(b)
				dir := filepath.Join(root, "checkpoint")
				times := map[string]time.Duration{}
				last := time.Now()
				lap := func(name string) {
					times[name] = time.Since(last)
					last = time.Now()
				}
				s, err := NewStore(filepath.Join(root, "store"))
				if err != nil {
					b.Fatal(err)
				}
				var env []string
				if composed {
					env = []string{"COHORT_CRIU_SKIP_CLEAN=1"}
					m.preCopy(s, 1)
					lap("first-round")
					if err := s.Sync(context.Background()); err != nil {
						b.Fatal(err)
					}
					lap("sync")
					m.preCopy(s, 2)
					lap("more-rounds")
				} else {
					// As many pages are changed as in the other case.
					time.Sleep(time.Second)
					lap("")
				}
				clean := m.dump(dir, env...)
				lap("dump")
				if composed {
					if _, err := Compose(context.Background(), dir, s, map[int][]Range{m.pid: clean}); err != nil {
						b.Fatal(err)
					}
					lap("compose")
				}
				if err := s.Discard(); err != nil {
					b.Fatal(err)
				}
				verdict, took := m.restore(dir)
				times["restore"] = took
				b.Log(verdict)
				delete(times, "")
				for name, d := range times {
					b.ReportMetric(float64(d.Microseconds())/1000, name+"-ms")
				}
				if composed {
					b.ReportMetric(mib/times["first-round"].Seconds(), "first-round-MiB/s")
				}
			}
		})
	}
}
