// SPDX-License-Identifier: Apache-2.0

package precopy

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/cohort-project/cohort/runtime/memory/track"
)

// shell starts a shell that does something when it is told a line.
func shell(t *testing.T, does string) (pid int, tell func()) {
	t.Helper()
	c := exec.Command("/bin/sh", "-c", "read line\n"+does)
	in, err := c.StdinPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = c.Process.Kill()
		_ = c.Wait()
	})
	return c.Process.Pid, func() { fmt.Fprintln(in) }
}

// A process that executes another program after tracking began is CRIU's, whole,
// and the others are pre-copied all the same.
func TestAProcessThatExecutesAnotherProgramIsLeftToCRIU(t *testing.T) {
	if err := track.Supported(); os.Geteuid() != 0 || err != nil {
		if os.Getenv("COHORT_REQUIRE") == "1" {
			t.Fatal("missing: root, or: ", err)
		}
		t.Skip("missing: root, or: ", err)
	}
	stays, _ := shell(t, "exit")
	leaves, tell := shell(t, "exec sleep 60")
	s, err := Start(t.Context(), t.TempDir(), func() ([]Process, error) { return []Process{{stays, 1}, {leaves, 2}}, nil }, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	tell()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", leaves))
		if strings.TrimSpace(string(name)) == "sleep" {
			break
		}
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("it has not executed sleep: %q, %v", name, err)
		}
	}
	if _, err := s.round(t.Context(), s.each); err != nil {
		t.Errorf("another round: %v", err)
	}
	if _, err := s.written(); err != nil {
		t.Errorf("what is left to copy: %v", err)
	}
	if err := s.Scan(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Complete(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, m := range s.members {
		if (m.clean != nil) != (m.Pid == stays) {
			t.Errorf("process %d (%d executes): clean is %v", m.Pid, leaves, m.clean)
		}
	}
}
