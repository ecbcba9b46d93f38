// SPDX-License-Identifier: Apache-2.0

// Package annotation names the annotations of a container by which a client instructs
// the shim, beside those of group and member (oci.AnnotationGroup, oci.AnnotationMember).
package annotation

// The annotations.
const (
	// Restore set to "false" starts a container afresh although its
	// image holds a checkpoint.
	Restore = "io.cohort.restore"
	// Hold set to "true" keeps a restored container at CRIU's
	// "post-restore" until a coordinator releases it.
	Hold = "io.cohort.restore.hold"
	// Outside says what becomes of restored TCP connections whose
	// other end is outside of the group: "close" (default) or "keep".
	Outside = "io.cohort.restore.tcp-outside"
	// Inside lists, separated by commas, the network namespaces (paths) of a
	// group that has several.
	Inside = "io.cohort.restore.inside"
	// Netns is a network namespace (a path) that cohort made for the
	// container; it is removed with the last container that names it.
	Netns = "io.cohort.restore.netns"
)
