// SPDX-License-Identifier: Apache-2.0

package setuptest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// limit is the longest that one script or command of a test may take.
const limit = 2 * time.Minute

// instance is one private containerd and cohortd, as a user of the scripts sees them.
type instance struct {
	t   *testing.T
	dir string
	env []string
}

// TestUpTwiceIsTheSameInstance: a second `make up` prints the same lines and starts nothing.
func TestUpTwiceIsTheSameInstance(t *testing.T) {
	in, printed := up(t, t.TempDir())
	daemons := in.daemons()
	_, again := up(t, filepath.Dir(in.dir))
	if again != printed {
		t.Errorf("the second up printed\n%s\nthe first\n%s", again, printed)
	}
	if now := in.daemons(); now != daemons {
		t.Errorf("daemons were %v, after the second up %v", daemons, now)
	}
	export := regexp.MustCompile(`^export [A-Z_]+=\S+$`)
	for line := range strings.Lines(printed) {
		if !export.MatchString(strings.TrimSpace(line)) {
			t.Errorf("up printed a line that is no export: %q", line)
		}
	}
	in.ctr("image", "ls")
}

// TestUpAfterAKillRunsAgain: up starts what was killed, over stale sockets, with the images still there.
func TestUpAfterAKillRunsAgain(t *testing.T) {
	in, _ := up(t, t.TempDir())
	before := in.ctr("image", "ls", "-q")
	for _, pid := range in.daemons() {
		kill(t, pid)
	}
	up(t, filepath.Dir(in.dir))
	if after := in.ctr("image", "ls", "-q"); after != before {
		t.Errorf("images were\n%s\nare\n%s", before, after)
	}
	in.run("again")
}

// TestDownLeavesNothing, whatever state the instance is in: processes, mounts, loop devices, cgroups and
// folders are all gone, also of an instance in a folder too deep for a unix socket's path.
func TestDownLeavesNothing(t *testing.T) {
	deep := filepath.Join("a-folder-whose-name-is-long", "because-a-unix-socket-has-107-bytes", "and-projects-are-cloned-anywhere-at-all")
	for name, test := range map[string]struct {
		below string
		spoil func(in *instance, container string)
	}{
		"running":           {"", func(*instance, string) {}},
		"deep folder":       {deep, func(*instance, string) {}},
		"paused":            {"", func(in *instance, id string) { in.ctr("task", "pause", id) }},
		"containerd killed": {"", func(in *instance, _ string) { kill(in.t, in.daemons()[0]) }},
		"cohortd killed":    {"", func(in *instance, _ string) { kill(in.t, in.daemons()[1]) }},
		"paused and both killed": {deep, func(in *instance, id string) {
			in.ctr("task", "pause", id)
			for _, pid := range in.daemons() {
				kill(in.t, pid)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			in, _ := up(t, filepath.Join(t.TempDir(), test.below))
			// A container of this name exists nowhere else, so that its cgroups can be told from others'.
			id := fmt.Sprintf("down-%d", os.Getpid())
			init := in.run(id)
			daemons := in.daemons()
			test.spoil(in, id)
			in.down()

			for _, pid := range append(daemons[:], init) {
				if alive(pid) {
					t.Errorf("process %d runs on", pid)
				}
			}
			if left := processes(in.value("CONTAINERD_ADDRESS")); len(left) > 0 {
				t.Errorf("shims run on: %v", left)
			}
			for _, path := range []string{in.dir, filepath.Dir(in.value("CONTAINERD_ADDRESS"))} {
				if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s is left", path)
				}
			}
			if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || bytes.Contains(mounts, []byte(in.dir)) {
				t.Errorf("mounts are left (%v):\n%s", err, mounts)
			}
			loops, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
			for _, loop := range loops {
				if backing, _ := os.ReadFile(loop); strings.HasPrefix(string(backing), in.dir) {
					t.Errorf("%s is left on %s", loop, backing)
				}
			}
			for _, pattern := range []string{"/sys/fs/cgroup/default/" + id, "/sys/fs/cgroup/*/default/" + id, "/run/containerd/*/*/" + id} {
				if left, _ := filepath.Glob(pattern); len(left) > 0 {
					t.Errorf("left: %v", left)
				}
			}
			in.down() // nothing to do is no error
		})
	}
}

// up starts an instance in parent/run and ends it with the test; it returns what up.sh printed.
func up(t *testing.T, parent string) (*instance, string) {
	t.Helper()
	project, err := filepath.Abs("../../..")
	if err != nil {
		t.Fatal(err)
	}
	if os.Getuid() != 0 {
		missing(t, "root")
	}
	tools := os.Getenv("COHORT_TOOLS")
	if tools == "" {
		tools = filepath.Join(project, ".tools")
	}
	for _, program := range []string{filepath.Join(tools, "bin/containerd"), filepath.Join(project, "bin/cohortd"), filepath.Join(project, "bin/containerd-shim-cohort-v2")} {
		if _, err := os.Stat(program); err != nil {
			missing(t, program)
		}
	}
	in := &instance{t: t, dir: filepath.Join(parent, "run")}
	t.Cleanup(in.down)
	printed := in.output(nil, "../up.sh", "--run", in.dir, "--images", "cohort-busybox")
	for line := range strings.Lines(printed) {
		in.env = append(in.env, strings.TrimPrefix(strings.TrimSpace(line), "export "))
	}
	return in, printed
}

func (in *instance) down() {
	in.t.Helper()
	in.output(nil, "../down.sh", "--run", in.dir)
}

// output runs a command and returns its standard output; a failure ends the test.
func (in *instance) output(env []string, name string, args ...string) string {
	in.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	command := exec.CommandContext(ctx, name, args...)
	command.Env = append(os.Environ(), env...)
	// A daemon that kept our pipe would keep us waiting for its end.
	command.WaitDelay = 10 * time.Second
	var failure bytes.Buffer
	command.Stderr = &failure
	out, err := command.Output()
	if err != nil {
		in.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, failure.Bytes())
	}
	return string(out)
}

func (in *instance) ctr(args ...string) string {
	in.t.Helper()
	// env looks the program up on the PATH that it is given, which is the one under test.
	return in.output(nil, "env", append(append(append([]string{}, in.env...), "ctr"), args...)...)
}

// run starts a container that sleeps and returns its first process.
func (in *instance) run(id string) int {
	in.t.Helper()
	in.ctr("run", "--detach", "--null-io", "--runtime", "io.containerd.cohort.v2", "docker.io/library/cohort-busybox:latest", id, "sleep", "1000")
	for line := range strings.Lines(in.ctr("task", "ls")) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == id {
			pid, err := strconv.Atoi(fields[1])
			if err != nil {
				in.t.Fatal(err)
			}
			return pid
		}
	}
	in.t.Fatalf("container %s is not in the list of tasks", id)
	return 0
}

func (in *instance) value(name string) string {
	for _, variable := range in.env {
		if key, value, _ := strings.Cut(variable, "="); key == name {
			return value
		}
	}
	in.t.Fatalf("up printed no %s", name)
	return ""
}

// daemons is the process ids of containerd and cohortd.
func (in *instance) daemons() (pids [2]int) {
	in.t.Helper()
	for i, name := range []string{"containerd", "cohortd"} {
		record, err := os.ReadFile(filepath.Join(in.dir, name+".pid"))
		if err != nil {
			in.t.Fatal(err)
		}
		if _, err := fmt.Sscan(string(record), &pids[i]); err != nil {
			in.t.Fatal(err)
		}
	}
	return pids
}

// alive tells whether a process runs; one that only waits to be reaped does not.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(rest, "Z")
}

// processes is the ids of processes that have argument among their arguments, as a shim has
// its containerd's address.
func processes(argument string) (pids []int) {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range files {
		arguments, _ := os.ReadFile(file)
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file))); err == nil && slices.Contains(strings.Split(string(arguments), "\x00"), argument) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// kill kills a process that is not our child and waits until it is gone.
func kill(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); alive(pid); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("process %d survives SIGKILL", pid)
		}
	}
}

func missing(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("COHORT_REQUIRE") == "1" {
		t.Fatalf("missing: %s", what)
	}
	t.Skipf("missing: %s", what)
}
