// SPDX-License-Identifier: Apache-2.0

// Package programs is what a test needs to talk to the test programs below
// cmd/, which run inside containers: their exit codes, the reports they write,
// and a way to ask for one without a network.
//
// Each program is one static binary that needs nothing from its image. Asked
// by SIGUSR1 it writes a JSON report to the file that --report names, inside
// its own root file system, and goes on. Each checks itself all the time, and
// ends with a code of its own the moment something is wrong:
//
//	ticker     one process of a given size that dirties its memory; measures
//	           the longest time it was stopped, verifies every byte it holds
//	memload    one process that dirties a given part of its memory each second
//	echo       two ends of a TCP stream that verify every byte's position
//	unixpair   two ends of a unix socket
//	uring      a process that holds an io_uring
//	forker     a tree of processes and threads with pipes between them
//	fileagree  a file whose size must agree with what the process remembers
//	oom        takes memory until it is killed
package programs
