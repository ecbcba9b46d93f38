// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"errors"
	"os/exec"
	"runtime"

	runc "github.com/containerd/go-runc"
	"golang.org/x/sys/unix"
)

// lastingThreads is the shim's process monitor, whose StartLocked keeps its
// promise: the thread that forked is there as long as the child.
//
// runc and CRIU are started with a parent-death signal, which the kernel sends
// when the forking *thread* ends (prctl(2), PR_SET_PDEATHSIG). containerd's
// reaper gives that thread back to the Go scheduler as soon as the child runs
// (pkg/sys/reaper, StartLocked), and in this shim threads do end: those that have entered
// a network namespace, traced a process or lowered their priority. CRIU was then
// killed now and then while it held a container.
type lastingThreads struct{ runc.ProcessMonitor }

func (m lastingThreads) StartLocked(c *exec.Cmd) (chan runc.Exit, error) {
	type started struct {
		exit chan runc.Exit
		err  error
	}
	done := make(chan started, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		exit, err := m.Start(c)
		done <- started{exit, err}
		if err == nil {
			awaitExit(c.Process.Pid)
		}
	}()
	s := <-done
	return s.exit, s.err
}

// awaitExit holds the calling thread until a child has ended; somebody else
// reaps it.
func awaitExit(pid int) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return // reaped already
	}
	defer unix.Close(fd)
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		if !errors.Is(err, unix.EINTR) {
			return
		}
	}
}
