// SPDX-License-Identifier: Apache-2.0

// Package oci is the checkpoint image: it builds, reads and verifies images,
// and reconciles the spec of a new container with the checkpoint it resumes.
//
// A member image is a runnable OCI image: the layers of the image that the
// container ran on, one layer with its writable layer, and one layer whose only
// content is the reserved directory .cohort (see docs/image-format.md). A group
// image is an OCI index of its members. Both are accepted by any registry. The image
// of an increment is its parent's with two layers more (chain.go).
//
// The life of a checkpoint, as this package sees it:
//
//	WriteCheckpointDir   facts and spec beside the CRIU images (local, sealed)
//	BuildMember          two layers, config and manifest in the content store
//	MergeMember          the same out of a chain of increments
//	BuildGroup           the index over all members
//	names.Publish        the names REF and REF-MEMBER
//	ReadGroup            from an index or a member, here or on another host
//	VerifyCheckpointDir  what was unpacked, before anything else looks at it
//	ReadCheckpointDir    the facts again
//	Reconcile            the client's spec and the checkpoint's make one
//
// Promises: nothing is buffered whole in memory and no temporary file is made,
// so the size of a checkpoint is bounded by the content store alone. A build that
// fails leaves no ingest behind. Everything read from an image is hostile
// input: sizes are bounded before they are allocated, names are compared with
// what a checkpoint can hold, and no link is followed.
//
// What it never does: mount, talk to a daemon of cohort, or change a container.
// Functions are safe for concurrent use on different inputs. Content that is
// written is protected from garbage collection only by the lease in the context
// until names.Publish has named it; callers hold one.
package oci
