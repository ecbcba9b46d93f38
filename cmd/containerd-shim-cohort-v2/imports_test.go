// SPDX-License-Identifier: Apache-2.0

package main

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// What a package makes when a program starts, every start of a container pays twice:
// for the shim that starts the shim, and for the shim.
func TestShimDoesNotBringWhatItDoesNotUse(t *testing.T) {
	gotool, err := exec.LookPath("go")
	if err != nil {
		if os.Getenv("COHORT_REQUIRE") == "1" {
			t.Fatal("the go command is missing, and COHORT_REQUIRE=1")
		}
		t.Skip("the go command is missing")
	}
	c := exec.Command(gotool, "list", "-deps", ".")
	c.Stderr = os.Stderr
	out, err := c.Output()
	if err != nil {
		t.Fatal(err)
	}
	deps := strings.Fields(string(out))
	if len(deps) < 100 {
		t.Fatalf("only %d packages", len(deps))
	}
	for _, p := range deps {
		for _, no := range []string{
			"github.com/distribution/reference", // ten large regular expressions
			"github.com/prometheus/",
			"go.opentelemetry.io/",
			"go.etcd.io/",
			"github.com/spf13/",
			"github.com/containerd/containerd/v2/client",
			"github.com/cohort-project/cohort/runtime/ops",
		} {
			if strings.HasPrefix(p, no) {
				t.Errorf("the shim imports %s; cure: go list -deps -f '{{.ImportPath}} {{.Imports}}' ./cmd/containerd-shim-cohort-v2 tells by way of what", p)
			}
		}
	}
}
