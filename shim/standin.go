// SPDX-License-Identifier: Apache-2.0

//go:build softdirtystandin

package shim

import (
	"sync"

	"github.com/cohort-project/cohort/runtime/memory/engine"
)

// With this tag the shim believes that the host has soft-dirty bits. Only a test builds
// with it, and gives the shim a CRIU to which there are some (runtime/criu/criutest).
func init() {
	memoryFacts = sync.OnceValue(func() engine.Facts {
		f := engine.Probe()
		f.SoftDirty = true
		return f
	})
}
