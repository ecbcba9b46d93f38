// SPDX-License-Identifier: Apache-2.0

// Package integration tests cohort against a real containerd, runc and CRIU.
//
// The tests in shim_*_test.go are about what cohort must not change: each runs
// with containerd's own runc shim and with cohort's, on a stock snapshotter and on
// cohort's, and asserts the same of all of them.
package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/runtime/journal"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

// same runs a test with the stock shim and with cohort's.
func same(t *testing.T, test func(t *testing.T, s *subject)) {
	for _, r := range []harness.Runtime{harness.Stock, harness.CohortOnStock, harness.CohortOnCohort} {
		t.Run(r.Name, func(t *testing.T) {
			in := harness.Up(t)
			in.RequireImage(t, harness.BusyboxImage, r.Snapshotter)
			in.RequireImage(t, harness.ToolsImage, r.Snapshotter)
			test(t, &subject{T: t, in: in, r: r, ctx: harness.Context(t)})
		})
	}
}

// subject is one runtime under test.
type subject struct {
	*testing.T
	in  *harness.Instance
	r   harness.Runtime
	ctx context.Context
}

// isCohort tells whether the shim under test keeps records.
func (s *subject) isCohort() bool { return s.r.Runtime != harness.Stock.Runtime }

// container is a container with what its first process printed.
type container struct {
	containerd.Container
	task containerd.Task
	exit <-chan containerd.ExitStatus
	out  *lockedBuffer
	err  *lockedBuffer
}

// setup changes how a container is created.
type setup struct {
	spec    []oci.SpecOpts
	options *options.Options
	io      cio.Opt // instead of buffers
}

// create makes a container of busybox, or of the test programs, with a task that
// has not started.
func (s *subject) create(how setup, args ...string) *container {
	s.Helper()
	client := s.in.Client(s)
	ref := harness.BusyboxImage
	if strings.HasPrefix(args[0], "/bin/ticker") || strings.HasPrefix(args[0], "/bin/oom") {
		ref = harness.ToolsImage
	}
	image, err := client.GetImage(s.ctx, ref)
	if err != nil {
		s.Fatal(err)
	}
	id := s.in.Name("shim")
	if how.options == nil {
		how.options = &options.Options{}
	}
	s.in.RemoveAfter(s, id)
	c := &container{out: &lockedBuffer{}, err: &lockedBuffer{}}
	spec := append([]oci.SpecOpts{oci.WithImageConfig(image), oci.WithProcessArgs(args...)}, how.spec...)
	c.Container, err = client.NewContainer(s.ctx, id,
		containerd.WithSnapshotter(s.r.Snapshotter), containerd.WithNewSnapshot(id, image),
		containerd.WithImage(image), containerd.WithNewSpec(spec...), containerd.WithRuntime(s.r.Runtime, how.options))
	if err != nil {
		s.Fatal(err)
	}
	streams := cio.WithStreams(nil, c.out, c.err)
	if how.io != nil {
		streams = how.io
	}
	if c.task, err = c.NewTask(s.ctx, cio.NewCreator(streams, cio.WithFIFODir(s.TempDir()))); err != nil {
		s.Fatal(err)
	}
	if c.exit, err = c.task.Wait(s.ctx); err != nil {
		s.Fatal(err)
	}
	return c
}

// run makes and starts a container.
func (s *subject) run(how setup, args ...string) *container {
	s.Helper()
	c := s.create(how, args...)
	if err := c.task.Start(s.ctx); err != nil {
		s.Fatal(err)
	}
	return c
}

// status waits for an exit.
func (s *subject) status(exit <-chan containerd.ExitStatus) uint32 {
	s.Helper()
	select {
	case e := <-exit:
		code, _, err := e.Result()
		if err != nil {
			s.Fatal(err)
		}
		return code
	case <-s.ctx.Done():
		s.Fatal(context.Cause(s.ctx))
	}
	return 0
}

// exec runs a command in a container and returns its output and exit code.
func (s *subject) exec(c *container, args ...string) (string, uint32) {
	s.Helper()
	var out lockedBuffer
	p := s.newExec(c, &out, args...)
	exit, err := p.Wait(s.ctx)
	if err != nil {
		s.Fatal(err)
	}
	if err := p.Start(s.ctx); err != nil {
		s.Fatal(err)
	}
	code := s.status(exit)
	p.IO().Wait()
	if _, err := p.Delete(s.ctx); err != nil {
		s.Fatal(err)
	}
	return out.String(), code
}

func (s *subject) newExec(c *container, out *lockedBuffer, args ...string) containerd.Process {
	s.Helper()
	spec, err := c.Spec(s.ctx)
	if err != nil {
		s.Fatal(err)
	}
	process := *spec.Process
	process.Args, process.Terminal = args, false
	p, err := c.task.Exec(s.ctx, s.in.Name("exec"), &process,
		cio.NewCreator(cio.WithStreams(nil, out, out), cio.WithFIFODir(s.TempDir())))
	if err != nil {
		s.Fatal(err)
	}
	return p
}

// state expects a task's status.
func (s *subject) state(c *container, want containerd.ProcessStatus) {
	s.Helper()
	st, err := c.task.Status(s.ctx)
	if err != nil {
		s.Fatal(err)
	}
	if st.Status != want {
		s.Errorf("the task is %s, want %s", st.Status, want)
	}
}

// lockedBuffer is written by a copying goroutine while a test reads it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// printed waits until a container has printed something.
func (s *subject) printed(c *container, want string) {
	s.Helper()
	harness.Eventually(s, 20*time.Second, func() error {
		if have := c.out.String(); !strings.Contains(have, want) {
			return fmt.Errorf("want %q, it has printed %q and %q", want, have, c.err.String())
		}
		return nil
	})
}

func TestExitCodesReachTheClient(t *testing.T) {
	same(t, func(t *testing.T, s *subject) {
		for script, want := range map[string]uint32{
			"true": 0, "exit 7": 7, "exit 255": 255,
			// A shell reports its child's signal; the next test kills the first process itself.
			"sh -c 'kill -TERM $$'; exit $?": 128 + 15,
		} {
			c := s.run(setup{}, "/bin/sh", "-c", script)
			if code := s.status(c.exit); code != want {
				t.Errorf("%s: exit code %d, want %d", script, code, want)
			}
			st, err := c.task.Delete(s.ctx)
			if err != nil || st.ExitCode() != want {
				t.Errorf("%s: deleted with %d, %v", script, st.ExitCode(), err)
			}
		}
	})
}

func TestSignalsReachTheirProcess(t *testing.T) {
	same(t, func(t *testing.T, s *subject) {
		c := s.run(setup{}, "/bin/sh", "-c", "trap 'echo got hup' HUP; trap 'echo got term; exit 3' TERM; echo ready; while :; do sleep 0.05; done")
		s.printed(c, "ready")
		if err := c.task.Kill(s.ctx, syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		s.printed(c, "got hup")

		var out lockedBuffer
		p := s.newExec(c, &out, "/bin/sleep", "1000")
		exit, err := p.Wait(s.ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Start(s.ctx); err != nil {
			t.Fatal(err)
		}
		if err := p.Kill(s.ctx, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if code := s.status(exit); code != 137 {
			t.Errorf("the exec that was killed has exit code %d", code)
		}
		if _, err := p.Delete(s.ctx); err != nil {
			t.Error(err)
		}
		s.state(c, containerd.Running)

		if err := c.task.Kill(s.ctx, syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if code := s.status(c.exit); code != 3 {
			t.Errorf("exit code %d", code)
		}
		if err := c.task.Kill(s.ctx, syscall.SIGTERM); !errdefs.IsNotFound(err) {
			t.Errorf("signalling a process that has ended: %v, want not found", err)
		}
	})
}

func TestAKilledContainerLeavesNoProcess(t *testing.T) {
	same(t, func(t *testing.T, s *subject) {
		c := s.run(setup{}, "/bin/sh", "-c", "sleep 1000 & sleep 1000 & echo ready; wait")
		s.printed(c, "ready")
		pids, err := c.task.Pids(s.ctx)
		if err != nil || len(pids) != 3 {
			t.Fatalf("processes: %v, %v; want 3", pids, err)
		}
		if err := c.task.Kill(s.ctx, syscall.SIGKILL, containerd.WithKillAll); err != nil {
			t.Fatal(err)
		}
		if code := s.status(c.exit); code != 137 {
			t.Errorf("exit code %d", code)
		}
		harness.Eventually(t, 10*time.Second, func() error {
			for _, p := range pids {
				if _, err := journal.ProcOf(int(p.Pid)); err == nil {
					return fmt.Errorf("process %d runs", p.Pid)
				}
			}
			return nil
		})
	})
}

func TestWhatCannotRunIsAnErrorAndLeavesNothing(t *testing.T) {
	same(t, func(t *testing.T, s *subject) {
		client := s.in.Client(t)
		image, err := client.GetImage(s.ctx, harness.BusyboxImage)
		if err != nil {
			t.Fatal(err)
		}
		id := s.in.Name("shim")
		s.in.RemoveAfter(t, id)
		c, err := client.NewContainer(s.ctx, id, containerd.WithSnapshotter(s.r.Snapshotter), containerd.WithNewSnapshot(id, image),
			containerd.WithNewSpec(oci.WithImageConfig(image), oci.WithProcessArgs("/no/such/program")), containerd.WithRuntime(s.r.Runtime, nil))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.NewTask(s.ctx, cio.NullIO); err == nil || !strings.Contains(err.Error(), "/no/such/program") {
			t.Errorf("the error does not name the program: %v", err)
		}
		s.gone(id)

		running := s.run(setup{}, "/bin/sleep", "1000")
		var out lockedBuffer
		p := s.newExec(running, &out, "/no/such/program")
		if err := p.Start(s.ctx); err == nil || !strings.Contains(err.Error(), "/no/such/program") {
			t.Errorf("the error does not name the program: %v", err)
		}
		s.state(running, containerd.Running)
	})
}

func TestExecsRunBesideEachOther(t *testing.T) {
	same(t, func(t *testing.T, s *subject) {
		c := s.run(setup{}, "/bin/sleep", "1000")
		if out, code := s.exec(c, "/bin/sh", "-c", "cat /proc/1/cmdline; exit 5"); code != 5 || !strings.Contains(out, "sleep") {
			t.Errorf("exit code %d, output %q: it is not in the container", code, out)
		}
		var wg sync.WaitGroup
		for n := range 4 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				out, code := s.exec(c, "/bin/sh", "-c", fmt.Sprintf("sleep 0.2; echo %d; exit %d", n, n))
				if strings.TrimSpace(out) != fmt.Sprint(n) || code != uint32(n) {
					t.Errorf("exec %d: exit code %d, output %q", n, code, out)
				}
			}()
		}
		wg.Wait()
	})
}

func TestAPausedContainerStandsStill(t *testing.T) {
	same(t, func(t *testing.T, s *subject) {
		c := s.run(setup{}, "/bin/sh", "-c", "n=0; while :; do n=$((n+1)); echo $n; sleep 0.01; done")
		s.printed(c, "10\n")
		if err := c.task.Pause(s.ctx); err != nil {
			t.Fatal(err)
		}
		s.state(c, containerd.Paused)
		// What was printed before may still be on its way.
		var before string
		harness.Eventually(t, 5*time.Second, func() error {
			last := before
			if before = c.out.String(); before != last {
				return errors.New("it goes on printing")
			}
			return nil
		})
		time.Sleep(200 * time.Millisecond) // the time for which it must do nothing
		if after := c.out.String(); after != before {
			t.Error("it printed while it was paused")
		}
		if err := c.task.Resume(s.ctx); err != nil {
			t.Fatal(err)
		}
		s.state(c, containerd.Running)
		harness.Eventually(t, 10*time.Second, func() error {
			if c.out.String() == before {
				return errors.New("it does not go on")
			}
			return nil
		})
	})
}

func TestARunningContainerIsNotDeletedUnlessForced(t *testing.T) {
	same(t, func(t *testing.T, s *subject) {
		c := s.run(setup{}, "/bin/sleep", "1000")
		shim := s.in.Shim(t, c.ID())
		if _, err := c.task.Delete(s.ctx); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("deleting a running task: %v, want failed precondition", err)
		}
		s.state(c, containerd.Running)
		s.recorded(c.ID(), true)
		if _, err := c.task.Delete(s.ctx, containerd.WithProcessKill); err != nil {
			t.Fatal(err)
		}
		s.gone(c.ID())
		harness.Eventually(t, 10*time.Second, func() error {
			if shim.Alive() {
				return fmt.Errorf("its shim, process %d, runs", shim.Pid)
			}
			return nil
		})
	})
}

// recorded expects that the shim keeps, or does not keep, a record of a member.
func (s *subject) recorded(id string, want bool) {
	s.Helper()
	if !s.isCohort() {
		return
	}
	_, err := journal.ReadMember(s.in.State, s.in.Namespace(), id)
	if have := err == nil; have != want {
		s.Errorf("the shim has a record of container %s: %v (%v), want %v", id, have, err, want)
	}
}

// gone expects that nothing is left of a task: bundle, runc's state, mounts,
// cgroups, record.
func (s *subject) gone(id string) {
	s.Helper()
	harness.Eventually(s, 10*time.Second, func() error {
		globs := []string{
			filepath.Join(s.in.Dir, "containerd", "state", "io.containerd.runtime.v2.task", "*", id),
			filepath.Join("/run/containerd/runc", "*", id),
			filepath.Join("/sys/fs/cgroup", s.in.Namespace(), id),
			filepath.Join("/sys/fs/cgroup", "*", s.in.Namespace(), id),
			filepath.Join(s.in.State, "*", "*", id+".json"),
		}
		for _, glob := range globs {
			if left, _ := filepath.Glob(glob); len(left) > 0 {
				return fmt.Errorf("left of container %s: %s", id, strings.Join(left, ", "))
			}
		}
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			return err
		}
		if strings.Contains(string(mounts), "/"+id+"/") {
			return fmt.Errorf("a mount is left of container %s", id)
		}
		return nil
	})
}

func TestContainersThatBelongTogetherShareAShim(t *testing.T) {
	same(t, func(t *testing.T, s *subject) {
		group := s.in.Name("group")
		annotated := setup{spec: []oci.SpecOpts{oci.WithAnnotations(map[string]string{"io.containerd.runc.v2.group": group})}}
		first := s.run(annotated, "/bin/sleep", "1000")
		second := s.run(annotated, "/bin/sleep", "1000")
		alone := s.run(setup{}, "/bin/sleep", "1000")
		if a, b, c := s.shimOf(first), s.shimOf(second), s.shimOf(alone); a != b || a == c {
			t.Errorf("shims %s, %s and %s: want the first two to be one", a, b, c)
		}
		if _, err := first.task.Delete(s.ctx, containerd.WithProcessKill); err != nil {
			t.Fatal(err)
		}
		s.state(second, containerd.Running)
		if out, code := s.exec(second, "/bin/echo", "here"); code != 0 || out != "here\n" {
			t.Errorf("exec: %q, %d", out, code)
		}
	})
}

// shimOf is the pid of the parent of a container's first process.
func (s *subject) shimOf(c *container) string {
	s.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.task.Pid()))
	if err != nil {
		s.Fatal(err)
	}
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	return fields[1]
}

func TestOptionsOfRuncAreHonoured(t *testing.T) {
	same(t, func(t *testing.T, s *subject) {
		runc := harness.RequireTool(t, "runc")
		dir := t.TempDir()
		calls := filepath.Join(dir, "calls")
		wrapper := filepath.Join(dir, "my-runc")
		script := fmt.Sprintf("#!/bin/sh\necho \"$*\" >>%s\nexec %s \"$@\"\n", calls, runc)
		if err := os.WriteFile(wrapper, []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
		root := filepath.Join(dir, "root")
		c := s.run(setup{options: &options.Options{BinaryName: wrapper, Root: root, NoNewKeyring: true}}, "/bin/sleep", "1000")
		if _, err := os.Stat(filepath.Join(root, s.in.Namespace(), c.ID(), "state.json")); err != nil {
			t.Errorf("runc's state is not in the root that was asked for: %v", err)
		}
		if out, code := s.exec(c, "/bin/echo", "here"); code != 0 || out != "here\n" {
			t.Errorf("exec: %q, %d", out, code)
		}
		if _, err := c.task.Delete(s.ctx, containerd.WithProcessKill); err != nil {
			t.Fatal(err)
		}
		said, err := os.ReadFile(calls)
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(string(said), "\n")
		for _, want := range []string{" create ", " start ", " exec ", " kill ", " delete "} {
			if !slices.ContainsFunc(lines, func(l string) bool { return strings.Contains(l, want) && strings.Contains(l, c.ID()) }) {
				t.Errorf("the runc that was asked for was not called for%s: %s", want, said)
			}
		}
		if !strings.Contains(string(said), "--no-new-keyring") {
			t.Error("the keyring option did not arrive")
		}
		if left, err := os.ReadDir(filepath.Join(root, s.in.Namespace())); err != nil && !errors.Is(err, fs.ErrNotExist) || len(left) > 0 {
			t.Errorf("left in runc's root: %v, %v", left, err)
		}
	})
}
