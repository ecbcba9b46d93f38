// SPDX-License-Identifier: Apache-2.0

// Package group takes a group of containers through the barrier: it is the
// protocol by which several containers are checkpointed at one consistent cut.
//
// It is pure. It reads no clock but Go's, opens no file and makes no Linux
// call, so that its tests can run it in virtual time with every failure in
// every order. What is done to a container is behind [Member] on the
// coordinator's side and behind the acts given to [Participant] on the
// member's side.
//
// # The words
//
// A member is one container. An epoch is one pass of a group through the
// barrier, named by an unguessable id that is never used again. The barrier
// stands while every member is frozen and no packet moves between them. A
// capture is what a member saves; it is sealed once it is durable.
//
// # One epoch, from the coordinator
//
// [Run] is the whole of it. For a group that runs on:
//
//	Prepare    the costly start of everything, while the members run
//	Freeze     all at once; returns when the last task of the last member stands
//	Lock       communication rules up: from here the barrier stands
//	Capture    memory, sockets and storage of all members, in parallel
//	Unlock     rules down, while nobody runs who could lose a packet to them
//	Resume     the members run again; from the first call on there is no abort
//	Seal       captures made durable
//	export     images, by the caller's function
//	Finish     the members forget the epoch and keep the capture
//
// For a group that ends in the barrier (Epoch.Stop) nothing may be killed
// before everything that survives it is on disk:
//
//	Prepare Freeze Lock Capture Seal Renew | Resume(stop) Unlock export Finish
//
// The bar is the commit point. Before it an error, a deadline or a cancelled
// context aborts the epoch for every member, which leaves them running as if
// nothing had been. Behind it the coordinator goes forward only.
//
// # One epoch, from a member
//
// [Ledger] knows what has been begun and what has been completed; it is written
// to disk before each act, so that whoever finds it knows what is owed: which
// [Step]s undo the epoch, in order. [Participant] drives a Ledger: one act at a
// time, repeats answered from the record, the lease watched, the undo carried
// out until it has succeeded. A shim uses Participant; the simulation in this
// package's tests uses the same one.
//
// A member never waits for a coordinator longer than its lease. When the lease
// ends it undoes what is owed and runs on. An unsealed capture is discarded
// then; a sealed one never goes by a timer.
//
// docs/barrier.md describes the protocol without the code, with the tables of
// who dies when, and what a member owes in each state.
package group
