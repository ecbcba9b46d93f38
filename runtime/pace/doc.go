// SPDX-License-Identifier: Apache-2.0

// Package pace has work that nobody waits for give way to the containers: copying,
// hashing and compressing around a checkpoint, while its members run.
//
//	p := pace.New(pace.Share)            // looks at the host from now on
//	ctx = pace.With(ctx, p)
//	for each piece of some hundred microseconds to a millisecond {
//		work(piece)
//		pace.Pause(ctx)                  // sleeps, on a busy host
//	}
//
// On a host whose processors are busy with others' work, this process gets a share
// of them all and sleeps the rest of the time; on an idle one Pause returns at once. It counts
// what the whole process used, its garbage collector and helping threads too, so
// that it need not be called by each of them, and on top of that what the kernel's threads and containerd
// do for it. What is paced takes [Most] times as long as otherwise at the most, so
// there is progress on a host that is always busy.
//
// Without a pacer in the context Pause does nothing. That is the case for a checkpoint
// that ends its members, and while a container is frozen: then the time counts
// and not the throughput of others.
//
// Why not a priority, and why not a cgroup: docs/stop.md.
package pace
