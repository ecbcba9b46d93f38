// SPDX-License-Identifier: Apache-2.0

// Package ops is what the command line and cohortd do: it finds the members of
// a group in containerd, takes them through the barrier (runtime/group), turns
// the sealed captures into images (oci), and brings a group back from them.
//
// It talks to containerd through its client, to each member through the Member
// service of its shim, and to nobody else. All functions may be called
// concurrently for different groups; one group is checkpointed by one caller
// at a time, which the shims enforce.
package ops
