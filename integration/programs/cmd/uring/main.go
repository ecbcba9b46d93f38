// SPDX-License-Identifier: Apache-2.0

// Uring holds an io_uring, which no checkpoint can contain, and waits. Exit
// code 6: the kernel, or the container's seccomp profile, does not let it.
package main

import (
	"flag"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/integration/programs"
	"github.com/cohort-project/cohort/integration/programs/internal/report"
)

func main() {
	path := flag.String("report", "", "`file` for reports")
	flag.Parse()
	// struct io_uring_params of include/uapi/linux/io_uring.h, all zero: 120 bytes.
	var params [120]byte
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 8, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		report.Exit(programs.ExitUnsupported, "io_uring_setup: %v", errno)
	}
	report.Serve(*path, func(n int) any {
		return programs.Uring{Report: programs.Report{N: n}, FD: int(fd)}
	})
	select {}
}
