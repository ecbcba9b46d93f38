// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"os"
	"os/exec"
	"testing"
)

// missingError names what is wanting for an instance.
type missingError string

func (e missingError) Error() string { return "missing: " + string(e) }

// Require skips a test for want of something, or fails it where
// COHORT_REQUIRE=1 says that nothing may be wanting.
func Require(t testing.TB, have bool, what string) {
	t.Helper()
	if have {
		return
	}
	if os.Getenv("COHORT_REQUIRE") == "1" {
		t.Fatalf("missing: %s", what)
	}
	t.Skipf("missing: %s", what)
}

// RequireRoot requires root.
func RequireRoot(t testing.TB) {
	t.Helper()
	Require(t, os.Geteuid() == 0, "root")
}

// RequireTool requires a program on the PATH and returns its path.
func RequireTool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	Require(t, err == nil, "the program "+name)
	return path
}
