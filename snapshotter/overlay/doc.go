// SPDX-License-Identifier: Apache-2.0

// Package overlay reads and changes directory trees in the format of an overlayfs
// upper directory, without a mount.
//
// A Union is a list of such trees read as one, the newest first: what overlayfs would
// show of them, plus what it would hide of the layers below, which a Union does not
// know. Compare finds out what a captured writable layer changed since a union of earlier
// ones, and Delta.Apply removes everything else from it. What is left is again a
// layer: mounted on top of the union, on top of the container's image, it shows what the
// captured one showed on top of the image alone.
//
// # The format
//
// Documentation/filesystems/overlayfs.rst of the kernel: a character device 0:0 is a
// whiteout; a directory with the attribute trusted.overlay.opaque "y" hides the ones below
// it; one with "x" may hold whiteouts that are empty files with the attribute
// trusted.overlay.whiteout. What lies in another place than it shows (the attributes
// redirect and metacopy) is refused: the snapshotter mounts with both off. The
// attributes origin, upper, nlink, impure and uuid are notes of a mount to itself.
//
// # Why files, and not a btrfs send stream
//
// A send stream between two subvolume snapshots would name changed extents, but exists on
// btrfs only, needs the parent as a subvolume wherever it is received, and is no OCI
// layer: no registry, no containerd and no other snapshotter can use it. Whole files
// work on every backend, become an ordinary layer of an ordinary image, and cost the
// disk nothing where they are clones. The price is that a large file of which
// one block changed is in the increment's image as a whole.
//
// # What is relied upon
//
// Nothing changes the trees while they are read, except for Apply. Their content is a
// container's, and hostile: every name is opened by itself below a directory
// descriptor and never through a link, and only regular files and directories are
// opened at all.
package overlay
