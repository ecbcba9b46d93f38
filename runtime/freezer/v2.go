// SPDX-License-Identifier: Apache-2.0

package freezer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// v2 uses cgroup.freeze to ask and cgroup.events to know: the kernel raises
// POLLPRI on the latter whenever "frozen" or "populated" changes
// (cgroup_file_notify, kernel/cgroup/cgroup.c).
type v2 struct{ files }

func openV2(dir string) (*v2, error) {
	o, err := openFiles(dir, "cgroup.freeze", "cgroup.events")
	if err != nil {
		return nil, err
	}
	return &v2{o}, nil
}

func (h *v2) version() int { return 2 }

// event reads one flat-keyed value of cgroup.events.
func (h *v2) event(key string) (bool, error) {
	data, err := h.read(h.status)
	if err != nil {
		return false, err
	}
	for line := range bytes.Lines(data) {
		if name, value, ok := bytes.Cut(bytes.TrimSpace(line), []byte(" ")); ok && string(name) == key {
			return string(value) == "1", nil
		}
	}
	return false, fmt.Errorf("%s has no %q; the kernel is older than 5.2", h.status.Name(), key)
}

func (h *v2) asked() (bool, error) {
	data, err := h.read(h.control)
	if err != nil {
		return false, err
	}
	return string(data) == "1", nil
}

func (h *v2) state() (State, error) {
	frozen, err := h.event("frozen")
	if err != nil {
		return "", err
	}
	if frozen {
		return Frozen, nil
	}
	asked, err := h.asked()
	if err != nil {
		return "", err
	}
	if asked {
		return Freezing, nil
	}
	return Thawed, nil
}

func (h *v2) ask(freeze bool) error {
	word := "0"
	if freeze {
		word = "1"
	}
	return h.write(word)
}

func (h *v2) await(ctx context.Context, want State) error {
	if want == Thawed {
		frozen, err := h.event("frozen")
		if err != nil || !frozen {
			return err
		}
		// Frozen with cgroup.freeze at 0: a parent holds it, and no event will
		// come from this cgroup. The kernel propagates a thaw within the write
		// (cgroup_freeze, kernel/cgroup/freezer.c), except for the counting of
		// tasks, which the poll below waits for; tell the two apart by the parents.
		if above, err := frozenAbove(h.dir); err != nil || above {
			return errors.Join(err, fmt.Errorf("a parent cgroup is frozen; thaw that one: %w", errdefs.ErrFailedPrecondition))
		}
	}
	return h.poll(ctx, "frozen", want == Frozen)
}

// poll waits for an event's value. The first read also tells the kernel which
// change this file has seen, so that none between read and poll is lost.
func (h *v2) poll(ctx context.Context, key string, want bool) error {
	var wake *waker
	for {
		got, err := h.event(key)
		if err != nil {
			return err
		}
		if got == want {
			return nil
		}
		if wake == nil {
			// Only a freeze that takes its time pays for the wake-up.
			if wake, err = newWaker(ctx); err != nil {
				return err
			}
			defer wake.close()
		}
		fds := []unix.PollFd{{Fd: int32(h.status.Fd()), Events: unix.POLLPRI}, wake.poll()}
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("waiting on %s: %w", h.status.Name(), err)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// kill uses cgroup.kill, which reaches tasks that are being cloned and needs no
// thaw (Linux 5.14).
func (h *v2) kill(ctx context.Context) error {
	file := filepath.Join(h.dir, "cgroup.kill")
	if err := os.WriteFile(file, []byte("1"), 0); err != nil {
		if _, statErr := os.Stat(h.dir); errors.Is(err, fs.ErrNotExist) && statErr == nil {
			return killTree(ctx, h.dir, func() error { return h.ask(false) })
		}
		return err
	}
	if err := h.poll(ctx, "populated", false); err != nil {
		return err
	}
	// Left frozen, the empty cgroup would freeze whoever enters it next.
	return h.ask(false)
}

// frozenAbove tells whether a parent of dir asks for a freeze.
func frozenAbove(dir string) (bool, error) {
	for dir = filepath.Dir(dir); ; dir = filepath.Dir(dir) {
		data, err := os.ReadFile(filepath.Join(dir, "cgroup.freeze"))
		if err != nil {
			// The root of the hierarchy has no such file.
			if errors.Is(err, fs.ErrNotExist) {
				return false, nil
			}
			return false, err
		}
		if string(bytes.TrimSpace(data)) == "1" {
			return true, nil
		}
	}
}
