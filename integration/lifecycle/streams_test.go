// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/cohort-project/cohort/integration/harness"
	shop "github.com/cohort-project/cohort/integration/shop/harness"
)

// streamsOf is what a process has as its standard streams: "pipe", or a path.
func (w *world) streamsOf(pid int) (kinds [3]string) {
	w.Helper()
	for i := range kinds {
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, i))
		w.must(err)
		kinds[i], _, _ = strings.Cut(link, ":")
	}
	return kinds
}

// counts waits until a program's count in /n has gone on by so many.
func (w *world) counts(pid, by int) {
	w.Helper()
	read := func() (int, error) {
		b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "root/n"))
		if err != nil {
			return 0, err
		}
		return strconv.Atoi(strings.TrimSpace(string(b)))
	}
	first := -1
	harness.Eventually(w, recovery, func() error {
		n, err := read()
		switch {
		case err != nil:
			return err
		case first < 0:
			first = n
		}
		if n < first+by {
			return fmt.Errorf("it counts from %d to %d and not to %d", first, n, first+by)
		}
		return nil
	})
}

// Containers of a client that is there, with pipes for their streams, are restored by a command that is
// not there any more: they print, which nobody reads and must not stop them, and are checkpointed again.
func TestContainersWithPipesComeBackWithPipesAndAreCheckpointedAgain(t *testing.T) {
	w := setUp(t)
	name := w.in.Name("pipes")
	annotations := func(member string) []string {
		return []string{"io.cohort.group=" + name, "io.cohort.member=" + member}
	}
	// 1 KiB at a time: a pipe that nobody reads is full after 64.
	printer, _ := w.run(harness.Container{
		ID: name + "-printer", Image: harness.BusyboxImage, Log: filepath.Join(t.TempDir(), "log"), Annotations: annotations("printer"),
		Args: []string{"/bin/sh", "-c", `n=0; while :; do n=$((n+1)); echo $n > /m; mv /m /n; printf '%1024d' $n; printf '%1024d' $n >&2; sleep 0.01; done`},
	})
	reader := name + "-reader"
	w.in.RemoveAfter(t, reader)
	args := []string{"run", "--detach", "--runtime", harness.CohortOnCohort.Runtime, "--snapshotter", harness.CohortOnCohort.Snapshotter}
	for _, a := range annotations("reader") {
		args = append(args, "--annotation", a)
	}
	w.ctr(append(args, harness.BusyboxImage, reader, "/bin/sh", "-c", `n=0; while :; do n=$((n+1)); echo $n > /m; mv /m /n; sleep 0.01; done`)...)
	ids := []string{printer, reader}
	before := map[string][3]string{}
	for _, id := range ids {
		w.counts(w.pid(id), 2)
		before[id] = w.streamsOf(w.pid(id))
	}
	if s := before[reader]; s[0] != "pipe" || s[1] != "pipe" || before[printer][1] != "pipe" {
		t.Fatalf("the containers have %v for their streams: this test proves nothing", before)
	}
	for generation := range 2 {
		ref := w.image("pipes")
		w.cohort("checkpoint", name, ref)
		w.remove(ids...)
		r := decode[shop.Restored](w, "restore", ref)
		if len(r.Members) != len(ids) {
			t.Fatalf("%d members are restored", len(r.Members))
		}
		for _, id := range ids {
			if got := w.streamsOf(w.pid(id)); got != before[id] {
				t.Errorf("restore %d: %s has the streams %v, and had %v", generation, id, got, before[id])
			}
			w.counts(w.pid(id), 150)
		}
	}
}
