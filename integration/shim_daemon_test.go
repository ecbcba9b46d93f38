// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"fmt"
	"os"
	"syscall"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
	"github.com/cohort-project/cohort/runtime/journal"
)

// reload finds a container again, as a client that has just started would.
func (s *subject) reload(c *container) {
	s.Helper()
	loaded, err := s.in.Client(s).LoadContainer(s.ctx, c.ID())
	if err != nil {
		s.Fatal(err)
	}
	c.Container = loaded
	if c.task, err = loaded.Task(s.ctx, nil); err != nil {
		s.Fatal(err)
	}
	if c.exit, err = c.task.Wait(s.ctx); err != nil {
		s.Fatal(err)
	}
}

func TestContainersSurviveContainerd(t *testing.T) {
	same(t, func(t *testing.T, s *subject) {
		c := s.run(setup{}, "/bin/ticker", "--mem", "16", "--report", reportPath)
		pid := int(c.task.Pid())
		if err := programs.WaitReady(s.ctx, pid, reportPath); err != nil {
			t.Fatal(err)
		}
		lost := s.run(setup{}, "/bin/sh", "-c", "trap 'exit 8' TERM; echo ready; while :; do sleep 0.02; done")
		s.printed(lost, "ready")
		shim := s.in.Shim(t, c.ID())

		s.in.KillDaemon(t, harness.Containerd)
		if !shim.Alive() {
			t.Fatal("the shim ended with containerd")
		}
		var report programs.Ticker
		if err := programs.Ask(s.ctx, pid, reportPath, &report); err != nil {
			t.Fatalf("the container does not run: %v", err)
		}
		// This one ends while nobody is there to be told.
		if err := syscall.Kill(int(lost.task.Pid()), syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		s.in.Restart(t)

		s.reload(c)
		s.state(c, containerd.Running)
		// containerd removes the task of a container that has no process any more
		// when it starts, and its exit code with it.
		if _, err := lost.Task(s.ctx, nil); !errdefs.IsNotFound(err) {
			t.Errorf("the task of the container that ended meanwhile: %v, want not found", err)
		}
		s.gone(lost.ID())
		if int(c.task.Pid()) != pid {
			t.Errorf("the process is %d now, it was %d", c.task.Pid(), pid)
		}
		other := s.run(setup{}, "/bin/sleep", "1000")
		if out, code := s.exec(other, "/bin/echo", "here"); code != 0 || out != "here\n" {
			t.Errorf("exec in a new container: %q, %d", out, code)
		}
		// A program of the image: it has no shell.
		if out, code := s.exec(c, "/bin/ticker", "--mem", "0"); code != 2 {
			t.Errorf("exec in the old container: exit code %d, %q", code, out)
		}
		s.recorded(c.ID(), true)
		if err := c.task.Kill(s.ctx, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if code := s.status(c.exit); code != 137 {
			t.Errorf("exit code %d", code)
		}
		if _, err := c.task.Delete(s.ctx); err != nil {
			t.Error(err)
		}
		s.gone(c.ID())
	})
}

func TestAKilledShimIsCleanedUpAfter(t *testing.T) {
	same(t, func(t *testing.T, s *subject) {
		w := s.watchEvents()
		c := s.run(setup{}, "/bin/sh", "-c", "sleep 1000 & echo ready; wait")
		w.id = c.ID()
		s.printed(c, "ready")
		pids, err := c.task.Pids(s.ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := harness.KillProcess(s.ctx, s.in.Shim(t, c.ID())); err != nil {
			t.Fatal(err)
		}
		w.until("Exit")
		harness.Eventually(t, 10*time.Second, func() error {
			for _, p := range pids {
				if _, err := journal.ProcOf(int(p.Pid)); err == nil {
					return fmt.Errorf("process %d outlived its shim", p.Pid)
				}
			}
			st, err := c.task.Status(s.ctx)
			if errdefs.IsNotFound(err) {
				return nil
			}
			if err == nil && st.Status != containerd.Stopped {
				err = fmt.Errorf("the task is %s", st.Status)
			}
			return err
		})
		s.recorded(c.ID(), false)
		if _, err := c.task.Delete(s.ctx, containerd.WithProcessKill); err != nil && !errdefs.IsNotFound(err) {
			t.Errorf("deleting the task: %v", err)
		}
		if err := c.Delete(s.ctx, containerd.WithSnapshotCleanup); err != nil {
			t.Errorf("deleting the container: %v", err)
		}
		s.gone(c.ID())
	})
}

func TestAShimKilledWhileItsContainerIsPausedLeavesNothingFrozen(t *testing.T) {
	same(t, func(t *testing.T, s *subject) {
		c := s.run(setup{}, "/bin/sleep", "1000")
		pid := int(c.task.Pid())
		if err := c.task.Pause(s.ctx); err != nil {
			t.Fatal(err)
		}
		if err := harness.KillProcess(s.ctx, s.in.Shim(t, c.ID())); err != nil {
			t.Fatal(err)
		}
		harness.Eventually(t, 20*time.Second, func() error {
			if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
				return fmt.Errorf("process %d is there still", pid)
			}
			return nil
		})
		s.gone(c.ID())
	})
}
