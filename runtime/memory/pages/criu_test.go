// SPDX-License-Identifier: Apache-2.0

package pages

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/runtime/memory/internal/uapi"
)

const criuLimit = 2 * time.Minute // of one CRIU run, on a busy machine

// mutator is testdata/mutator.c running, with its memory tracked by this process.
type mutator struct {
	t       testing.TB
	cmd     *exec.Cmd
	pid     int
	uffd    *os.File
	pagemap *os.File
	memory  Range
	result  string
	keep    bool     // a dump leaves it running
	before  []string // how CRIU is started for a restore
	root    string   // where it has another root than we
}

func needRoot(t testing.TB, tools ...string) {
	t.Helper()
	if os.Getuid() != 0 {
		missing(t, "root")
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			missing(t, tool)
		}
	}
}

func missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("COHORT_REQUIRE") == "1" {
		t.Fatalf("missing: %s", what)
	}
	t.Skipf("missing: %s", what)
}

func output(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
}

func startMutator(t testing.TB, pages, steps int) *mutator {
	t.Helper()
	dir := t.TempDir()
	program, result := filepath.Join(dir, "mutator"), filepath.Join(dir, "result")
	output(t, "gcc", "-O2", "-Wall", "-o", program, "testdata/mutator.c")
	return startMutatorAs(t, result, exec.Command(program, fmt.Sprint(pages), fmt.Sprint(steps), result))
}

// startMutatorAs is startMutator with a command line that becomes the program.
func startMutatorAs(t testing.TB, result string, cmd *exec.Cmd) *mutator {
	t.Helper()
	m := &mutator{t: t, result: result, cmd: cmd}
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	m.cmd.Dir = "/"
	stdout, err := m.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	m.pid = m.cmd.Process.Pid
	t.Cleanup(func() {
		// Only for a failed test: a restored one is not our child, and has ended.
		if m.cmd.ProcessState == nil {
			_ = m.cmd.Process.Kill()
			_ = m.cmd.Wait()
		}
	})
	var fd int
	var size uint64
	lines := bufio.NewReader(stdout)
	if _, err := fmt.Fscan(lines, &fd, &m.memory.Start, &size); err != nil {
		_ = m.cmd.Wait()
		if code := m.cmd.ProcessState.ExitCode(); code == 4 || code == 5 {
			missing(t, "userfaultfd with asynchronous write protection")
		}
		t.Fatalf("the program did not start: %v, %v", err, m.cmd.ProcessState)
	}
	m.memory.End = m.memory.Start + size
	m.waitStopped()
	pidfd, err := unix.PidfdOpen(m.pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	got, err := unix.PidfdGetfd(pidfd, fd, 0)
	if err != nil {
		t.Fatal(err)
	}
	m.uffd = os.NewFile(uintptr(got), "uffd")
	t.Cleanup(func() { m.uffd.Close() })
	if m.pagemap, err = os.Open(fmt.Sprintf("/proc/%d/pagemap", m.pid)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.pagemap.Close() })
	m.signal(unix.SIGCONT)
	// It closes this after the descriptor that CRIU could not dump.
	if _, err := io.Copy(io.Discard, lines); err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *mutator) signal(s unix.Signal) {
	m.t.Helper()
	if err := unix.Kill(m.pid, s); err != nil {
		m.t.Fatal(err)
	}
}

func (m *mutator) waitStopped() {
	m.t.Helper()
	for {
		var status unix.WaitStatus
		_, err := unix.Wait4(m.pid, &status, unix.WUNTRACED, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || !status.Stopped() {
			m.t.Fatalf("waiting for the program to stop: %v, status %#x", err, status)
		}
		return
	}
}

// scan asks the kernel for pages; vec is small, so that answers come in parts.
func (m *mutator) scan(arg uapi.PmScanArg) iter.Seq[Range] {
	return func(yield func(Range) bool) {
		vec := make([]uapi.PageRegion, 512)
		arg.Start, arg.End = m.memory.Start, m.memory.End
		for arg.Start < arg.End {
			n, err := uapi.PagemapScan(int(m.pagemap.Fd()), &arg, vec)
			if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EINVAL) {
				missing(m.t, "ioctl PAGEMAP_SCAN")
			}
			if err != nil {
				m.t.Error(err)
				return
			}
			for _, r := range vec[:n] {
				if !yield(Range{r.Start, r.End}) {
					return
				}
			}
			arg.Start = arg.WalkEnd
		}
	}
}

// written reports what was written since the last call, and starts anew.
// It asks only for pages that are there, as runtime/memory/track does: where there is no page table the kernel first reports
// the hole and then protects what is in it, which may be a page by then (fs/proc/task_mmu.c, pagemap_scan_pte_hole).
func (m *mutator) written() iter.Seq[Range] {
	return func(yield func(Range) bool) {
		vec := make([]uapi.PageRegion, 512)
		arg := uapi.PmScanArg{
			Flags: uapi.PmScanWPMatching | uapi.PmScanCheckWPAsync,
			Start: m.memory.Start, End: m.memory.End,
			CategoryMask: uapi.PageIsWritten, CategoryAnyofMask: uapi.PageIsPresent | uapi.PageIsSwapped,
			ReturnMask: uapi.PageIsPresent | uapi.PageIsSwapped | uapi.PageIsPfnZero,
		}
		for arg.Start < arg.End {
			n, err := uapi.PagemapScan(int(m.pagemap.Fd()), &arg, vec)
			if err != nil {
				m.t.Error(err)
				return
			}
			for _, r := range vec[:n] {
				// One that the kernel is moving at this moment looks as if it were on swap.
				there := r.Categories == uapi.PageIsPresent || r.Categories == uapi.PageIsSwapped
				if there && !yield(Range{r.Start, r.End}) {
					return
				}
			}
			arg.Start = arg.WalkEnd
		}
	}
}

// clean is what has content and was not written. There is no swap in this test.
func (m *mutator) clean() []Range {
	return slices.Collect(m.scan(uapi.PmScanArg{
		CategoryMask:     uapi.PageIsPresent | uapi.PageIsWritten | uapi.PageIsPfnZero | uapi.PageIsFile,
		CategoryInverted: uapi.PageIsWritten | uapi.PageIsPfnZero | uapi.PageIsFile,
	}))
}

func criu(t testing.TB, env []string, dir string, args ...string) {
	t.Helper()
	if err := tryCRIU(env, dir, args...); err != nil {
		t.Fatal(err)
	}
}

func tryCRIU(env []string, dir string, args ...string) error {
	return tryCRIUAs(nil, env, dir, args...)
}

// tryCRIUAs is tryCRIU with words before it on the command line.
func tryCRIUAs(before, env []string, dir string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), criuLimit)
	defer cancel()
	args = append(args, "--images-dir", dir, "--work-dir", filepath.Dir(dir), "--log-file", args[0]+".log")
	line := slices.Concat(before, []string{"criu"}, args)
	cmd := exec.CommandContext(ctx, line[0], line[1:]...)
	cmd.Env = append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		log, _ := os.ReadFile(filepath.Join(filepath.Dir(dir), args[0]+".log"))
		lines := strings.Split(string(log), "\n")
		return fmt.Errorf("criu %s: %w\n%s\n%s", args[0], err, out, strings.Join(lines[max(0, len(lines)-40):], "\n"))
	}
	return nil
}

// dump stops the process and leaves it dead, with images of what the store has not.
func (m *mutator) dump(dir string, env ...string) []Range {
	m.t.Helper()
	m.signal(unix.SIGSTOP)
	m.waitStopped()
	clean := m.clean()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		m.t.Fatal(err)
	}
	args := []string{"dump", "--tree", fmt.Sprint(m.pid)}
	if m.keep {
		args = append(args, "--leave-running")
	}
	criu(m.t, env, dir, args...)
	if m.keep {
		m.signal(unix.SIGCONT)
	} else {
		_ = m.cmd.Wait()
	}
	return clean
}

// restore brings the process back and returns its own verdict.
func (m *mutator) restore(dir string) (string, time.Duration) {
	m.t.Helper()
	// It becomes our child, and its pid is free when we have waited for it.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		m.t.Fatal(err)
	}
	start := time.Now()
	args := []string{"restore", "--restore-detached"}
	if m.root != "" {
		args = append(args, "--root", m.root)
	}
	if err := tryCRIUAs(m.before, nil, dir, args...); err != nil {
		m.t.Fatal(err)
	}
	took := time.Since(start)
	pidfd, err := unix.PidfdOpen(m.pid, 0)
	if err != nil {
		m.t.Fatal(err)
	}
	f := os.NewFile(uintptr(pidfd), "pidfd")
	defer f.Close()
	m.t.Cleanup(func() { _ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0) })
	m.signal(unix.SIGUSR1)
	m.signal(unix.SIGCONT)
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	deadline := time.Now().Add(criuLimit)
	for {
		n, err := unix.Poll(fds, int(time.Until(deadline).Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			m.t.Fatalf("the restored program does not end: %v", err)
		}
		break
	}
	if _, err := unix.Wait4(m.pid, nil, 0, nil); err != nil {
		m.t.Fatal(err)
	}
	verdict, err := os.ReadFile(m.result)
	if err != nil {
		m.t.Fatalf("the restored program left no verdict: %v", err)
	}
	return string(bytes.TrimSpace(verdict)), took
}

func (m *mutator) preCopy(s *Store, rounds int) {
	m.t.Helper()
	p := s.Process(m.pid)
	for range rounds {
		c, err := p.Copy(context.Background(), m.pid, m.written())
		if err != nil {
			m.t.Fatal(err)
		}
		m.t.Logf("round: %+v", c)
	}
}

// TestAProcessCopiedWhileRunningIsRestoredByPlainCRIU goes the whole way, with the preload library and
// without its effect.
func TestAProcessCopiedWhileRunningIsRestoredByPlainCRIU(t *testing.T) {
	needRoot(t, "gcc", "criu")
	const pages, steps = 6000, 40
	for _, test := range []struct {
		name   string
		rounds int
		env    []string
		skips  bool
	}{
		{"five rounds", 5, []string{"COHORT_CRIU_SKIP_CLEAN=1"}, true},
		{"one round", 1, []string{"COHORT_CRIU_SKIP_CLEAN=1"}, true},
		{"CRIU skips nothing", 3, nil, false},
		{"shared memory is watched by CRIU", 2, []string{"COHORT_CRIU_SKIP_CLEAN=1", "CRIU_TRACK_SHMEM=1"}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := startMutator(t, pages, steps)
			root := t.TempDir()
			dir := filepath.Join(root, "checkpoint")
			s, err := NewStore(filepath.Join(root, "store"))
			if err != nil {
				t.Fatal(err)
			}
			defer s.Discard()
			m.preCopy(s, test.rounds)
			// One round more changes the store once the program has gone on for a while.
			time.Sleep(50 * time.Millisecond)
			s.Hold()
			m.preCopy(s, 1)
			time.Sleep(20 * time.Millisecond)
			clean := m.dump(dir, test.env...)
			stats, err := Compose(context.Background(), dir, s, map[int][]Range{m.pid: clean})
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%+v", stats)
			if test.skips && (stats.Overlap != 0 || stats.ParentPages != count(clean) || stats.ParentPages < pages/4) {
				t.Errorf("CRIU dumped what it should not: %+v; %d pages were clean; is the preload library of this version installed (contrib/setup/setup.sh)?", stats, count(clean))
			}
			if !test.skips && stats.Overlap != count(clean) {
				t.Errorf("CRIU was to dump everything: %+v; %d pages were clean", stats, count(clean))
			}
			if err := s.Discard(); err != nil {
				t.Fatal(err)
			}
			verdict, _ := m.restore(dir)
			if !strings.HasPrefix(verdict, "0 of ") {
				t.Error(verdict)
			}
			t.Log(verdict)
		})
	}
}
