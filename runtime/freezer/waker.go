// SPDX-License-Identifier: Apache-2.0

package freezer

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// waker makes the end of a context visible to poll(2), as an eventfd that
// becomes readable.
type waker struct {
	stop func() bool

	mu sync.Mutex
	fd int
}

func newWaker(ctx context.Context) (*waker, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("making an eventfd: %w", err)
	}
	w := &waker{fd: fd}
	w.stop = context.AfterFunc(ctx, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.fd >= 0 {
			// Only a counter overflow can fail here, and then it is readable.
			_, _ = unix.Write(w.fd, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		}
	})
	return w, nil
}

func (w *waker) poll() unix.PollFd {
	return unix.PollFd{Fd: int32(w.fd), Events: unix.POLLIN}
}

func (w *waker) close() {
	w.stop()
	w.mu.Lock()
	defer w.mu.Unlock()
	unix.Close(w.fd)
	w.fd = -1
}
