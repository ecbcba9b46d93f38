// SPDX-License-Identifier: Apache-2.0

// Package netlock keeps a network namespace silent during the barrier, and
// carries what a namespace consists of from a checkpoint to a restore.
//
// # Silence
//
// Prepare puts one nftables table, named "cohort-" and a name of the caller's,
// into a network namespace. While the rules are open it passes everything; Close
// makes it drop every IPv4 and IPv6 packet that arrives at or leaves a local
// socket, Open lets them through again, Remove takes the table away. Packets are
// dropped, never rejected: TCP sends them again later and no peer sees a reset.
// Close and Open are one transaction that adds or deletes one element of an empty
// set, the cheapest switch that nftables has: no chain is rebuilt and no grace
// period is waited for. Tables of different names in one namespace are independent,
// and the namespace is silent while any of them is closed.
//
// A packet that another CPU is handling at the very moment of Close may still be
// delivered; members are frozen first and dumped later, so it is part of the cut.
// A running process that sends a datagram into closed rules gets EPERM from
// sendto(2), one more reason to close only when its members are frozen.
//
// # Rebuilding
//
// Capture describes a namespace as plain data: links, addresses, routes, rules,
// permanent neighbours and the sysctls that differ from those of a new
// namespace. Rebuild makes the same in a fresh one, with the interface indexes
// kept where they are free, because sockets remember them.
//
// # Connections
//
// Connections and UnixSockets ask the kernel (sock_diag(7)) which sockets a
// namespace holds; CloseOutside destroys the connections whose peer is not part
// of what was restored.
//
// A network namespace is named by a path: a bind mount, /proc/PID/ns/net, or
// /proc/self/fd/N for an open descriptor. Functions that must enter one do so on
// an operating system thread of their own and bring the thread back, or end it. No
// external program is run.
//
// Nothing of this package changes the network namespace of the host: the rules and
// CloseOutside refuse it.
package netlock
