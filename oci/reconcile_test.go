// SPDX-License-Identifier: Apache-2.0

package oci

import (
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// ctrMounts are those that ctr run gives every container.
func ctrMounts() []specs.Mount {
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts"},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm"},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue"},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"ro"}},
		{Destination: "/run", Type: "tmpfs", Source: "tmpfs"},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro"}},
	}
}

func bindMount(dest, src string, options ...string) specs.Mount {
	return specs.Mount{Destination: dest, Type: "bind", Source: src, Options: append([]string{"rbind"}, options...)}
}

func nsList(types ...specs.LinuxNamespaceType) (out []specs.LinuxNamespace) {
	for _, t := range types {
		out = append(out, specs.LinuxNamespace{Type: t})
	}
	return out
}

var usual = []specs.LinuxNamespaceType{specs.PIDNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.MountNamespace, specs.NetworkNamespace}

// ckptSpec is a container as it was checkpointed on another host.
func ckptSpec() *specs.Spec {
	s := &specs.Spec{
		Version:  "1.2.0",
		Hostname: "db",
		Process:  &specs.Process{Args: []string{"postgres", "-D", "/data"}, Env: []string{"A=b"}, Cwd: "/srv", User: specs.User{UID: 70}, Capabilities: &specs.LinuxCapabilities{Bounding: []string{"CAP_CHOWN"}}, Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 9, Soft: 9}}, ApparmorProfile: "aa"},
		Root:     &specs.Root{Path: "/old/rootfs"},
		Mounts:   append(ctrMounts(), bindMount("/etc/hosts", "/old/hosts")),
		Hooks:    &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/evil"}}},
		Annotations: map[string]string{
			"keep": "ckpt", "both": "ckpt", AnnotationGroup: "shop", "io.cohort.hold": "1", "org.criu.config": "/etc/evil", "org.systemd.property.X": "y", "run.oci.handler": "wasm",
		},
		Linux: &specs.Linux{
			Namespaces: nsList(usual...), CgroupsPath: "/old", Resources: &specs.LinuxResources{}, MaskedPaths: []string{"/proc/kcore"}, Sysctl: map[string]string{"net.core.somaxconn": "9"},
			Seccomp: &specs.LinuxSeccomp{DefaultAction: "SCMP_ACT_ALLOW", ListenerPath: "/run/evil.sock", ListenerMetadata: "m"}, NetDevices: map[string]specs.LinuxNetDevice{"eth0": {}},
			IntelRdt: &specs.LinuxIntelRdt{ClosID: "old"}, Devices: []specs.LinuxDevice{{Path: "/dev/fuse"}},
		},
		VM: &specs.VM{},
	}
	s.Linux.Namespaces[4].Path = "/old/ns/net"
	return s
}

// clientSpec is what a client makes for the new container.
func clientSpec() *specs.Spec {
	limit := int64(1 << 30)
	s := &specs.Spec{
		Version:     "1.3.0",
		Hostname:    "newid",
		Process:     &specs.Process{Args: []string{"postgres", "-D", "/data"}, Cwd: "/", Capabilities: &specs.LinuxCapabilities{Bounding: []string{"CAP_CHOWN", "CAP_KILL"}}, ConsoleSize: &specs.Box{Height: 1, Width: 2}},
		Root:        &specs.Root{Path: "rootfs"},
		Mounts:      ctrMounts(),
		Hooks:       &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/usr/bin/nerdctl"}}},
		Annotations: map[string]string{"both": "client", "io.cohort.hold": "client"},
		Linux:       &specs.Linux{Namespaces: nsList(usual...), CgroupsPath: "/new", Resources: &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}, MaskedPaths: []string{"/x"}, Seccomp: &specs.LinuxSeccomp{DefaultAction: "SCMP_ACT_ERRNO"}},
	}
	return s
}

func ckptMeta() *Checkpoint {
	return &Checkpoint{Member: "db", MemoryBytes: 1 << 20, Mounts: []Mount{{Destination: "/etc/hosts", Kind: MountFile, File: "00-hosts"}}}
}

var recOpts = ReconcileOptions{FilesDir: "/run/x/files"}

func TestProcessesKeepWhatTheyHadAndTheHostKeepsItsOwn(t *testing.T) {
	client, ckpt := clientSpec(), ckptSpec()
	client.Linux.Namespaces[4].Path = "/new/ns/net"
	before, _ := json.Marshal([]any{client, ckpt})
	got, err := Reconcile(client, ckpt, ckptMeta(), recOpts)
	must(t, err)
	if after, _ := json.Marshal([]any{client, ckpt}); string(after) != string(before) {
		t.Error("an input was changed")
	}
	s := got.Spec
	want := ckptSpec()
	// From the checkpoint.
	want.Process.ConsoleSize = &specs.Box{Height: 1, Width: 2}
	if !reflect.DeepEqual(s.Process, want.Process) || s.Hostname != "db" || !reflect.DeepEqual(s.Linux.MaskedPaths, want.Linux.MaskedPaths) ||
		!reflect.DeepEqual(s.Linux.Sysctl, want.Linux.Sysctl) || !reflect.DeepEqual(s.Linux.Devices, want.Linux.Devices) || s.Linux.Seccomp.DefaultAction != "SCMP_ACT_ALLOW" {
		t.Errorf("process or devices are not the checkpoint's: %+v", s)
	}
	// From the client.
	if s.Root.Path != "rootfs" || s.Linux.CgroupsPath != "/new" || *s.Linux.Resources.Memory.Limit != 1<<30 || s.Hooks.CreateRuntime[0].Path != "/usr/bin/nerdctl" || s.Linux.Namespaces[4].Path != "/new/ns/net" {
		t.Errorf("what belongs to the host is not the client's: %+v", s)
	}
	// From nobody.
	if s.Linux.NetDevices != nil || s.Linux.IntelRdt != nil || s.VM != nil || s.Linux.Seccomp.ListenerPath != "" || s.Linux.Seccomp.ListenerMetadata != "" {
		t.Errorf("the checkpoint reaches for the host: %+v", s.Linux)
	}
	if w := map[string]string{"keep": "ckpt", "both": "client", AnnotationGroup: "shop", "io.cohort.hold": "client"}; !reflect.DeepEqual(s.Annotations, w) {
		t.Errorf("annotations: %v", s.Annotations)
	}
	if len(s.Mounts) != 9 || s.Mounts[8].Source != "/run/x/files/00-hosts" || !reflect.DeepEqual(got.Files, []FileCopy{{From: "files/00-hosts", To: "/run/x/files/00-hosts"}}) {
		t.Errorf("mounts: %+v, files %+v", s.Mounts, got.Files)
	}
	if len(got.Warnings) != 0 {
		t.Errorf("warnings: %q", got.Warnings)
	}
	b, _ := json.Marshal(s)
	if strings.Contains(string(b), "/old") || strings.Contains(string(b), "evil") {
		t.Errorf("a path of the checkpoint's host is left: %s", b)
	}
}

type edit func(client, ckpt *specs.Spec, meta *Checkpoint)

func TestWhatCannotBeReconciledIsOneClearError(t *testing.T) {
	ns := func(s *specs.Spec, typ specs.LinuxNamespaceType, path string) {
		for i := range s.Linux.Namespaces {
			if s.Linux.Namespaces[i].Type == typ {
				s.Linux.Namespaces[i].Path = path
			}
		}
	}
	without := func(s *specs.Spec, typ specs.LinuxNamespaceType) {
		s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == typ })
	}
	for _, c := range []struct {
		name  string
		edit  edit
		words []string
	}{
		{"terminal missing", func(_, k *specs.Spec, _ *Checkpoint) { k.Process.Terminal = true }, []string{"terminal", "-t"}},
		{"terminal given", func(c, _ *specs.Spec, _ *Checkpoint) { c.Process.Terminal = true }, []string{"without a terminal", "leave -t away"}},
		{"root read-only before", func(_, k *specs.Spec, _ *Checkpoint) { k.Root.Readonly = true }, []string{"--read-only"}},
		{"root read-only now", func(c, _ *specs.Spec, _ *Checkpoint) { c.Root.Readonly = true }, []string{"leave --read-only away"}},
		{"host network now", func(c, _ *specs.Spec, _ *Checkpoint) { without(c, specs.NetworkNamespace) }, []string{"network", "leave --net-host"}},
		{"host network before", func(_, k *specs.Spec, _ *Checkpoint) { without(k, specs.NetworkNamespace) }, []string{"host's network", "--net-host"}},
		{"host pids now", func(c, _ *specs.Spec, _ *Checkpoint) { without(c, specs.PIDNamespace) }, []string{"pid namespace"}},
		{"host pids before", func(_, k *specs.Spec, _ *Checkpoint) { without(k, specs.PIDNamespace) }, []string{"host's pid namespace"}},
		{"joins a pid namespace", func(c, _ *specs.Spec, _ *Checkpoint) { ns(c, specs.PIDNamespace, "/proc/7/ns/pid") }, []string{"pid namespace", "/proc/7/ns/pid"}},
		{"joins an ipc namespace", func(c, _ *specs.Spec, _ *Checkpoint) { ns(c, specs.IPCNamespace, "/proc/7/ns/ipc") }, []string{"ipc namespace"}},
		{"shared ipc before", func(_, k *specs.Spec, _ *Checkpoint) { ns(k, specs.IPCNamespace, "/old/ipc") }, []string{"shared the ipc namespace", "--with-ns ipc:"}},
		{"namespace twice", func(c, _ *specs.Spec, _ *Checkpoint) {
			c.Linux.Namespaces = append(c.Linux.Namespaces, nsList(specs.PIDNamespace)...)
		}, []string{"twice"}},
		{"user namespace now", func(c, _ *specs.Spec, _ *Checkpoint) {
			c.Linux.Namespaces = append(c.Linux.Namespaces, nsList(specs.UserNamespace)...)
		}, []string{"user namespace"}},
		{"other id maps", func(c, k *specs.Spec, _ *Checkpoint) {
			for _, s := range []*specs.Spec{c, k} {
				s.Linux.Namespaces = append(s.Linux.Namespaces, nsList(specs.UserNamespace)...)
			}
			c.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: 1000, Size: 10}}
			k.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: 2000, Size: 10}}
		}, []string{"maps ids", "uid 0:2000:10"}},
		{"bind mount left out", func(_, k *specs.Spec, m *Checkpoint) {
			k.Mounts = append(k.Mounts, bindMount("/data", "/old/data"))
			m.Mounts = append(m.Mounts, Mount{Destination: "/data", Kind: MountLeftOut})
		}, []string{"bind mount at /data", "--mount type=bind,src=PATH,dst=/data,options=rbind"}},
		{"read-only bind mount left out", func(_, k *specs.Spec, _ *Checkpoint) {
			k.Mounts = append(k.Mounts, bindMount("/data", "/old/data", "ro"))
		}, []string{"dst=/data,options=rbind:ro"}},
		{"bind mount unknown to the document", func(_, k *specs.Spec, m *Checkpoint) { m.Mounts = nil }, []string{"/etc/hosts"}},
		{"mount that was not there", func(c, _ *specs.Spec, _ *Checkpoint) { c.Mounts = append(c.Mounts, bindMount("/new", "/srv/new")) }, []string{"/new", "lacks"}},
		{"tmpfs that was not there", func(c, _ *specs.Spec, _ *Checkpoint) {
			c.Mounts = append(c.Mounts, specs.Mount{Destination: "/scratch", Type: "tmpfs"})
		}, []string{"/scratch", "lacks"}},
		{"read-only now", func(c, k *specs.Spec, _ *Checkpoint) {
			k.Mounts = append(k.Mounts, bindMount("/data", "/old/data"))
			c.Mounts = append(c.Mounts, bindMount("/data", "/srv/data", "ro"))
		}, []string{"/data", "read-only"}},
		{"propagates to the host", func(c, k *specs.Spec, _ *Checkpoint) {
			k.Mounts = append(k.Mounts, bindMount("/data", "/old/data", "rshared"))
			c.Mounts = append(c.Mounts, bindMount("/data", "/srv/data"))
		}, []string{"/data", "rshared"}},
		{"root propagates to the host", func(_, k *specs.Spec, _ *Checkpoint) { k.Linux.RootfsPropagation = "rshared" }, []string{"rshared"}},
		{"bind over a tmpfs", func(c, k *specs.Spec, _ *Checkpoint) {
			k.Mounts = append(k.Mounts, specs.Mount{Destination: "/scratch", Type: "tmpfs"})
			c.Mounts = append(c.Mounts, bindMount("/scratch", "/srv/scratch"))
		}, []string{"/scratch", "tmpfs"}},
		{"host's disk", func(_, k *specs.Spec, _ *Checkpoint) {
			k.Mounts = append(k.Mounts, specs.Mount{Destination: "/mnt", Type: "ext4", Source: "/dev/vda1"})
		}, []string{"ext4", "/mnt", "--mount"}},
		{"tmpfs instead of a bind", func(c, k *specs.Spec, _ *Checkpoint) {
			k.Mounts = append(k.Mounts, bindMount("/data", "/old/data"))
			c.Mounts = append(c.Mounts, specs.Mount{Destination: "/data", Type: "tmpfs"})
		}, []string{"bind mount at /data"}},
		{"same destination twice", func(_, k *specs.Spec, _ *Checkpoint) {
			k.Mounts = append(k.Mounts, bindMount("/etc/./hosts", "/old/hosts2"))
		}, []string{"two mounts", "/etc/hosts"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			client, ckpt, meta := clientSpec(), ckptSpec(), ckptMeta()
			c.edit(client, ckpt, meta)
			_, err := Reconcile(client, ckpt, meta, recOpts)
			wantErr(t, err, nil, append(c.words, "restoring db")...)
			if err != nil && !errdefs.IsFailedPrecondition(err) && !errdefs.IsInvalidArgument(err) {
				t.Errorf("class of %v", err)
			}
		})
	}
}

func TestWhatCanBeReconciledIs(t *testing.T) {
	for _, c := range []struct {
		name  string
		edit  edit
		check func(r *Reconciled) (got, want any)
		warn  string
	}{
		{"client's source for a bind mount", func(c, k *specs.Spec, _ *Checkpoint) {
			k.Mounts = append(k.Mounts, bindMount("/data", "/old/data", "nosuid"))
			c.Mounts = append(c.Mounts, bindMount("/data/", "/srv/data"))
		}, func(r *Reconciled) (any, any) {
			return r.Spec.Mounts[9], specs.Mount{Destination: "/data", Type: "bind", Source: "/srv/data", Options: []string{"rbind", "nosuid"}}
		}, ""},
		{"client's file wins over the captured one", func(c, _ *specs.Spec, _ *Checkpoint) {
			c.Mounts = append(c.Mounts, bindMount("/etc/hosts", "/var/lib/nerdctl/hosts"))
		}, func(r *Reconciled) (any, any) {
			return fmt.Sprint(r.Spec.Mounts[8].Source, len(r.Files)), "/var/lib/nerdctl/hosts0"
		}, ""},
		{"a read-only mount stays so", func(c, k *specs.Spec, _ *Checkpoint) {
			k.Mounts = append(k.Mounts, bindMount("/data", "/old/data", "ro"))
			c.Mounts = append(c.Mounts, bindMount("/data", "/srv/data"))
		}, func(r *Reconciled) (any, any) { return r.Spec.Mounts[9].Options, []string{"rbind", "ro"} }, ""},
		{"usual files are dropped with a warning", func(c, _ *specs.Spec, _ *Checkpoint) {
			c.Mounts = append(c.Mounts, bindMount("/etc/resolv.conf", "/x"))
		}, func(r *Reconciled) (any, any) { return len(r.Spec.Mounts), 9 }, "/etc/resolv.conf"},
		{"default mounts the checkpoint lacks are dropped", func(_, k *specs.Spec, _ *Checkpoint) {
			k.Mounts = slices.DeleteFunc(k.Mounts, func(m specs.Mount) bool { return m.Destination == "/run" || m.Destination == "/dev/shm" })
		}, func(r *Reconciled) (any, any) { return len(r.Spec.Mounts), 7 }, ""},
		{"a default mount that is a bind now", func(c, k *specs.Spec, _ *Checkpoint) {
			k.Mounts = slices.DeleteFunc(k.Mounts, func(m specs.Mount) bool { return m.Destination == "/dev/shm" })
			c.Mounts[3] = bindMount("/dev/shm", "/run/sandbox/shm")
		}, func(r *Reconciled) (any, any) { return len(r.Spec.Mounts), 8 }, "/dev/shm"},
		{"private network", func(_, _ *specs.Spec, _ *Checkpoint) {}, func(r *Reconciled) (any, any) { return r.Spec.Linux.Namespaces[4].Path, "" }, ""},
		{"host network both times", func(c, k *specs.Spec, _ *Checkpoint) {
			c.Linux.Namespaces, k.Linux.Namespaces = nsList(usual[:4]...), nsList(usual[:4]...)
		}, func(r *Reconciled) (any, any) { return len(r.Spec.Linux.Namespaces), 4 }, ""},
		{"ipc of another container both times", func(c, k *specs.Spec, _ *Checkpoint) {
			c.Linux.Namespaces[1].Path, k.Linux.Namespaces[1].Path = "/new/ipc", "/old/ipc"
		}, func(r *Reconciled) (any, any) { return r.Spec.Linux.Namespaces[1].Path, "/new/ipc" }, ""},
		{"cgroup namespace before", func(_, k *specs.Spec, _ *Checkpoint) {
			k.Linux.Namespaces = append(k.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace, Path: "/old/cg"})
		}, func(r *Reconciled) (any, any) { return r.Spec.Linux.Namespaces[5:], nsList(specs.CgroupNamespace) }, ""},
		{"cgroup namespace now", func(c, _ *specs.Spec, _ *Checkpoint) {
			c.Linux.Namespaces = append(c.Linux.Namespaces, nsList(specs.CgroupNamespace)...)
		}, func(r *Reconciled) (any, any) { return len(r.Spec.Linux.Namespaces), 5 }, ""},
		{"other command", func(c, _ *specs.Spec, _ *Checkpoint) { c.Process.Args = []string{"sh"} }, nil, "\"sh\" is not started"},
		{"more capabilities", func(_, k *specs.Spec, _ *Checkpoint) {
			k.Process.Capabilities.Bounding = append(k.Process.Capabilities.Bounding, "CAP_SYS_ADMIN")
		}, nil, "CAP_SYS_ADMIN"},
		{"no seccomp", func(_, k *specs.Spec, _ *Checkpoint) { k.Linux.Seccomp = nil }, nil, "seccomp"},
		{"small memory limit", func(c, _ *specs.Spec, m *Checkpoint) { m.MemoryBytes = 2 << 30 }, nil, "memory limit"},
		{"no annotations", func(c, k *specs.Spec, _ *Checkpoint) { k.Annotations = nil }, func(r *Reconciled) (any, any) { return r.Spec.Annotations["both"], "client" }, ""},
		{"captured file does not propagate", func(_, k *specs.Spec, _ *Checkpoint) { k.Mounts[8].Options = []string{"rbind", "rshared"} }, func(r *Reconciled) (any, any) { return r.Spec.Mounts[8].Options, []string{"rbind"} }, ""},
		{"disk that the client asks for", func(c, k *specs.Spec, _ *Checkpoint) {
			k.Mounts = append(k.Mounts, specs.Mount{Destination: "/mnt", Type: "ext4", Source: "/dev/old"})
			c.Mounts = append(c.Mounts, specs.Mount{Destination: "/mnt", Type: "ext4", Source: "/dev/new"})
		}, func(r *Reconciled) (any, any) { return r.Spec.Mounts[9].Source, "/dev/new" }, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			client, ckpt, meta := clientSpec(), ckptSpec(), ckptMeta()
			c.edit(client, ckpt, meta)
			r, err := Reconcile(client, ckpt, meta, recOpts)
			must(t, err)
			if c.check != nil {
				if got, want := c.check(r); !reflect.DeepEqual(got, want) {
					t.Errorf("got %v, want %v", got, want)
				}
			}
			if c.warn == "" && len(r.Warnings) > 0 || c.warn != "" && (len(r.Warnings) != 1 || !strings.Contains(r.Warnings[0], c.warn)) {
				t.Errorf("warnings: %q", r.Warnings)
			}
		})
	}
}

func TestIncompleteSpecIsRefused(t *testing.T) {
	for _, s := range []*specs.Spec{nil, {}, {Root: &specs.Root{}, Process: &specs.Process{}}} {
		_, err := Reconcile(s, ckptSpec(), ckptMeta(), recOpts)
		wantErr(t, err, errdefs.ErrInvalidArgument)
		_, err = Reconcile(clientSpec(), s, ckptMeta(), recOpts)
		wantErr(t, err, errdefs.ErrInvalidArgument)
	}
	_, err := Reconcile(clientSpec(), ckptSpec(), ckptMeta(), ReconcileOptions{})
	wantErr(t, err, errdefs.ErrInvalidArgument, "/etc/hosts")
}
