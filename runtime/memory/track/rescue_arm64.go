// SPDX-License-Identifier: Apache-2.0

package track

import (
	"os"

	"github.com/cohort-project/cohort/runtime/memory/internal/uapi"
)

// rescue is x86-64's so far. Here the window in which only the injector keeps the
// thread from harm stays open; see the package documentation.
type rescue struct{}

func findRescue(*os.File, area, *code) {}

func (code) rescueHolds(*os.File) bool { return true }

func (*rescue) lay(*os.File, code, int, *uapi.Regs, uint64) {}
func (*rescue) prepare(*uapi.Regs)                          {}
func (*rescue) lift()                                       {}
func (*rescue) laid() bool                                  { return false }
