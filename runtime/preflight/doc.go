// SPDX-License-Identifier: Apache-2.0

// Package preflight finds what would make a checkpoint fail before anything is
// frozen, and says which member and process it is and what to do about it.
//
// Check is given what each member's shim knows of its container and reads the
// rest from /proc and from the kernel's socket listings, once per process, changing
// nothing and stopping nobody. What it refuses is what CRIU refuses: each rule
// names the CRIU source that it comes from, and a rule goes when CRIU learns better.
// A finding of severity Warn does not stand in the way; it says what will be
// different after a restore.
//
// Everything is read while members run, so a clean report is no promise: a process
// may open a device a moment later. It is the difference between an error that
// names a cure and one that names a line of CRIU.
package preflight
