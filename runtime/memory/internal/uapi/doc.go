// SPDX-License-Identifier: Apache-2.0

// Package uapi holds the raw kernel interfaces that the memory packages need and
// golang.org/x/sys does not have: userfaultfd, PAGEMAP_SCAN, and the ptrace
// requests of a seized tracee. Each struct and constant names the kernel header
// that it mirrors. Nothing here decides anything; errors are bare errnos.
package uapi
