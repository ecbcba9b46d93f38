// SPDX-License-Identifier: Apache-2.0

package freezer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// The v1 freezer has no event: FREEZING turns into FROZEN when somebody reads
// freezer.state (update_if_frozen, kernel/cgroup/legacy_freezer.c). So it is read
// at intervals that start at pollMin and grow to pollMax.
const (
	pollMin = 50 * time.Microsecond
	pollMax = time.Millisecond
	// pollKick is how often FROZEN is written anew while waiting: the kernel then
	// asks every task again, which reaches one that slipped through between clone
	// and signal delivery.
	pollKick = 10 * time.Millisecond
)

type v1 struct{ files }

func openV1(dir string) (*v1, error) {
	o, err := openFiles(dir, "freezer.state", "freezer.parent_freezing")
	if err != nil {
		return nil, err
	}
	return &v1{o}, nil
}

func (h *v1) version() int { return 1 }

func (h *v1) state() (State, error) {
	word, err := h.read(h.control)
	if err != nil {
		return "", err
	}
	switch string(word) {
	case "THAWED":
		return Thawed, nil
	case "FREEZING":
		return Freezing, nil
	case "FROZEN":
		return Frozen, nil
	}
	return "", fmt.Errorf("%s holds %q", h.control.Name(), word)
}

func (h *v1) ask(freeze bool) error {
	word := "THAWED"
	if freeze {
		word = "FROZEN"
	}
	return h.write(word)
}

func (h *v1) await(ctx context.Context, want State) error {
	wait, kicked := pollMin, time.Now()
	for {
		st, err := h.state()
		if err != nil {
			return err
		}
		if st == want {
			return nil
		}
		if want == Thawed {
			// THAWED takes effect in the write; what still freezes is above.
			parent, err := h.read(h.status)
			if err != nil {
				return err
			}
			if string(parent) == "1" {
				return fmt.Errorf("a parent cgroup is frozen; thaw that one: %w", errdefs.ErrFailedPrecondition)
			}
		}
		if want == Frozen && time.Since(kicked) >= pollKick {
			if err := h.ask(true); err != nil {
				return err
			}
			kicked = time.Now()
		}
		if err := sleep(ctx, wait); err != nil {
			return err
		}
		wait = min(wait*2, pollMax)
	}
}

// sleep uses nanosleep itself: the Go timer's resolution when idle is a
// millisecond, twenty times the first interval.
func sleep(ctx context.Context, d time.Duration) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	ts := unix.NsecToTimespec(int64(d))
	if err := unix.Nanosleep(&ts, nil); err != nil && !errors.Is(err, unix.EINTR) {
		return err
	}
	return ctx.Err()
}

func (h *v1) kill(ctx context.Context) error { return killTree(ctx, h.dir, h.thawAll) }

// thawAll thaws the cgroup and those below it; a task in a frozen child would
// never die.
func (h *v1) thawAll() error {
	return filepath.WalkDir(h.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			if err != nil && !gone(err) {
				return err
			}
			return nil
		}
		err = os.WriteFile(filepath.Join(path, "freezer.state"), []byte("THAWED"), 0)
		if err != nil && !gone(err) {
			return err
		}
		return nil
	})
}
