// SPDX-License-Identifier: Apache-2.0

package memory

import (
	"fmt"
	"testing"

	"github.com/cohort-project/cohort/integration/harness"
	"github.com/cohort-project/cohort/integration/programs"
)

// Every epoch of a chain comes back, whichever way it was found out what had
// changed since the one before.
func TestEveryEpochOfAChainComesBackIntact(t *testing.T) {
	for _, tc := range []struct {
		name, increment string
		flags           []string
	}{
		{"by tracking", "tracking", []string{"--keep-tracking"}},
		{"by content", "content", nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			in := harness.Up(t)
			harness.RequireTool(t, "criu")
			id, pid := run(t, in, "96")
			var refs []string
			var states []programs.Ticker
			for i := range 4 {
				var s programs.Ticker
				if err := programs.Ask(harness.Context(t), pid, report, &s); err != nil {
					t.Fatal(err)
				}
				states = append(states, s)
				refs = append(refs, fmt.Sprintf("test.local/%s:%d", id, i))
				m := checkpoint(t, in, id, refs[i], tc.flags...)
				switch {
				case i == 0:
					if m.Memory.Increment != "" {
						t.Errorf("the first epoch builds on another: %+v", m.Memory)
					}
				case m.Memory.Increment != tc.increment:
					t.Errorf("epoch %d: increment by %q, want %q: %+v", i, m.Memory.Increment, tc.increment, m.Memory)
				// The program writes to a thousand pages a second of its 24,576.
				case m.Memory.ParentBytes < 32<<20:
					t.Errorf("epoch %d: %d bytes are the parent's, want most of 96 MiB: %+v", i, m.Memory.ParentBytes, m.Memory)
				case tc.increment == "tracking" && m.Memory.CopiedBytes > 64<<20:
					t.Errorf("epoch %d: %d bytes were copied though most had not changed", i, m.Memory.CopiedBytes)
				}
			}
			for i, ref := range refs {
				restored(t, in, id, ref, fmt.Sprintf("-r%d", i), states[i])
			}
			in.CheckClean(t)
		})
	}
}
