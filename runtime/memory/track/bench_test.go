// SPDX-License-Identifier: Apache-2.0

package track

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"
)

// BenchmarkTracking prints what tracking costs, for processes of several sizes:
// go test -bench Tracking -benchtime 10x
func BenchmarkTracking(b *testing.B) {
	for _, mib := range []int{16, 1024, 4096} {
		b.Run(fmt.Sprintf("%dMiB", mib), func(b *testing.B) {
			s := startSubject(b, nil)
			s.mapping(0, mib*256, "anon")
			s.do("fill 0 1")
			attachTo(b, s.pid).Close() // starts the injector
			times := map[string][]time.Duration{}
			note := func(what string, d time.Duration) { times[what] = append(times[what], d) }
			timed := func(what string, fn func() error) {
				begin := time.Now()
				if err := fn(); err != nil {
					b.Fatal(err)
				}
				note(what, time.Since(begin))
			}
			ctx := context.Background()
			for range b.N {
				s.do("work 0 1")
				note("write-untracked", time.Duration(s.do("work 0 1")[0]))
				tr := attachTo(b, s.pid)
				note("attach", tr.Cost().Attach)
				note("stopped", tr.Cost().Stopped)
				note("width", tr.Cost().Width)
				timed("take-first", func() error { return tr.Take(ctx, ignore) })
				timed("take-none", func() error { return tr.Take(ctx, ignore) })
				note("write-1%", time.Duration(s.do("work 0 100")[0]))
				timed("written-1%", func() error { _, err := tr.Written(); return err })
				timed("clean-1%", func() error { return tr.Clean(ignore, ignore) })
				timed("take-1%", func() error { return tr.Take(ctx, ignore) })
				timed("clean-all", func() error { return tr.Clean(ignore, ignore) })
				note("write-tracked", time.Duration(s.do("work 0 1")[0]))
				note("write-again", time.Duration(s.do("work 0 1")[0]))
				timed("refresh", func() error { _, err := tr.Refresh(ctx); return err })
				timed("close", tr.Close)
			}
			for what, list := range times {
				slices.Sort(list)
				b.ReportMetric(float64(list[len(list)/2].Microseconds()), what+"-µs")
			}
			pages := float64(mib * 256)
			median := func(what string) float64 { return float64(times[what][len(times[what])/2].Nanoseconds()) }
			b.ReportMetric((median("write-tracked")-median("write-untracked"))/pages, "ns/first-write")
			b.ReportMetric(0, "ns/op")
		})
	}
}
