// SPDX-License-Identifier: Apache-2.0

// Package shop is the proof that a group of containers came back as it was: a
// small shop whose three members only agree with each other if all of them
// were cut at one instant, and the checker that says whether they do.
//
// The members are PostgreSQL, Redis and shopd, a web application with a fixed
// pool of connections to each. An order is one PostgreSQL transaction that
// stores an unguessable token under the next sequence number, then one INCR in
// Redis, then the answer. A load client outside the group (package load,
// command shopload) places orders and writes down what it was promised.
//
// Check holds a checkpoint and its restore against four invariants:
//
//	I1  every token acknowledged before the cut is in PostgreSQL, and
//	    PostgreSQL holds a prefix of what was ordered: nothing ordered after
//	    a missing order was answered is there;
//	I2  Redis's counter equals PostgreSQL's count, within the orders in flight;
//	I3  the connections between members live on with no error: the same
//	    process, the same connections on both of their ends, no new dial;
//	I4  sequence numbers never go back.
//
// The invariants need no knowledge of how a checkpoint works, so they hold
// for a barrier that works and fail for one that does not. Package harness
// starts a shop in containers; nothing here does.
package shop
