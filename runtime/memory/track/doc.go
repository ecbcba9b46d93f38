// SPDX-License-Identifier: Apache-2.0

// Package track finds out which pages a running process has written since one last
// looked, without soft-dirty and without the process's help.
//
//	t, err := track.Attach(ctx, pid)   // one thread stops for a fraction of a millisecond
//	defer t.Close()
//	t.Take(ctx, copyPages)             // first: everything; the process runs
//	t.Refresh(ctx)                     // mappings made since
//	t.Take(ctx, copyPages)             // then: what was written since the last Take
//	... freeze the process ...
//	t.Clean(keep, copyPages)           // of what was copied, this is still as it was; and strays
//
// How: a userfaultfd is made inside the process by an injected system call, taken
// with pidfd_getfd, and closed there. Private mappings are registered with it for
// asynchronous write protection (UFFD_FEATURE_WP_ASYNC, Linux 6.7): a write, of the
// program or of the kernel for it, clears a bit in the page table and goes on; nobody
// has to answer. ioctl(PAGEMAP_SCAN) reads the bits and sets them again in one step.
//
// When in doubt a page is dirty. Take and Clean are about private mappings only, because
// a shared one has writers in other address spaces (WatchShared is for whoever knows them
// all); and what is not tracked is never Clean: a
// mapping made, moved or replaced since the last Refresh, a page that was dropped
// (MADV_DONTNEED, MADV_FREE) and touched anew, a fork's copy. After execve or exit
// every method fails with ErrExec or ErrGone. One class of writes is invisible to page
// tables: a transfer that was begun before a Take and ends after it (O_DIRECT, AIO,
// RDMA). Blind names the processes that can do such a thing.
//
// The other way round the page tables are not to be believed by somebody else: marks of write protection
// may stay where nothing is registered any more, and then tell nothing. Clean reports those pages as strays.
//
// The injection is done by a process of its own, the injector: this program, run
// again, in its own session. Whoever imports the package gets the hook in init. If the
// caller is killed, the injector ends what it was at. A tracer's death detaches its
// tracees, with whatever registers they have then; should the injector itself be
// killed in the 0.2 ms (median) in which the registers are not the thread's own, then
// a signal frame that was laid below its stack brings them back (x86-64, see
// rescue_amd64.go). The program's text is not changed; registers, FPU state, signal
// mask, pending signals, interrupted system calls and stop state are as they were. A
// process must not be frozen by its cgroup during Attach: it could not be finished.
//
// What it costs the process: one page fault of about a microsecond for each page
// written for the first time after a Take; huge pages are split where they are
// written to; mappings that are registered do not merge with new neighbours.
package track
