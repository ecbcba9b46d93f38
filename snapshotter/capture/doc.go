// SPDX-License-Identifier: Apache-2.0

// Package capture keeps the captures of live snapshots: ROOT/captures/ID with
//
//	capture.json   what is known about it (record)
//	fs/            the captured upper directory, in overlay format, once sealed
//	checkpoint/    0700, filled by the caller: CRIU images and metadata
//
// # Life of a capture
//
// Open makes it, Take fixes its content while the writers are frozen, Seal completes it
// and makes it durable. Until then it is held by a lease: when the lease ends,
// and when cohortd starts, an unsealed capture is discarded. A sealed one
// stays until it is discarded or both of its parts are adopted.
//
// What is about to be done is on disk before it is done, with one exception: Take writes
// nothing, because everything else stands still meanwhile. Nothing depends on it,
// since a capture that is open and one that is taken are both discarded at start.
//
// # Increments
//
// Seal may be given the layers of earlier captures of the same container, as snapshots.
// fs is then left with what changed since (package overlay). On btrfs what did
// not change is never cloned, elsewhere it is removed again. Nothing is recorded before that
// is done: a crash in the middle leaves an unsealed capture, and an error in the middle one
// that can only be discarded.
//
// # Adoption
//
// A new snapshot may take over fs or checkpoint of a sealed capture, by
// rename and each once (Adopt). The record names the snapshot before the rename;
// Recover, at start, finishes or undoes what was under way by looking whether the
// snapshot made it into the metastore.
//
// # Ids
//
// An id is 32 hexadecimal digits chosen by the caller from a random source. It is a
// capability: the label that adopts a capture may also come from the annotations of a
// foreign image, which must not be able to name one. Ids must not be published.
package capture
