// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"fmt"
	"maps"
	"path"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// RestoreSpec makes the spec that a client would have made, for a restore that
// has no other client than cohort itself: what Reconcile then takes from "the
// client" is here. It starts from the checkpoint's spec, which is hostile input, and
// keeps nothing of it that acts on the host: no hook, no path of a namespace, a
// cgroup or a bind mount, no annotation that commands a runtime, no propagation.
// Resource limits and device rules are kept.
//
// binds gives the sources of bind mounts by destination. A bind mount that is
// neither there nor captured is an error, as is a bind for which the checkpoint
// has no mount. The caller sets the cgroup's path and the network namespace's.
func RestoreSpec(saved *specs.Spec, meta *Checkpoint, binds map[string]string) (*specs.Spec, error) {
	if saved == nil || saved.Root == nil || saved.Process == nil || saved.Linux == nil {
		return nil, fmt.Errorf("restoring %s: the checkpoint's spec has no root, process or linux section: %w", meta.Member, errdefs.ErrInvalidArgument)
	}
	s, err := cloneSpec(saved)
	if err != nil {
		return nil, err
	}
	s.Root = &specs.Root{Path: "rootfs", Readonly: saved.Root.Readonly}
	s.Hooks = nil
	s.VM, s.Windows, s.Solaris, s.ZOS, s.FreeBSD = nil, nil, nil, nil, nil
	maps.DeleteFunc(s.Annotations, func(k, _ string) bool { return commandsRuntime(k) })
	l := s.Linux
	l.CgroupsPath, l.RootfsPropagation, l.IntelRdt, l.NetDevices = "", "", nil, nil
	for i := range l.Namespaces {
		l.Namespaces[i].Path = ""
	}
	if l.Seccomp != nil {
		l.Seccomp.ListenerPath, l.Seccomp.ListenerMetadata = "", ""
	}
	if s.Mounts, err = restoreMounts(s.Mounts, meta, binds); err != nil {
		return nil, fmt.Errorf("restoring %s: %w", meta.Member, err)
	}
	return s, nil
}

func restoreMounts(mounts []specs.Mount, meta *Checkpoint, binds map[string]string) ([]specs.Mount, error) {
	captured := map[string]bool{}
	for _, m := range meta.Mounts {
		captured[m.Destination] = m.Kind == MountFile
	}
	unused := map[string]string{}
	for dest, src := range binds {
		if !filepath.IsAbs(src) {
			return nil, fmt.Errorf("source %q for the mount at %s is not an absolute path: %w", src, dest, errdefs.ErrInvalidArgument)
		}
		unused[path.Clean("/"+dest)] = src
	}
	given := maps.Clone(unused)
	var out []specs.Mount
	for _, m := range mounts {
		dest := path.Clean("/" + m.Destination)
		m.UIDMappings, m.GIDMappings = nil, nil
		m.Options = slices.DeleteFunc(m.Options, func(o string) bool { return o == "shared" || o == "rshared" })
		src, ok := given[dest]
		switch {
		case isBind(m) && ok:
			delete(unused, dest)
			m.Type, m.Source = "bind", src
		case isBind(m) && captured[dest]:
			continue // its content comes out of the image
		case isBind(m):
			return nil, conflict("its bind mount at %s is not in the image: say where it is with --bind %s=PATH", printable(dest), printable(dest))
		case !kernelMounts[m.Type]:
			return nil, conflict("it has a mount of type %q at %s, which only a client can give", printable(m.Type), printable(dest))
		}
		out = append(out, m)
	}
	for dest := range unused {
		return nil, conflict("the checkpoint has no bind mount at %s to give a source for", printable(dest))
	}
	return out, nil
}
