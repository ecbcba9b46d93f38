// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"encoding/json"
	"fmt"
	"path"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Version of cohort.json. A reader refuses a higher one; a change that an
// older reader would misunderstand raises it, a field that it may ignore does not.
//
// Version 2 is an increment, whose images lack pages that its parent has; a full
// checkpoint is written as version 1.
const (
	Version     = 2
	versionFull = 1
)

// Checkpoint is the document .cohort/cohort.json: what the checkpoint of one
// member is, beside CRIU's images. Times are UTC, sizes are bytes.
type Checkpoint struct {
	// Version of this document, see Version.
	Version int `json:"version"`
	// Group and Member name the container: within its host, and within its group.
	Group  string `json:"group"`
	Member string `json:"member"`
	// ContainerID is the id it had in containerd.
	ContainerID string `json:"container_id"`
	// Epoch is the pass through the barrier, [0-9a-f]{32}: all members of one
	// group image carry the same. EpochNumber counts the group's epochs from 1.
	Epoch       string `json:"epoch"`
	EpochNumber uint64 `json:"epoch_number"`
	// Parent is the epoch that an increment builds on; nil for a full checkpoint.
	Parent *ParentEpoch `json:"parent,omitempty"`
	// Chain is of how many epochs the checkpoint consists, its own included: 1 for
	// a full one. Documents older than increments lack it; they are read as 1.
	Chain int `json:"chain"`
	// CreatedAt is when the container was created, CutAt when every member was frozen.
	CreatedAt time.Time `json:"created_at"`
	CutAt     time.Time `json:"cut_at"`
	// Stopped is set where the container ended in the barrier.
	Stopped bool `json:"stopped"`

	Host Host `json:"host"`
	// CRIUVersion is "4.2.1"; an older CRIU may not read the images.
	CRIUVersion string `json:"criu_version"`
	// Runtime is containerd's name of the shim, OCIRuntime the runtime below it
	// with its version.
	Runtime    string `json:"runtime"`
	OCIRuntime string `json:"oci_runtime,omitempty"`
	// Terminal is set where the container has a TTY; a restore needs one too.
	Terminal bool  `json:"terminal"`
	Stdio    Stdio `json:"stdio"`

	Rootfs     Rootfs      `json:"rootfs"`
	Mounts     []Mount     `json:"mounts,omitempty"`
	Namespaces []Namespace `json:"namespaces,omitempty"`

	// NetNS is an id of the network namespace, unique within the epoch: members
	// with the same value shared one. Empty: the host's.
	NetNS string `json:"netns,omitempty"`
	// Network describes that namespace, for package runtime/netlock alone.
	Network json.RawMessage `json:"network,omitempty"`

	// Tmpfs describes the tmpfs mounts whose content is below tmpfs/, for package
	// runtime/tmpfs alone; the others' is in CRIU's images.
	Tmpfs json.RawMessage `json:"tmpfs,omitempty"`

	Processes []Process `json:"processes,omitempty"`
	// MemoryBytes are the pages in CRIU's images, StorageBytes the regular files
	// in the writable layer.
	MemoryBytes  uint64 `json:"memory_bytes"`
	StorageBytes uint64 `json:"storage_bytes"`
}

// ParentEpoch names the epoch that an increment builds on.
type ParentEpoch struct {
	Epoch  string `json:"epoch"`
	Number uint64 `json:"number"`
}

// Host tells where the checkpoint was taken; preflight compares it with the
// host of the restore.
type Host struct {
	Hostname string `json:"hostname,omitempty"`
	// Kernel is uname's release, Arch Go's name of the architecture.
	Kernel string `json:"kernel"`
	Arch   string `json:"arch"`
	// CPUVendor and CPUModel are for people; CPUFlags is the sha256 of the sorted
	// feature flags of /proc/cpuinfo: equal means that no feature is missing.
	CPUVendor string `json:"cpu_vendor,omitempty"`
	CPUModel  string `json:"cpu_model,omitempty"`
	CPUFlags  string `json:"cpu_flags,omitempty"`
	// PageSize in bytes.
	PageSize int `json:"page_size,omitempty"`
	// Cgroup is "v1", "v2" or "hybrid".
	Cgroup string `json:"cgroup,omitempty"`
}

// Kinds of standard streams.
const (
	StdioPipe = "pipe"
	StdioTTY  = "tty"
	StdioNull = "null"
)

// Stdio is the kind of each standard stream; empty means unknown.
type Stdio struct {
	Stdin  string `json:"stdin,omitempty"`
	Stdout string `json:"stdout,omitempty"`
	Stderr string `json:"stderr,omitempty"`
}

// Rootfs is what the container ran on.
type Rootfs struct {
	// ImageRef and ImageDigest name the image, as the container record has it.
	ImageRef    string        `json:"image_ref,omitempty"`
	ImageDigest digest.Digest `json:"image_digest,omitempty"`
	// ChainID is the parent of the container's snapshot.
	ChainID digest.Digest `json:"chain_id,omitempty"`
	// ReadOnly is set where the root is mounted read-only.
	ReadOnly bool `json:"read_only,omitempty"`
}

// Kinds of mounts, by who brings the content back.
const (
	// MountInternal is made by the kernel or by CRIU: proc, sysfs, devpts, mqueue, cgroup.
	MountInternal = "internal"
	// MountTmpfs has its content below tmpfs/, or in CRIU's images.
	MountTmpfs = "tmpfs"
	// MountFile is a bind-mounted regular file, captured below files/.
	MountFile = "file"
	// MountLeftOut is a bind mount that is not captured: the client of the
	// restore gives it.
	MountLeftOut = "left-out"
)

// Mount is one mount of the container's spec.
type Mount struct {
	Destination string `json:"destination"`
	// Type is the spec's (bind, proc, tmpfs, ...).
	Type string `json:"type,omitempty"`
	Kind string `json:"kind"`
	// File is the name below files/ where Kind is MountFile.
	File string `json:"file,omitempty"`
	// Source is the path on the host of the checkpoint. For people: a restore
	// never opens it.
	Source string `json:"source,omitempty"`
	// ReadOnly is the mount's flag.
	ReadOnly bool `json:"read_only,omitempty"`
}

// How a container holds a namespace.
const (
	NamespacePrivate = "private" // made for it
	NamespacePath    = "path"    // given by path
)

// Namespace is one entry of the spec's linux.namespaces; a type that is absent
// is the host's.
type Namespace struct {
	Type string `json:"type"`
	Kind string `json:"kind"`
}

// Process is one process of the container, as ps would show it.
type Process struct {
	// PID and PPID as the container sees them; 1 is its init.
	PID  int32 `json:"pid"`
	PPID int32 `json:"ppid"`
	// Comm is /proc/PID/comm; what is not printable is replaced by '?'.
	Comm    string `json:"comm"`
	Threads uint32 `json:"threads"`
	RSS     uint64 `json:"rss_bytes"`
}

// Validate checks every field that is used as a name or path, and that a
// reader of this version understands the document. Errors are of class
// ErrInvalidArgument, or ErrNotImplemented for a newer version.
func (c *Checkpoint) Validate() error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%s: %s: %w", CheckpointFile, fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
	}
	switch {
	case c.Version < 1:
		return bad("no version")
	case c.Version > Version:
		return fmt.Errorf("%s: version %d, this cohort reads up to %d; restore with a newer cohort: %w", CheckpointFile, c.Version, Version, errdefs.ErrNotImplemented)
	case !epochPattern().MatchString(c.Epoch):
		return bad("epoch %q is not 32 hex digits", c.Epoch)
	case c.CutAt.IsZero():
		return bad("no cut time")
	}
	if c.Parent != nil && c.Version == versionFull {
		return bad("an increment is version %d or newer", Version)
	}
	if err := validChain(c.Parent, c.Chain, c.Epoch, c.EpochNumber); err != nil {
		return bad("%v", err)
	}
	if err := ValidGroup(c.Group); err != nil {
		return bad("%v", err)
	}
	if err := ValidMember(c.Member); err != nil {
		return bad("%v", err)
	}
	if err := ValidMember(c.ContainerID); err != nil {
		return bad("container id: %v", err)
	}
	if c.NetNS != "" && !filePattern().MatchString(c.NetNS) {
		return bad("netns %q", c.NetNS)
	}
	for _, d := range []digest.Digest{c.Rootfs.ImageDigest, c.Rootfs.ChainID} {
		if d != "" && d.Validate() != nil {
			return bad("digest %q", d)
		}
	}
	for name, s := range map[string]string{
		"image_ref": c.Rootfs.ImageRef, "hostname": c.Host.Hostname, "kernel": c.Host.Kernel, "arch": c.Host.Arch,
		"cpu_vendor": c.Host.CPUVendor, "cpu_model": c.Host.CPUModel, "cpu_flags": c.Host.CPUFlags, "cgroup": c.Host.Cgroup,
		"criu_version": c.CRIUVersion, "runtime": c.Runtime, "oci_runtime": c.OCIRuntime,
		"stdin": c.Stdio.Stdin, "stdout": c.Stdio.Stdout, "stderr": c.Stdio.Stderr,
	} {
		if len(s) > 1024 || s != printable(s) {
			return bad("%s is not a printable string", name)
		}
	}
	return c.validateLists(bad)
}

func (c *Checkpoint) validateLists(bad func(string, ...any) error) error {
	seen := map[string]bool{}
	for _, m := range c.Mounts {
		if !path.IsAbs(m.Destination) || path.Clean(m.Destination) != m.Destination || m.Destination != printable(m.Destination) {
			return bad("mount destination %q is not a clean absolute path", m.Destination)
		}
		switch m.Kind {
		case MountInternal, MountTmpfs, MountLeftOut:
			if m.File != "" {
				return bad("mount %s of kind %s names a file", m.Destination, m.Kind)
			}
		case MountFile:
			if !filePattern().MatchString(m.File) {
				return bad("mount %s: file name %q", m.Destination, m.File)
			}
			if seen[m.File] {
				return bad("file %q is used by two mounts", m.File)
			}
			seen[m.File] = true
		default:
			return bad("mount %s: kind %q", m.Destination, m.Kind)
		}
		if m.Type != printable(m.Type) || m.Source != printable(m.Source) {
			return bad("mount %s: type or source is not printable", m.Destination)
		}
	}
	for _, n := range c.Namespaces {
		if n.Kind != NamespacePrivate && n.Kind != NamespacePath || n.Type != printable(n.Type) {
			return bad("namespace %q of kind %q", n.Type, n.Kind)
		}
	}
	for _, p := range c.Processes {
		if len(p.Comm) > 64 || p.Comm != printable(p.Comm) {
			return bad("process %d: comm %q", p.PID, p.Comm)
		}
	}
	return nil
}

// normalize makes a document fit to be written: UTC, and no byte that a
// terminal would take for a command. A process chooses its comm freely.
func (c *Checkpoint) normalize() {
	switch {
	case c.Parent != nil && c.Version <= Version:
		c.Version = Version
	case c.Version <= Version:
		c.Version = versionFull
	}
	if c.Chain == 0 && c.Parent == nil {
		c.Chain = 1
	}
	c.CreatedAt, c.CutAt = c.CreatedAt.UTC(), c.CutAt.UTC()
	processes := make([]Process, len(c.Processes))
	for i, p := range c.Processes {
		p.Comm = printable(p.Comm)
		processes[i] = p
	}
	c.Processes = processes
	for _, s := range []*string{&c.Host.Hostname, &c.Host.CPUModel, &c.Host.CPUVendor, &c.Host.Kernel} {
		*s = printable(*s)
	}
}

func printable(s string) string {
	ok := true
	for _, r := range s {
		ok = ok && r != utf8.RuneError && unicode.IsPrint(r)
	}
	if ok {
		return s
	}
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}
