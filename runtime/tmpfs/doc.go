// SPDX-License-Identifier: Apache-2.0

// Package tmpfs carries the content of a container's tmpfs mounts beside CRIU.
//
// Left to itself CRIU runs "tar --gzip" once for each tmpfs while the container
// is frozen, and a container has half a dozen of them, nearly all empty (/dev,
// /dev/shm, /run, the covers of masked directories): 5 ms each. Declared external,
// a mount's content is none of CRIU's business: [Archive] writes it in this
// process, in a fraction of a millisecond where there is next to nothing, and
// [Mount] makes it again before a restore, for CRIU to bind to its place.
//
// Large files are copied while the container runs ([Precopy]), and in the barrier
// only compared with their copy: writes through a mapping leave no trace on a tmpfs
// that could be asked for. What the archive takes from the copy is put into it when
// the container runs again.
//
// Only plain mounts are taken (see [List]); others stay CRIU's.
package tmpfs
