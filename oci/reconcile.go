// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// ReconcileOptions is what the shim knows beside the documents.
type ReconcileOptions struct {
	// FilesDir is where the caller will put writable copies of captured files,
	// private to the new container. Absolute.
	FilesDir string
}

// FileCopy is a captured file that the caller copies before the restore, with
// mode and owner of its original: From is relative to the checkpoint directory,
// To absolute. Only From of the checkpoint itself is to be opened, below its root.
type FileCopy struct {
	From string
	To   string
}

// Reconciled is the spec to create the container with.
type Reconciled struct {
	Spec  *specs.Spec
	Files []FileCopy
	// Warnings tell what the client asked for and does not get, a line each.
	Warnings []string
}

// Mounts that clients add to every container. Where the checkpoint has none
// there, the restored processes never saw one.
var defaultMounts = map[string]bool{
	"/proc": true, "/dev": true, "/dev/pts": true, "/dev/shm": true, "/dev/mqueue": true,
	"/sys": true, "/run": true, "/sys/fs/cgroup": true,
}

// Files that Docker, nerdctl, Podman and the kubelet write for each container.
var clientFiles = map[string]bool{
	"/etc/hosts": true, "/etc/resolv.conf": true, "/etc/hostname": true,
	"/run/.containerenv": true, "/.dockerenv": true, "/dev/termination-log": true,
}

// File systems that a container's spec mounts by type alone. Any other could name a
// device of the host, so the client must ask for it.
var kernelMounts = map[string]bool{
	"proc": true, "sysfs": true, "tmpfs": true, "devpts": true, "mqueue": true, "cgroup": true, "cgroup2": true,
}

// Reconcile makes the spec of a container that resumes a checkpoint out of the
// spec that the client made for it and the spec of the checkpoint (spec.dump).
//
// CRIU brings back processes with their mount tree, namespaces, credentials and
// devices; the spec must describe those. So the checkpoint's spec is the base.
// What belongs to the host or to the new container is the client's: the root's path,
// the cgroup and its limits, hooks, annotations, the network namespace and the
// source of every bind mount. No path on the host is ever taken from the checkpoint.
//
// What cannot be reconciled is one error of class ErrFailedPrecondition, which
// names the thing and the cure. Neither input is changed.
func Reconcile(client, ckpt *specs.Spec, meta *Checkpoint, opts ReconcileOptions) (*Reconciled, error) {
	if client == nil || client.Root == nil || client.Process == nil || client.Linux == nil {
		return nil, fmt.Errorf("restoring %s: the new container's spec has no root, process or linux section: %w", meta.Member, errdefs.ErrInvalidArgument)
	}
	if ckpt == nil || ckpt.Root == nil || ckpt.Process == nil || ckpt.Linux == nil {
		return nil, fmt.Errorf("restoring %s: the checkpoint's spec has no root, process or linux section: %w", meta.Member, errdefs.ErrInvalidArgument)
	}
	spec, err := cloneSpec(ckpt)
	if err != nil {
		return nil, err
	}
	own, err := cloneSpec(client)
	if err != nil {
		return nil, err
	}
	r := &reconciler{client: own, spec: spec, meta: meta, opts: opts}
	for _, step := range []func() error{r.process, r.root, r.namespaces, r.linux, r.mounts} {
		if err := step(); err != nil {
			return nil, fmt.Errorf("restoring %s from its checkpoint: %w", meta.Member, err)
		}
	}
	r.host()
	return &Reconciled{Spec: r.spec, Files: r.files, Warnings: r.warnings}, nil
}

// cloneSpec copies by the format that the specs come in and go out by.
func cloneSpec(s *specs.Spec) (*specs.Spec, error) {
	b, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("copying a spec: %w", err)
	}
	var out specs.Spec
	if err := json.Unmarshal(b, &out); err != nil {
		return nil, fmt.Errorf("copying a spec: %w", err)
	}
	return &out, nil
}

type reconciler struct {
	client   *specs.Spec
	spec     *specs.Spec // the checkpoint's, becoming the result
	meta     *Checkpoint
	opts     ReconcileOptions
	files    []FileCopy
	warnings []string
}

func (r *reconciler) warn(format string, a ...any) {
	r.warnings = append(r.warnings, fmt.Sprintf(format, a...))
}

func conflict(format string, a ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, a...), errdefs.ErrFailedPrecondition)
}

// process: everything about it is in CRIU's images already; the terminal is the
// client's end.
func (r *reconciler) process() error {
	switch {
	case r.spec.Process.Terminal && !r.client.Process.Terminal:
		return conflict("it was running with a terminal, the new container has none: create it with a terminal (-t)")
	case !r.spec.Process.Terminal && r.client.Process.Terminal:
		return conflict("it was running without a terminal, the new container has one: create it without (leave -t away)")
	}
	r.spec.Process.ConsoleSize = r.client.Process.ConsoleSize
	if !slices.Equal(r.client.Process.Args, r.spec.Process.Args) && len(r.client.Process.Args) > 0 {
		r.warn("the command %q is not started: the checkpoint's processes go on", printable(strings.Join(r.client.Process.Args, " ")))
	}
	if more := extra(r.spec.Process.Capabilities, r.client.Process.Capabilities); len(more) > 0 {
		r.warn("the checkpoint's processes have capabilities that the new container was not given: %s", strings.Join(more, " "))
	}
	if r.client.Linux.Seccomp != nil && r.spec.Linux.Seccomp == nil {
		r.warn("the checkpoint's processes run without the seccomp profile that the new container was given")
	}
	return nil
}

func extra(have, given *specs.LinuxCapabilities) []string {
	if have == nil {
		return nil
	}
	var allowed []string
	if given != nil {
		allowed = given.Bounding
	}
	var out []string
	for _, c := range have.Bounding {
		if !slices.Contains(allowed, c) {
			out = append(out, printable(c))
		}
	}
	return out
}

func (r *reconciler) root() error {
	switch {
	case r.spec.Root.Readonly && !r.client.Root.Readonly:
		return conflict("its root was read-only, the new container's is not: create it with --read-only")
	case !r.spec.Root.Readonly && r.client.Root.Readonly:
		return conflict("its root was writable, the new container's is read-only: leave --read-only away")
	}
	r.spec.Root.Path = r.client.Root.Path
	return nil
}

// namespaces: a process is restored into the same kinds of namespaces. Only the
// network's may be another one than before, because its content is rebuilt by cohort.
func (r *reconciler) namespaces() error {
	want, err := byType(r.client.Linux.Namespaces)
	if err != nil {
		return err
	}
	have, err := byType(r.spec.Linux.Namespaces)
	if err != nil {
		return err
	}
	for i := range r.spec.Linux.Namespaces {
		ns := &r.spec.Linux.Namespaces[i]
		given, ok := want[ns.Type]
		switch {
		case ns.Type == specs.CgroupNamespace:
			// It shows the container its own cgroup as the root; nothing in it
			// needs to agree with the client's wish, but no path is the checkpoint's to give.
			if ns.Path = ""; ok {
				ns.Path = given.Path
			}
		case !ok && ns.Type == specs.NetworkNamespace:
			return conflict("it had a network namespace of its own, the new container uses the host's: leave --net-host (--network host) away")
		case !ok:
			return conflict("it had a %s namespace of its own, the new container uses the host's: leave the option for it away", ns.Type)
		case ns.Type == specs.NetworkNamespace:
			ns.Path = given.Path
		case ns.Path == "" && given.Path != "":
			return conflict("it had a %s namespace of its own, the new container is to join %s: leave the option for it away", ns.Type, given.Path)
		case ns.Path != "" && given.Path == "":
			return conflict("it shared the %s namespace of another container: give the new one such a namespace by its path (--with-ns %s:PATH)", ns.Type, ns.Type)
		default:
			ns.Path = given.Path
		}
	}
	for _, ns := range r.client.Linux.Namespaces {
		if _, ok := have[ns.Type]; ok || ns.Type == specs.CgroupNamespace {
			continue
		}
		if ns.Type == specs.NetworkNamespace {
			return conflict("it used the host's network, the new container has a network namespace: create it with --net-host (--network host)")
		}
		return conflict("it used the host's %s namespace, the new container has one of its own: create it with the host's", ns.Type)
	}
	if !slices.Equal(r.client.Linux.UIDMappings, r.spec.Linux.UIDMappings) || !slices.Equal(r.client.Linux.GIDMappings, r.spec.Linux.GIDMappings) {
		return conflict("its user namespace maps ids otherwise than the new container's: create it with the mappings %s", mappings(r.spec.Linux))
	}
	return nil
}

func byType(list []specs.LinuxNamespace) (map[specs.LinuxNamespaceType]specs.LinuxNamespace, error) {
	m := map[specs.LinuxNamespaceType]specs.LinuxNamespace{}
	for _, n := range list {
		if _, ok := m[n.Type]; ok {
			return nil, fmt.Errorf("a spec names its %s namespace twice: %w", printable(string(n.Type)), errdefs.ErrInvalidArgument)
		}
		m[n.Type] = n
	}
	return m, nil
}

func mappings(l *specs.Linux) string {
	var out []string
	for _, m := range l.UIDMappings {
		out = append(out, fmt.Sprintf("uid %d:%d:%d", m.ContainerID, m.HostID, m.Size))
	}
	for _, m := range l.GIDMappings {
		out = append(out, fmt.Sprintf("gid %d:%d:%d", m.ContainerID, m.HostID, m.Size))
	}
	if len(out) == 0 {
		return "of no user namespace"
	}
	return strings.Join(out, ", ")
}

func (r *reconciler) linux() error {
	l, c := r.spec.Linux, r.client.Linux
	if p := l.RootfsPropagation; (p == "shared" || p == "rshared") && c.RootfsPropagation != p {
		return conflict("its mounts were propagated to the host (%s): create the new container with that propagation", p)
	}
	l.CgroupsPath = c.CgroupsPath
	l.Resources = c.Resources
	return nil
}

// host takes from the client what would act on the host.
func (r *reconciler) host() {
	l := r.spec.Linux
	l.IntelRdt = r.client.Linux.IntelRdt
	l.NetDevices = nil
	if len(r.client.Linux.NetDevices) > 0 {
		r.warn("network devices given to the new container are not moved: its network is the checkpoint's")
	}
	if l.Seccomp != nil {
		// A socket on the host, to which the runtime would send descriptors.
		l.Seccomp.ListenerPath, l.Seccomp.ListenerMetadata = "", ""
	}
	r.spec.Hooks = r.client.Hooks
	r.spec.VM, r.spec.Windows, r.spec.Solaris, r.spec.ZOS, r.spec.FreeBSD = nil, nil, nil, nil, nil
	maps.DeleteFunc(r.spec.Annotations, func(k, _ string) bool { return commandsRuntime(k) })
	if len(r.client.Annotations) > 0 && r.spec.Annotations == nil {
		r.spec.Annotations = map[string]string{}
	}
	maps.Copy(r.spec.Annotations, r.client.Annotations)
	if res := l.Resources; res != nil && res.Memory != nil && res.Memory.Limit != nil && *res.Memory.Limit > 0 && uint64(*res.Memory.Limit) < r.meta.MemoryBytes {
		r.warn("the memory limit (%d bytes) is below the checkpoint's memory (%d bytes): the restore may be killed", *res.Memory.Limit, r.meta.MemoryBytes)
	}
}

// commandsRuntime says whether an annotation makes a runtime do something: runc
// takes CRIU's configuration file and systemd's properties from annotations,
// crun its handler, and cohort its own orders.
func commandsRuntime(key string) bool {
	if key == AnnotationGroup || key == AnnotationMember {
		return false
	}
	for _, p := range []string{"org.criu.", "org.systemd.", "run.oci.", "io.cohort.", "io.katacontainers."} {
		if strings.HasPrefix(key, p) {
			return true
		}
	}
	return false
}

func isBind(m specs.Mount) bool {
	return m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
}

func readOnly(m specs.Mount) bool {
	ro := false
	for _, o := range m.Options { // the last one counts
		switch o {
		case "ro", "rro":
			ro = true
		case "rw", "rrw":
			ro = false
		}
	}
	return ro
}

func (r *reconciler) mounts() error {
	given := map[string]specs.Mount{}
	for _, m := range r.client.Mounts {
		given[path.Clean("/"+m.Destination)] = m // of several, the topmost
	}
	kinds := map[string]Mount{}
	for _, m := range r.meta.Mounts {
		kinds[m.Destination] = m
	}
	had := map[string]bool{}
	for i := range r.spec.Mounts {
		m := &r.spec.Mounts[i]
		if !path.IsAbs(m.Destination) || m.Destination != printable(m.Destination) {
			return fmt.Errorf("mount destination %q of the checkpoint: %w", m.Destination, errdefs.ErrInvalidArgument)
		}
		m.Destination = path.Clean(m.Destination)
		c, ok := given[m.Destination]
		if isBind(*m) && had[m.Destination] {
			return conflict("two mounts of the checkpoint are at %s", m.Destination)
		}
		had[m.Destination] = true
		// Id maps are the client's as the source is.
		m.UIDMappings, m.GIDMappings = nil, nil
		var err error
		if isBind(*m) {
			err = r.bind(m, c, ok && isBind(c), kinds[m.Destination])
		} else {
			err = r.kernel(m, c, ok)
		}
		if err != nil {
			return err
		}
	}
	for _, m := range r.client.Mounts {
		dest := path.Clean("/" + m.Destination)
		switch {
		case had[dest] || defaultMounts[dest] && !isBind(m):
		case defaultMounts[dest] || clientFiles[dest]:
			r.warn("%s is not mounted: the checkpoint has no mount there", dest)
			had[dest] = true
		default:
			return conflict("the new container is to have a mount at %s, which the checkpoint lacks and its processes cannot be given: leave that mount away", printable(dest))
		}
	}
	return nil
}

func shared(m specs.Mount) bool {
	return slices.Contains(m.Options, "shared") || slices.Contains(m.Options, "rshared")
}

// bind gives a bind mount its source.
func (r *reconciler) bind(m *specs.Mount, c specs.Mount, given bool, kind Mount) error {
	if given {
		if readOnly(c) && !readOnly(*m) {
			return conflict("the mount at %s was writable and would be so again, but is given read-only: give it writable", m.Destination)
		}
		if shared(*m) && !shared(c) {
			return conflict("mounts below %s were propagated to the host: give it with that propagation (options=rbind:rshared)", m.Destination)
		}
		m.Source, m.UIDMappings, m.GIDMappings = c.Source, c.UIDMappings, c.GIDMappings
		return nil
	}
	if kind.Kind == MountFile {
		if !filePattern().MatchString(kind.File) || !filepath.IsAbs(r.opts.FilesDir) {
			return fmt.Errorf("captured file %q of %s, to be copied below %q: %w", kind.File, m.Destination, r.opts.FilesDir, errdefs.ErrInvalidArgument)
		}
		m.Source = filepath.Join(r.opts.FilesDir, kind.File)
		m.Options = slices.DeleteFunc(m.Options, func(o string) bool { return o == "shared" || o == "rshared" })
		r.files = append(r.files, FileCopy{From: FilesDir + "/" + kind.File, To: m.Source})
		return nil
	}
	options := "rbind"
	if readOnly(*m) {
		options = "rbind:ro"
	}
	return conflict("the checkpoint has a bind mount at %s whose content is not in the image: give it with --mount type=bind,src=PATH,dst=%s,options=%s", m.Destination, m.Destination, options)
}

// kernel checks a mount that is made by its type.
func (r *reconciler) kernel(m *specs.Mount, c specs.Mount, given bool) error {
	if kernelMounts[m.Type] {
		// A source means nothing to these, and is shown in /proc/self/mountinfo.
		if given && isBind(c) && !defaultMounts[m.Destination] {
			return conflict("the checkpoint has a %s at %s, the new container is to have %s there: leave that mount away", m.Type, m.Destination, c.Source)
		}
		return nil
	}
	if !given || c.Type != m.Type {
		return conflict("the checkpoint has a mount of type %q at %s: give the new container the same with --mount type=%s,src=SOURCE,dst=%s", printable(m.Type), m.Destination, printable(m.Type), m.Destination)
	}
	m.Source = c.Source
	return nil
}
