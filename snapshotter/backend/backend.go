// SPDX-License-Identifier: Apache-2.0

package backend

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Names of the backends, as in the --backend flag.
const (
	Btrfs   = "btrfs"
	Reflink = "reflink"
	Copy    = "copy"
)

// Backend captures directory trees below one root. Its methods may be called
// concurrently, for different dst.
type Backend interface {
	// Name is one of Btrfs, Reflink and Copy.
	Name() string

	// Open begins to capture the directory src as dst, which does not exist yet and
	// whose parent directory does. Writers of src run, and may do anything: replace a
	// directory by a symbolic link, rename, delete. Open may take as long as it
	// likes; whatever it does makes Take shorter.
	//
	// When Open fails, the caller calls Discard.
	Open(ctx context.Context, src, dst string) (Capture, error)

	// Discard removes what a capture into dst left, in any state and from any process
	// before. A capture of this process is closed first. No error if there is nothing.
	Discard(dst string) error
}

// Capture is one capture under way. Its methods are called one at a time.
type Capture interface {
	// Ready tells that Take will be called soon and makes it shorter: the capture is
	// brought up to date with what src is now. Writers run. It may be called any number of times
	// or not at all, and its context may end it anywhere; Take is none the worse.
	Ready(ctx context.Context) error

	// Take fixes the content: every byte written to src before the call is in the
	// capture, dirty pages included, and none that is written after it returned.
	// Called again, it fixes the content of that moment instead. What a Take that fails
	// has left is made good by the next.
	Take(ctx context.Context) error

	// Seal completes dst after Take. It does not flush dst to the disk.
	Seal(ctx context.Context) error

	// Close ends what runs in the background on behalf of the capture and gives up what
	// only Seal needs, in any state. It does not remove dst and may be called again.
	Close() error
}

// Reducer is a Capture that need not copy what its caller does not want.
type Reducer interface {
	Capture

	// SealReduced is Seal, except that it calls choose with the captured tree, which may only
	// be read and is gone afterwards, and leaves out of dst the paths that choose returns, a
	// directory with everything in it. After an error it may be called again, or Seal; after
	// errdefs.ErrNotImplemented, choose has not been called.
	SealReduced(ctx context.Context, choose func(src string) (without map[string]struct{}, err error)) error
}

// Syncfs writes back everything dirty on the file system that holds dir.
func Syncfs(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("flush the file system of %s: %w", dir, err)
	}
	return nil
}
