// SPDX-License-Identifier: Apache-2.0

package ops

import "github.com/cohort-project/cohort/runtime/preflight"

// preflightFacts hands what a shim told of its container to preflight.
func preflightFacts(c *Container) preflight.Member {
	in := c.inspect
	m := preflight.Member{
		ID: c.Member, Status: in.Status, InitPid: int(in.InitPid), NetnsInode: in.Netns, HostNetwork: in.HostNetwork,
		MemoryBytes: in.MemoryBytes, CriuVersion: int(in.CriuVersion), CriuError: in.CriuError, StorageAddress: in.StorageAddress,
	}
	if in.MemoryEngine == "" {
		m.MemoryError = in.MemoryEngineWhy
	}
	for _, p := range in.Processes {
		m.Pids = append(m.Pids, int(p.Pid))
	}
	for _, p := range in.Foreign {
		m.Foreign = append(m.Foreign, int(p.Pid))
	}
	return m
}
