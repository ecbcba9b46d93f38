// SPDX-License-Identifier: Apache-2.0

// Package backend captures a directory tree of a live container at one instant.
//
// A capture is three calls, in the order of the barrier's phases:
//
//	c, err := b.Open(ctx, src, dst) // writers run: flush, first pass
//	err = c.Take(ctx)               // writers are frozen: the instant
//	err = c.Seal(ctx)               // writers run again: dst is completed
//
// and Discard, which undoes any of them, also in a later process. src is the upper
// directory of an overlay, dst a name in a private directory on the same file
// system. After Seal dst is a plain directory tree in overlay format (character
// devices 0/0 and trusted.overlay attributes as they were), which no later write to
// src changes, and which can be renamed into place as a snapshot.
//
// # The three backends
//
//   - btrfs: as reflink where there are few files. Where there are many, Take is one
//     ioctl, a subvolume snapshot of the whole root, whose cost does not depend on their
//     number; Seal clones src out of that snapshot and deletes it.
//   - reflink: Open clones the tree, Take clones again what changed since, but for ranges
//     with dirty pages, which it copies within the page cache.
//   - copy: the same with copied bytes, for file systems that can do neither.
//
// All of them need the writers to be stopped during Take. Without it what is taken file
// by file is not of one instant at all, and a snapshot only for what the writers had synced: the
// kernel writes dirty pages back file after file before it takes the snapshot.
//
// # Why btrfs does not use a subvolume for each snapshot
//
// Inode numbers are unique within a subvolume only, and every subvolume begins
// at 256. Overlayfs takes layers of one superblock to have unique inode numbers
// and passes them on with its own st_dev (fs/overlayfs/inode.c, ovl_map_dev_ino:
// "When all layers are on the same fs, all real inode number are unique"). With
// layers in subvolumes of their own, two different files of one container get the
// same st_dev and st_ino. The dynamic linker then takes one library for another
// (it compares exactly these), and CRIU takes one mapped file for its neighbour
// (criu/proc_parse.c, vfi_equal). So all layers live in one subvolume, and snapshots
// of it exist only between Take and Seal.
package backend
