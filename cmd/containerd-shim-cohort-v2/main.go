// SPDX-License-Identifier: Apache-2.0

// Command containerd-shim-cohort-v2 is the shim of the containerd runtime
// io.containerd.cohort.v2.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/manager"
	containerdshim "github.com/containerd/containerd/v2/pkg/shim"

	"github.com/cohort-project/cohort/api/version"
	"github.com/cohort-project/cohort/shim"
)

const name = "io.containerd.cohort.v2"

func main() {
	// CRIU starts this binary as its action script while it restores.
	if os.Getenv("CRTOOLS_SCRIPT_ACTION") != "" && len(os.Args) == 2 {
		if err := shim.RunAction(os.Args[1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	for _, a := range os.Args[1:] {
		if a == "-v" || a == "--version" || a == "-version" {
			fmt.Println("containerd-shim-cohort-v2", version.String())
			return
		}
	}
	containerdshim.RunShim(context.Background(), shim.NewManager(manager.NewShimManager(name)))
}
