// SPDX-License-Identifier: Apache-2.0

package harness

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/cohort-project/cohort/integration/shop/harness"
)

// Container is what Run is told of a container; an empty ID is given a name.
type Container = harness.Container

// The set-up's images.
const (
	BusyboxImage = "docker.io/library/cohort-busybox:latest"
	ToolsImage   = harness.ToolsImage
	DataImage    = harness.DataImage
)

// Runtime is a shim on a snapshotter.
type Runtime struct {
	Name        string
	Runtime     string
	Snapshotter string
}

// The runtimes that tests compare.
var (
	Stock          = Runtime{"stock", "io.containerd.runc.v2", "overlayfs"}
	CohortOnStock  = Runtime{"cohort-overlayfs", "io.containerd.cohort.v2", "overlayfs"}
	CohortOnCohort = Runtime{"cohort", "io.containerd.cohort.v2", "cohort"}
)

// CtrOf is the stock client that runs containers with r.
func (in *Instance) CtrOf(r Runtime) harness.Ctr {
	bin, err := in.LookPath("ctr")
	if err != nil {
		bin = "ctr"
	}
	return harness.Ctr{Bin: bin, Address: in.Address, Namespace: in.Namespace(), Runtime: r.Runtime, Snapshotter: r.Snapshotter}
}

// Context is the test's context with a limit of two minutes, which a test that
// needs longer replaces by its own.
func Context(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), 2*time.Minute, fmt.Errorf("%s took longer than two minutes", t.Name()))
	t.Cleanup(cancel)
	return ctx
}

// Run runs a container in the background, and removes it when the test is over.
// It returns the container's id and the host's pid of its first process.
func (in *Instance) Run(t testing.TB, r Runtime, c Container) (id string, pid int) {
	t.Helper()
	ctx := Context(t)
	if c.ID == "" {
		c.ID = in.Name("c")
	}
	in.RequireImage(t, c.Image, r.Snapshotter)
	in.RemoveAfter(t, c.ID)
	ctr := in.CtrOf(r)
	if err := ctr.Run(ctx, c); err != nil {
		t.Fatal(err)
	}
	pid, err := ctr.Pid(ctx, c.ID)
	if err != nil {
		t.Fatal(err)
	}
	return c.ID, pid
}

// RemoveAfter removes containers when the test is over, whether they are there
// then or not.
func (in *Instance) RemoveAfter(t testing.TB, ids ...string) {
	t.Helper()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		for _, id := range ids {
			if err := in.CtrOf(Stock).Remove(ctx, id); err != nil {
				t.Errorf("removing container %s: %v", id, err)
			}
		}
	})
}

// RemoveImagesAfter removes images when the test is over: those of the given
// names, and those whose names are a given one, a dash and more, which is how the
// members of a group's image are called.
func (in *Instance) RemoveImagesAfter(t testing.TB, refs ...string) {
	t.Helper()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := in.RemoveImages(ctx, refs...); err != nil {
			t.Errorf("removing images: %v", err)
		}
	})
}

// RemoveImages is RemoveImagesAfter at once. It returns when their content is
// collected.
func (in *Instance) RemoveImages(ctx context.Context, refs ...string) error {
	out, err := in.Ctr(ctx, "images", "ls", "-q")
	if err != nil {
		return err
	}
	have := slices.DeleteFunc(strings.Fields(out), func(name string) bool {
		return !slices.ContainsFunc(refs, func(ref string) bool {
			return name == ref || strings.HasPrefix(name, ref+"-")
		})
	})
	if len(have) == 0 {
		return nil
	}
	return in.CtrOf(Stock).RemoveImages(ctx, have...)
}

// RequireImage requires one of the set-up's images, unpacked for a snapshotter.
func (in *Instance) RequireImage(t testing.TB, image, snapshotter string) {
	t.Helper()
	if err := in.Unpack(Context(t), image, snapshotter); errdefs.IsNotFound(err) {
		Require(t, false, "the image "+image+" (make setup)")
	} else if err != nil {
		t.Fatal(err)
	}
}

// Unpack unpacks an image for a snapshotter unless it is. The first container
// on a snapshotter would do it, and pay for it.
func (in *Instance) Unpack(ctx context.Context, image, snapshotter string) error {
	c, err := in.client()
	if err != nil {
		return err
	}
	i, err := c.GetImage(ctx, image)
	if err != nil {
		return err
	}
	if ok, err := i.IsUnpacked(ctx, snapshotter); err != nil || ok {
		return err
	}
	return i.Unpack(ctx, snapshotter)
}

// Eventually polls until f returns nil, and fails the test with f's last error
// after the time d. It is for what has no event that could be waited for.
func Eventually(t testing.TB, d time.Duration, f func() error) {
	t.Helper()
	if err := eventually(d, f); err != nil {
		t.Fatalf("not within %v: %v", d, err)
	}
}

func eventually(d time.Duration, f func() error) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(d); ; <-tick.C {
		err := f()
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}
