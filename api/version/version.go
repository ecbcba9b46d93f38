// SPDX-License-Identifier: Apache-2.0

// Package version says which cohort this is. Every binary prints it for --version, and it is written
// into the checkpoints that a binary makes.
package version

import (
	"fmt"
	"runtime"
)

// Both are set by the linker (see the Makefile); a plain `go build` or `go test` leaves them as they are.
var (
	// Version is the release, as `git describe` names it.
	Version = "0.0.0-dev"
	// Revision is the full commit hash that was built, with ".m" behind it if the tree was modified;
	// empty if unknown.
	Revision = ""
)

// String is the line that follows a program's name for --version, such as
// "v0.1.0 3f2c… go1.26.6 linux/amd64".
func String() string {
	revision := Revision
	if revision == "" {
		revision = "unknown"
	}
	return fmt.Sprintf("%s %s %s %s/%s", Version, revision, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}
