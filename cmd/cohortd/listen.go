// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// dialTimeout is for finding out whether somebody answers on a socket.
const dialTimeout = 2 * time.Second

// listen listens on a unix socket that only root can use. A socket that is left from
// a process that died is replaced; one that somebody answers on, or a file that is no
// socket, is not.
func listen(ctx context.Context, path string) (net.Listener, error) {
	if len(path) >= len(unix.RawSockaddrUnix{}.Path) {
		return nil, fmt.Errorf("the path %s is %d bytes long, a socket's can have %d: choose a shorter --root or --address",
			path, len(path), len(unix.RawSockaddrUnix{}.Path)-1)
	}
	if err := removeStale(ctx, path); err != nil {
		return nil, err
	}
	// From the first moment on, not by a chmod after it. Nothing else makes files yet.
	old := unix.Umask(0o177)
	defer unix.Umask(old)
	return (&net.ListenConfig{}).Listen(ctx, "unix", path)
}

func removeStale(ctx context.Context, path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("%s is in the way: it is not a socket", path)
	}
	conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "unix", path)
	if err == nil {
		conn.Close()
		return fmt.Errorf("another process listens on %s: end it, or choose another --address", path)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("find out whether %s is stale: %w", path, err)
	}
	return os.Remove(path)
}
