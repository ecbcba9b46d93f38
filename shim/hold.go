// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// holdLease is how long a restored container waits at "post-restore" for a
// coordinator that does not renew its interest.
const holdLease = 30 * time.Second

const (
	holdSocket = "hold.sock"
	verdictGo  = "go"
)

// hold keeps one restore at CRIU's "post-restore". CRIU runs the shim binary as
// its action script (see runtime/criu.WriteRestoreConfig), which connects to
// the hold's socket and waits for the verdict; a connection that breaks means
// no, so a dead shim fails the restore instead of leaving it half-way.
type hold struct {
	l       *net.UnixListener
	arrived chan struct{} // closed when CRIU has arrived
	verdict chan struct{} // closed when there is a verdict
	failed  chan struct{} // closed when the restore has failed before
	once    sync.Once
	arrive  sync.Once
	fail    sync.Once
	release bool
	timer   *time.Timer
}

func newHold(dir string) (*hold, error) {
	// Bundles lie deep, and a socket's path must fit in 108 bytes.
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), holdSocket)})
	if err != nil {
		return nil, fmt.Errorf("listen for CRIU: %w", err)
	}
	l.SetUnlinkOnClose(false)
	h := &hold{l: l, arrived: make(chan struct{}), verdict: make(chan struct{}), failed: make(chan struct{})}
	h.timer = time.AfterFunc(holdLease, func() { h.decide(false) })
	go h.serve()
	return h, nil
}

func (h *hold) serve() {
	for {
		c, err := h.l.AcceptUnix()
		if err != nil {
			return
		}
		h.arrive.Do(func() { close(h.arrived) })
		go func() {
			defer c.Close()
			<-h.verdict
			if h.release {
				fmt.Fprintln(c, verdictGo)
			}
		}()
	}
}

// decide gives the verdict; only the first counts.
func (h *hold) decide(release bool) {
	h.once.Do(func() {
		h.release = release
		close(h.verdict)
		h.timer.Stop()
	})
}

// renew extends the lease.
func (h *hold) renew(d time.Duration) {
	if d <= 0 {
		d = holdLease
	}
	h.timer.Reset(d)
	select {
	case <-h.verdict:
		h.timer.Stop()
	default:
	}
}

// await blocks until CRIU has arrived.
func (h *hold) await(ctx context.Context) error {
	select {
	case <-h.arrived:
		return nil
	case <-h.failed:
		return errors.New("the restore failed before the container was complete")
	case <-h.verdict:
		return errors.New("the restore has been decided already")
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (h *hold) close() {
	h.decide(false)
	h.fail.Do(func() { close(h.failed) })
	h.l.Close()
}

// RunAction is the whole program when CRIU starts the shim binary as an action
// script: it waits in dir for the verdict and returns nil for "go".
func RunAction(dir string) error {
	if err := os.Chdir(dir); err != nil {
		return err
	}
	// If CRIU dies, its children must not wait on.
	_ = unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0)
	c, err := net.Dial("unix", holdSocket)
	if err != nil {
		return fmt.Errorf("reach the shim at %s: %w", filepath.Join(dir, holdSocket), err)
	}
	defer c.Close()
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return fmt.Errorf("wait for the shim: %w", err)
	}
	if strings.TrimSpace(line) != verdictGo {
		return fmt.Errorf("the shim answered %q", line)
	}
	return nil
}
