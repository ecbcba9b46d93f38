// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

// BenchmarkCheckpointLayer packs memory pages: random ones, and pages of which
// every second is zero. COHORT_BENCH_MIB sets the size (default 64).
func BenchmarkCheckpointLayer(b *testing.B) {
	mib := 64
	if s := os.Getenv("COHORT_BENCH_MIB"); s != "" {
		mib, _ = strconv.Atoi(s)
	}
	for _, zero := range []bool{false, true} {
		dir := checkpointDir(b, sampleCheckpoint("db"))
		f, err := os.Create(filepath.Join(dir, "checkpoint/pages-2.img"))
		must(b, err)
		buf := make([]byte, 1<<20)
		for range mib {
			rand.Read(buf)
			for i := 0; zero && i < len(buf); i += 8192 {
				clear(buf[i : i+4096])
			}
			_, err := f.Write(buf)
			must(b, err)
		}
		must(b, f.Sync()) // its write-back is not what is measured
		must(b, f.Close())
		for _, comp := range []Compression{Zstd, Gzip, None} {
			b.Run(fmt.Sprintf("zero=%v/%s", zero, comp), func(b *testing.B) {
				h := newHost(b)
				b.SetBytes(int64(mib) << 20)
				for b.Loop() {
					d, _, err := writeLayer(h.ctx, h.store, comp, LayerCheckpoint, func(w io.Writer) error {
						return writeCheckpoint(h.ctx, w, dir, cutTime)
					})
					must(b, err)
					b.ReportMetric(float64(d.Size)/float64(mib<<20), "ratio")
				}
			})
		}
	}
}
