// SPDX-License-Identifier: Apache-2.0

package track

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cohort-project/cohort/runtime/memory/internal/uapi"
	"golang.org/x/sys/unix"
)

// checker is a running testdata/integrity.c.
type checker struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startChecker(t testing.TB, mode string) *checker {
	t.Helper()
	needTracking(t)
	c := &checker{t: t, cmd: exec.Command(build(t, "integrity.c"), mode)}
	c.start(t, mode)
	return c
}

func (c *checker) start(t testing.TB, mode string) {
	t.Helper()
	in, err := c.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	c.in, c.out = in, bufio.NewReader(out)
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.cmd.Process.Kill()
		_ = c.cmd.Wait()
	})
	if line, err := c.out.ReadString('\n'); line != "ready\n" {
		t.Fatalf("%s: %q %v", mode, line, err)
	}
}

func (c *checker) pid() int { return c.cmd.Process.Pid }

// finish ends it and fails the test if it has anything to complain about.
func (c *checker) finish() {
	c.t.Helper()
	c.in.Close()
	line, err := c.out.ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "ok ") {
		werr := c.cmd.Wait()
		c.t.Fatalf("it says %q (%v, %v)", strings.TrimSpace(line), err, werr)
	}
	c.t.Logf("%s rounds", strings.TrimSpace(line))
}

var checkerModes = []string{
	"registers", "sleep", "futex", "poll", "read", "epoll", "sigsuspend", "pending", "handler", "sigwait", "rseq",
}

func TestAttachingLeavesNoTraceInWhatTheProcessSees(t *testing.T) {
	const attaches = 200
	for _, mode := range checkerModes {
		t.Run(mode, func(t *testing.T) {
			c := startChecker(t, mode)
			var sum, top Cost
			rescued := 0
			for range attaches {
				tr := attachTo(t, c.pid())
				cost := tr.Cost()
				tr.Close()
				sum.Attach += cost.Attach
				sum.Stopped += cost.Stopped
				sum.Width += cost.Width
				top.Stopped, top.Width = max(top.Stopped, cost.Stopped), max(top.Width, cost.Width)
				if cost.Rescue {
					rescued++
				}
				// Not to wait for anything: to meet the process at any point of its round.
				time.Sleep(time.Duration(rand.IntN(1000)) * time.Microsecond)
			}
			t.Logf("attach %v, stopped %v (at most %v), width %v (at most %v), with a rescue frame %d of %d", sum.Attach/attaches,
				sum.Stopped/attaches, top.Stopped, sum.Width/attaches, top.Width, rescued, attaches)
			if runtime.GOARCH == "amd64" && rescued < attaches {
				t.Errorf("only %d of %d with a rescue frame", rescued, attaches)
			}
			c.finish()
		})
	}
}

// attachLoopEnv has the test binary attach to a process again and again, until it
// is killed.
const attachLoopEnv = "TRACK_TEST_ATTACH_LOOP"

func init() {
	value := os.Getenv(attachLoopEnv)
	if value == "" {
		return
	}
	var pid int
	fmt.Sscan(value, &pid)
	fmt.Println("looping")
	for {
		t, err := Attach(context.Background(), pid)
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		_ = t.Take(context.Background(), func(Range) error { return nil })
		t.Close()
	}
}

func TestKilledCallerLeavesTheProcessUnharmed(t *testing.T) {
	for _, mode := range []string{"registers", "read", "epoll", "pending", "sleep"} {
		t.Run(mode, func(t *testing.T) {
			c := startChecker(t, mode)
			for range 20 {
				loop := exec.Command("/proc/self/exe")
				loop.Env = append(os.Environ(), fmt.Sprintf("%s=%d", attachLoopEnv, c.pid()))
				out, err := loop.StdoutPipe()
				if err != nil {
					t.Fatal(err)
				}
				if err := loop.Start(); err != nil {
					t.Fatal(err)
				}
				if line, err := bufio.NewReader(out).ReadString('\n'); line != "looping\n" {
					t.Fatalf("%q %v", line, err)
				}
				time.Sleep(30*time.Millisecond + time.Duration(rand.IntN(3000))*time.Microsecond)
				_ = loop.Process.Kill()
				_ = loop.Wait()
				unattended(t, c.pid())
			}
			// The injector of the last one may just be beginning what it was asked for.
			tr, err := Attach(context.Background(), c.pid())
			for deadline := time.Now().Add(5 * time.Second); errors.Is(err, ErrTraced) && time.Now().Before(deadline); {
				tr, err = Attach(context.Background(), c.pid())
			}
			if err != nil {
				t.Fatal(err)
			}
			tr.Close()
			unattended(t, c.pid())
			if left := userfaultfds(t, c.pid()); left != 0 {
				t.Errorf("%d userfaultfds are left in the process", left)
			}
			c.finish()
		})
	}
}

// unattended waits until nothing traces the process.
func unattended(t *testing.T, pid int) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		st, err := readStatus(procPath(pid, "status"))
		if err != nil {
			t.Fatal(err)
		}
		if st.tracer == 0 && st.state != 't' {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still traced by %d, state %c", st.tracer, st.state)
		}
		runtime.Gosched()
	}
}

func userfaultfds(t *testing.T, pid int) int {
	t.Helper()
	fds, err := os.ReadDir(procPath(pid, "fd"))
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, fd := range fds {
		if target, _ := os.Readlink(procPath(pid, "fd/"+fd.Name())); target == "anon_inode:[userfaultfd]" {
			n++
		}
	}
	return n
}

// The tracer itself is killed, at each step of an injection in turn: then only the
// rescue frame is left.
func TestKilledInjectorLeavesTheProcessUnharmed(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("x86-64 only")
	}
	// Not "epoll": if nobody is left to prevent it, epoll_wait ends with EINTR, as
	// after a stop signal (signal(7)).
	for _, mode := range []string{"registers", "read", "poll", "sleep", "pending", "futex", "handler"} {
		t.Run(mode, func(t *testing.T) {
			c := startChecker(t, mode)
			for step := range 8 {
				for range 3 {
					// Each meets another wait: of one that was restarted already the frame
					// cannot know which it was, and ends it with EINTR.
					time.Sleep(25 * time.Millisecond)
					if err := dieAt(c.pid(), step); err != nil {
						c.in.Close()
						line, _ := c.out.ReadString('\n')
						t.Fatalf("%v; it says %q", err, line)
					}
					unattended(t, c.pid())
				}
			}
			for userfaultfds(t, c.pid()) > 0 { // swept up by the next ones to come
				before := userfaultfds(t, c.pid())
				attachTo(t, c.pid()).Close()
				if userfaultfds(t, c.pid()) >= before {
					t.Fatalf("%d userfaultfds stay in the process", before)
				}
			}
			c.finish()
		})
	}
}

// dieAt injects in a process of its own that kills itself at one step.
func dieAt(pid, step int) error {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d", dieEnv, pid, step))
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || !exit.Sys().(syscall.WaitStatus).Signaled() {
		return fmt.Errorf("step %d: %w: %s", step, err, out)
	}
	return nil
}

const dieEnv = "TRACK_TEST_DIE"

func init() {
	value := os.Getenv(dieEnv)
	if value == "" {
		return
	}
	var pid, step int
	fmt.Sscan(value, &pid, &step)
	die := func() { _ = unix.Kill(os.Getpid(), unix.SIGKILL); select {} }
	go func() {
		runtime.LockOSThread()
		found, err := findCode(pid)
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		tr := tracee{pid: pid, tid: pid, code: found}
		must := func(err error) {
			if err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
		}
		at := func(n int) {
			if n == step {
				die()
			}
		}
		must(tr.seize())
		must(tr.stop(context.Background(), always()))
		must(tr.save())
		mem, err := tr.code.open(pid, pid)
		must(err)
		tr.rescue.lay(mem, tr.code, pid, &tr.regs, tr.sigmask)
		if !tr.rescue.laid() {
			must(errors.New("no frame"))
		}
		at(0)
		// Registers set, mask not yet.
		regs := tr.regs
		setSyscall(&regs, tr.code.insn, unix.SYS_USERFAULTFD, []uint64{unix.O_CLOEXEC | unix.O_NONBLOCK | uapi.UffdUserModeOnly})
		tr.rescue.prepare(&regs)
		must(uapi.PtraceSetRegs(pid, &regs))
		at(1)
		must(uapi.PtraceSetSigmask(pid, ^uint64(0)))
		at(2)
		must(uapi.PtraceSyscall(pid, 0)) // anywhere between here and the call's entry
		at(3)
		_, _, err = uapi.WaitTracee(pid, 0)
		must(err)
		at(4)
		must(uapi.PtraceInterrupt(pid))
		must(uapi.PtraceCont(pid, 0))
		_, _, err = uapi.WaitTracee(pid, 0)
		must(err)
		at(5)
		must(uapi.PtraceSetSigmask(pid, tr.sigmask))
		at(6)
		must(uapi.PtraceSetRegs(pid, &tr.regs))
		at(7)
		os.Exit(1)
	}()
	select {}
}

// always is a channel that lets stop ask again all the time.
func always() <-chan os.Signal {
	c := make(chan os.Signal)
	close(c)
	return c
}
