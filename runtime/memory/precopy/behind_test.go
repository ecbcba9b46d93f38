// SPDX-License-Identifier: Apache-2.0

package precopy

import (
	"bufio"
	"math"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/runtime/memory/track"
)

const (
	writerEnv  = "PRECOPY_TEST_WRITER"
	writerSize = 64 << 20
)

// This program, run again, is a process that writes all of its memory again and again: nobody gets
// ahead of it.
func init() {
	if os.Getenv(writerEnv) == "" {
		return
	}
	memory, err := unix.Mmap(-1, 0, writerSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		os.Exit(1)
	}
	for round := byte(1); ; round++ {
		for at := 0; at < len(memory); at += int(pageSize) {
			memory[at] = round
		}
		if round == 1 {
			_, _ = os.Stdout.WriteString("ready\n")
		}
	}
}

func needTracking(t *testing.T) {
	t.Helper()
	if err := track.Supported(); os.Geteuid() != 0 || err != nil {
		if os.Getenv("COHORT_REQUIRE") == "1" {
			t.Fatal("missing: root, or: ", err)
		}
		t.Skip("missing: root, or: ", err)
	}
}

// started starts a program for the time of the test, and returns what waits until it says that it is ready.
func started(t *testing.T, c *exec.Cmd) (ready func()) {
	t.Helper()
	out, err := c.StdoutPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Process.Kill()
		_ = c.Wait()
	})
	lines := bufio.NewReader(out)
	return func() {
		t.Helper()
		if line, err := lines.ReadString('\n'); err != nil {
			t.Fatalf("the program says %q: %v", line, err)
		}
	}
}

// behind begins a session of such a process, as if so much memory could be spared.
func behind(t *testing.T, spare uint64) (*Session, *os.Process) {
	t.Helper()
	needTracking(t)
	c := exec.Command("/proc/self/exe")
	c.Env = append(os.Environ(), writerEnv+"=1")
	started(t, c)()
	list := func() ([]Process, error) { return []Process{{c.Process.Pid, 1}}, nil }
	s, err := Start(t.Context(), t.TempDir(), list, Options{spare: func() uint64 { return spare }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s, c.Process
}

// A container that writes as fast as it is copied costs one round on the disk. The rest goes to
// memory, and what is left at last is copied while it is frozen: CRIU finds nothing.
func TestAContainerThatIsNotCaughtUpWithIsCopiedIntoMemory(t *testing.T) {
	s, p := behind(t, math.MaxUint64)
	if st := s.Stats(); st.Rounds != 1 || st.End != EndBehind {
		t.Errorf("%d rounds on the disk, which end with %q", st.Rounds, st.End)
	}
	begun := time.Now()
	if err := s.CatchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begun); took > catchUpTime+5*time.Second {
		t.Errorf("CatchUp took %v", took)
	}
	s.KeepWarm()
	s.Sprint(t.Context(), 20*time.Millisecond)
	if err := p.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	waitStopped(t, p.Pid)
	// The control: there is something to be copied.
	if left, err := s.written(); err != nil || left == 0 {
		t.Errorf("nothing is left for the barrier: %d, %v", left, err)
	}
	if err := s.Scan(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left, err := s.written(); err != nil || left != 0 {
		t.Errorf("%d bytes are left to CRIU, %v", left, err)
	}
	if err := s.Complete(t.Context()); err != nil {
		t.Fatal(err)
	}
	m := s.members[0]
	var clean uint64
	for _, r := range m.clean {
		clean += r.End - r.Start
	}
	if missing, err := m.store.Missing(m.clean); err != nil || len(missing) > 0 || clean < writerSize {
		t.Errorf("of %d clean bytes are missing %v, %v", clean, missing, err)
	}
	if st := s.Stats(); st.BarrierBytes == 0 || (st.End != EndBehind && st.End != EndCaughtUp) {
		t.Errorf("%d bytes in the barrier, end %q", st.BarrierBytes, st.End)
	}
}

// Where memory is short, the rounds go to the disk as far as they go.
func TestWithoutMemoryToSpareTheRoundsGoOn(t *testing.T) {
	s, _ := behind(t, 0)
	if st := s.Stats(); st.Rounds < 2 || st.End == EndBehind {
		t.Errorf("%d rounds, which end with %q", st.Rounds, st.End)
	}
}

func waitStopped(t *testing.T, pid int) {
	t.Helper()
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PID, pid, &info, unix.WSTOPPED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
}
