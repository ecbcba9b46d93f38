// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cohort-project/cohort/oci"
)

// captureID names a member's capture. It must be unguessable, as the epoch is,
// and another for each member.
func captureID(epoch, ns, id string) string {
	sum := sha256.Sum256([]byte(epoch + "\x00" + ns + "\x00" + id))
	return hex.EncodeToString(sum[:16])
}

// maxFile bounds a bind-mounted file that is carried in the checkpoint, in
// bytes: /etc/hosts and its like, not data.
const maxFile = 1 << 20

// metadata describes the capture in oci's terms, and copies small bind-mounted
// files beside the images.
func (a *acts) metadata(done *composed) (*oci.Checkpoint, error) {
	c := &oci.Checkpoint{
		Version: oci.Version, Group: a.req.Group, Member: a.req.Member, ContainerID: a.c.id,
		Epoch: a.req.Epoch, EpochNumber: a.req.Number, CreatedAt: time.Unix(0, a.req.CreatedUnixNs), CutAt: a.frozenAt,
		Stopped: a.req.Stop, Host: hostFacts(), CRIUVersion: criuVersionString(), Runtime: "io.containerd.cohort.v2",
		Terminal: a.spec.Process != nil && a.spec.Process.Terminal,
		Rootfs: oci.Rootfs{
			ImageRef: a.req.ImageRef, ImageDigest: digest.Digest(a.req.ImageDigest), ChainID: digest.Digest(a.req.ChainId),
			ReadOnly: a.spec.Root != nil && a.spec.Root.Readonly,
		},
		MemoryBytes: done.bytes,
	}
	if done.memory.Increment != "" {
		c.Parent = &oci.ParentEpoch{Epoch: a.memory.parent.epoch, Number: a.memory.parent.number}
		c.Chain = a.memory.parent.length + 1
	}
	if a.network != nil {
		c.NetNS, c.Network = netnsName(a.netnsID), mustJSON(a.network)
	}
	if len(a.tmpfs) > 0 {
		c.Tmpfs = mustJSON(a.tmpfs)
	}
	kinds := a.stdio()
	c.Stdio = oci.Stdio{Stdin: kinds[0], Stdout: kinds[1], Stderr: kinds[2]}
	for _, p := range a.processes {
		c.Processes = append(c.Processes, oci.Process{PID: p.NsPid, PPID: a.nsPid(p.Ppid), Comm: p.Comm, Threads: p.Threads, RSS: p.RssBytes})
	}
	for _, ns := range a.spec.Linux.Namespaces {
		kind := oci.NamespacePrivate
		if ns.Path != "" {
			kind = oci.NamespacePath
		}
		c.Namespaces = append(c.Namespaces, oci.Namespace{Type: string(ns.Type), Kind: kind})
	}
	for i, m := range a.spec.Mounts {
		mount, err := a.mount(i, m)
		if err != nil {
			return nil, err
		}
		c.Mounts = append(c.Mounts, mount)
	}
	return c, nil
}

func (a *acts) nsPid(host int32) int32 {
	for _, p := range a.processes {
		if p.Pid == host {
			return p.NsPid
		}
	}
	return 0
}

func (a *acts) stdio() [3]string {
	var out [3]string
	for i := range out {
		out[i] = oci.StdioPipe
		if a.spec.Process != nil && a.spec.Process.Terminal {
			out[i] = oci.StdioTTY
		} else if i < len(a.runc.ExternalDescriptors) && a.runc.ExternalDescriptors[i] == "/dev/null" {
			out[i] = oci.StdioNull
		}
	}
	return out
}

// mount tells what a restore finds of a mount in the checkpoint.
func (a *acts) mount(i int, m specs.Mount) (oci.Mount, error) {
	out := oci.Mount{Destination: path.Clean(m.Destination), Type: m.Type, Kind: oci.MountInternal, ReadOnly: slices.Contains(m.Options, "ro")}
	bind := m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
	switch {
	case m.Type == "tmpfs":
		out.Kind = oci.MountTmpfs
	case bind:
		out.Source, out.Kind = m.Source, oci.MountLeftOut
		if fi, err := os.Stat(m.Source); err != nil || !fi.Mode().IsRegular() || fi.Size() > maxFile {
			return out, nil //nolint:nilerr // whoever restores it says where it is
		}
		out.Kind, out.File = oci.MountFile, oci.FileName(i, m.Destination)
		dir := filepath.Join(a.checkpointDir(), oci.FilesDir)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return out, err
		}
		b, err := os.ReadFile(m.Source)
		if err != nil {
			return out, fmt.Errorf("capture the file mounted at %s: %w", m.Destination, err)
		}
		if err := os.WriteFile(filepath.Join(dir, out.File), b, 0o600); err != nil {
			return out, err
		}
	}
	return out, nil
}

func criuVersionString() string {
	v, err := criuVersion()
	if err != nil {
		return "unknown"
	}
	return fmt.Sprintf("%d.%d.%d", v/10000, v/100%100, v%100)
}

// hostFacts are what a restore on another host is compared with.
var hostFacts = sync.OnceValue(func() oci.Host {
	h := oci.Host{Arch: runtime.GOARCH, PageSize: os.Getpagesize()}
	h.Hostname, _ = os.Hostname()
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		h.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	switch cgroups.Mode() {
	case cgroups.Unified:
		h.Cgroup = "v2"
	case cgroups.Hybrid:
		h.Cgroup = "hybrid"
	default:
		h.Cgroup = "v1"
	}
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return h
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan() && sc.Text() != ""; {
		key, val, _ := strings.Cut(sc.Text(), ":")
		switch strings.TrimSpace(key) {
		case "vendor_id":
			h.CPUVendor = strings.TrimSpace(val)
		case "model name":
			h.CPUModel = strings.TrimSpace(val)
		case "flags", "Features":
			flags := strings.Fields(val)
			slices.Sort(flags)
			h.CPUFlags = digest.FromString(strings.Join(flags, " ")).Encoded()
		}
	}
	return h
})
