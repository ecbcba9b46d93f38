// SPDX-License-Identifier: Apache-2.0

package freezer

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// killTree ends the tasks of dir where the kernel has no single call for it. It
// signals first and thaws after, so that a frozen task meets the signal
// before its next instruction. Tasks that were cloned between the listing and the
// signal are met by the next round.
func killTree(ctx context.Context, dir string, thaw func() error) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		pids, err := tasks(dir)
		if err != nil {
			return err
		}
		if len(pids) == 0 {
			return thaw()
		}
		waits := make([]unix.PollFd, 0, len(pids))
		for _, pid := range pids {
			fd, err := unix.PidfdOpen(pid, 0)
			if err != nil {
				if errors.Is(err, unix.ESRCH) {
					continue
				}
				closeAll(waits)
				return fmt.Errorf("opening process %d: %w", pid, err)
			}
			waits = append(waits, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
			if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
				closeAll(waits)
				return fmt.Errorf("killing process %d: %w", pid, err)
			}
		}
		err = thaw()
		if err == nil {
			err = awaitExit(ctx, waits)
		}
		closeAll(waits)
		if err != nil {
			return err
		}
	}
}

// awaitExit returns when every pidfd says that its process has ended.
func awaitExit(ctx context.Context, waits []unix.PollFd) error {
	wake, err := newWaker(ctx)
	if err != nil {
		return err
	}
	defer wake.close()
	for _, w := range waits {
		for {
			fds := []unix.PollFd{w, wake.poll()}
			if _, err := unix.Poll(fds, -1); err != nil {
				if errors.Is(err, unix.EINTR) {
					continue
				}
				return err
			}
			if fds[0].Revents != 0 {
				break
			}
			if err := ctx.Err(); err != nil {
				return err
			}
		}
	}
	return nil
}

func closeAll(fds []unix.PollFd) {
	for _, f := range fds {
		unix.Close(int(f.Fd))
	}
}
