// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/snapshotter/internal/uapi"
)

// Sizes of the image, in bytes.
const (
	// smallest is what a btrfs needs to be of use.
	smallest = 512 << 20
	// largest is where making and growing stops.
	largest = 1 << 40
)

// mkfsTimeout is for a disk that does not answer; making the file system takes 0.1 s.
const mkfsTimeout = 2 * time.Minute

// imagePath is beside root and not in it: root is what the image is mounted over.
func imagePath(root string) string { return root + ".img" }

// hasImage tells whether img is there, and refuses a file that is no btrfs.
func hasImage(img string) (bool, error) {
	f, err := os.Open(img)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	// struct btrfs_super_block, at BTRFS_SUPER_INFO_OFFSET, has its magic at byte 64
	// (include/uapi/linux/btrfs_tree.h).
	const offset, magic = 0x10000 + 64, "_BHRfS_M"
	got := make([]byte, len(magic))
	if _, err := f.ReadAt(got, offset); err != nil || !bytes.Equal(got, []byte(magic)) {
		return false, fmt.Errorf("%s is in the way: it is not a btrfs image, so it was not made by cohortd; move it away: %w", img, errdefs.ErrFailedPrecondition)
	}
	return true, nil
}

// makeImage makes the image file with an empty btrfs, whole or not at all.
func makeImage(ctx context.Context, img string) (err error) {
	mkfs, err := exec.LookPath("mkfs.btrfs")
	if err != nil {
		return fmt.Errorf("mkfs.btrfs is not installed (Debian and Ubuntu: apt install btrfs-progs; Fedora: dnf install btrfs-progs): %w", errdefs.ErrFailedPrecondition)
	}
	free, _, err := Free(filepath.Dir(img))
	if err != nil {
		return err
	}
	size := min(free/2, largest) &^ (1<<20 - 1)
	if size < smallest {
		return fmt.Errorf("only %d MiB are free for %s, a btrfs image takes %d: make room: %w", free>>20, img, 2*smallest>>20, errdefs.ErrResourceExhausted)
	}
	tmp := img + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(tmp)
		}
	}()
	if err := f.Truncate(int64(size)); err != nil { //nolint:gosec // bounded by largest
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, mkfsTimeout)
	defer cancel()
	// One copy of the metadata: the host's disk below has its own redundancy or none, and
	// every transaction, so every capture, writes half as much.
	if out, err := exec.CommandContext(ctx, mkfs, "-q", "-m", "single", "-L", "cohort", tmp).CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.btrfs %s: %w: %s", tmp, err, strings.TrimSpace(string(out)))
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(tmp, img); err != nil {
		return err
	}
	log.G(ctx).Infof("made the btrfs image %s of %d MiB (sparse)", img, size>>20)
	return nil
}

// mountImage mounts img on root, unless it is mounted there already.
func mountImage(ctx context.Context, root, img string) error {
	mounted, err := isMounted(root, img)
	if err != nil {
		return err
	}
	if mounted {
		log.G(ctx).Infof("taking over %s, mounted on %s", img, root)
		return nil
	}
	dev, err := uapi.FindLoop(img)
	if err != nil {
		return err
	}
	if dev == nil {
		dev, err = uapi.AttachLoop(img)
	}
	if err != nil {
		return fmt.Errorf("attach %s to a loop device: %w", img, err)
	}
	defer dev.Close() // the mount holds it from here on
	// Freed space goes back to the host's disk, in the background; kernels before 5.6 can only
	// do so at once, which makes deleting slow, so they do not.
	err = unix.Mount(dev.Name(), root, "btrfs", unix.MS_NOATIME, "discard=async")
	if errors.Is(err, unix.EINVAL) {
		err = unix.Mount(dev.Name(), root, "btrfs", unix.MS_NOATIME, "")
	}
	if errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("the kernel has no btrfs: use --backend=copy: %w", err)
	}
	if err != nil {
		return fmt.Errorf("mount %s (%s) on %s: %w", img, dev.Name(), root, err)
	}
	log.G(ctx).Infof("mounted %s (%s) on %s", img, dev.Name(), root)
	return nil
}

// isMounted tells whether what is mounted on root is img. Another mount there is an
// error: it would be hidden.
func isMounted(root, img string) (bool, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(root))
	if err != nil || len(mounts) == 0 {
		return false, err
	}
	dev, err := uapi.FindLoop(img)
	if err != nil {
		return false, err
	}
	if dev != nil {
		defer dev.Close()
		if dev.Name() == mounts[0].Source {
			return true, nil
		}
	}
	return false, fmt.Errorf("%s is mounted on %s, and %s is there too: unmount it or move the image away: %w", mounts[0].Source, root, img, errdefs.ErrFailedPrecondition)
}

// Unmount unmounts the image from root, if there is one, which also frees the loop
// device. It refuses while a container has a mount on it. The caller holds the root's
// lock.
func Unmount(ctx context.Context, root string) error {
	img := imagePath(root)
	exists, err := hasImage(img)
	if err != nil || !exists {
		return err
	}
	mounted, err := isMounted(root, img)
	if err != nil || !mounted {
		return err
	}
	users, err := mountsOn(root)
	if err != nil {
		return err
	}
	if len(users) > 0 {
		return fmt.Errorf("%d mounts use %s, the first is %s: end the containers first: %w", len(users), root, users[0], errdefs.ErrFailedPrecondition)
	}
	if err := unix.Unmount(root, unix.UMOUNT_NOFOLLOW); err != nil {
		return fmt.Errorf("unmount %s: %w", root, err)
	}
	log.G(ctx).Infof("unmounted %s", root)
	return nil
}

// mountsOn lists the mount points whose content comes from below root: overlays with
// their upper or a lower directory there, and bind mounts.
func mountsOn(root string) ([]string, error) {
	all, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, err
	}
	device := ""
	for _, m := range all {
		if m.Mountpoint == root {
			device = m.Source
		}
	}
	var users []string
	for _, m := range all {
		switch {
		case m.Mountpoint == root:
		case m.FSType == "overlay" && strings.Contains(m.VFSOptions, "="+root+"/"),
			m.FSType == "overlay" && strings.Contains(m.VFSOptions, ":"+root+"/"),
			m.Source == device:
			users = append(users, m.Mountpoint)
		}
	}
	return users, nil
}
