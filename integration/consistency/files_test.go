// SPDX-License-Identifier: Apache-2.0

package consistency

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
)

// Paths of the files that the programs write.
const (
	recordsFile = "/records"
	counterFile = "/counter"
)

func TestFilesAndMemoryAgree(t *testing.T) {
	in := harness.Up(t)
	ctx := limit(t, 2*time.Minute)
	g := newGroup(t, in, "files")
	// As often as they can: the moment between a write and what the process
	// remembers of it is met sooner or later.
	records := g.run(ctx, "records", "", "/bin/fileagree", "--file", recordsFile, "--rate", "5000")
	counter := g.run(ctx, "counter", "", "/bin/ticker", "--mem", "8", "--checksum", "--file", counterFile)

	type cut struct {
		ref     string
		records uint64
		counter uint64
	}
	var cuts []cut
	pause := newMoments(t)
	for range 10 {
		pause.pass(ctx)
		c := cut{records: ask[programs.FileAgree](ctx, t, records).Records, counter: ask[programs.Ticker](ctx, t, counter).Counter}
		var err error
		if c.ref, _, err = g.checkpoint(ctx); err != nil {
			t.Fatal(err)
		}
		cuts = append(cuts, c)
	}
	if err := g.allRun(ctx); err != nil {
		t.Fatalf("after ten checkpoints of the running group: %v", err)
	}
	g.destroy(ctx)
	for i, c := range cuts {
		if err := g.filesAgree(ctx, c.ref, c.records, c.counter); err != nil {
			t.Errorf("checkpoint %d: %v", i, err)
		}
		g.destroy(ctx)
	}
}

// filesAgree restores a group of a fileagree and a ticker and lets both write on,
// which they only do while file and memory agree.
func (g *group) filesAgree(ctx context.Context, ref string, records, counter uint64) error {
	g.t.Helper()
	pids, err := g.restore(ctx, ref)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, 20*time.Second, errors.New("nothing is written any more"))
	defer cancel()
	var first, last programs.FileAgree
	var ticker programs.Ticker
	for last.Records < first.Records+100 || first.N == 0 {
		if err := programs.Ask(ctx, pids["records"], report, &last); err != nil {
			return errors.Join(err, context.Cause(ctx), g.allRun(g.t.Context()))
		}
		if first.N == 0 {
			first = last
		}
	}
	if err := programs.AskVerified(ctx, pids["counter"], report, &ticker); err != nil {
		return errors.Join(err, context.Cause(ctx), g.allRun(g.t.Context()))
	}
	if first.Records < records || ticker.Counter < counter || !ticker.SumOK {
		return fmt.Errorf("restored with %d records and counter %d, which were %d and %d before the cut", first.Records, ticker.Counter, records, counter)
	}
	// What the files hold, as anybody sees it: they are written before they are
	// counted, and go on being written while this looks.
	for _, f := range []struct {
		member, path string
		least        uint64
	}{{"records", recordsFile, last.Bytes}, {"counter", counterFile, ticker.Counter * 8}} {
		fi, err := os.Stat(filepath.Join("/proc", strconv.Itoa(pids[f.member]), "root", f.path))
		if err != nil {
			return err
		}
		if uint64(fi.Size()) < f.least {
			return fmt.Errorf("%s has %d bytes, its process knows of %d", f.path, fi.Size(), f.least)
		}
	}
	return g.allRun(ctx)
}
