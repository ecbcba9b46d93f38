// SPDX-License-Identifier: Apache-2.0

package track

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cohort-project/cohort/runtime/memory/internal/uapi"
	"golang.org/x/sys/unix"
)

func TestForkedChildIsUntrackedAndUnharmed(t *testing.T) {
	s, m, tr := trackedSubject(t, 32)
	answer := s.do("fork 0")
	child, right := int(answer[0]), answer[1]
	if right != 1 {
		t.Error("the child found or wrote something else than it should")
	}
	expect(t, "Clean of the parent", clean(t, tr, m), pages(0, 32))

	ctr := attachTo(t, child)
	if n, err := ctr.Written(); err != nil || n < 32 {
		t.Errorf("Written of the child: %d, %v", n, err)
	}
	expect(t, "first Take of the child", taken(t, ctr, m), pages(0, 32))
	s.do("fill 0 2 0 4")
	expect(t, "Clean of the child", clean(t, ctr, m), pages(0, 32))
	expect(t, "Take of the parent", taken(t, tr, m), pages(0, 4))
	s.do("reap %d", child)
	if err := ctr.Take(context.Background(), func(Range) error { return nil }); !errors.Is(err, ErrGone) {
		t.Errorf("Take of the ended child: %v", err)
	}
}

func TestChildsPagesAreNotWriteProtected(t *testing.T) {
	s, m, _ := trackedSubject(t, 32)
	child := int(s.do("fork 0")[0])
	f, err := os.Open(procPath(child, "pagemap"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	arg := uapi.PmScanArg{
		Start: m.Start, End: m.End,
		CategoryMask: uapi.PageIsWritten | uapi.PageIsPresent, ReturnMask: uapi.PageIsWPAllowed | uapi.PageIsWritten,
	}
	vec := make([]uapi.PageRegion, 8)
	n, err := uapi.PagemapScan(int(f.Fd()), &arg, vec)
	if err != nil {
		t.Fatal(err)
	}
	if n != 1 || vec[0].Start != m.Start || vec[0].End != m.End || vec[0].Categories != uapi.PageIsWritten {
		t.Errorf("the child's pages: %+v", vec[:n])
	}
}

func TestExecIsNoticed(t *testing.T) {
	for _, how := range []string{"exec", "vforkexec"} {
		t.Run(how, func(t *testing.T) {
			s, _, tr := trackedSubject(t, 32)
			s.do("%s", how)
			s.answer("start again")
			never := func(r Range) error { return fmt.Errorf("reported %#x", r.Start) }
			if err := tr.Take(context.Background(), never); !errors.Is(err, ErrExec) {
				t.Errorf("Take: %v", err)
			}
			if err := tr.Clean(never, never); !errors.Is(err, ErrExec) {
				t.Errorf("Clean: %v", err)
			}
			if _, err := tr.Written(); !errors.Is(err, ErrExec) {
				t.Errorf("Written: %v", err)
			}
			if _, err := tr.Refresh(context.Background()); !errors.Is(err, ErrExec) {
				t.Errorf("Refresh: %v", err)
			}
			if err := tr.Alive(); !errors.Is(err, ErrExec) {
				t.Errorf("Alive: %v", err)
			}
			again := s.attach()
			m := s.mapping(0, 8, "anon")
			s.do("fill 0 1")
			refresh(t, again)
			expect(t, "Take of the new program", taken(t, again, m), pages(0, 8))
		})
	}
}

func TestExitIsNoticed(t *testing.T) {
	s := startSubject(t, nil)
	tr := s.attach()
	s.in.Close()
	_ = s.cmd.Wait()
	if err := tr.Take(context.Background(), func(Range) error { return nil }); !errors.Is(err, ErrGone) {
		t.Errorf("Take: %v", err)
	}
	if err := tr.Clean(ignore, ignore); !errors.Is(err, ErrGone) {
		t.Errorf("Clean: %v", err)
	}
	if err := tr.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	if _, err := Attach(context.Background(), s.pid); !errors.Is(err, ErrGone) {
		t.Errorf("Attach to a pid that is gone: %v", err)
	}
}

func TestZombieIsGone(t *testing.T) {
	s := startSubject(t, nil)
	tr := s.attach()
	s.in.Close()
	for { // not reaped
		st, err := readStatus(procPath(s.pid, "status"))
		if err != nil || st.state == 'Z' {
			break
		}
		runtime.Gosched()
	}
	if err := tr.Alive(); !errors.Is(err, ErrGone) {
		t.Errorf("Alive: %v", err)
	}
	if _, err := Attach(context.Background(), s.pid); !errors.Is(err, ErrGone) {
		t.Errorf("Attach: %v", err)
	}
}

// A pid given to another process must not make the tracker speak of that one. In a
// pid namespace of our own the next pid can be chosen.
func TestReusedPidIsGone(t *testing.T) {
	const knob = "/proc/sys/kernel/ns_last_pid"
	if !exists(knob) {
		missing(t, knob)
	}
	s := startSubject(t, nil)
	tr := s.attach()
	pid := s.pid
	s.in.Close()
	_ = s.cmd.Wait()
	for range 200 {
		// Others start processes as well: it may take some tries.
		if err := os.WriteFile(knob, fmt.Appendf(nil, "%d", pid-1), 0); err != nil {
			missing(t, knob+": "+err.Error())
		}
		other := exec.Command("sleep", "60")
		if err := other.Start(); err != nil {
			t.Fatal(err)
		}
		got := other.Process.Pid
		if got == pid {
			if err := tr.Take(context.Background(), func(Range) error { return nil }); !errors.Is(err, ErrGone) {
				t.Errorf("Take: %v", err)
			}
		}
		_ = other.Process.Kill()
		_ = other.Wait()
		if got == pid {
			return
		}
	}
	t.Skip("the pid was not reused in 200 tries")
}

func TestConfinedUnprivilegedProcessIsTracked(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, 16*pageSize), 0o644); err != nil {
		t.Fatal(err)
	}
	for dir := filepath.Dir(file); dir != "/"; dir = filepath.Dir(dir) {
		if st, err := os.Stat(dir); err == nil && st.Mode()&1 == 0 {
			_ = os.Chmod(dir, st.Mode()|0o755) // only folders of this test are closed to others
		}
	}
	cases := map[string]*syscall.SysProcAttr{
		"non-root": {Credential: &syscall.Credential{Uid: 65534, Gid: 65534}},
		"user namespace": {
			Cloneflags:  syscall.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 65536}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 65536}},
			Credential:  &syscall.Credential{Uid: 0, Gid: 0},
		},
		"pid namespace": {Cloneflags: syscall.CLONE_NEWPID},
	}
	for name, attr := range cases {
		t.Run(name, func(t *testing.T) {
			s := startSubject(t, attr)
			s.do("confine") // userfaultfd and ptrace: killed
			m := s.mapping(0, 32, "anon")
			s.do("fill 0 1")
			tr := s.attach()
			expect(t, "first Take", taken(t, tr, m), pages(0, 32))
			s.do("read 0 4 4 %s", file)
			s.do("fill 0 2 20 1")
			expect(t, "Clean", clean(t, tr, m), union(pages(0, 4), pages(8, 20), pages(21, 32)))
			expect(t, "Take", taken(t, tr, m), union(pages(4, 8), pages(20, 21)))
			if st, err := readStatus(procPath(s.pid, "status")); err != nil || st.tracer != 0 || st.seccomp != 2 {
				t.Errorf("afterwards: %+v, %v", st, err)
			}
		})
	}
}

func TestThreadedProcessIsTracked(t *testing.T) {
	s := startSubject(t, nil)
	s.do("threads 4")
	m := s.mapping(0, 32, "anon")
	s.do("fill 0 1")
	for range 20 {
		tr := s.attach()
		expect(t, "Take", taken(t, tr, m), pages(0, 32))
		tr.Close()
	}
}

func TestProcessWithoutItsLeaderIsTracked(t *testing.T) {
	s := startSubject(t, nil)
	before := s.attach()
	s.do("endleader")
	m := s.mapping(0, 32, "anon")
	s.do("fill 0 1")
	for {
		if st, err := readStatus(procPath(s.pid, "status")); err != nil || st.state == 'Z' {
			break
		}
		runtime.Gosched()
	}
	refresh(t, before)
	expect(t, "Take of a tracker from before", taken(t, before, m), pages(0, 32))
	before.Close()
	tr := s.attach()
	expect(t, "first Take", taken(t, tr, m), pages(0, 32))
	s.do("fill 0 2 3 1")
	expect(t, "Clean", clean(t, tr, m), union(pages(0, 3), pages(4, 32)))
}

func TestManyProcessesAtOnce(t *testing.T) {
	needTracking(t)
	const n = 32
	subjects := make([]*subject, n)
	for i := range subjects {
		subjects[i] = startSubject(t, nil)
	}
	begin := time.Now()
	var wg sync.WaitGroup
	trackers := make([]*Tracker, n)
	errs := make([]error, n)
	for i, s := range subjects {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			trackers[i], errs[i] = Attach(ctx, s.pid)
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d processes attached in %v", n, time.Since(begin))
	for i, tr := range trackers {
		m := subjects[i].mapping(0, 8, "anon")
		subjects[i].do("fill 0 1")
		refresh(t, tr)
		expect(t, "Take", taken(t, tr, m), pages(0, 8))
		tr.Close()
	}
}

func TestTracedProcessIsRefused(t *testing.T) {
	s := startSubject(t, nil)
	release := make(chan struct{})
	seized := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: detaches
		seized <- uapi.PtraceSeize(s.pid, 0)
		<-release
		if uapi.PtraceInterrupt(s.pid) == nil {
			_, _, _ = uapi.WaitTracee(s.pid, 0)
			_ = uapi.PtraceDetach(s.pid, 0)
		}
		seized <- nil
	}()
	if err := <-seized; err != nil {
		t.Fatal(err)
	}
	if _, err := Attach(context.Background(), s.pid); !errors.Is(err, ErrTraced) {
		t.Errorf("Attach: %v", err)
	}
	close(release)
	<-seized
	s.attach()
}

func TestStoppedProcessStaysStopped(t *testing.T) {
	s := startSubject(t, nil)
	m := s.mapping(0, 8, "anon")
	s.do("fill 0 1")
	if err := unix.Kill(s.pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	waitState(t, s.pid, 'T')
	for range 20 {
		tr := s.attach()
		expect(t, "Take", taken(t, tr, m), pages(0, 8))
		tr.Close()
		waitState(t, s.pid, 'T')
	}
	if err := unix.Kill(s.pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	s.do("fill 0 1")
}

func waitState(t *testing.T, pid int, want byte) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		st, err := readStatus(procPath(pid, "status"))
		if err != nil {
			t.Fatal(err)
		}
		if st.state == want && st.tracer == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d is in state %c, want %c", pid, st.state, want)
		}
		runtime.Gosched()
	}
}

// A frozen process cannot be attached to; the attempt ends with the context, and
// leaves nothing that would stop the process when it is thawed.
func TestFrozenProcessIsGivenUpAndUnharmed(t *testing.T) {
	const root = "/sys/fs/cgroup/freezer"
	needTracking(t)
	if !exists(root + "/cgroup.procs") {
		missing(t, "the cgroup v1 freezer")
	}
	dir := filepath.Join(root, fmt.Sprintf("track-test-%d", os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		missing(t, "a freezer cgroup: "+err.Error())
	}
	s := startSubject(t, nil)
	t.Cleanup(func() {
		_ = os.WriteFile(dir+"/freezer.state", []byte("THAWED"), 0)
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
		_ = os.Remove(dir)
	})
	m := s.mapping(0, 8, "anon")
	s.do("fill 0 1")
	tracker := s.attach()
	taken(t, tracker, m)
	s.do("fill 0 2 3 1")
	write := func(name, value string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(value), 0); err != nil {
			t.Fatal(err)
		}
	}
	write("cgroup.procs", fmt.Sprint(s.pid))
	write("freezer.state", "FROZEN")
	for {
		state, err := os.ReadFile(dir + "/freezer.state")
		if err != nil {
			t.Fatal(err)
		}
		if strings.TrimSpace(string(state)) == "FROZEN" {
			break
		}
		runtime.Gosched()
	}
	expect(t, "Clean of a frozen process", clean(t, tracker, m), union(pages(0, 3), pages(4, 8)))
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if _, err := Attach(ctx, s.pid); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Attach to a frozen process: %v", err)
	}
	if st, err := readStatus(procPath(s.pid, "status")); err != nil || st.tracer != 0 {
		t.Errorf("afterwards: %+v, %v", st, err)
	}
	expect(t, "Take of a frozen process", taken(t, tracker, m), pages(3, 4))
	write("freezer.state", "THAWED")
	s.do("fill 0 2")
	tracker.Close()
	expect(t, "Take after thawing", taken(t, s.attach(), m), pages(0, 8))
}

func TestCanceledAttachLeavesNothing(t *testing.T) {
	s := startSubject(t, nil)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Attach(ctx, s.pid); !errors.Is(err, context.Canceled) {
		t.Errorf("Attach: %v", err)
	}
	s.attach()
}

func TestNothingIsLeftInTheProcess(t *testing.T) {
	s := startSubject(t, nil)
	m := s.mapping(0, 64, "anon")
	s.do("fill 0 1")
	before := snapshotOf(t, s.pid)
	for range 10 {
		tr := s.attach()
		taken(t, tr, m)
		s.do("fill 0 1 3 3")
		if err := tr.Close(); err != nil {
			t.Fatal(err)
		}
		if err := tr.Clean(ignore, ignore); !errors.Is(err, ErrClosed) {
			t.Errorf("Clean after Close: %v", err)
		}
	}
	if after := snapshotOf(t, s.pid); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
}

// snapshotOf is what others can see of a process: descriptors, mappings with their
// flags (uw: registered for write protection), signals.
func snapshotOf(t *testing.T, pid int) string {
	t.Helper()
	var b strings.Builder
	fds, err := os.ReadDir(procPath(pid, "fd"))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		target, _ := os.Readlink(procPath(pid, "fd/"+fd.Name()))
		fmt.Fprintln(&b, fd.Name(), target)
	}
	smaps, err := os.ReadFile(procPath(pid, "smaps"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(smaps)) {
		if _, err := parseArea(strings.TrimSpace(line)); err == nil || strings.HasPrefix(line, "VmFlags") {
			b.WriteString(line)
		}
	}
	status, err := os.ReadFile(procPath(pid, "status"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		for _, key := range []string{"SigPnd", "SigBlk", "SigIgn", "SigCgt", "Shd", "Tracer", "Threads", "Seccomp"} {
			if strings.HasPrefix(line, key) {
				b.WriteString(line)
			}
		}
	}
	return b.String()
}
