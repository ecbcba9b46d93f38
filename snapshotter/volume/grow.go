// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/cohort-project/cohort/snapshotter/internal/uapi"
)

// watchInterval is how often Watch looks. The kernel tells nobody that a file system
// fills up.
const watchInterval = 5 * time.Second

// Watch grows the image when it is nearly full, and warns when the disk under it is,
// until ctx ends. Without an image it does nothing.
func (v *Volume) Watch(ctx context.Context) {
	if v.image == "" {
		return
	}
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	said := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		grown, err := v.Grow()
		switch {
		case grown > 0:
			log.G(ctx).Infof("grew %s to %d MiB", v.image, grown>>20)
			said = ""
		case err != nil && err.Error() != said: // not again and again
			log.G(ctx).WithError(err).Warn("storage")
			said = err.Error()
		case err == nil:
			said = ""
		}
	}
}

// Grow makes the image half as large again if less than a tenth of it, or less
// than 1 GiB, is free and the disk has the room. It returns the new size in bytes, 0
// if nothing was to be done.
func (v *Volume) Grow() (uint64, error) {
	free, size, err := Free(v.Root)
	if err != nil {
		return 0, err
	}
	room, _, err := Free(filepath.Dir(v.image))
	if err != nil {
		return 0, err
	}
	if free >= size/10 && free >= min(1<<30, size/4) {
		// The image promises more than it has: its free space is the disk's.
		if room < smallest {
			return 0, fmt.Errorf("only %d MiB are free on the disk of %s: when it is full, containers' writes fail: %w", room>>20, v.image, errdefs.ErrResourceExhausted)
		}
		return 0, nil
	}
	step := min(size/2, room/2) &^ (1<<20 - 1)
	if size+step > largest || step < 64<<20 {
		return 0, fmt.Errorf("%s has %d MiB free and cannot grow: %d MiB are free on its disk: %w", v.image, free>>20, room>>20, errdefs.ErrResourceExhausted)
	}
	return size + step, v.resize(size + step)
}

// resize makes the image, the loop device and the file system size bytes large, in
// this order, so that each step can be repeated after a crash.
func (v *Volume) resize(size uint64) error {
	fi, err := os.Stat(v.image)
	if err != nil {
		return err
	}
	if uint64(fi.Size()) < size { //nolint:gosec // not negative
		if err := os.Truncate(v.image, int64(size)); err != nil { //nolint:gosec // bounded by largest
			return err
		}
	}
	dev, err := uapi.FindLoop(v.image)
	if err != nil {
		return err
	}
	if dev == nil {
		return fmt.Errorf("%s is not attached to a loop device: %w", v.image, errdefs.ErrNotFound)
	}
	defer dev.Close()
	if err := uapi.RefreshLoopSize(dev); err != nil {
		return err
	}
	return uapi.ResizeBtrfsToDevice(v.Root)
}
