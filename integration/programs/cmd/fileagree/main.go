// SPDX-License-Identifier: Apache-2.0

// Fileagree appends records to a file and remembers how many: the file has
// exactly that size whenever the process looks, unless a checkpoint took file
// and memory at two instants. (CRIU's own check, "file has bad size", sees the
// same through the open descriptor.)
//
//	fileagree --file /data --rate 500 --report /report
//
// SIGUSR1 asks for a report (programs.FileAgree). Exit code 3: they disagree.
package main

import (
	"bytes"
	"flag"
	"os"
	"sync/atomic"
	"time"

	"github.com/cohort-project/cohort/integration/programs"
	"github.com/cohort-project/cohort/integration/programs/internal/pattern"
	"github.com/cohort-project/cohort/integration/programs/internal/report"
)

const size = 64

func main() {
	path := flag.String("file", "/data", "`file` to append to")
	rate := flag.Float64("rate", 500, "records a second")
	reports := flag.String("report", "", "`file` for reports")
	flag.Parse()
	if flag.NArg() > 0 || *rate <= 0 {
		flag.Usage()
		os.Exit(2)
	}
	f, err := os.OpenFile(*path, os.O_RDWR|os.O_CREATE|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		report.Exit(1, "%v", err)
	}
	var records atomic.Uint64
	report.Serve(*reports, func(n int) any {
		have := records.Load()
		return programs.FileAgree{Report: programs.Report{N: n}, Records: have, Bytes: have * size}
	})
	for tick := time.NewTicker(time.Duration(float64(time.Second) / *rate)); ; <-tick.C {
		n := records.Load()
		verify(f, n)
		var rec [size]byte
		pattern.Fill(rec[:], n*size)
		if _, err := f.Write(rec[:]); err != nil {
			report.Exit(1, "%v", err)
		}
		records.Store(n + 1)
	}
}

// verify checks that the file is n records long and ends in record n-1.
func verify(f *os.File, n uint64) {
	st, err := f.Stat()
	if err != nil {
		report.Exit(1, "%v", err)
	}
	if st.Size() != int64(n*size) {
		report.Exit(programs.ExitCorrupt, "%s has %d bytes and memory says %d", f.Name(), st.Size(), n*size)
	}
	if n == 0 {
		return
	}
	var have, want [size]byte
	pattern.Fill(want[:], (n-1)*size)
	if _, err := f.ReadAt(have[:], int64((n-1)*size)); err != nil || !bytes.Equal(have[:], want[:]) {
		report.Exit(programs.ExitCorrupt, "%s: record %d is not what was written there (%v)", f.Name(), n-1, err)
	}
}
