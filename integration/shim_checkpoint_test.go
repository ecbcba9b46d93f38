// SPDX-License-Identifier: Apache-2.0

package integration

import (
	"testing"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
)

// runTicker runs a ticker whose memory and file verify themselves.
func (s *subject) runTicker() (id string, pid int) {
	s.Helper()
	id, pid = s.in.Run(s, s.r, harness.Container{
		ID: s.in.Name("shim"), Image: harness.ToolsImage,
		Args: []string{"/bin/ticker", "--mem", "24", "--checksum", "--file", "/counter", "--report", reportPath},
	})
	if err := programs.WaitReady(s.ctx, pid, reportPath); err != nil {
		s.Fatal(err)
	}
	return id, pid
}

// goesOn expects a restored ticker to go on where the checkpoint was taken, with
// its memory and its file intact.
func (s *subject) goesOn(id string, before programs.Ticker) {
	s.Helper()
	pid, err := s.in.CtrOf(s.r).Pid(s.ctx, id)
	if err != nil {
		s.Fatal(err)
	}
	var after programs.Ticker
	if err := programs.AskVerified(s.ctx, pid, reportPath, &after); err != nil {
		s.Fatal(err)
	}
	if !after.SumOK || after.Writes <= before.Writes || after.Counter < before.Counter || after.N <= before.N {
		s.Errorf("it was at %+v and is at %+v after the restore", before, after)
	}
}

func (s *subject) requireCRIU() {
	s.Helper()
	harness.RequireTool(s, "criu")
}

// The checkpoint that containerd itself knows goes through cohort's shim as well.
func TestStockCheckpointsOfContainersWork(t *testing.T) {
	same(t, func(t *testing.T, s *subject) {
		s.requireCRIU()
		id, pid := s.runTicker()
		var before, after programs.Ticker
		if err := programs.AskVerified(s.ctx, pid, reportPath, &before); err != nil {
			t.Fatal(err)
		}
		ref := "test.local/" + s.in.Name("stock") + ":1"
		s.in.RemoveImagesAfter(t, ref)
		if _, err := s.in.Ctr(s.ctx, "containers", "checkpoint", "--rw", "--task", id, ref); err != nil {
			t.Fatal(err)
		}
		if err := programs.AskVerified(s.ctx, pid, reportPath, &after); err != nil || !after.SumOK {
			t.Fatalf("the container did not go on: %+v, %v", after, err)
		}
		if err := s.in.CtrOf(s.r).Remove(s.ctx, id); err != nil {
			t.Fatal(err)
		}
		s.gone(id)
		if _, err := s.in.Ctr(s.ctx, "containers", "restore", "--rw", "--live", id, ref); err != nil {
			t.Fatal(err)
		}
		s.goesOn(id, before)
		s.recorded(id, true)
	})
}

// A task checkpoint by the client library, the container ending with it, and a new
// container with a new task that begins from it.
func TestStockCheckpointsOfTasksWork(t *testing.T) {
	same(t, func(t *testing.T, s *subject) {
		s.requireCRIU()
		id, pid := s.runTicker()
		var before programs.Ticker
		if err := programs.AskVerified(s.ctx, pid, reportPath, &before); err != nil {
			t.Fatal(err)
		}
		c, err := s.in.Client(t).LoadContainer(s.ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		task, err := c.Task(s.ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		exit, err := task.Wait(s.ctx)
		if err != nil {
			t.Fatal(err)
		}
		image, err := task.Checkpoint(s.ctx, containerd.WithCheckpointName("test.local/"+s.in.Name("task")+":1"), checkpointAndExit)
		if err != nil {
			t.Fatal(err)
		}
		s.in.RemoveImagesAfter(t, image.Name())
		s.status(exit)
		if _, err := task.Delete(s.ctx); err != nil {
			t.Fatal(err)
		}
		// Same container, same writable layer: only the process was away.
		began := time.Now()
		if task, err = c.NewTask(s.ctx, cio.NullIO, containerd.WithTaskCheckpoint(image)); err != nil {
			t.Fatal(err)
		}
		if err := task.Start(s.ctx); err != nil {
			t.Fatal(err)
		}
		t.Logf("restored in %v", time.Since(began).Round(time.Millisecond))
		s.goesOn(id, before)
	})
}

// checkpointAndExit ends the container with its checkpoint.
func checkpointAndExit(i *containerd.CheckpointTaskInfo) error {
	i.Options = &options.CheckpointOptions{Exit: true}
	return nil
}
