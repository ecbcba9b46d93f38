// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/containerd/log"

	memberAPI "github.com/cohort-project/cohort/api/member/v1"
	"github.com/cohort-project/cohort/oci"
	"github.com/cohort-project/cohort/runtime/memory/engine"
	"github.com/cohort-project/cohort/runtime/tmpfs"
)

// copyTmpfs copies the large files of the tmpfs mounts while the container runs.
func (a *acts) copyTmpfs(ctx context.Context, pid int, choice engine.Choice) error {
	a.copies = make([]*tmpfs.Copy, len(a.tmpfs))
	if choice.Engine == engine.Full {
		return nil
	}
	for i, f := range a.tmpfs {
		var err error
		if a.copies[i], err = tmpfs.Precopy(ctx, pid, f, filepath.Join(a.dir, fmt.Sprintf("tmpfs-%d", i))); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			// It is read in the barrier then.
			log.G(ctx).WithError(err).WithField("id", a.c.id).Warn("a tmpfs was not copied before the barrier")
		}
	}
	return nil
}

// takeTmpfs keeps what has changed of them since, beside CRIU.
func (a *acts) takeTmpfs(ctx context.Context) error {
	for _, c := range a.copies {
		if err := c.Take(ctx); err != nil {
			return err
		}
	}
	return nil
}

// accountTmpfs adds what was taken of the tmpfs mounts to the shared memory, which
// it is as soon as somebody maps it.
func (a *acts) accountTmpfs(m *memberAPI.Memory) {
	all := slices.Concat(a.tmpfs, a.inside) // the order of the contents
	for i, c := range a.contents {
		barrier, before := c.Bytes()
		m.SharedPrecopiedBytes += before
		m.SharedBarrierBytes += barrier
		if barrier > 0 {
			m.SharedWhy = append(m.SharedWhy, fmt.Sprintf("%d KiB of the tmpfs at %s: small files, and what had changed", (barrier+1023)>>10, all[i].Destination))
		}
	}
}

func (a *acts) closeCopies() error {
	var errs []error
	for _, c := range a.copies {
		errs = append(errs, c.Close())
	}
	a.copies = nil
	return errors.Join(errs...)
}

func (a *acts) archiveTmpfs() error {
	<-a.taken
	a.contents = nil
	for _, list := range []struct {
		fs     []tmpfs.FS
		copies []*tmpfs.Copy
		dir    string
	}{{a.tmpfs, a.copies, oci.TmpfsDir}, {a.inside, make([]*tmpfs.Copy, len(a.inside)), oci.ImagesDir}} {
		for i, f := range list.fs {
			c, err := tmpfs.Archive(a.runc.InitPid, f, filepath.Join(a.checkpointDir(), list.dir), list.copies[i])
			if err != nil {
				return err
			}
			a.contents = append(a.contents, c)
		}
	}
	return nil
}
