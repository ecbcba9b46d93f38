// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/runtime/journal"
)

// Daemons of an instance, as KillDaemon names them.
const (
	Containerd = "containerd"
	Cohortd    = "cohortd"
)

// KillDaemon kills a daemon of the instance with SIGKILL and returns when it has
// gone. Restart starts it again; the test does so in any case when it is over.
func (in *Instance) KillDaemon(t testing.TB, name string) {
	t.Helper()
	proc, err := in.daemon(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Restart(t) })
	if err := KillProcess(Context(t), proc); err != nil {
		t.Fatalf("killing %s: %v", name, err)
	}
}

// EndDaemon is KillDaemon with SIGTERM, as a service manager ends it, and tells how
// long it took.
func (in *Instance) EndDaemon(t testing.TB, name string) time.Duration {
	t.Helper()
	proc, err := in.daemon(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Restart(t) })
	begun := time.Now()
	if err := endProcess(Context(t), proc, syscall.SIGTERM); err != nil {
		t.Fatalf("ending %s: %v", name, err)
	}
	return time.Since(begun)
}

// Restart starts whichever daemon of the instance does not run, and returns when
// it answers.
func (in *Instance) Restart(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	temp := filepath.Join(in.Dir, "tmp")
	if err := os.MkdirAll(temp, 0o711); err != nil {
		t.Fatal(err)
	}
	if _, err := script(ctx, []string{"TMPDIR=" + temp}, "up.sh", "--run", in.Dir, "--images", "none"); err != nil {
		t.Errorf("starting the instance again: %v", err)
	}
}

// daemon reads what up.sh recorded: the pid, and the time at which that process
// began, without which a pid may be somebody else's.
func (in *Instance) daemon(name string) (journal.Proc, error) {
	b, err := os.ReadFile(filepath.Join(in.Dir, name+".pid"))
	if err != nil {
		return journal.Proc{}, err
	}
	var p journal.Proc
	if _, err := fmt.Sscan(string(b), &p.Pid, &p.Start); err != nil {
		return journal.Proc{}, fmt.Errorf("reading the pid of %s: %w", name, err)
	}
	if !p.Alive() {
		return journal.Proc{}, fmt.Errorf("%s (process %d) does not run", name, p.Pid)
	}
	return p, nil
}

// KillProcess kills a process with SIGKILL and waits until it has gone.
func KillProcess(ctx context.Context, p journal.Proc) error {
	return endProcess(ctx, p, syscall.SIGKILL)
}

func endProcess(ctx context.Context, p journal.Proc, signal syscall.Signal) error {
	fd, err := unix.PidfdOpen(p.Pid, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// The descriptor names whoever has the pid now: only then is it compared.
	if !p.Alive() {
		return fmt.Errorf("process %d: %w", p.Pid, os.ErrProcessDone)
	}
	if err := unix.PidfdSendSignal(fd, signal, nil, 0); err != nil {
		return err
	}
	return waitPidfd(ctx, fd, p.Pid)
}

// waitPidfd waits for a process that need not be a child.
func waitPidfd(ctx context.Context, fd, pid int) error {
	for {
		// Short waits, only to look at ctx between them.
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int((100 * time.Millisecond).Milliseconds()))
		if n > 0 {
			return nil
		}
		if err != nil && err != unix.EINTR {
			return err
		}
		if ctx.Err() != nil {
			return fmt.Errorf("waiting for process %d to end: %w", pid, context.Cause(ctx))
		}
	}
}

// Shim is the process of the shim that serves a container, found by the socket
// path that containerd recorded and the command line that it was given.
func (in *Instance) Shim(t testing.TB, id string) journal.Proc {
	t.Helper()
	p, err := in.findShim(id)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (in *Instance) findShim(id string) (journal.Proc, error) {
	for _, pid := range processes() {
		args := cmdline(pid)
		if len(args) > 0 && follows(args, "-id", id) && follows(args, "-address", in.Address) {
			return journal.ProcOf(pid)
		}
	}
	return journal.Proc{}, fmt.Errorf("no shim runs for container %s", id)
}

func follows(args []string, option, value string) bool {
	for i := range len(args) - 1 {
		if args[i] == option && args[i+1] == value {
			return true
		}
	}
	return false
}
