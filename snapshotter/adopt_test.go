// SPDX-License-Identifier: Apache-2.0

package snapshotter

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/cohort-project/cohort/snapshotter/capture"
)

const captureID = "0123456789abcdef0123456789abcdef"

// sealed makes a container with some files on a layer, and a sealed capture of it.
func (w *world) sealed() {
	w.Helper()
	w.must(w.unpack("", "base", func(dir string) { write(w, dir+"/lower", "l"); write(w, dir+"/dropped", "d") }))
	m, err := w.sn.Prepare(w.Context(), "container", "base")
	w.must(err)
	w.mounted(m, func(dir string) {
		write(w, dir+"/data/file", "captured")
		w.must(os.Remove(dir + "/dropped"))
		w.capture(captureID)
		write(w, dir+"/data/file", "later")
	})
}

// capture captures the container's upper directory whole.
func (w *world) capture(id string) {
	w.Helper()
	upper := w.path("snapshots", w.id("container"), "fs")
	w.must(w.sn.ActiveUpper(w.Context(), upper))
	info, err := w.store.Open(w.Context(), id, upper, leaseForTests, nil)
	w.must(err)
	write(w, info.Dir+"/checkpoint/config.dump", "config")
	_, err = w.store.Take(w.Context(), id, 0)
	w.must(err)
	_, err = w.store.Seal(w.Context(), id)
	w.must(err)
}

func adopt(label, id string) snapshots.Opt {
	return snapshots.WithLabels(map[string]string{label: id})
}

func TestAdoptedCaptureIsTheContainersLayerAndItsCheckpoint(t *testing.T) {
	each(t, func(w *world) {
		w.sealed()
		_, err := w.sn.Prepare(w.Context(), "a1", "base", adopt(LabelAdoptFS, captureID))
		w.must(err)
		w.must(w.sn.Commit(w.Context(), "layer", "a1"))
		_, err = w.sn.Prepare(w.Context(), "a2", "layer", adopt(LabelAdoptCheckpoint, captureID))
		w.must(err)
		w.must(w.sn.Commit(w.Context(), "cp", "a2"))

		if got := read(w, w.checkpointOf("cp")+"/config.dump"); got != "config" {
			t.Errorf("checkpoint %q", got)
		}
		m, err := w.sn.Prepare(w.Context(), "restored", "cp")
		w.must(err)
		w.mounted(m, func(dir string) {
			if got := read(w, dir+"/data/file") + read(w, dir+"/lower"); got != "capturedl" {
				t.Errorf("got %q", got)
			}
			for _, gone := range []string{"dropped", "config.dump", "checkpoint", ".cohort"} {
				if _, err := os.Lstat(filepath.Join(dir, gone)); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s is there: %v", gone, err)
				}
			}
		})
		if left, _ := filepath.Glob(w.path("captures/*")); len(left) > 0 {
			t.Errorf("the adopted capture left %v", left)
		}
	})
}

func TestAdoptionRefusesWhatIsNotASealedCapture(t *testing.T) {
	w := one(t)
	w.sealed()
	upper := w.path("snapshots", w.id("container"), "fs")
	open := strings.Repeat("a", 32)
	_, err := w.store.Open(w.Context(), open, upper, leaseForTests, nil)
	w.must(err)
	taken := strings.Repeat("b", 32)
	_, err = w.store.Open(w.Context(), taken, upper, leaseForTests, nil)
	w.must(err)
	_, err = w.store.Take(w.Context(), taken, 0)
	w.must(err)

	for _, c := range []struct {
		name, id string
		is       func(error) bool
	}{
		{"unknown", strings.Repeat("c", 32), errdefs.IsNotFound},
		{"open", open, errdefs.IsFailedPrecondition},
		{"taken", taken, errdefs.IsFailedPrecondition},
		{"empty", "", errdefs.IsInvalidArgument},
		{"short", captureID[1:], errdefs.IsInvalidArgument},
		{"upper case", strings.ToUpper(captureID), errdefs.IsInvalidArgument},
		{"path", "../captures/" + captureID[13:], errdefs.IsInvalidArgument},
		{"newline", captureID + "\n", errdefs.IsInvalidArgument},
	} {
		for _, label := range []string{LabelAdoptFS, LabelAdoptCheckpoint} {
			if _, err := w.sn.Prepare(w.Context(), "k", "base", adopt(label, c.id)); !c.is(err) {
				t.Errorf("%s, %s: got %v", c.name, label, err)
			}
		}
	}
	both := snapshots.WithLabels(map[string]string{LabelAdoptFS: captureID, LabelAdoptCheckpoint: captureID})
	if _, err := w.sn.Prepare(w.Context(), "k", "base", both); !errdefs.IsInvalidArgument(err) {
		t.Errorf("both labels: %v", err)
	}
	if _, err := w.sn.View(w.Context(), "k", "base", adopt(LabelAdoptFS, captureID)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("view: %v", err)
	}
	// A link in place of the content is not followed.
	w.must(os.RemoveAll(w.path("captures", captureID, "checkpoint")))
	w.must(os.Symlink("/etc", w.path("captures", captureID, "checkpoint")))
	if _, err := w.sn.Prepare(w.Context(), "k", "base", adopt(LabelAdoptCheckpoint, captureID)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("link: %v", err)
	}
	// Nothing of all that left a trace, and the other part can still be adopted, once.
	_, err = w.sn.Prepare(w.Context(), "k", "base", adopt(LabelAdoptFS, captureID))
	w.must(err)
	if _, err := w.sn.Prepare(w.Context(), "k2", "base", adopt(LabelAdoptFS, captureID)); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("twice: %v", err)
	}
	if left, _ := filepath.Glob(w.path("snapshots/new-*")); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}

// A Prepare that fails after the adoption gives the content back.
func TestFailedPrepareGivesTheCaptureBack(t *testing.T) {
	w := one(t)
	w.sealed()
	// Where the next snapshot's directory goes, something is in the way.
	next := w.path("snapshots", "4")
	for i := range 10 {
		write(w, w.path("snapshots", string(rune('0'+i)), "in-the-way"), "")
	}
	if _, err := w.sn.Prepare(w.Context(), "k", "base", adopt(LabelAdoptFS, captureID)); err == nil {
		t.Fatalf("the test is wrong: nothing was in the way at %s", next)
	}
	w.must(w.sn.Cleanup(w.Context()))
	_, err := w.sn.Prepare(w.Context(), "k", "base", adopt(LabelAdoptFS, captureID))
	w.must(err)
	if got := read(w, w.path("snapshots", w.id("k"), "fs/data/file")); got != "captured" {
		t.Errorf("got %q", got)
	}
}

// The process dies between any two steps of an adoption; after the restart the
// content is in exactly one place and nothing is lost.
func TestAdoptionSurvivesACrashAtEveryStep(t *testing.T) {
	for _, part := range []capture.Part{capture.FS, capture.Checkpoint} {
		label := map[capture.Part]string{capture.FS: LabelAdoptFS, capture.Checkpoint: LabelAdoptCheckpoint}[part]
		t.Run(string(part), func(t *testing.T) {
			each(t, func(w *world) {
				w.sealed()
				content := map[capture.Part]string{capture.FS: "fs/data/file", capture.Checkpoint: "checkpoint/config.dump"}[part]
				intact := func(step string) {
					w.Helper()
					if _, err := os.Stat(w.path("captures", captureID, content)); err != nil {
						t.Fatalf("%s: %v", step, err)
					}
				}
				staging := w.path("snapshots", capture.StagingName(captureID, part))

				w.must(os.Mkdir(staging, 0o700))
				w.crash()
				intact("staging directory made")

				// The adoption is neither done nor undone: the locked capture dies with its store.
				w.must(os.Mkdir(staging, 0o700))
				_, err := w.store.Adopt(captureID, part, "42", filepath.Join(staging, string(part)))
				w.must(err)
				w.crash()
				intact("moved to the staging directory")

				w.must(os.Mkdir(staging, 0o700))
				_, err = w.store.Adopt(captureID, part, "42", filepath.Join(staging, string(part)))
				w.must(err)
				w.must(os.Rename(staging, w.path("snapshots/42")))
				w.crash()
				intact("put into place, not committed")

				_, err = w.sn.Prepare(w.Context(), "k", "base", adopt(label, captureID))
				w.must(err)
				id := w.id("k")
				// The transaction was committed, but the record does not say so yet.
				rec := w.path("captures", captureID, "capture.json")
				w.must(os.WriteFile(rec, []byte(strings.Replace(read(w, rec), `"done": true`, `"done": false`, 1)), 0o600))
				w.crash()
				if _, err := os.Stat(w.path("snapshots", id, content)); err != nil {
					t.Fatalf("committed: %v", err)
				}
				if _, err := w.sn.Prepare(w.Context(), "k2", "base", adopt(label, captureID)); !errdefs.IsFailedPrecondition(err) {
					t.Fatalf("adopted twice: %v", err)
				}
			})
		})
	}
}

func TestActiveUpperAcceptsNothingElse(t *testing.T) {
	w := one(t)
	w.must(w.unpack("", "base", func(string) {}))
	_, err := w.sn.Prepare(w.Context(), "c", "base")
	w.must(err)
	_, err = w.sn.View(w.Context(), "v", "base")
	w.must(err)
	upper := w.path("snapshots", w.id("c"), "fs")
	w.must(w.sn.ActiveUpper(w.Context(), upper))
	for _, bad := range []string{
		"", "/", "/etc", w.root, w.path("snapshots"), w.path("snapshots/fs"), w.path("snapshots//fs"), upper + "/", upper + "/..",
		w.path("snapshots") + "/../snapshots/" + w.id("c") + "/fs", w.path("snapshots/999/fs"), w.path("snapshots/new-1/fs"),
		w.path("snapshots/1/fs"), "relative/snapshots/2/fs", w.path("snapshots", w.id("c"), "work"),
	} {
		if err := w.sn.ActiveUpper(w.Context(), bad); err == nil {
			t.Errorf("%q accepted", bad)
		}
	}
}

// layer is the directory of a committed snapshot, as the mounts above it name it.
func (w *world) layer(name string) string {
	w.Helper()
	m, err := w.sn.View(w.Context(), "view of "+name, name)
	w.must(err)
	w.must(w.sn.Remove(w.Context(), "view of "+name))
	for _, o := range m[0].Options {
		if lowers, ok := strings.CutPrefix(o, "lowerdir="); ok {
			top, _, _ := strings.Cut(lowers, ":")
			return top
		}
	}
	return m[0].Source
}

func TestCommittedUpperAcceptsNothingElse(t *testing.T) {
	w := one(t)
	w.must(w.unpack("", "base", func(string) {}))
	_, err := w.sn.Prepare(w.Context(), "c", "base")
	w.must(err)
	_, err = w.sn.View(w.Context(), "v", "base")
	w.must(err)
	layer := w.layer("base")
	w.must(w.sn.CommittedUpper(w.Context(), layer))
	for _, bad := range []string{
		"", "/etc", w.root, layer + "/", layer + "/..", w.path("snapshots/999/fs"),
		w.path("snapshots", w.id("c"), "fs"), w.path("snapshots/3/fs"), filepath.Dir(layer),
	} {
		if err := w.sn.CommittedUpper(w.Context(), bad); err == nil {
			t.Errorf("%q accepted", bad)
		}
	}
}

func TestIncrementIsALayerOnItsParents(t *testing.T) {
	each(t, func(w *world) {
		w.must(w.unpack("", "base", func(dir string) { write(w, dir+"/lower", "l"); write(w, dir+"/dropped", "d") }))
		m, err := w.sn.Prepare(w.Context(), "container", "base")
		w.must(err)
		parent, uppers := "base", []string(nil)
		w.mounted(m, func(dir string) {
			write(w, dir+"/data/stays", "12345")
			for n := range 3 {
				write(w, dir+"/data/changes", fmt.Sprint(n))
				write(w, dir+"/new"+fmt.Sprint(n), "n")
				if n > 0 {
					w.must(os.Remove(dir + "/new" + fmt.Sprint(n-1)))
				}
				id := fmt.Sprintf("%032x", n)
				_, err := w.store.Open(w.Context(), id, w.path("snapshots", w.id("container"), "fs"), leaseForTests, nil)
				w.must(err)
				_, err = w.store.Take(w.Context(), id, 0)
				w.must(err)
				info, err := w.store.Seal(w.Context(), id, uppers...)
				w.must(err)
				if n > 0 && (info.StorageBytes != 2 || info.UnchangedBytes != 5) {
					w.Errorf("increment %d: %+v", n, info)
				}
				key := "layer" + fmt.Sprint(n)
				_, err = w.sn.Prepare(w.Context(), "adopt"+key, parent, adopt(LabelAdoptFS, id))
				w.must(err)
				w.must(w.sn.Commit(w.Context(), key, "adopt"+key))
				parent, uppers = key, append([]string{w.layer(key)}, uppers...)
			}
		})
		m, err = w.sn.View(w.Context(), "check", parent)
		w.must(err)
		w.mounted(m, func(dir string) {
			for name, want := range map[string]string{"lower": "l", "dropped": "d", "data/stays": "12345", "data/changes": "2", "new2": "n"} {
				if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
					w.Errorf("%s: %q, %v", name, got, err)
				}
			}
			entries, err := os.ReadDir(dir)
			w.must(err)
			if len(entries) != 4 {
				w.Errorf("the chain shows %v", entries)
			}
		})
	})
}
