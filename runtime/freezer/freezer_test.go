// SPDX-License-Identifier: Apache-2.0

package freezer

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// helperEnv makes the test binary act as a member: it writes a byte every
// millisecond and, with "tree", has a child that does the same.
const helperEnv = "COHORT_FREEZER_HELPER"

// v2Env marks the re-executed test binary whose only cgroup mount is v2.
const v2Env = "COHORT_FREEZER_V2ONLY"

func TestMain(m *testing.M) {
	if role := os.Getenv(helperEnv); role != "" {
		helper(role)
	}
	os.Exit(m.Run())
}

func helper(role string) {
	// Wait for the test to have put this process into its cgroup.
	if _, err := os.Stdin.Read(make([]byte, 1)); err != nil {
		os.Exit(1)
	}
	if role == "tree" {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), helperEnv+"=leaf")
		in, _ := cmd.StdinPipe()
		if cmd.Start() != nil {
			os.Exit(1)
		}
		_, _ = in.Write([]byte{0})
	}
	for range time.Tick(time.Millisecond) {
		if _, err := os.Stdout.Write([]byte{'.'}); err != nil {
			os.Exit(0)
		}
	}
}

// require skips, or fails where the environment promises that all is there.
func require(t *testing.T, ok bool, missing string) {
	t.Helper()
	if ok {
		return
	}
	if os.Getenv("COHORT_REQUIRE") == "1" {
		t.Fatalf("missing: %s", missing)
	}
	t.Skipf("missing: %s", missing)
}

// member is a running process in a cgroup of its own.
type member struct {
	pid int
	dir string
	out *bufio.Reader
}

// startMember makes a cgroup below root and runs a helper in it.
func startMember(t *testing.T, root, role string) *member {
	t.Helper()
	dir, err := os.MkdirTemp(root, "cohort-test-")
	if err != nil {
		t.Fatal(err)
	}
	m := &member{dir: dir}
	m.pid, m.out = startIn(t, dir, role)
	t.Cleanup(func() {
		// Whatever the test left: thaw, kill, remove.
		for _, f := range []struct{ name, word string }{{"freezer.state", "THAWED"}, {"cgroup.freeze", "0"}} {
			if _, err := os.Stat(filepath.Join(dir, f.name)); err == nil {
				_ = os.WriteFile(filepath.Join(dir, f.name), []byte(f.word), 0)
			}
		}
		deadline := time.Now().Add(5 * time.Second)
		for {
			pids, _ := tasks(dir)
			for _, pid := range pids {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
			subs, _ := filepath.Glob(filepath.Join(dir, "*/cgroup.procs"))
			for _, s := range subs {
				_ = os.WriteFile(filepath.Join(filepath.Dir(s), "freezer.state"), []byte("THAWED"), 0)
				_ = os.Remove(filepath.Dir(s))
			}
			err := os.Remove(dir)
			if err == nil || errors.Is(err, os.ErrNotExist) {
				return
			}
			if time.Now().After(deadline) {
				t.Errorf("removing %s: %v", dir, err)
				return
			}
			time.Sleep(2 * time.Millisecond)
		}
	})
	return m
}

func startIn(t *testing.T, dir, role string) (int, *bufio.Reader) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), helperEnv+"="+role)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// The cgroup's clean-up ends it; waiting here would wait for a frozen process.
	go func() { _, _ = cmd.Process.Wait() }()
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := in.Write([]byte{0}); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(out)
	if _, err := r.ReadByte(); err != nil {
		t.Fatalf("the helper does not run: %v", err)
	}
	return cmd.Process.Pid, r
}

// ticks drains what is buffered and tells how many bytes arrive within d.
func (m *member) ticks(t *testing.T, d time.Duration) int {
	t.Helper()
	got := make(chan int, 1)
	stop := time.Now().Add(d)
	go func() {
		n := 0
		for time.Now().Before(stop) {
			if _, err := m.out.ReadByte(); err != nil {
				break
			}
			n++
		}
		got <- n
	}()
	select {
	case n := <-got:
		return n
	case <-time.After(d + 5*time.Second):
		t.Fatal("the member does not run")
		return 0
	}
}

// conformance is what every hierarchy must keep. root is a directory of the
// hierarchy in which the test may make cgroups.
func conformance(t *testing.T, root string, version int) {
	open := func(t *testing.T, pid int) *Freezer {
		t.Helper()
		f, err := Open(pid)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	state := func(t *testing.T, f *Freezer, want State) {
		t.Helper()
		got, err := f.State()
		if err != nil {
			t.Fatal(err)
		}
		if got != want {
			t.Fatalf("state is %s, want %s", got, want)
		}
	}
	ctx := context.Background()

	t.Run("open finds the cgroup of the process", func(t *testing.T) {
		m := startMember(t, root, "leaf")
		f := open(t, m.pid)
		if f.Path() != m.dir || f.Version() != version {
			t.Fatalf("found %s (v%d), want %s (v%d)", f.Path(), f.Version(), m.dir, version)
		}
		state(t, f, Thawed)
	})

	t.Run("a frozen process does not run and a thawed one does", func(t *testing.T) {
		m := startMember(t, root, "tree")
		f := open(t, m.pid)
		before := monotonic()
		asked, frozen, err := f.Freeze(ctx)
		if err != nil {
			t.Fatal(err)
		}
		after := monotonic()
		if asked < before || frozen < asked || after < frozen {
			t.Fatalf("times out of order: %d %d %d %d", before, asked, frozen, after)
		}
		t.Logf("frozen in %s", time.Duration(frozen-asked))
		state(t, f, Frozen)
		pids, err := f.Tasks()
		if err != nil {
			t.Fatal(err)
		}
		if len(pids) != 2 || !slices.Contains(pids, m.pid) {
			t.Fatalf("tasks are %v, want %d and its child", pids, m.pid)
		}
		// What was written before the freeze is in the pipe; nothing may come after.
		cpu := cpuTimes(t, pids)
		time.Sleep(30 * time.Millisecond)
		if got := cpuTimes(t, pids); got != cpu {
			t.Fatalf("frozen tasks used the CPU: %s before, %s after", cpu, got)
		}
		if err := f.Thaw(ctx); err != nil {
			t.Fatal(err)
		}
		state(t, f, Thawed)
		if n := m.ticks(t, 50*time.Millisecond); n < 10 {
			t.Fatalf("%d ticks in 50 ms after the thaw", n)
		}
	})

	t.Run("freezing what is frozen fails and does not thaw it", func(t *testing.T) {
		m := startMember(t, root, "leaf")
		f, other := open(t, m.pid), open(t, m.pid)
		if _, _, err := other.Freeze(ctx); err != nil {
			t.Fatal(err)
		}
		if _, _, err := f.Freeze(ctx); !errdefs.IsFailedPrecondition(err) {
			t.Fatalf("got %v, want a failed precondition", err)
		}
		state(t, f, Frozen)
	})

	t.Run("a frozen parent is not undone", func(t *testing.T) {
		m := startMember(t, root, "leaf")
		parent := open(t, m.pid)
		sub := filepath.Join(m.dir, "sub")
		if err := os.Mkdir(sub, 0o755); err != nil {
			t.Fatal(err)
		}
		pid, _ := startIn(t, sub, "leaf")
		f := open(t, pid)
		if f.Path() != sub {
			t.Fatalf("found %s, want %s", f.Path(), sub)
		}
		if _, _, err := parent.Freeze(ctx); err != nil {
			t.Fatal(err)
		}
		if _, _, err := f.Freeze(ctx); !errdefs.IsFailedPrecondition(err) {
			t.Fatalf("Freeze: got %v, want a failed precondition", err)
		}
		if err := f.Thaw(ctx); !errdefs.IsFailedPrecondition(err) {
			t.Fatalf("Thaw: got %v, want a failed precondition", err)
		}
		state(t, parent, Frozen)
		pids, err := parent.Tasks()
		if err != nil || len(pids) != 2 {
			t.Fatalf("tasks %v, %v; want the two of both cgroups", pids, err)
		}
	})

	t.Run("a freeze that cannot complete is taken back", func(t *testing.T) {
		m := startMember(t, root, "leaf")
		f := open(t, m.pid)
		short, cancel := context.WithCancel(ctx)
		cancel()
		if _, _, err := f.Freeze(short); !errors.Is(err, context.Canceled) {
			t.Fatalf("got %v, want %v", err, context.Canceled)
		}
		state(t, f, Thawed)
		f.h = stuck{f.h}
		short, cancel = context.WithTimeout(ctx, 20*time.Millisecond)
		defer cancel()
		if _, _, err := f.Freeze(short); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v, want %v", err, context.DeadlineExceeded)
		}
		state(t, f, Thawed)
		m.ticks(t, 10*time.Millisecond)
	})

	t.Run("the undo of Hold thaws and may be called twice", func(t *testing.T) {
		m := startMember(t, root, "leaf")
		f := open(t, m.pid)
		_, _, undo, err := f.Hold(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := undo(); err != nil {
				t.Fatal(err)
			}
			state(t, f, Thawed)
		}
	})

	t.Run("kill ends frozen tasks of all levels", func(t *testing.T) {
		m := startMember(t, root, "tree")
		f := open(t, m.pid)
		sub := filepath.Join(m.dir, "sub")
		if err := os.Mkdir(sub, 0o755); err != nil {
			t.Fatal(err)
		}
		startIn(t, sub, "tree")
		if _, _, err := f.Freeze(ctx); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if err := f.Kill(ctx); err != nil {
			t.Fatal(err)
		}
		t.Logf("killed in %s", time.Since(start))
		if pids, err := f.Tasks(); err != nil || len(pids) != 0 {
			t.Fatalf("tasks %v, %v after Kill", pids, err)
		}
		// The pipe ends: no descriptor of a dead member is left.
		if _, err := io.Copy(io.Discard, m.out); err != nil {
			t.Fatal(err)
		}
		if err := f.Kill(ctx); err != nil {
			t.Fatalf("second Kill: %v", err)
		}
		_ = os.Remove(sub)
		if err := os.Remove(m.dir); err != nil {
			t.Fatal(err)
		}
		if err := f.Thaw(ctx); err != nil {
			t.Fatalf("Thaw of a removed cgroup: %v", err)
		}
		if err := f.Kill(ctx); err != nil {
			t.Fatalf("Kill of a removed cgroup: %v", err)
		}
	})

	t.Run("a recorded path is enough to thaw and to kill", func(t *testing.T) {
		m := startMember(t, root, "leaf")
		f := open(t, m.pid)
		if _, _, err := f.Freeze(ctx); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := ThawPath(ctx, m.dir); err != nil {
				t.Fatal(err)
			}
			state(t, f, Thawed)
		}
		if err := KillPath(ctx, m.dir); err != nil {
			t.Fatal(err)
		}
		if pids, err := f.Tasks(); err != nil || len(pids) != 0 {
			t.Fatalf("tasks %v, %v after KillPath", pids, err)
		}
		if err := os.Remove(m.dir); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(ThawPath(ctx, m.dir), KillPath(ctx, m.dir)); err != nil {
			t.Fatalf("a removed cgroup: %v", err)
		}
	})

	t.Run("a closed freezer says so", func(t *testing.T) {
		m := startMember(t, root, "leaf")
		f := open(t, m.pid)
		if err := errors.Join(f.Close(), f.Close()); err != nil {
			t.Fatal(err)
		}
		if _, _, err := f.Freeze(ctx); !errors.Is(err, os.ErrClosed) {
			t.Fatalf("got %v, want %v", err, os.ErrClosed)
		}
	})
}

// stuck is a hierarchy in which the freeze never completes.
type stuck struct{ hierarchy }

func (s stuck) await(ctx context.Context, want State) error {
	if want == Thawed {
		return s.hierarchy.await(ctx, want)
	}
	<-ctx.Done()
	return ctx.Err()
}

// cpuTimes is the user and system time of the processes, and their voluntary
// and forced switches: anything that runs changes one of them.
func cpuTimes(t *testing.T, pids []int) string {
	t.Helper()
	var s string
	for _, pid := range pids {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/schedstat", pid))
		if err != nil {
			t.Fatal(err)
		}
		s += string(data)
	}
	return s
}

func TestV1KeepsTheContract(t *testing.T) {
	require(t, os.Geteuid() == 0, "root")
	v1, _, err := freezerMounts()
	if err != nil {
		t.Fatal(err)
	}
	require(t, len(v1) > 0, "the v1 freezer hierarchy")
	conformance(t, v1[0].point, 1)
}

// TestV2KeepsTheContract runs the same in a mount namespace of its own that shows
// a v2 hierarchy alone, which is what a host without v1 looks like.
func TestV2KeepsTheContract(t *testing.T) {
	require(t, os.Geteuid() == 0, "root")
	if os.Getenv(v2Env) == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestV2KeepsTheContract$", "-test.v")
		cmd.Env = append(os.Environ(), v2Env+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
		out, err := cmd.CombinedOutput()
		t.Logf("in a mount namespace with v2 alone:\n%s", out)
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	const root = "/sys/fs/cgroup"
	require(t, unix.Mount("cgroup2", root, "cgroup2", 0, "") == nil, "cgroup v2")
	_, err := os.Stat(filepath.Join(root, "cgroup.procs"))
	require(t, err == nil, "cgroup v2")
	conformance(t, root, 2)
}

func TestOpenRefusesWhatCannotBeFrozenAlone(t *testing.T) {
	if _, err := Open(0); !errdefs.IsInvalidArgument(err) {
		t.Errorf("pid 0: got %v, want an invalid argument", err)
	}
	if _, err := Open(os.Getpid()); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the caller itself: got %v, want a failed precondition", err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^$")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// A zombie until it is waited for: gone as well.
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PID, cmd.Process.Pid, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(cmd.Process.Pid); !errdefs.IsNotFound(err) {
		t.Errorf("a zombie: got %v, want not found", err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(cmd.Process.Pid); !errdefs.IsNotFound(err) {
		t.Errorf("a dead process: got %v, want not found", err)
	}
}

func TestPathsOfTheKernelAreUnderstood(t *testing.T) {
	m := parseMembership("12:cpu,freezer:/a:b/c\n1:name=systemd:/x\n0::/v2/path\n")
	if m.v1 != "/a:b/c" || m.v2 != "/v2/path" {
		t.Errorf("membership is %+v", m)
	}
	v1, v2 := parseMounts([]byte(`36 31 0:34 /docker/x /sys/fs/cgroup/free\040zer rw,relatime shared:5 - cgroup cgroup rw,freezer
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
42 31 0:39 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
`))
	if len(v1) != 1 || v1[0] != (cgroupMount{"/sys/fs/cgroup/free zer", "/docker/x"}) {
		t.Errorf("v1 mounts are %+v", v1)
	}
	if len(v2) != 1 || v2[0].point != "/sys/fs/cgroup/unified" {
		t.Errorf("v2 mounts are %+v", v2)
	}
	// The hierarchy's root may be mounted from below its top.
	tmp := t.TempDir()
	if err := os.Mkdir(filepath.Join(tmp, "y"), 0o755); err != nil {
		t.Fatal(err)
	}
	mounts := []cgroupMount{{tmp, "/docker/x"}}
	if dir, err := resolve("/docker/x/y", mounts); err != nil || dir != filepath.Join(tmp, "y") {
		t.Errorf("resolve: %s, %v", dir, err)
	}
	for _, path := range []string{"/docker/xy", "/../y", "/docker/x/z"} {
		if dir, err := resolve(path, mounts); err == nil {
			t.Errorf("resolve(%s) = %s, want an error", path, dir)
		}
	}
}
