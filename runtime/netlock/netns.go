// SPDX-License-Identifier: Apache-2.0

package netlock

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// PathOf is the path of the network namespace of a process.
func PathOf(pid int) string { return "/proc/" + strconv.Itoa(pid) + "/ns/net" }

// Inode identifies the network namespace at path; two paths with one inode are
// the same namespace (namespaces(7)).
func Inode(path string) (uint64, error) {
	f, err := openNS(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	id, err := idOf(f)
	return id.ino, err
}

// IsHost tells whether the namespace at path is the host's: that of process 1 or
// of the calling process.
func IsHost(path string) (bool, error) {
	f, err := openNS(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	return isHost(f)
}

// New makes a network namespace and binds it to path, which is created; its
// directory must exist. The loopback link is down, as the kernel gives it. The
// namespace lives until remove is called and its last process has ended.
//
// It fails with errdefs.ErrAlreadyExists when path exists.
func New(path string) (remove func() error, err error) {
	path, err = filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("making a network namespace at %s: %w", path, err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		if errors.Is(err, fs.ErrExist) {
			err = fmt.Errorf("%w (remove it first): %w", errdefs.ErrAlreadyExists, err)
		}
		return nil, fmt.Errorf("making a network namespace at %s: %w", path, err)
	}
	f.Close()
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		// The thread's own entry: /proc/self is that of the main thread.
		src := fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
		if err := unix.Mount(src, path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind mount: %w", err)
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("making a network namespace at %s: %w", path, err), os.Remove(path))
	}
	return func() error { return Remove(path) }, nil
}

// Remove takes away a namespace that New made. One that is gone is no error, so
// that a janitor may call it again.
func Remove(path string) error {
	// EINVAL: not a mount point, the bind mount is gone already.
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("removing the network namespace %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the network namespace %s: %w", path, err)
	}
	return nil
}

// openNS opens a namespace and makes sure that it is one of the network kind, so
// that a wrong path is an error here and not in the middle of something.
func openNS(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: %w", errdefs.ErrNotFound, err)
		}
		return nil, fmt.Errorf("opening network namespace: %w", err)
	}
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		f.Close()
		return nil, fmt.Errorf("%s is not a network namespace: %w", path, errdefs.ErrInvalidArgument)
	}
	return f, nil
}

type nsID struct {
	dev, ino uint64
}

func idOf(f *os.File) (nsID, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nsID{}, &fs.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	return nsID{dev: st.Dev, ino: st.Ino}, nil
}

// ownNS is remembered from the first use: it must not change when a thread of
// this process is in another namespace for a while.
var ownNS = sync.OnceValues(func() (nsID, error) {
	f, err := openNS("/proc/self/ns/net")
	if err != nil {
		return nsID{}, err
	}
	defer f.Close()
	return idOf(f)
})

func isHost(f *os.File) (bool, error) {
	id, err := idOf(f)
	if err != nil {
		return false, err
	}
	own, err := ownNS()
	if err != nil {
		return false, err
	}
	if id == own {
		return true, nil
	}
	first, err := openNS(PathOf(1))
	if err != nil {
		// Without a view of process 1 (hidepid, a container) the caller's own
		// namespace is all that can be known to be in use by others.
		return false, nil
	}
	defer first.Close()
	one, err := idOf(first)
	return id == one, err
}

func refuseHost(f *os.File, doing string) error {
	host, err := isHost(f)
	if err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	if host {
		return fmt.Errorf("%s: %s is the host's network namespace, which other programs need; run the container in a network namespace of its own: %w",
			doing, f.Name(), errdefs.ErrFailedPrecondition)
	}
	return nil
}

// onThread runs fn on a locked thread and brings the thread back to the network
// namespace it had. A thread that cannot be brought back ends with its goroutine.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		old, err := os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		defer old.Close()
		err = fn()
		if unix.Setns(int(old.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// inside runs fn on a thread that is in the namespace f.
func inside(f *os.File, fn func() error) error {
	// The first call must see the process's own namespace.
	if _, err := ownNS(); err != nil {
		return err
	}
	return onThread(func() error {
		if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("entering network namespace %s: %w", f.Name(), err)
		}
		return fn()
	})
}
