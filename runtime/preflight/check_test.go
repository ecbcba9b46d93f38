// SPDX-License-Identifier: Apache-2.0

package preflight

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// helperEnv makes the test binary act as a container's process. Its value is
// what to start below it: a number of children, or "pidns" for one child in a pid
// namespace of its own.
const helperEnv = "COHORT_PREFLIGHT_HELPER"

func TestMain(m *testing.M) {
	if role, ok := os.LookupEnv(helperEnv); ok {
		helper(role)
	}
	// What the test was started with must not reach the containers.
	_ = unix.CloseRange(3, 1<<20, unix.CLOSE_RANGE_CLOEXEC)
	os.Exit(m.Run())
}

func helper(role string) {
	children, _ := strconv.Atoi(role)
	attr := &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if role == "pidns" {
		children, attr.Cloneflags = 1, syscall.CLONE_NEWPID
	}
	// Pdeathsig is sent when the thread ends, not the process.
	runtime.LockOSThread()
	for range children {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), helperEnv+"=")
		cmd.SysProcAttr = attr
		in, err1 := cmd.StdinPipe()
		out, err2 := cmd.StdoutPipe()
		if err1 != nil || err2 != nil || cmd.Start() != nil {
			os.Exit(1)
		}
		defer in.Close()
		if _, err := out.Read(make([]byte, 1)); err != nil {
			os.Exit(1)
		}
	}
	_, _ = os.Stdout.Write([]byte{'r'})
	_, _ = io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
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

// setup changes a container before it starts.
type setup func(*exec.Cmd)

func with(files ...*os.File) setup {
	return func(cmd *exec.Cmd) { cmd.ExtraFiles = append(cmd.ExtraFiles, files...) }
}

func role(r string) setup {
	return func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, helperEnv+"="+r) }
}

func namespacesOf(flags uintptr) setup {
	return func(cmd *exec.Cmd) { cmd.SysProcAttr.Cloneflags = flags }
}

const allNamespaces = syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS | syscall.CLONE_NEWNET

// container starts a process in namespaces of its own, as runc does, and returns
// the facts that its shim would tell.
func container(t *testing.T, id string, setups ...setup) Member {
	t.Helper()
	require(t, os.Geteuid() == 0, "root")
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), helperEnv+"=")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: allNamespaces, Setsid: true}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	ready, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer ready.Close()
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	for _, s := range setups {
		s(cmd)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Process.Kill()
		_, _ = cmd.Process.Wait()
	})
	// A role that has no pipe for its output is ready when its children are.
	if cmd.Stdout == out {
		_ = ready.SetReadDeadline(time.Now().Add(20 * time.Second))
		if _, err := ready.Read(make([]byte, 1)); err != nil {
			t.Fatalf("the container does not start: %v", err)
		}
	}
	return Member{
		ID: id, InitPid: cmd.Process.Pid, Pids: append([]int{cmd.Process.Pid}, descendants(t, cmd.Process.Pid)...),
		Status: "running", CriuVersion: DefaultMinCriu, StorageAddress: filepath.Join(os.TempDir(), "host.sock"),
	}
}

func descendants(t *testing.T, pid int) []int {
	t.Helper()
	var all []int
	tasks, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	for _, task := range tasks {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pid, task.Name()))
		if err != nil {
			continue
		}
		for f := range strings.FieldsSeq(string(data)) {
			child, _ := strconv.Atoi(f)
			all = append(append(all, child), descendants(t, child)...)
		}
	}
	return all
}

func check(t *testing.T, opts Options, members ...Member) Report {
	t.Helper()
	r, err := Check(context.Background(), members, opts)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// expectOne wants exactly one finding, of the code and severity, about the member
// (and its init, unless pid is 0), whose sentence has all the words.
func expectOne(t *testing.T, r Report, s Severity, code string, m Member, pid int, words ...string) {
	t.Helper()
	if len(r.Findings) != 1 {
		t.Fatalf("findings: %v, want one", r.Findings)
	}
	f := r.Findings[0]
	if f.Severity != s || f.Code != code || f.Member != m.ID || f.Pid != pid || f.Cure == "" {
		t.Errorf("finding %+v, want %s %s of member %s, pid %d", f, s, code, m.ID, pid)
	}
	for _, w := range words {
		if !strings.Contains(f.String(), w) {
			t.Errorf("%q does not say %q", f, w)
		}
	}
	if (r.Err() != nil) != (s == Refuse) || r.Refused() != (s == Refuse) {
		t.Errorf("Err is %v, Refused %v for severity %s", r.Err(), r.Refused(), s)
	}
	if r.Err() != nil && !errdefs.IsFailedPrecondition(r.Err()) {
		t.Errorf("Err is %v, want a failed precondition", r.Err())
	}
	t.Log(f)
}

func TestACleanGroupHasNoFindings(t *testing.T) {
	a, b := container(t, "a", role("2")), container(t, "b")
	if len(a.Pids) != 3 {
		t.Fatalf("pids %v, want three", a.Pids)
	}
	r := check(t, Options{}, a, b)
	if len(r.Findings) != 0 || r.Err() != nil || r.Processes != 4 {
		t.Errorf("report %+v", r)
	}
}

func TestWhatTheShimTellsIsJudged(t *testing.T) {
	good := container(t, "a")
	change := func(f func(*Member)) Member {
		m := good
		f(&m)
		return m
	}
	for name, c := range map[string]struct {
		m     Member
		opts  Options
		code  string
		words []string
	}{
		"paused":       {change(func(m *Member) { m.Status = "paused" }), Options{}, CodeStatus, []string{"resume"}},
		"created":      {change(func(m *Member) { m.Status = "created" }), Options{}, CodeStatus, []string{"start"}},
		"stopped":      {change(func(m *Member) { m.Status, m.InitPid = "stopped", 0 }), Options{}, CodeGone, []string{"no running process"}},
		"memory":       {change(func(m *Member) { m.MemoryError = "kernel 6.1 has no PAGEMAP_SCAN" }), Options{}, CodeMemory, []string{"kernel 6.1 has no PAGEMAP_SCAN", "cohort check"}},
		"no CRIU":      {change(func(m *Member) { m.CriuVersion, m.CriuError = 0, "not found in PATH" }), Options{}, CodeCRIU, []string{"not found in PATH", "4.2"}},
		"old CRIU":     {change(func(m *Member) { m.CriuVersion = 31701 }), Options{}, CodeCRIU, []string{"3.17.1", "4.2.0"}},
		"no room":      {change(func(m *Member) { m.MemoryBytes = 1 << 60 }), Options{CaptureDir: os.TempDir()}, CodeDisk, []string{os.TempDir(), "free"}},
		"no directory": {good, Options{CaptureDir: "/nonexistent/x"}, CodeDisk, []string{"/nonexistent/x", "cohortd"}},
		"no storage":   {change(func(m *Member) { m.StorageAddress = "" }), Options{}, CodeDisk, []string{"--snapshotter cohort"}},
	} {
		t.Run(name, func(t *testing.T) {
			m := c.m
			if c.code == CodeDisk && name != "no storage" {
				m.ID = "" // the whole group's
			}
			r := check(t, c.opts, c.m)
			expectOne(t, r, Refuse, c.code, m, 0, c.words...)
		})
	}
	t.Run("gone", func(t *testing.T) {
		cmd := exec.Command("/proc/self/exe", "-test.run=^$")
		if err := cmd.Run(); err != nil {
			t.Fatal(err)
		}
		m := change(func(m *Member) { m.InitPid, m.Pids = cmd.Process.Pid, nil })
		expectOne(t, check(t, Options{}, m), Refuse, CodeGone, m, 0)
	})
}

// ioURing makes an instance; the parameters are struct io_uring_params
// (linux/io_uring.h), 120 bytes.
func ioURing(t *testing.T) *os.File {
	t.Helper()
	var params [120]byte
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 2, uintptr(unsafe.Pointer(&params)), 0)
	require(t, errno == 0, "io_uring")
	return file(t, int(fd), "io_uring")
}

func file(t *testing.T, fd int, name string) *os.File {
	t.Helper()
	f := os.NewFile(uintptr(fd), name)
	t.Cleanup(func() { f.Close() })
	return f
}

func open(t *testing.T, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func socket(t *testing.T, family, kind, proto int, missing string) *os.File {
	t.Helper()
	fd, err := unix.Socket(family, kind|unix.SOCK_CLOEXEC, proto)
	require(t, err == nil, missing)
	return file(t, fd, "socket")
}

func TestWhatCRIUCannotSaveIsNamed(t *testing.T) {
	for name, c := range map[string]struct {
		file  func(t *testing.T) *os.File
		s     Severity
		code  string
		words []string
	}{
		"io_uring": {ioURing, Refuse, CodeIOUring, []string{"io_uring", "descriptor 3"}},
		"device": {
			func(t *testing.T) *os.File { return open(t, "/dev/loop-control", os.O_RDONLY) },
			Refuse, CodeDevice,
			[]string{"/dev/loop-control"},
		},
		"userfaultfd": {func(t *testing.T) *os.File {
			fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, 1 /* UFFD_USER_MODE_ONLY */, 0, 0)
			require(t, errno == 0, "userfaultfd")
			return file(t, int(fd), "userfaultfd")
		}, Refuse, CodeAnonInode, []string{"userfaultfd"}},
		"inotify": {func(t *testing.T) *os.File {
			fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
			require(t, err == nil, "inotify")
			return file(t, fd, "inotify")
		}, Warn, CodeWatch, []string{"inotify"}},
		"pidfd of the host": {func(t *testing.T) *os.File {
			fd, err := unix.PidfdOpen(os.Getpid(), 0)
			require(t, err == nil, "pidfd_open")
			return file(t, fd, "pidfd")
		}, Refuse, CodePidfd, []string{strconv.Itoa(os.Getpid())}},
		"netlink": {func(t *testing.T) *os.File {
			return socket(t, unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE, "netlink")
		}, Warn, CodeSocket, []string{"netlink"}},
		"packet socket": {func(t *testing.T) *os.File {
			return socket(t, unix.AF_PACKET, unix.SOCK_RAW, 0, "packet sockets")
		}, Warn, CodeSocket, []string{"packet"}},
		"multipath TCP": {func(t *testing.T) *os.File {
			return socket(t, unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP, "multipath TCP")
		}, Refuse, CodeSocket, []string{"multipath", "GODEBUG"}},
		"vsock": {func(t *testing.T) *os.File {
			return socket(t, unix.AF_VSOCK, unix.SOCK_STREAM, 0, "vsock")
		}, Refuse, CodeSocket, []string{"VSOCK"}},
		"file of the host": {func(t *testing.T) *os.File {
			return open(t, filepath.Join(t.TempDir(), "secret"), os.O_CREATE|os.O_RDWR)
		}, Refuse, CodeOutsideFile, []string{"/secret", "mount"}},
	} {
		t.Run(name, func(t *testing.T) {
			m := container(t, "a", with(c.file(t)))
			expectOne(t, check(t, Options{}, m), c.s, c.code, m, m.InitPid, append(c.words, "member a", "(exe)")...)
		})
	}
}

func TestHarmlessFilesAreNoFindings(t *testing.T) {
	var files []*os.File
	efd, err := unix.Eventfd(0, 0)
	if err != nil {
		t.Fatal(err)
	}
	tfd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, 0)
	if err != nil {
		t.Fatal(err)
	}
	mfd, err := unix.MemfdCreate("x", 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range []int{efd, tfd, mfd} {
		files = append(files, file(t, fd, "x"))
	}
	files = append(files,
		socket(t, unix.AF_INET, unix.SOCK_STREAM, 0, "TCP"), socket(t, unix.AF_INET6, unix.SOCK_DGRAM, 0, "UDP"),
		socket(t, unix.AF_UNIX, unix.SOCK_STREAM, 0, "unix sockets"))
	m := container(t, "a", with(files...), namespacesOf(allNamespaces&^syscall.CLONE_NEWNET))
	if r := check(t, Options{}, m); len(r.Findings) != 0 {
		t.Errorf("findings: %v", r.Findings)
	}
}

func TestAUnixStreamBetweenTwoMembersNamesBothEnds(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	one, two := os.NewFile(uintptr(fds[0]), "one"), os.NewFile(uintptr(fds[1]), "two")
	a, b := container(t, "a", with(one)), container(t, "b", with(two))
	one.Close()
	two.Close()
	// The sockets were made in the test's network namespace, which is neither's.
	r := check(t, Options{}, a, b)
	if len(r.Findings) != 2 || r.Findings[0].Code != CodeUnix || !strings.Contains(r.Findings[0].String(), "network namespace") {
		t.Errorf("findings of sockets from a third namespace: %v", r.Findings)
	}

	fds, err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	one, two = os.NewFile(uintptr(fds[0]), "one"), os.NewFile(uintptr(fds[1]), "two")
	sameNet := namespacesOf(allNamespaces &^ syscall.CLONE_NEWNET)
	a, b = container(t, "a", with(one), sameNet), container(t, "b", with(two), sameNet)
	one.Close()
	two.Close()
	r = check(t, Options{}, a, b)
	if len(r.Findings) != 1 {
		t.Fatalf("findings: %v, want one", r.Findings)
	}
	f := r.Findings[0]
	for _, w := range []string{"member a", "member b", strconv.Itoa(a.InitPid), strconv.Itoa(b.InitPid)} {
		if f.Severity != Refuse || f.Code != CodeUnix || !strings.Contains(f.String(), w) {
			t.Errorf("%q (%s, %s) does not say %q", f, f.Severity, f.Code, w)
		}
	}
}

func TestAUnixStreamToOutsideNamesTheOtherEnd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	s, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	f, err := c.File()
	if err != nil {
		t.Fatal(err)
	}
	sameNet := namespacesOf(allNamespaces &^ syscall.CLONE_NEWNET)
	m := container(t, "a", with(f), sameNet)
	f.Close()
	c.Close()
	expectOne(t, check(t, Options{}, m), Refuse, CodeUnix, m, m.InitPid, path, strconv.Itoa(os.Getpid()), "outside")
}

func TestAUnixStreamInsideOneMemberIsFine(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	one, two := os.NewFile(uintptr(fds[0]), "one"), os.NewFile(uintptr(fds[1]), "two")
	m := container(t, "a", with(one, two), namespacesOf(allNamespaces&^syscall.CLONE_NEWNET))
	one.Close()
	two.Close()
	if r := check(t, Options{}, m); len(r.Findings) != 0 {
		t.Errorf("findings: %v", r.Findings)
	}
}

func TestStandardStreamsOutsideTheContainerAreRefused(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "log")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	f := open(t, fifo, os.O_RDWR)
	m := container(t, "a", func(cmd *exec.Cmd) { cmd.Stdout = f })
	if b, err := bufio.NewReader(f).ReadByte(); err != nil || b != 'r' {
		t.Fatal(b, err)
	}
	expectOne(t, check(t, Options{}, m), Refuse, CodeStdio, m, m.InitPid, fifo, "standard output", "pipes")
}

func TestATracedProcessIsRefused(t *testing.T) {
	m := container(t, "a")
	// ptrace(2) belongs to a thread; the thread ends and lets go with the test.
	attached, done := make(chan error), make(chan struct{})
	defer close(done)
	go func() {
		runtime.LockOSThread()
		attached <- unix.PtraceSeize(m.InitPid)
		<-done
	}()
	if err := <-attached; err != nil {
		require(t, false, "ptrace: "+err.Error())
	}
	expectOne(t, check(t, Options{}, m), Refuse, CodeTraced, m, m.InitPid, "traced", "preflight.test")
}

func TestARemovedFileCountsAgainstTheGhostLimit(t *testing.T) {
	// Opened by the container itself, so that it is on one of its mounts.
	path := filepath.Join(t.TempDir(), "big")
	if err := os.WriteFile(path, make([]byte, 3<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	m := container(t, "a", func(cmd *exec.Cmd) {
		cmd.Path, _ = exec.LookPath("sh")
		cmd.Args = []string{"sh", "-c", `exec 3<"$1"; rm "$1"; printf r; read x`, "sh", path}
	})
	r := check(t, Options{}, m)
	if len(r.Findings) != 0 || r.GhostBytes < 3<<20 {
		t.Errorf("report %+v, want no finding and 3 MiB", r)
	}
	expectOne(t, check(t, Options{GhostLimit: 1 << 20}, m), Refuse, CodeGhost, m, m.InitPid, path, "3.0 MiB", "1.0 MiB")
}

func TestNamespacesThatCannotBeSavedAreRefused(t *testing.T) {
	t.Run("the host's pid namespace", func(t *testing.T) {
		m := container(t, "a", namespacesOf(allNamespaces&^syscall.CLONE_NEWPID))
		expectOne(t, check(t, Options{}, m), Refuse, CodeNamespace, m, 0, "host's pid namespace")
	})
	t.Run("a pid namespace inside", func(t *testing.T) {
		m := container(t, "a", role("pidns"))
		if len(m.Pids) != 2 {
			t.Fatalf("pids %v, want two", m.Pids)
		}
		r := check(t, Options{}, m)
		expectOne(t, r, Refuse, CodeNamespace, m, m.Pids[1], "pid namespace of its own inside")
	})
	t.Run("another member's pid namespace", func(t *testing.T) {
		// As if the child were a container that joined its parent's namespace.
		m := container(t, "a", role("1"))
		a, b := m, m
		a.Pids = m.Pids[:1]
		b.ID, b.InitPid, b.Pids = "b", m.Pids[1], m.Pids[1:]
		r := check(t, Options{}, a, b)
		if i := slices.IndexFunc(r.Findings, func(f Finding) bool { return f.Member == "b" && f.Code == CodeNamespace }); i < 0 ||
			!strings.Contains(r.Findings[i].String(), "member a") {
			t.Errorf("findings: %v", r.Findings)
		}
	})
	t.Run("the host's network with open sockets", func(t *testing.T) {
		m := container(t, "a", with(socket(t, unix.AF_INET, unix.SOCK_STREAM, 0, "TCP")), namespacesOf(allNamespaces&^syscall.CLONE_NEWNET))
		m.HostNetwork = true
		expectOne(t, check(t, Options{}, m), Refuse, CodeHostNetwork, m, m.InitPid, "network namespace of its own")
	})
	t.Run("a session from outside", func(t *testing.T) {
		m := container(t, "a", func(cmd *exec.Cmd) { cmd.SysProcAttr.Setsid = false })
		expectOne(t, check(t, Options{}, m), Refuse, CodeSession, m, m.InitPid, "session")
	})
}

func TestExecSessionsAreWarnedOf(t *testing.T) {
	m := container(t, "a")
	other := container(t, "x")
	m.Foreign = []int{other.InitPid}
	expectOne(t, check(t, Options{}, m), Warn, CodeForeign, m, other.InitPid, "exec")
}

func TestFortyProcessesTakeUnderFiftyMilliseconds(t *testing.T) {
	m := container(t, "a", role("39"))
	if len(m.Pids) != 40 {
		t.Fatalf("%d processes, want 40", len(m.Pids))
	}
	best := time.Hour
	for range 5 {
		r := check(t, Options{}, m)
		if len(r.Findings) != 0 || r.Processes != 40 {
			t.Fatalf("report %+v", r)
		}
		best = min(best, r.Took)
	}
	t.Logf("40 processes in %s", best)
	if best > 50*time.Millisecond {
		t.Errorf("40 processes took %s, want under 50 ms", best)
	}
}

// What passes while it is looked at is no reason to refuse.
func TestAProcessThatIsTracedForAMomentIsNotRefused(t *testing.T) {
	m := container(t, "a")
	attached, detached := make(chan error), make(chan error, 1)
	go func() {
		runtime.LockOSThread() // ptrace(2) belongs to a thread
		err := unix.PtraceSeize(m.InitPid)
		attached <- err
		if err != nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
		if err = unix.PtraceInterrupt(m.InitPid); err == nil {
			_, err = unix.Wait4(m.InitPid, nil, unix.WALL, nil)
		}
		detached <- errors.Join(err, unix.PtraceDetach(m.InitPid))
	}()
	if err := <-attached; err != nil {
		require(t, false, "ptrace: "+err.Error())
	}
	for _, f := range check(t, Options{}, m).Findings {
		if f.Code == CodeTraced {
			t.Errorf("refused: %v", f)
		}
	}
	if err := <-detached; err != nil {
		t.Error(err)
	}
}
