// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/containerd/api/events"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
)

const reportPath = "/report"

func TestMetricsAreTheContainersOwn(t *testing.T) {
	same(t, func(t *testing.T, s *subject) {
		c := s.run(setup{}, "/bin/ticker", "--mem", "48", "--report", reportPath)
		if err := programs.WaitReady(s.ctx, int(c.task.Pid()), reportPath); err != nil {
			t.Fatal(err)
		}
		metric, err := c.task.Metrics(s.ctx)
		if err != nil {
			t.Fatal(err)
		}
		data, err := typeurl.UnmarshalAny(metric.Data)
		if err != nil {
			t.Fatal(err)
		}
		var memory, pids uint64
		switch m := data.(type) {
		case *cgroup1.Metrics:
			memory, pids = m.Memory.Usage.Usage, m.Pids.Current
		case *cgroup2.Metrics:
			memory, pids = m.Memory.Usage, m.Pids.Current
		default:
			t.Fatalf("metrics of type %T", data)
		}
		if memory < 48<<20 || memory > 96<<20 {
			t.Errorf("%d MiB of memory, of a process that holds 48", memory>>20)
		}
		if pids < 2 || pids > 100 {
			t.Errorf("%d tasks", pids)
		}
	})
}

func TestLimitsCanBeUpdated(t *testing.T) {
	same(t, func(t *testing.T, s *subject) {
		c := s.run(setup{}, "/bin/sleep", "1000")
		limit := int64(77 << 20)
		if err := c.task.Update(s.ctx, containerd.WithResources(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}})); err != nil {
			t.Fatal(err)
		}
		files, _ := filepath.Glob(filepath.Join("/sys/fs/cgroup/memory", s.in.Namespace(), c.ID(), "memory.limit_in_bytes"))
		more, _ := filepath.Glob(filepath.Join("/sys/fs/cgroup", s.in.Namespace(), c.ID(), "memory.max"))
		if files = append(files, more...); len(files) != 1 {
			t.Fatalf("memory limits of the container: %v", files)
		}
		b, err := os.ReadFile(files[0])
		if err != nil || strings.TrimSpace(string(b)) != fmt.Sprint(limit) {
			t.Errorf("the limit is %s, want %d (%v)", b, limit, err)
		}
		s.state(c, containerd.Running)
	})
}

// watch collects the events of a container, in their order.
type watch struct {
	s      *subject
	id     string
	seen   []string
	exits  map[string]uint32
	events <-chan any
}

// watchEvents begins before the container is made.
func (s *subject) watchEvents() *watch {
	s.Helper()
	ctx, cancel := context.WithCancel(s.ctx)
	s.Cleanup(cancel)
	envelopes, errs := s.in.Client(s).Subscribe(ctx, `topic~="^/tasks/"`)
	out := make(chan any)
	go func() {
		defer close(out)
		for {
			select {
			case e := <-envelopes:
				if e == nil {
					return
				}
				if v, err := typeurl.UnmarshalAny(e.Event); err == nil {
					select {
					case out <- v:
					case <-ctx.Done():
						return
					}
				}
			case <-errs:
				return
			}
		}
	}()
	return &watch{s: s, exits: map[string]uint32{}, events: out}
}

// until takes events until one of the given name has come.
func (w *watch) until(name string) {
	w.s.Helper()
	timeout := time.After(20 * time.Second)
	for !slices.Contains(w.seen, name) {
		select {
		case e := <-w.events:
			if e == nil {
				w.s.Fatalf("the events ended before %s: %v", name, w.seen)
			}
			w.take(e)
		case <-timeout:
			w.s.Fatalf("no event %s came, only %v", name, w.seen)
		}
	}
}

func (w *watch) take(e any) {
	c, ok := e.(interface{ GetContainerID() string })
	if !ok || c.GetContainerID() != w.id {
		return
	}
	name := strings.TrimPrefix(fmt.Sprintf("%T", e), "*events.Task")
	if exit, ok := e.(*events.TaskExit); ok {
		if exit.ID != exit.ContainerID {
			name = "ExecExit"
		}
		w.exits[name] = exit.ExitStatus
	}
	w.seen = append(w.seen, name)
}

func TestOutOfMemoryIsAnEvent(t *testing.T) {
	same(t, func(t *testing.T, s *subject) {
		w := s.watchEvents()
		c := s.run(setup{spec: []oci.SpecOpts{oci.WithMemoryLimit(48 << 20)}}, "/bin/oom", "--pause", "1ms")
		w.id = c.ID()
		if code := s.status(c.exit); code != 137 {
			t.Errorf("exit code %d; it printed %q", code, c.err.String())
		}
		w.until("OOM")
		w.until("Exit")
	})
}

func TestEventsTellTheContainersLife(t *testing.T) {
	same(t, func(t *testing.T, s *subject) {
		w := s.watchEvents()
		c := s.run(setup{}, "/bin/sh", "-c", "trap 'exit 4' TERM; while :; do sleep 0.05; done")
		w.id = c.ID()
		if err := c.task.Pause(s.ctx); err != nil {
			t.Fatal(err)
		}
		if err := c.task.Resume(s.ctx); err != nil {
			t.Fatal(err)
		}
		s.exec(c, "/bin/sh", "-c", "exit 6")
		w.until("ExecExit")
		if err := c.task.Kill(s.ctx, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		// The event of the task's deletion is not waited for: containerd shuts the
		// shim down at the same time, and sometimes the shim is the faster one.
		w.until("Exit")
		want := []string{"Create", "Start", "Paused", "Resumed", "ExecAdded", "ExecStarted", "ExecExit", "Exit"}
		if !slices.Equal(w.seen, want) {
			t.Errorf("events %v, want %v", w.seen, want)
		}
		if w.exits["ExecExit"] != 6 || w.exits["Exit"] != 137 {
			t.Errorf("exit codes %v", w.exits)
		}
	})
}

func TestAnExitWhileNobodyWaitsIsRemembered(t *testing.T) {
	same(t, func(t *testing.T, s *subject) {
		c := s.run(setup{}, "/bin/sh", "-c", "exit 42")
		s.status(c.exit)
		again, err := s.in.Client(t).LoadContainer(s.ctx, c.ID())
		if err != nil {
			t.Fatal(err)
		}
		task, err := again.Task(s.ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		exit, err := task.Wait(s.ctx)
		if err != nil {
			t.Fatal(err)
		}
		if code := s.status(exit); code != 42 {
			t.Errorf("exit code %d", code)
		}
		harness.Eventually(t, 5*time.Second, func() error {
			st, err := task.Status(s.ctx)
			if err == nil && (st.Status != containerd.Stopped || st.ExitStatus != 42) {
				err = fmt.Errorf("the task is %s with %d", st.Status, st.ExitStatus)
			}
			return err
		})
	})
}
