// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cohort-project/cohort/integration/harness"
)

// containerd goes on writing into the folder of an ingest for a moment after its writer
// has given up, which is when it is to be removed.
func TestAnInterruptedExportLeavesNoIngest(t *testing.T) {
	w := setUp(t)
	id, _ := w.run(harness.Container{Args: []string{"/bin/memload", "--mem", "64", "--dirty", "0", "--report", reportPath}})
	ingests := w.watchDir(filepath.Join(w.in.Dir, "containerd", "root", "io.containerd.content.v1.content", "ingest"))
	path, err := w.in.LookPath("cohort")
	w.must(err)
	listed := func() []string {
		refs, err := filepath.Glob(filepath.Join(ingests.dir, "*", "ref"))
		w.must(err)
		return refs
	}
	before := listed() // of commands that other tests have killed: they go with their leases
	interrupted := 0
	for n := range 10 {
		ref := w.image("interrupted")
		_, err := ingests.seen() // and forgotten: what the last one made
		w.must(err)
		cmd := startCommand(w.ctx, w.in.Env, path, "checkpoint", "--member", id, ref)
		ctx, cancel := context.WithTimeout(w.ctx, time.Minute)
		_, err = ingests.next(ctx)
		cancel()
		w.must(err)
		time.Sleep(time.Duration(n) * 5 * time.Millisecond) // another moment of the export each time
		w.must(cmd.cmd.Process.Signal(os.Interrupt))
		_, err = cmd.wait()
		if err == nil {
			continue // it was too late
		}
		interrupted++
		if strings.Contains(err.Error(), "removing ingest") {
			t.Error(err)
		}
		for _, file := range listed() {
			if slices.Contains(before, file) {
				continue
			}
			name, err := os.ReadFile(file)
			t.Errorf("interrupted %d ms after the first ingest, and left behind: %s (%v)", 5*n, name, err)
		}
		if names := w.images(ref); len(names) > 0 {
			t.Errorf("interrupted, and there are %v", names)
		}
	}
	if interrupted == 0 {
		t.Error("no export was interrupted")
	}
}
