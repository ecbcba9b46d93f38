// SPDX-License-Identifier: Apache-2.0

package track

import "errors"

// Sentinels; every error of the package that has one of these as its reason wraps it.
var (
	// ErrGone: the process ended, or its pid now belongs to another one.
	ErrGone = errors.New("the process is gone")
	// ErrExec: the process called execve since Attach: what the tracker knew is
	// about an address space that no longer exists. Attach again.
	ErrExec = errors.New("the process executed another program")
	// ErrTraced: something else (a debugger, CRIU) traces the process already.
	ErrTraced = errors.New("the process is already being traced")
	// ErrUnsupported: this kernel, or this kind of process, cannot be tracked.
	ErrUnsupported = errors.New("memory tracking is not supported")
	// ErrClosed: the tracker was closed.
	ErrClosed = errors.New("the tracker is closed")
)
