// SPDX-License-Identifier: Apache-2.0

package undo

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/cohort-project/cohort/runtime/group"
	"github.com/cohort-project/cohort/runtime/journal"
)

// record writes the record of an epoch whose shim is dead and which owes all that is
// undone in the kernel.
func record(t *testing.T, dir, freezer, netns string) *journal.Epoch {
	t.Helper()
	state, err := json.Marshal(group.Ledger{
		Epoch: group.Epoch{ID: "0123"}, State: group.Prepared,
		Undo: []group.Step{group.EndDump, group.Kill, group.RemoveRules, group.Thaw, group.StopTracking},
	})
	if err != nil {
		t.Fatal(err)
	}
	e := &journal.Epoch{
		ID: "c", Namespace: "default", Epoch: "0123", State: state,
		Init: journal.Self(), Freezer: freezer, Netns: netns, Table: "c",
	}
	if err := journal.Write(dir, e); err != nil {
		t.Fatal(err)
	}
	return e
}

func left(t *testing.T, dir string) int {
	t.Helper()
	epochs, err := journal.Epochs(dir)
	if err != nil {
		t.Fatal(err)
	}
	restores, err := journal.Restores(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(epochs) + len(restores)
}

func TestWhatIsGoneNeedsNoUndo(t *testing.T) {
	dir, gone := t.TempDir(), filepath.Join(t.TempDir(), "gone")
	e := record(t, dir, gone, gone)
	if err := Epoch(t.Context(), dir, e); err != nil || left(t, dir) != 0 {
		t.Errorf("%v, and %d records are left", err, left(t, dir))
	}
	if err := journal.Write(dir, &journal.Restore{ID: "r", Namespace: "default", Netns: []string{gone}, Table: "r"}); err != nil {
		t.Fatal(err)
	}
	Sweep(t.Context(), dir)
	if n := left(t, dir); n != 0 {
		t.Errorf("%d records are left", n)
	}
}

// A path that cannot be what was recorded may hide what is: somebody must look.
func TestWhatCannotBeUndoneStaysOnRecord(t *testing.T) {
	for name, where := range map[string]struct{ cgroup bool }{"cgroup": {true}, "network namespace": {false}} {
		t.Run(name, func(t *testing.T) {
			dir, other := t.TempDir(), t.TempDir()
			e := record(t, dir, filepath.Join(other, "gone"), filepath.Join(other, "gone"))
			if where.cgroup {
				e.Freezer = other
			} else {
				e.Netns = filepath.Join(other, "file")
				if err := os.WriteFile(e.Netns, nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := Epoch(t.Context(), dir, e); err == nil || left(t, dir) != 1 {
				t.Errorf("%v, and %d records are left", err, left(t, dir))
			}
		})
	}
}
