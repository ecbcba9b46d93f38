// SPDX-License-Identifier: Apache-2.0

// Package volume readies the file system under a snapshotter's root: it finds out what
// the disk can do, chooses the backend, and where the disk offers neither btrfs nor shared
// extents, makes a btrfs of its own in an image file.
//
// # The image
//
// The image is the sparse file ROOT.img, mode 0600, beside ROOT; it is attached to
// a loop device and mounted over ROOT. So ROOT/snapshots, ROOT/captures and the
// sockets have the same paths with every backend. It is made as ROOT.img.new and renamed when
// it is complete, so a ROOT.img that is no btrfs is never one of ours half made, and is left alone.
//
// The mount outlives the process: containers run on it. The next start takes it over. The loop
// device detaches itself when the mount and every container's mount on it are gone. While it
// is attached the image is never attached a second time, because two file systems
// on one image would destroy it: even after ROOT was unmounted, containers may hold
// the first.
//
// The image is made as large as half of the free space, and grows in use, as long as the disk
// has room. It takes from the disk only what is written, and gives back what is deleted
// (discard). Since it is sparse, a disk that others fill up makes its writes fail:
// Watch warns before that.
package volume
