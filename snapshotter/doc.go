// SPDX-License-Identifier: Apache-2.0

// Package snapshotter is cohort's containerd snapshotter: overlay mounts over plain
// directories, with three things that the stock overlay snapshotter has not.
//
//   - The writable layer of a running container can be captured at one instant
//     (packages backend and capture). For that every mount is made with options
//     that leave an upper directory complete in itself: no index, no redirects, no
//     metadata-only copies.
//   - A sealed capture becomes a snapshot without a byte being copied, by the
//     labels LabelAdoptFS and LabelAdoptCheckpoint given to Prepare.
//   - The layer of an image that holds a checkpoint, everything under the
//     directory ReservedDir, is taken apart when it is committed: the directory moves out of the
//     file system to ROOT/snapshots/N/checkpoint, where no container sees it and the shim
//     finds it.
//
// # Layout
//
//	ROOT/metadata.db            containerd's snapshot metastore
//	ROOT/snapshots/N/fs         layer, or upper directory
//	ROOT/snapshots/N/work       overlay's work directory, of active snapshots
//	ROOT/snapshots/N/checkpoint checkpoint of a layer that holds one, 0700
//	ROOT/captures/ID            captures
//	ROOT/cuts                   btrfs: snapshots that live between Take and Seal
//	ROOT.img, ROOT.lock         image and lock of cohortd, beside ROOT
//
// A directory in ROOT/snapshots that the metastore does not know is garbage: begun by a
// process that died, or removed ("rm-N"). It is deleted at start, by Cleanup, and in
// the background after Remove.
//
// # What an image may and may not do
//
// Images are hostile. A directory ReservedDir is accepted as a checkpoint only in a
// layer that an image is being unpacked into, that holds nothing else, and that
// consists of directories and regular files. What a container itself wrote under that
// name never becomes a checkpoint: its snapshot is not an unpack, so the directory is
// deleted when the snapshot is committed; and when its files reach an image as a
// layer by way of a diff, the layer holds other things too. Whether the checkpoint of an image is
// trusted enough to be restored is for the shim to decide.
package snapshotter
