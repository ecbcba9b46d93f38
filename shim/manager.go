// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"context"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	containerdshim "github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/log"

	"github.com/cohort-project/cohort/runtime/journal"
	"github.com/cohort-project/cohort/runtime/tmpfs"
	"github.com/cohort-project/cohort/runtime/undo"
)

// manager is the stock shim manager, which also cleans up after a shim that
// died: containerd calls Stop for each of its containers.
type manager struct {
	containerdshim.Shim
}

// NewManager wraps containerd's own manager of the runc shim.
func NewManager(stock containerdshim.Shim) containerdshim.Shim {
	return manager{stock}
}

// Stop undoes an epoch that the dead shim had open, then lets the stock manager
// delete the container, then removes what belonged to it. The undo comes first:
// a frozen task does not die of SIGKILL before it is thawed.
func (m manager) Stop(ctx context.Context, id string) (containerdshim.StopStatus, error) {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return containerdshim.StopStatus{}, err
	}
	dir := journal.Dir()
	if e, err := journal.ReadEpoch(dir, ns, id); err == nil {
		if err := undo.Epoch(ctx, dir, e); err != nil {
			log.G(ctx).WithError(err).WithField("id", id).Error("undo the open epoch of a dead shim")
		}
	}
	status, err := m.Shim.Stop(ctx, id)
	if cwd, werr := os.Getwd(); werr == nil {
		// The bundle is the sibling of the working directory's, as for the stock manager.
		mounts, _ := filepath.Glob(filepath.Join(filepath.Dir(cwd), id, privateDir, tmpfsDir, "*"))
		for _, t := range mounts {
			_ = tmpfs.Unmount(t)
		}
	}
	if rec, rerr := journal.ReadMember(dir, ns, id); rerr == nil {
		removeNetns(rec.Netns, ns, id)
		_ = journal.RemoveMember(dir, ns, id)
	}
	return status, err
}
