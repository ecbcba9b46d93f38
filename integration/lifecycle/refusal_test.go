// SPDX-License-Identifier: Apache-2.0

package lifecycle

import (
	"path/filepath"
	"slices"
	"strings"

	shop "github.com/cohort-project/cohort/integration/shop/harness"
)

// untouched watches that nothing is done to any container while f runs: no record of
// an epoch is written, no capture is opened, no image appears.
func (w *world) untouched(f func()) {
	w.Helper()
	epochs, captures := w.watchDir(w.epochsDir()), w.watchDir(filepath.Join(w.in.Root, "captures"))
	before := w.ctr("images", "ls", "-q")
	f()
	for _, x := range []*watch{epochs, captures} {
		changes, err := x.seen()
		w.must(err)
		if len(changes) > 0 {
			w.Errorf("something was done all the same: in %s %v", x.dir, changes)
		}
	}
	if after := w.ctr("images", "ls", "-q"); after != before {
		w.Errorf("the images have changed from\n%sto\n%s", before, after)
	}
	if err := w.in.Leaks(); err != nil && !w.paused {
		w.Error(err)
	}
}

// refused expects preflight to refuse a command, naming the member and the reason,
// and to leave everything alone.
func (w *world) refused(member, reason string, args ...string) *shop.CommandError {
	w.Helper()
	var err *shop.CommandError
	w.untouched(func() { err = w.failure(args...) })
	w.says(err, 3, member, reason)
	return err
}

// says expects an exit code and words of a command's error; the last line of what it
// said is the error, and it is one line.
func (w *world) says(err *shop.CommandError, code int, words ...string) {
	w.Helper()
	lines := strings.Split(strings.TrimSpace(err.Stderr), "\n")
	last := lines[len(lines)-1]
	if err.ExitCode() != code {
		w.Errorf("%s: exit code %d, want %d", err, err.ExitCode(), code)
	}
	own := slices.DeleteFunc(slices.Clone(lines), func(l string) bool { return !strings.HasPrefix(l, "cohort: ") })
	if len(own) != 1 || own[0] != last {
		w.Errorf("not one clear message: %q", err.Stderr)
	}
	for _, word := range words {
		if !strings.Contains(last, word) {
			w.Errorf("%q does not say %q", last, word)
		}
	}
}
