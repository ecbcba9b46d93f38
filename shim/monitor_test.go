// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/sys/reaper"
	runc "github.com/containerd/go-runc"
	"golang.org/x/sys/unix"
)

// outlives tells whether a child lives on when the thread ends that asked for it.
func outlives(t *testing.T, m runc.ProcessMonitor) bool {
	t.Helper()
	c := exec.Command("sleep", "60")
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	started := make(chan error)
	go func() {
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		_, err := m.StartLocked(c)
		started <- err
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = c.Wait()
		close(ended)
	}()
	select {
	case <-ended:
		return false
	case <-time.After(200 * time.Millisecond):
		_ = c.Process.Kill()
		<-ended
		return true
	}
}

func TestAChildOutlivesTheThreadsOfTheShim(t *testing.T) {
	for range 5 {
		if !outlives(t, lastingThreads{reaper.Default}) {
			t.Fatal("the child was killed when a thread ended")
		}
	}
	// And with the reaper alone it does not; but the process's first thread, on which
	// the goroutine may have been, never ends.
	for range 20 {
		if !outlives(t, reaper.Default) {
			return
		}
	}
	t.Error("the child lives: what lastingThreads is for has gone from the reaper, and so may it")
}
