// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/process"

	"github.com/cohort-project/cohort/runtime/journal"
	"github.com/cohort-project/cohort/runtime/netlock"
)

// netnsName names a network namespace within the checkpoints of one epoch:
// members with the same name shared it.
func netnsName(inode uint64) string { return fmt.Sprintf("net-%d", inode) }

// captureNetwork describes the container's network namespace. Where a veth pair
// leads neither to the host nor back, its other end is looked for in the
// namespaces of the containers that may be members with it: a restore of the
// group joins them again.
func (a *acts) captureNetwork(netns string) (*netlock.Namespace, error) {
	n, err := netlock.Capture(netns)
	if err != nil {
		return nil, err
	}
	lost := func(l netlock.Link) bool { return l.Peer != nil && l.Peer.Where == "" }
	if !slices.ContainsFunc(n.Links, lost) {
		return n, nil
	}
	others := a.neighbours()
	if len(others) == 0 {
		return n, nil
	}
	// One that has ended since takes its namespace with it; what was found
	// without it still holds.
	if wider, err := netlock.Capture(netns, others...); err == nil {
		n = wider
	}
	return n, nil
}

// neighbours are the other network namespaces of cohort's containers in the
// same containerd namespace. Which of them are members of the epoch only its
// coordinator knows: groups need no annotation.
func (a *acts) neighbours() []netlock.Other {
	members, err := journal.Members(journal.Dir())
	if err != nil {
		return nil
	}
	seen := map[uint64]bool{a.netnsID: true}
	var others []netlock.Other
	for _, m := range members {
		if m.Namespace != a.c.ns || !m.Shim.Alive() {
			continue
		}
		b, err := os.ReadFile(filepath.Join(m.Bundle, process.InitPidFile))
		if err != nil {
			continue // not started yet
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil {
			continue
		}
		inode, host := netnsOf(pid)
		if inode == 0 || host || seen[inode] {
			continue
		}
		seen[inode] = true
		others = append(others, netlock.Other{Name: netnsName(inode), Path: netlock.PathOf(pid)})
	}
	return others
}
