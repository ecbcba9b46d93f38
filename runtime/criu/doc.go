// SPDX-License-Identifier: Apache-2.0

// Package criu drives CRIU for one container: the dump that a member takes
// inside the barrier, and what CRIU needs to know when runc restores it.
//
// A dump is split in two so that nothing slow happens while the container is
// frozen. [Start] forks CRIU, sends the request and returns when CRIU stands at
// its first notification ("pre-dump"), before it has touched any task: kernel
// feature probing and process start (some 20 ms) are paid for by then.
// [Dump.Finish] lets it go, once the container is frozen, and calls back at
// "post-dump", when everything is in the images and every task is still
// stopped: the one moment at which a snapshot of the file system agrees with
// the memory and still holds the links that CRIU makes for unlinked files.
// [Dump.Cancel] ends a dump that has not begun.
//
// The request mirrors what runc's own checkpoint sends (libcontainer's
// criu_linux.go), because runc performs the restore: keys of external mounts
// and namespaces and the file descriptors.json must be those it expects.
//
// The package speaks the "swrk" protocol with go-criu's message types, but
// starts the process itself: in a shim all children are reaped in one place,
// the socket must not leak into containers started at the same moment, and
// CRIU has to die with the shim.
package criu
