// SPDX-License-Identifier: Apache-2.0

// Package precopy takes a container's memory out of the barrier: it copies the
// pages of its processes while they run, and leaves for the barrier only those
// that were written since.
//
//	s, err := precopy.Start(ctx, dir, processes, options)  // running: tracked, copied round after round
//	err = s.CatchUp(ctx)                                  // what was written since, into memory
//	s.KeepWarm()                                          // until the freeze: what is written is copied on
//	s.Cool()                                              // before the freeze
//	err = s.Scan(ctx)                                     // frozen: what is left is copied; which pages are good
//	err = s.Complete(ctx)                                 // frozen, beside CRIU: what could not be read before
//	stats, err := s.Compose(ctx, imagesDir)               // running: CRIU's images and ours become one
//	s.Close()
//
// CRIU is started with criu.Config.SkipClean and SkipShared between Start and the freeze, so that it
// leaves out what was copied. Package track finds what was written, package pages
// keeps the copies and puts the images together, package shm does both for shared
// memory. The memory of processes that cannot be tracked, or were born since, is
// CRIU's, whole.
package precopy
