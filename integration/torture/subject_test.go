// SPDX-License-Identifier: Apache-2.0

package torture

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
)

const (
	image      = "test.local/torture:latest"
	reportPath = "/report"
	// Huge pages for the original and for copies beside it; each takes one.
	hugePages = 4
)

// report is what the program says when every process of it has verified itself.
type report struct {
	programs.Report
	Failed bool `json:"failed"`
	// Steps is how many things have been done to memory, files and processes.
	Steps uint64 `json:"steps"`
	// Verified is in pages.
	Verified  uint64            `json:"verified"`
	Processes int               `json:"processes"`
	Ops       map[string]uint64 `json:"ops"`
}

// subject is one run of the program, or a restored one.
type subject struct {
	id  string
	pid int
}

// limit is the test's context.
func limit(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), d, fmt.Errorf("%s took longer than %v", t.Name(), d))
	t.Cleanup(cancel)
	return ctx
}

// loadImage compiles the program, and makes an image of it that holds nothing else.
func loadImage(ctx context.Context, t *testing.T, in *harness.Instance) {
	t.Helper()
	gcc, compiler := harness.RequireTool(t, "gcc"), harness.RequireTool(t, "go")
	dir := t.TempDir()
	root, archive := filepath.Join(dir, "root"), filepath.Join(dir, "image.tar")
	for _, d := range []string{"data", "dev", "proc", "sys", "tmp"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	sources, err := filepath.Glob("program/*.c")
	if err != nil || len(sources) == 0 {
		t.Fatalf("no sources in program/: %v", err)
	}
	build := append([]string{"-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-o", filepath.Join(root, "torture")}, sources...)
	for _, cmd := range []*exec.Cmd{
		exec.CommandContext(ctx, gcc, build...),
		exec.CommandContext(ctx, compiler, "run", "-buildvcs=false", "github.com/cohort-project/cohort/contrib/setup/mkimage", "-ref", image, "-root", root, "-out", archive),
	} {
		cmd.Env = append(cmd.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
		}
	}
	if _, err := in.Ctr(ctx, "images", "import", "--snapshotter", harness.CohortOnCohort.Snapshotter, archive); err != nil {
		t.Fatal(err)
	}
	in.RemoveImagesAfter(t, image)
}

// allowHugePages gives the host huge pages for the time of the test. Where that
// cannot be had the program does without them.
func allowHugePages(t *testing.T) bool {
	const file = "/proc/sys/vm/nr_hugepages"
	old, err := os.ReadFile(file)
	if err != nil {
		t.Logf("without explicit huge pages: %v", err)
		return false
	}
	before, err := strconv.Atoi(string(bytes.TrimSpace(old)))
	// Not more on top: a run that was killed has left some.
	want := strconv.Itoa(max(before, hugePages))
	if err == nil {
		err = os.WriteFile(file, []byte(want), 0)
	}
	if err == nil {
		t.Cleanup(func() { _ = os.WriteFile(file, old, 0) })
		var now []byte
		if now, err = os.ReadFile(file); err == nil && strings.TrimSpace(string(now)) != want {
			err = errors.New("the host has not enough memory in one piece")
		}
	}
	if err != nil {
		t.Logf("without explicit huge pages: %v", err)
	}
	return err == nil
}

// args is the program's command line. A pid can only be had again with a capability.
func args(t *testing.T, seed uint64) (cmd, more []string) {
	t.Helper()
	cmd = []string{"/torture", "--seed", strconv.FormatUint(seed, 10), "--memory", "3072"}
	if allowHugePages(t) {
		cmd = append(cmd, "--hugetlb")
	}
	return cmd, []string{"--cap-add", "CAP_CHECKPOINT_RESTORE"}
}

// verify has every process verify everything. The error quotes what the program
// found.
func (s subject) verify(ctx context.Context) (report, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*time.Minute, errors.New("no report within two minutes"))
	defer cancel()
	var r report
	err := programs.Ask(ctx, s.pid, reportPath, &r)
	if err == nil && !r.Failed {
		return r, nil
	}
	found, readErr := os.ReadFile(filepath.Join("/proc", strconv.Itoa(s.pid), "root/failed"))
	if readErr != nil {
		found = []byte(readErr.Error())
	}
	if err == nil {
		err = errors.New("something is not as it should be")
	}
	return r, fmt.Errorf("%s: %w: %s", s.id, err, bytes.TrimSpace(found))
}

// goesOn has it verify itself, work for a moment, and verify itself again.
func (s subject) goesOn(ctx context.Context) (first report, err error) {
	if first, err = s.verify(ctx); err != nil {
		return first, err
	}
	select {
	case <-time.After(300 * time.Millisecond):
	case <-ctx.Done():
		return first, context.Cause(ctx)
	}
	second, err := s.verify(ctx)
	if err == nil && second.Steps <= first.Steps {
		err = fmt.Errorf("%s: it stands still at step %d", s.id, second.Steps)
	}
	return first, err
}
