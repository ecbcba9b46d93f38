// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/cohort-project/cohort/runtime/memory/internal/uapi"
)

// Engine is a way to take memory, by the name that results and options have for it.
type Engine string

// The engines. Auto is for asking only: the best one that the host has.
const (
	Auto      Engine = "auto"
	WPAsync   Engine = "wp-async"
	SoftDirty Engine = "soft-dirty"
	Full      Engine = "full"
)

// Env is the variable of the shim's environment that chooses the engine of all of
// its containers, where a request names none.
const Env = "COHORT_MEMORY"

// Parse refuses what is no engine. The empty name is Auto.
func Parse(name string) (Engine, error) {
	e := Engine(name)
	if name == "" {
		return Auto, nil
	}
	all := []Engine{Auto, WPAsync, SoftDirty, Full}
	if !slices.Contains(all, e) {
		var names []string
		for _, a := range all {
			names = append(names, string(a))
		}
		return "", fmt.Errorf("memory engine %q: choose one of %s: %w", name, strings.Join(names, ", "), errdefs.ErrInvalidArgument)
	}
	return e, nil
}

// Facts are what a host's kernel can do.
type Facts struct {
	// Kernel is the release, as uname(2) has it; Arch is Go's name. Both are for
	// people.
	Kernel, Arch string
	// UffdFeatures are those of userfaultfd, as UFFDIO_API reports them; UffdError
	// says why it could not be asked.
	UffdFeatures uint64
	UffdError    string
	// PagemapScan says that the kernel has ioctl(PAGEMAP_SCAN).
	PagemapScan bool
	// Trial is why a child of ours could not be tracked, with all that it takes;
	// empty if it could be. It is not tried where one of the above is missing.
	Trial string
	// SoftDirty says that the kernel reports soft-dirty pages.
	SoftDirty bool
}

// Choice is the engine to use and why, in words for people.
type Choice struct {
	Engine Engine
	Why    string
}

// Choose takes the best engine that a host has, or the one that is forced. One that
// the host lacks gives FailedPrecondition, a name that is none InvalidArgument.
func Choose(f Facts, forced string) (Choice, error) {
	want, err := Parse(forced)
	if err != nil {
		return Choice{}, err
	}
	noWP, noSD := f.noWPAsync(), f.noSoftDirty()
	switch want {
	case Full:
		return Choice{Full, "it was asked for"}, nil
	case WPAsync, SoftDirty:
		missing := noWP
		if want == SoftDirty {
			missing = noSD
		}
		if missing != "" {
			return Choice{}, fmt.Errorf("the memory engine %s was asked for and cannot be used on this host: %s; choose another, or %s: %w", want, missing, Auto, errdefs.ErrFailedPrecondition)
		}
		return Choice{want, "it was asked for"}, nil
	}
	switch {
	case noWP == "":
		return Choice{WPAsync, "the kernel has asynchronous write protection and PAGEMAP_SCAN"}, nil
	case noSD == "":
		return Choice{SoftDirty, noWP + ", but soft-dirty bits, which CRIU's pre-dump goes by"}, nil
	}
	return Choice{Full, noWP + ", and " + noSD}, nil
}

// noWPAsync is what is missing for WPAsync, empty if nothing is.
func (f Facts) noWPAsync() string {
	kernel := "kernel " + f.Kernel
	switch {
	case f.UffdError != "":
		return kernel + " has no userfaultfd that can be used (" + f.UffdError + ")"
	case f.UffdFeatures&uapi.UffdFeatureWPAsync == 0 || f.UffdFeatures&uapi.UffdFeatureWPUnpopulated == 0:
		return kernel + " has no asynchronous write protection (userfaultfd WP_ASYNC, Linux 6.7)"
	case !f.PagemapScan:
		return kernel + " has no PAGEMAP_SCAN (Linux 6.7)"
	case f.Trial != "":
		return "tracking failed on a process of our own (" + f.Trial + ")"
	}
	return ""
}

// noSoftDirty is what is missing for SoftDirty, empty if nothing is.
func (f Facts) noSoftDirty() string {
	if f.SoftDirty {
		return ""
	}
	return fmt.Sprintf("kernel %s (%s) has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)", f.Kernel, f.Arch)
}
