// SPDX-License-Identifier: Apache-2.0

package backend

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// The benchmarks report Take alone, which is the part that stops containers, and Seal:
//
//	go test -run - -bench Take -benchtime 10x ./snapshotter/backend
func BenchmarkTake(b *testing.B) {
	for _, be := range []struct {
		name    string
		factory func(testing.TB) (string, Backend)
	}{{Btrfs, newBtrfs}, {"snapshots", newSnapshots}, {Reflink, newReflink}, {Copy, newCopy}} {
		for _, load := range []string{"idle", "rewritten", "writer100MBps"} {
			b.Run(be.name+"/"+load, func(b *testing.B) { benchTake(b, be.factory, load) })
		}
	}
}

func benchTake(b *testing.B, factory func(testing.TB) (string, Backend), load string) {
	root, be := factory(b)
	src := filepath.Join(root, "src")
	must(b, os.Mkdir(src, 0o755))
	for i := range 1500 {
		must(b, os.WriteFile(filepath.Join(src, fmt.Sprint(i)), make([]byte, 4<<10), 0o600))
	}
	must(b, os.WriteFile(filepath.Join(src, "big"), make([]byte, 512<<20), 0o600))

	var takes, seals []time.Duration
	for b.Loop() {
		var end func()
		if load == "writer100MBps" {
			end = writeSteadily(b, filepath.Join(src, "written"))
		}
		dst := filepath.Join(root, "dst")
		c, err := be.Open(b.Context(), src, dst)
		must(b, err)
		// What the barrier does between its phases prepare and capture.
		<-time.After(300 * time.Millisecond)
		if load == "rewritten" {
			for i := range 100 {
				must(b, os.WriteFile(filepath.Join(src, fmt.Sprint(i)), make([]byte, 8<<10), 0o600))
			}
		}
		if end != nil {
			end() // frozen
		}
		t := time.Now()
		must(b, c.Take(b.Context()))
		takes = append(takes, time.Since(t))
		t = time.Now()
		must(b, c.Seal(b.Context()))
		seals = append(seals, time.Since(t))
		must(b, c.Close())
		must(b, be.Discard(dst))
	}
	slices.Sort(takes)
	slices.Sort(seals)
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(takes[len(takes)/2].Microseconds())/1000, "take-p50-ms")
	b.ReportMetric(float64(takes[len(takes)-1].Microseconds())/1000, "take-max-ms")
	b.ReportMetric(float64(seals[len(seals)/2].Microseconds())/1000, "seal-p50-ms")
}

// writeSteadily dirties 1 MiB of a file every 10 ms until its result is called.
func writeSteadily(b *testing.B, path string) func() {
	f, err := os.Create(path)
	must(b, err)
	stop, done := make(chan struct{}), make(chan error)
	go func() {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		buf := make([]byte, 1<<20)
		for off := int64(0); ; off = (off + 1<<20) % (256 << 20) {
			select {
			case <-stop:
				done <- f.Close()
				return
			case <-tick.C:
			}
			if _, err := f.WriteAt(buf, off); err != nil {
				done <- err
				return
			}
		}
	}()
	return func() {
		close(stop)
		must(b, <-done)
	}
}
