// SPDX-License-Identifier: Apache-2.0

// Package shm takes shared memory out of the barrier: anonymous shared mappings
// and memfds. It copies them while the container runs, and in the barrier takes
// only what has changed since.
//
//	s, err := shm.Start(ctx, writers, store) // running: found and copied
//	skip := s.Skip()                         // for CRIU: these objects it finds empty
//	s.Round(ctx)                             // running: what changed is copied again
//	s.Scan(false)                            // frozen, beside CRIU: what need not be looked at
//	err = s.Take(ctx)                        // frozen, beside CRIU: what changed is kept in memory
//	clean, err := s.Compose(ctx, imagesDir)  // running: for pages.Compose
//	s.Close()
//
// The kernel has no record of what was written to shared memory. Page tables tell
// it for one process only, and not for one that has ended, has unmapped the
// memory, or uses write(2). So what changed is found by comparing the content
// with the copy, which stays in the page cache: some 5 GiB a second and processor,
// while CRIU, on another one, is at its own work. Nobody's writes can be missed so:
// neither those of a process that was born and has died since, nor those through a
// descriptor that came with a message.
//
// Large anonymous memory is spared most of that where all of its writers are known:
// see watch. It has no descriptor, and only children inherit it. Their births the
// kernel's process events tell, their writes package track. Anything unusual (a
// process born or ended since the last look, mappings that changed, a hole) and all of
// it is compared.
//
// CRIU dumps every such object as a memfd (criu/proc_parse.c, handle_vma;
// criu/memfd.c): the pages where lseek(SEEK_DATA) finds data, once for each, as
// pagemap-shmem-INO.img. The preload library makes that find nothing in the listed
// ones, and package pages adds ours. If it has no effect CRIU dumps them whole, and
// its pages are used.
//
// An object is never written to, and holes stay holes: it is read by pread(2), and
// only where it has data. The descriptors of a session keep an object, and its
// number, until Close: memory that a container frees while a checkpoint is taken is
// freed after it.
//
// Left to CRIU: System V segments, whose images are named by another kind of
// number; objects with little in them, and those that come after Start; huge
// pages (hugetlb). [Stats] says how many bytes, and why. Files on a container's own
// tmpfs (/dev/shm) are not CRIU's: package tmpfs carries them.
package shm
