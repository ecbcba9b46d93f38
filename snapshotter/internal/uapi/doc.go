// SPDX-License-Identifier: Apache-2.0

// Package uapi holds the Linux system calls of the snapshotter that neither the
// standard library nor golang.org/x/sys/unix offers: btrfs subvolumes and
// resizing, and the loop device control.
//
// Every structure names the kernel header that it mirrors. Functions are thin:
// they do one ioctl, retry on EINTR, and return the bare errno wrapped with the
// name of the call; policy lives in the packages above. All functions may be
// called concurrently.
package uapi
