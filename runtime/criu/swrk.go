// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	runc "github.com/containerd/go-runc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// messageSize bounds one message of CRIU; its own sender uses 1 KiB buffers
// for everything but error texts (criu/cr-service.c).
const messageSize = 64 << 10

// Binary is the CRIU executable, looked up on PATH where it has no slash.
func Binary() string {
	if b := os.Getenv("COHORT_CRIU"); b != "" {
		return b
	}
	return "criu"
}

// swrk is a CRIU process in "swrk" mode: one request on a socket pair, replies
// and notifications until the operation ends. Methods are not safe for
// concurrent use, but kill is.
type swrk struct {
	conn *net.UnixConn
	cmd  *exec.Cmd
	exit chan runc.Exit
	done chan struct{}
	once sync.Once
}

// startSwrk starts it. gate, if any, is its descriptor 4.
func startSwrk(workDir string, gate *os.File, env ...string) (*swrk, error) {
	// The descriptors are close-on-exec from birth: a container started by
	// another goroutine at this moment must not inherit them.
	fds, err := unix.Socketpair(unix.AF_LOCAL, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket pair for CRIU: %w", err)
	}
	server := os.NewFile(uintptr(fds[1]), "criu-server")
	defer server.Close()
	client := os.NewFile(uintptr(fds[0]), "criu-client")
	c, err := net.FileConn(client)
	client.Close()
	if err != nil {
		return nil, fmt.Errorf("use socket pair for CRIU: %w", err)
	}
	cmd := exec.Command(Binary(), "swrk", "3")
	cmd.ExtraFiles = []*os.File{server}
	if gate != nil {
		cmd.ExtraFiles = append(cmd.ExtraFiles, gate)
	}
	cmd.Dir = workDir
	// See contrib/criu-preload: the table is no part of an external namespace's
	// image, and dumping it takes long.
	cmd.Env = append(append(os.Environ(), "COHORT_CRIU_NO_CONNTRACK=1"), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL, Setpgid: true}
	// StartLocked: the parent-death signal follows the thread that forked.
	exit, err := runc.Monitor.StartLocked(cmd)
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("start CRIU (%s): %w; install CRIU 4.2 or newer, or set COHORT_CRIU", cmd.Path, err)
	}
	s := &swrk{conn: c.(*net.UnixConn), cmd: cmd, exit: exit, done: make(chan struct{})}
	go func() {
		_, _ = runc.Monitor.Wait(cmd, exit)
		close(s.done)
	}()
	return s, nil
}

func (s *swrk) send(req *rpc.CriuReq) error {
	b, err := proto.Marshal(req)
	if err != nil {
		return err
	}
	_, err = s.conn.Write(b)
	return err
}

func (s *swrk) recv() (*rpc.CriuResp, error) {
	buf := make([]byte, messageSize)
	oob := make([]byte, unix.CmsgSpace(4*16))
	n, oobn, _, _, err := s.conn.ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, fmt.Errorf("read from CRIU: %w", err)
	}
	closeRights(oob[:oobn])
	if n == 0 {
		return nil, errors.New("CRIU ended without an answer")
	}
	resp := &rpc.CriuResp{}
	if err := proto.Unmarshal(buf[:n], resp); err != nil {
		return nil, fmt.Errorf("decode answer of CRIU: %w", err)
	}
	return resp, nil
}

// closeRights closes descriptors that came along with a message (the master of
// an orphan terminal): the shim holds its own.
func closeRights(oob []byte) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return
	}
	for i := range msgs {
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			continue
		}
		for _, fd := range fds {
			unix.Close(fd)
		}
	}
}

func (s *swrk) ack(ok bool) error {
	t := rpc.CriuReqType_NOTIFY
	return s.send(&rpc.CriuReq{Type: &t, NotifySuccess: proto.Bool(ok)})
}

// close ends the conversation and waits until the process is gone.
func (s *swrk) close(ctx context.Context) error {
	s.once.Do(func() { s.conn.Close() })
	select {
	case <-s.done:
		return nil
	case <-ctx.Done():
		s.kill()
		<-s.done
		return ctx.Err()
	}
}

// kill ends CRIU and its children at once; it does not wait.
func (s *swrk) kill() {
	select {
	case <-s.done: // its pid may be another's
		return
	default:
	}
	if s.cmd.Process != nil {
		_ = unix.Kill(-s.cmd.Process.Pid, unix.SIGKILL)
	}
}

// hurry has a process run before others until calm, where that is allowed:
// on a busy host they would run in the time that a container stands still. The lowest of the real-time
// priorities is asked for, since a nice value counts within a session only (sched(7),
// autogroup) or a cgroup. The kernel leaves others a twentieth of the time whatever happens.
func hurry(pid int) {
	if unix.SchedSetAttr(pid, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_RR, Priority: 1}, 0) != nil {
		_ = unix.Setpriority(unix.PRIO_PROCESS, pid, -20) // without either it is one among many
	}
}

// calm ends what hurry began.
func calm(pid int) {
	_ = unix.SchedSetAttr(pid, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL, Nice: 19}, 0)
}

// yieldCPU takes the last of its processors from a process that has several; where that is
// not allowed it keeps it.
func yieldCPU(pid int) {
	var set unix.CPUSet
	if unix.SchedGetaffinity(pid, &set) != nil || set.Count() < 2 {
		return
	}
	for cpu := len(set)*64 - 1; cpu >= 0; cpu-- {
		if set.IsSet(cpu) {
			set.Clear(cpu)
			break
		}
	}
	_ = unix.SchedSetaffinity(pid, &set)
}

// Version asks CRIU for its version: major*10000 + minor*100 + sublevel. The
// process it starts is bounded by ctx.
func Version(ctx context.Context) (int, error) {
	s, err := startSwrk("", nil)
	if err != nil {
		return 0, err
	}
	stop := context.AfterFunc(ctx, s.kill)
	defer stop()
	defer s.close(ctx)
	t := rpc.CriuReqType_VERSION
	if err := s.send(&rpc.CriuReq{Type: &t}); err != nil {
		return 0, fmt.Errorf("ask CRIU for its version: %w", err)
	}
	resp, err := s.recv()
	if err != nil {
		return 0, fmt.Errorf("ask CRIU for its version: %w", err)
	}
	v := resp.GetVersion()
	return int(v.GetMajorNumber()*10000 + v.GetMinorNumber()*100 + v.GetSublevel()), nil
}
