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

// BenchmarkCheckpointLayer packs memory pages: random ones, pages of which every second
// is zero, and pages of which every second is text. COHORT_BENCH_MIB sets the size
// (default 64).
func BenchmarkCheckpointLayer(b *testing.B) {
	mib := 64
	if s := os.Getenv("COHORT_BENCH_MIB"); s != "" {
		mib, _ = strconv.Atoi(s)
	}
	for _, kind := range []string{"random", "zero", "text"} {
		dir := checkpointDir(b, sampleCheckpoint("db"))
		f, err := os.Create(filepath.Join(dir, "checkpoint/pages-2.img"))
		must(b, err)
		buf := make([]byte, 1<<20)
		for n := range mib {
			rand.Read(buf)
			for i := 0; kind != "random" && i < len(buf); i += 8192 {
				clear(buf[i : i+4096])
				for page := buf[i : i : i+4096]; kind == "text" && len(page) < 4000; {
					page = fmt.Appendf(page, "%d: row %d of table %x has the key %q and the value %f\n", i, len(page), n, buf[i+5000:i+5004], float64(len(page))/7)
				}
			}
			_, err := f.Write(buf)
			must(b, err)
		}
		must(b, f.Sync()) // its write-back is not what is measured
		must(b, f.Close())
		for _, comp := range []Compression{Zstd, Gzip, None} {
			b.Run(kind+"/"+string(comp), func(b *testing.B) {
				h := newHost(b)
				b.SetBytes(int64(mib) << 20)
				for b.Loop() {
					d, err := writeLayer(h.ctx, h.store, comp, LayerCheckpoint, &Checkpoint{}, func(w io.Writer) error {
						return writeCheckpoint(h.ctx, w, dir, cutTime)
					})
					must(b, err)
					b.ReportMetric(float64(d.desc.Size)/float64(mib<<20), "ratio")
				}
			})
		}
	}
}
