// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"

	"github.com/cohort-project/cohort/runtime/netlock"
)

// connections notes what is connected in the container's network namespace. The
// function that it returns is to be called once the container is dead: it
// destroys what nobody holds any more, and lets the namespace go.
func (a *acts) connections() (orphans func() error, err error) {
	if a.rules == nil {
		return nil, nil
	}
	// The path may be that of a process of the container.
	ns, err := os.Open(a.rec.Netns)
	if err != nil {
		return nil, err
	}
	path := fmt.Sprintf("/proc/self/fd/%d", ns.Fd())
	held, err := netlock.Connections(path)
	if err != nil {
		return nil, errors.Join(err, ns.Close())
	}
	return func() error {
		_, err := netlock.CloseOrphans(path, held)
		return errors.Join(err, ns.Close())
	}, nil
}

// cutOff takes the links down in a network namespace that goes with the container:
// as long as it is there without the connections, the kernel would answer a
// peer's next segment with a reset. One that others use, or that somebody keeps
// by a mount, stays as it is.
func (a *acts) cutOff() error {
	own, err := a.ownsNetns()
	if err != nil || !own {
		return err
	}
	return a.rules.CutOff()
}

// ownsNetns tells whether the network namespace of the dead container ends with
// it: no process is in it, and no mount keeps it but one that cohort made for the
// container.
func (a *acts) ownsNetns() (bool, error) {
	name := fmt.Sprintf("net:[%d]", a.netnsID)
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		ours := a.c.restore != nil && a.c.restore.netns == m.Mountpoint
		return m.FSType != "nsfs" || m.Root != name || ours, false
	})
	if err != nil || len(mounts) > 0 {
		return false, err
	}
	links, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		return false, err
	}
	for _, link := range links {
		// Of a process that has ended it cannot be read.
		if at, err := os.Readlink(link); err == nil && strings.TrimSpace(at) == name {
			return false, nil
		}
	}
	return true, nil
}
